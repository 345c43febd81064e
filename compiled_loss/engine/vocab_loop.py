"""The vocabulary walk: row statistics streamed over columns, logits recomputed in backward.

N tokens, H width, V vocabulary, C columns per chunk. Four GEMMs where both gradients are wanted, 8 N H V operations;
any upstream gradient. Keeps O(N) between forward and backward; creates no [N, V] tensor, one [N, C].
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from compiled_loss import checks
from compiled_loss.engine import bodies, execution, gemm
from compiled_loss.engine.bodies import Head, Problem, Upstream
from compiled_loss.engine.operators import none, operator, unpack
from compiled_loss.engine.plan import Lengths
from compiled_loss.engine.statistics import RowStatistics, State, finish, initial_state, looked_at, unit_scale
from compiled_loss.engine.token_loop import Asked, fold_operations, product, state_like
from compiled_loss.engine.transforms import without_autocast


class _Known(NamedTuple):
    """What backward knows of every row, and by what to scale the gradients of the parameters."""

    maximum: Tensor
    scale: Tensor | None


class _Wants(NamedTuple):
    wants_hidden: bool
    wants_weight: bool
    wants_bias: bool


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
    return RowStatistics(*_VocabLoop.apply(*problem, Asked(total, entropy), lengths, group))


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


@operator("fold_vocab_chunks", Problem, Asked, Lengths, like=state_like, operations=fold_operations)
def _fold(problem: Problem, asked: Asked, lengths: Lengths) -> list[Tensor]:
    """The state of every row."""
    state = initial_state(problem.hidden, problem.labels.shape, total=asked.with_total, entropy=asked.with_entropy)
    for _, _, head, z in _chunks(problem, lengths):
        found = [torch.empty_like(v) for v in state.present()]
        execution.run(bodies.fold, z, (problem.labels, *state), head, found, compiled=lengths.compiled)
        state = state.replaced(found)
    return list(state.present())


def _gradients_like(
    problem: Problem, _known: _Known, _upstream: Upstream, wants: _Wants, _lengths: Lengths
) -> list[Tensor]:
    wanted = zip((problem.hidden, problem.weight, problem.bias), wants, strict=True)
    return [torch.empty_like(v) for v, wants in wanted if wants and v is not None]


def _operations(problem: Problem, _known: _Known, _upstream: Upstream, wants: _Wants, _lengths: Lengths) -> int:
    return (1 + wants.wants_hidden + wants.wants_weight) * product(problem)


@operator(
    "vocab_chunks_gradients",
    Problem,
    _Known,
    Upstream,
    _Wants,
    Lengths,
    like=_gradients_like,
    operations=_operations,
)
def _gradients(problem: Problem, known: _Known, upstream: Upstream, wants: _Wants, lengths: Lengths) -> list[Tensor]:
    """dH, dW and db of those that are wanted."""
    hidden, weight, bias, scale = problem.hidden, problem.weight, problem.bias, known.scale
    accumulate_dtype = lengths.plan("vocab", hidden).accumulate_dtype
    d_hidden = torch.empty_like(hidden, dtype=accumulate_dtype) if wants.wants_hidden else None
    d_weight = torch.empty_like(weight) if wants.wants_weight else None
    d_bias = torch.empty_like(bias, dtype=known.maximum.dtype) if wants.wants_bias and bias is not None else None
    active = looked_at(problem.labels)
    rows = (problem.labels, known.maximum, *upstream)
    for start, columns, head, z in _chunks(problem, lengths):
        execution.run(bodies.gradient, z, rows, head, [z], compiled=lengths.compiled)
        gemm.accumulate_gradients(d_hidden, d_weight, d_bias, z, hidden, columns, active, 0, start, scale)
    del z
    if d_hidden is not None and (scale is not None or d_hidden.dtype != hidden.dtype):
        d_hidden = gemm.scaled_(d_hidden, known.maximum.new_ones(()) if scale is None else scale, hidden.dtype)
    if bias is not None and d_bias is not None:
        d_bias = (d_bias if scale is None else d_bias * scale).to(bias.dtype)
    return [v for v in (d_hidden, d_weight, d_bias) if v is not None]


class _VocabLoop(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *args: Any) -> tuple[Tensor | None, ...]:
        problem, (asked, lengths, group) = unpack(args, Problem)
        total, entropy = asked
        state = State.of(_fold(problem, asked, lengths), total=total, entropy=entropy).merged(group)
        result = finish(state)
        for rows in (result.nll, result.lse):  # or their logarithm joins the kernel that sums losses, which then spills
            gemm.fence_(rows)
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
        needs, _ = unpack(ctx.needs_input_grad, Problem)
        wants = _Wants(needs.hidden, needs.weight, needs.bias and problem.bias is not None)
        with without_autocast(problem.hidden.device):  # whatever backward's caller is in
            upstream = Upstream.of(state, g_nll, g_lse, g_total, g_entropy)
            scale = unit_scale(problem.hidden.dtype, *upstream)
            if scale is not None:
                upstream = upstream.map(lambda g: g / scale)
            found = _gradients(problem, _Known(state.maximum, scale), upstream, wants, ctx.lengths)
            hidden, weight, bias = [found.pop(0) if wanted else None for wanted in wants]
        return *none(Problem)._replace(hidden=hidden, weight=weight, bias=bias), None, None, None
