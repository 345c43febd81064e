"""Row statistics of logits that exist already: one pass forward, one back, nothing of [N, V] kept beyond the logits."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from compiled_loss import checks
from compiled_loss.engine import bodies, gemm, hosts
from compiled_loss.engine.bodies import Head, Upstream
from compiled_loss.engine.statistics import RowStatistics, State, finish, initial_state
from compiled_loss.engine.transforms import without_autocast


def statistics(
    logits: Tensor,  # [..., V], two dimensions or more, any strides
    labels: Tensor,  # [...]
    head: Head,
    group: str | None,
    *,
    total: bool,
    entropy: bool,
) -> RowStatistics:
    """The statistics of NOTE [Relative statistics], all but `correct` differentiable with respect to the logits."""
    return RowStatistics(*_Logits.apply(logits, *head[:4], labels, group, total, entropy))


def plain_statistics(logits: Tensor, labels: Tensor, head: Head, *, total: bool, entropy: bool) -> RowStatistics:
    """The same by ordinary autograd, for functorch's transforms: any order of derivative, no memory promise."""
    state = initial_state(logits, labels.shape, total=total, entropy=entropy)
    return finish(state.replaced(bodies.fold(logits, None, labels, *head, *state)))


class _Logits(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        logits: Tensor,
        bias: Tensor | None,
        class_weights: Tensor | None,
        softcap: Tensor | None,
        inverse_temperature: Tensor | None,
        labels: Tensor,
        group: str | None,
        total: bool,
        entropy: bool,
    ) -> tuple[Tensor | None, ...]:
        head = Head(bias, class_weights, softcap, inverse_temperature)
        state = initial_state(logits, labels.shape, total=total, entropy=entropy)
        run = hosts.choose(logits.device, "auto", loop=False)
        state = state.replaced(run(bodies.fold, logits, None, labels, *head, *state)).merged(group)
        result = finish(state)
        ctx.save_for_backward(logits, *head[:4], labels, *state)
        ctx.set_materialize_grads(False)
        ctx.moved = not logits.is_contiguous()
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
        logits, *saved = ctx.saved_tensors
        with without_autocast(logits.device):  # whatever backward's caller is in
            head, labels, state = Head(*saved[:4]), saved[4], State(*saved[5:])
            upstream = Upstream.of(state, g_nll, g_lse, g_total, g_entropy)
            if ctx.moved:  # or Inductor writes a long expression out twice, in its layout and in theirs
                rows = [None if v is None else gemm.in_turn(v, []) for v in upstream]
                upstream = Upstream(*rows)  # type: ignore[arg-type]
            operands = (labels, *head, state.maximum, *upstream)
            run = hosts.choose(logits.device, "auto", loop=False)
            (d,) = run(bodies.gradient, logits, None, *operands)
            return d, None, None, None, None, None, None, None, None
