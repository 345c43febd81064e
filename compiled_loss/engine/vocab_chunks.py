"""The vocabulary walk: row statistics streamed over columns, logits recomputed in backward.

N tokens, H width, V vocabulary, C columns a chunk. Four GEMMs where both gradients are wanted, 8 N H V operations; any
upstream gradient; one graph for every N. Keeps O(N) between forward and backward; creates no [N, V] tensor, one [N, C].
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from compiled_loss import checks
from compiled_loss.engine import bodies, gemm, hosts
from compiled_loss.engine.bodies import Head, Upstream
from compiled_loss.engine.parts import part, parts, planned
from compiled_loss.engine.plan import Plan
from compiled_loss.engine.statistics import RowStatistics, State, finish, initial_state, looked_at, unit_scale
from compiled_loss.engine.transforms import without_autocast


def statistics(
    hidden: Tensor,  # [N, H]
    weight: Tensor,  # [V, H]
    labels: Tensor,  # [N]
    head: Head,
    plan: Plan,
    group: str | None,
    *,
    total: bool,
    entropy: bool,
) -> RowStatistics:
    """The statistics of NOTE [Relative statistics], all but `correct` differentiable. Over a group: NOTE [Ranks]."""
    return RowStatistics(*_VocabChunks.apply(hidden, weight, *head[:4], labels, plan, group, total, entropy))


def _starts(hidden: Tensor, plan: Plan) -> Tensor:
    """Each chunk's first column, as data."""
    return torch.arange(plan.count, device=hidden.device) * plan.chunk


def _chunks(head: Head, weight: Tensor, plan: Plan, starts: Tensor) -> Iterator[tuple[Tensor, Head]]:
    """Weight and head of each chunk. A rank without columns has one chunk of none."""
    for i, (columns, vectors) in enumerate(parts(plan, weight, head.bias, head.class_weights)):
        bias, class_weights = vectors
        start = part(starts, i, 1, copied=plan.copied)
        yield columns, head._replace(bias=bias, class_weights=class_weights, start=start)


class _VocabChunks(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        class_weights: Tensor | None,
        softcap: Tensor | None,
        inverse_temperature: Tensor | None,
        labels: Tensor,
        plan: Plan,
        group: str | None,
        total: bool,
        entropy: bool,
    ) -> tuple[Tensor | None, ...]:
        head = Head(bias, class_weights, softcap, inverse_temperature)
        run = hosts.choose(hidden.device, plan.compile)
        state = initial_state(hidden, (hidden.shape[0],), total=total, entropy=entropy)
        chunks = _chunks(head, weight, planned(plan, weight, bias, class_weights), _starts(hidden, plan))
        for columns, part_of_head in chunks:
            state = state.replaced(run(bodies.fold, hidden, columns, labels, *part_of_head, *state))
        state = state.merged(group)
        result = finish(state)
        for rows in (result.nll, result.lse):  # or their logarithm joins the kernel that sums losses, which then spills
            gemm.fence_(rows)
        ctx.save_for_backward(hidden, weight, *head[:4], labels, *state)
        ctx.set_materialize_grads(False)
        ctx.plan = plan
        return tuple(result)

    @staticmethod
    def backward(
        ctx: Any,
        g_nll: Tensor | None,
        g_lse: Tensor | None,
        g_total: Tensor | None,
        g_entropy: Tensor | None,
        _correct: None,
    ) -> tuple[Tensor | None, ...]:
        checks.first_derivative()
        hidden, weight, *saved = ctx.saved_tensors
        with without_autocast(hidden.device):  # whatever backward's caller is in
            head, labels, state = Head(*saved[:4]), saved[4], State(*saved[5:])
            wants_hidden, wants_weight, wants_bias = ctx.needs_input_grad[:3]
            upstream = Upstream.of(state, g_nll, g_lse, g_total, g_entropy)
            scale = unit_scale(hidden.dtype, *upstream)
            if scale is not None:
                upstream = upstream.map(lambda g: g / scale)

            run = hosts.choose(hidden.device, ctx.plan.compile)
            d_hidden = torch.empty_like(hidden, dtype=ctx.plan.accumulate_dtype) if wants_hidden else None
            d_weight = torch.empty_like(weight) if wants_weight else None
            d_bias = None
            if head.bias is not None and wants_bias:
                d_bias = torch.empty_like(head.bias, dtype=state.maximum.dtype)
            active = looked_at(labels)
            starts = _starts(hidden, ctx.plan)
            for i, (columns, part_of_head) in enumerate(_chunks(head, weight, ctx.plan, starts)):
                start, host = i * ctx.plan.chunk, hosts.of_chunk(run, ctx.plan.alone(i, weight.shape[0]))
                (d,) = host(bodies.gradient, hidden, columns, labels, *part_of_head, state.maximum, *upstream)
                gemm.add_gradients_(starts, d_hidden, d_weight, d_bias, d, hidden, columns, active, 0, start, scale, [])
                del d  # or eager code holds two chunks

            if d_hidden is not None and (scale is not None or d_hidden.dtype != hidden.dtype):
                one = torch.ones((), dtype=state.maximum.dtype, device=hidden.device)
                d_hidden = gemm.scaled(d_hidden, one if scale is None else scale, hidden.dtype)
            if head.bias is not None and d_bias is not None:
                d_bias = (d_bias if scale is None else d_bias * scale).to(head.bias.dtype)
            return d_hidden, d_weight, d_bias, *(None,) * 8
