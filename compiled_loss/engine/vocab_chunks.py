"""Statistics chunked over the vocabulary: streamed over columns, logits computed again in backward.

N tokens, H width, V vocabulary, C columns per chunk. Four GEMMs where both gradients are wanted, 8 N H V operations;
any upstream gradient. Keeps O(N) between forward and backward; creates no [N, V] tensor, one [N, C].
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from compiled_loss import checks
from compiled_loss.engine import execution, gemm
from compiled_loss.engine.gradients import Gradients, Needs
from compiled_loss.engine.math import bodies
from compiled_loss.engine.math.bodies import Head, Problem, Upstream
from compiled_loss.engine.math.statistics import (
    RowStatistics,
    State,
    finish,
    initial_state,
    looked_at,
    statistics_dtype,
    unit_scale,
)
from compiled_loss.engine.operators import none, operator, unpack
from compiled_loss.engine.token_chunks import Asked, fold_operations, product, statistics_like
from compiled_loss.engine.transforms import without_autocast
from compiled_loss.planner.plan import Lengths


class _Known(NamedTuple):
    """What backward knows of every row, and by what to scale the gradients of the parameters."""

    maximum: Tensor
    scale: Tensor | None


def statistics(
    hidden: Tensor,  # [N, H]
    weight: Tensor,  # [V, H]
    labels: Tensor,  # [N]
    head: Head,
    lengths: Lengths,
    group: str | None,
    *,
    total: bool,
    entropy: bool,
) -> RowStatistics:
    """The statistics of NOTE [Relative statistics], all but `correct` differentiable. Over a group: NOTE [Ranks]."""
    problem = Problem.of(hidden, weight, head, labels)
    return RowStatistics(*_VocabChunks.apply(*problem, Asked(total, entropy, group), lengths))


def _chunks(problem: Problem, lengths: Lengths) -> Iterator[tuple[int, Tensor, Head, Tensor]]:
    """The first column of each chunk, its weight and head, and its logits, in one buffer for all.

    A rank without columns has one chunk of none.
    """
    hidden, weight, head = problem.hidden, problem.weight, problem.head
    tokens, columns = hidden.shape[0], weight.shape[0]
    size = lengths.plan("vocab", hidden).chunk
    buffer = hidden.new_empty(tokens * min(size, columns))
    starts = torch.arange(0, max(1, columns), size, device=hidden.device)
    for i, start in enumerate(range(0, max(1, columns), size)):
        part = slice(start, min(columns, start + size))
        bias, class_weights = (None if v is None else v[part] for v in (head.bias, head.class_weights))
        z = buffer[: tokens * (part.stop - start)].view(tokens, part.stop - start)
        torch.mm(hidden, weight[part].t(), out=z)
        yield start, weight[part], head._replace(bias=bias, class_weights=class_weights, start=starts[i : i + 1]), z


def _folded_like(problem: Problem, asked: Asked, lengths: Lengths) -> list[Tensor]:
    rows = problem.labels.new_empty(problem.labels.shape, dtype=statistics_dtype(problem.hidden.dtype))
    state = [torch.empty_like(rows) for _ in range(3 + asked.with_total + asked.with_entropy)]
    return state + statistics_like(problem, asked, lengths)


@operator("fold_vocab_chunks", Problem, Asked, Lengths, like=_folded_like, operations=fold_operations)
def _fold(problem: Problem, asked: Asked, lengths: Lengths) -> list[Tensor]:
    """The state of every row, and its statistics."""
    total, entropy, group = asked
    state = initial_state(problem.hidden, problem.labels.shape, total=total, entropy=entropy)
    for _, _, head, z in _chunks(problem, lengths):
        found = state.map(torch.empty_like)
        execution.run(bodies.fold, z, (problem.labels, *state), head, found.present(), compiled=lengths.compiled)
        state = found
    state = state.merged(group)
    return [*state.present(), *(v.clone() if v is state.total else v for v in finish(state).present())]


def _gradients_like(
    problem: Problem, _known: _Known, _upstream: Upstream, needs: Needs, _lengths: Lengths
) -> list[Tensor]:
    gradients = Gradients.empty(*problem[:3], needs)
    if gradients.d_bias is not None and problem.bias is not None:
        gradients = gradients._replace(d_bias=torch.empty_like(problem.bias))
    return gradients.present()


def _operations(problem: Problem, _known: _Known, _upstream: Upstream, needs: Needs, _lengths: Lengths) -> int:
    return (1 + needs.needs_hidden + needs.needs_weight) * product(problem)


@operator(
    "vocab_chunks_gradients",
    Problem,
    _Known,
    Upstream,
    Needs,
    Lengths,
    like=_gradients_like,
    operations=_operations,
)
def _gradients(problem: Problem, known: _Known, upstream: Upstream, needs: Needs, lengths: Lengths) -> list[Tensor]:
    """Those that are wanted."""
    hidden, weight, bias = problem[:3]
    accumulate_dtype, scale = lengths.plan("vocab", hidden).accumulate_dtype, known.scale
    gradients = Gradients.empty(hidden, weight, bias, needs, hidden_dtype=accumulate_dtype)
    active = looked_at(problem.labels)
    rows = (problem.labels, known.maximum, *upstream)
    for start, columns, head, z in _chunks(problem, lengths):
        execution.run(bodies.gradient, z, rows, head, [z], compiled=lengths.compiled)
        gemm.accumulate_gradients(*gradients, z, hidden, columns, active, 0, start, scale)
    del z
    d_hidden, _, d_bias = gradients
    if d_hidden is not None and (scale is not None or d_hidden.dtype != hidden.dtype):
        d_hidden = gemm.scaled_(d_hidden, known.maximum.new_ones(()) if scale is None else scale, hidden.dtype)
    if bias is not None and d_bias is not None:
        d_bias = (d_bias if scale is None else d_bias * scale).to(bias.dtype)
    return gradients._replace(d_hidden=d_hidden, d_bias=d_bias).present()


class _VocabChunks(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *args: Any) -> tuple[Tensor | None, ...]:
        problem, (asked, lengths) = unpack(args, Problem)
        found = _fold(problem, asked, lengths)
        parts = 3 + asked.with_total + asked.with_entropy
        state = State.of(found[:parts], total=asked.with_total, entropy=asked.with_entropy)
        result = RowStatistics.of(found[parts:], total=asked.with_total, entropy=asked.with_entropy)
        ctx.save_for_backward(*problem, *state)
        ctx.set_materialize_grads(False)
        ctx.lengths = lengths
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
        problem, state, _ = unpack(ctx.saved_tensors, Problem, State)
        wanted, _ = unpack(ctx.needs_input_grad, Problem)
        needs = Needs(wanted.hidden, wanted.weight, wanted.bias)
        with without_autocast(problem.hidden.device):  # whatever backward's caller is in
            upstream = Upstream.of(state, g_nll, g_lse, g_total, g_entropy)
            scale = unit_scale(problem.hidden.dtype, *upstream)
            if scale is not None:
                upstream = upstream.map(lambda g: g / scale)
            found = _gradients(problem, _Known(state.maximum, scale), upstream, needs, ctx.lengths)
        hidden, weight, bias = Gradients.taken(found, needs, problem.bias)
        return *none(Problem)._replace(hidden=hidden, weight=weight, bias=bias), None, None
