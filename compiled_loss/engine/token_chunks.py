"""Statistics and losses chunked over tokens: a chunk's gradient is formed while its logits are alive.

N tokens, H width, V vocabulary, C rows per chunk. Three GEMMs where both gradients are wanted, 6 N H V operations, all
in forward; scalar losses only, since the upstream gradient of each row is needed before it exists: it comes as
`Coefficients`. Keeps dH, dW and O(N) between forward and backward; creates no [N, V] tensor, one [C, V].
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from compiled_loss import checks
from compiled_loss.engine import execution, gemm
from compiled_loss.engine.gradients import Formed, Gradients, Needs, hand_out
from compiled_loss.engine.math import bodies
from compiled_loss.engine.math.bodies import Head, Problem
from compiled_loss.engine.math.statistics import (
    IGNORED,
    Coefficients,
    RowStatistics,
    finish,
    initial_state,
    looked_at,
    masked,
    statistics_dtype,
    unit_scale,
)
from compiled_loss.engine.operators import none, operator, unpack
from compiled_loss.planner.plan import Lengths


class Asked(NamedTuple):
    """Which of the statistics are asked for beside nll and lse, and over which ranks."""

    with_total: bool
    with_entropy: bool
    group: str | None


class _Forming(NamedTuple):
    """What the pass that forms gradients does besides."""

    group: str | None
    with_statistics: bool
    with_entropy: bool


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
    """The statistics of NOTE [Relative statistics], without gradients: one GEMM, 2 N H V operations."""
    found = _fold(Problem.of(hidden, weight, head.packed(), labels), Asked(total, entropy, group), lengths)
    return RowStatistics.of(found, total=total, entropy=entropy)


def weighted_sum(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    head: Head,
    lengths: Lengths,
    group: str | None,
    coefficients: Coefficients,
    active: Tensor,  # [N] bool
    needs: Needs,
    *,
    with_statistics: bool,
) -> tuple[Tensor, RowStatistics | None]:
    """sum(combine(statistics, coefficients)), differentiable, and if wanted the masked statistics, detached."""
    labels = torch.where(active, labels, IGNORED)
    forming = _Forming(group, with_statistics=False, with_entropy=with_statistics)
    problem = Problem.of(hidden, weight, head, labels)
    loss, *rest = _TokenChunks.apply(*problem, *coefficients, needs, forming, lengths)
    return loss, RowStatistics(*rest).map(Tensor.detach) if with_statistics else None


def statistics_like(problem: Problem, asked: Asked, _lengths: Lengths | None = None) -> list[Tensor]:
    """`RowStatistics` without data."""
    dtype = statistics_dtype(problem.hidden.dtype)
    dtypes = [dtype] * (2 + asked.with_total + asked.with_entropy) + [torch.bool]
    return [problem.labels.new_empty(problem.labels.shape, dtype=d) for d in dtypes]


def fold_operations(problem: Problem, _asked: Asked, _lengths: Lengths) -> int:
    """Of one GEMM."""
    return product(problem)


def product(problem: Problem) -> int:
    """Operations of the logits' GEMM, and of each of the gradients'; the problem has shapes for tensors."""
    tokens, width = problem.hidden
    return 2 * int(tokens * width) * int(next(iter(problem.weight)))


def chunks(hidden: Tensor, weight: Tensor, lengths: Lengths) -> Iterator[tuple[slice, Tensor]]:
    """The rows of each chunk, and its logits, in one buffer for all."""
    rows, plan = hidden.shape[0], lengths.plan("tokens", hidden)
    buffer = hidden.new_empty(min(plan.chunk, rows), weight.shape[0])
    for i in range(plan.count):
        chunk = slice(min(rows, i * plan.chunk), min(rows, (i + 1) * plan.chunk))
        z = buffer[: chunk.stop - chunk.start]
        torch.mm(hidden[chunk], weight.t(), out=z)
        yield chunk, z


def of_chunk(chunk: slice, *rows: Tensor | None) -> list[Tensor | None]:
    """A chunk's part of each."""
    return [None if v is None else v[chunk] for v in rows]


@operator("fold_token_chunks", Problem, Asked, Lengths, like=statistics_like, operations=fold_operations)
def _fold(problem: Problem, asked: Asked, lengths: Lengths) -> list[Tensor]:
    """The statistics of every row."""
    total, entropy, group = asked
    state = initial_state(problem.hidden, problem.labels.shape, total=total, entropy=entropy)
    found = state.map(torch.empty_like)
    for chunk, z in chunks(problem.hidden, problem.weight, lengths):
        rows, out = of_chunk(chunk, problem.labels, *state), of_chunk(chunk, *found.present())
        execution.run(bodies.fold, z, rows, problem.head, out, compiled=lengths.compiled)
    return list(finish(found.merged(group)).present())


def kept(dtype: torch.dtype, lengths: Lengths) -> torch.dtype:
    """The dtype in which dW waits for backward: wider than the weight's for fp16, whose sums are not yet scaled."""
    return lengths.accumulate_dtype or (torch.float32 if dtype == torch.float16 else dtype)


def _rows_like(problem: Problem, coefficients: Coefficients, forming: _Forming) -> list[Tensor]:
    """Each row's loss, and its statistics."""
    rows = [problem.labels.new_empty(problem.labels.shape, dtype=statistics_dtype(problem.hidden.dtype))]
    if forming.with_statistics or forming.with_entropy:
        rows += statistics_like(problem, Asked(coefficients.total is not None, forming.with_entropy, forming.group))
    return rows


def _formed_like(
    problem: Problem, coefficients: Coefficients, needs: Needs, forming: _Forming, lengths: Lengths
) -> list[Tensor]:
    hidden, weight, bias = problem[:3]
    gradients = Gradients.empty(hidden, weight, bias, needs, weight_dtype=kept(weight.dtype, lengths))
    return gradients.present() + _rows_like(problem, coefficients, forming)


def _form_operations(
    problem: Problem, _coefficients: Coefficients, needs: Needs, _forming: _Forming, _lengths: Lengths
) -> int:
    return (1 + needs.needs_hidden + needs.needs_weight) * product(problem)


@operator(
    "form_token_chunks",
    Problem,
    Coefficients,
    Needs,
    _Forming,
    Lengths,
    like=_formed_like,
    operations=_form_operations,
)
def _form(
    problem: Problem, coefficients: Coefficients, needs: Needs, forming: _Forming, lengths: Lengths
) -> list[Tensor]:
    """The gradients that are wanted, each row's loss, and its statistics."""
    hidden, weight, bias = problem[:3]
    body = bodies.statistics_and_gradient if forming.with_statistics else bodies.fold_and_gradient
    if forming.with_entropy:
        body = bodies.all_statistics_and_gradient
    accumulate_dtype = lengths.plan("tokens", hidden).accumulate_dtype
    gradients = Gradients.empty(hidden, weight, bias, needs, weight_dtype=accumulate_dtype)
    active = looked_at(problem.labels)
    losses, *known = found = _rows_like(problem, coefficients, forming)
    for chunk, z in chunks(hidden, weight, lengths):
        rows = of_chunk(chunk, problem.labels, *coefficients)
        out = [z, losses[chunk], None, *of_chunk(chunk, *known)]  # None: bodies.py, NOTE [Few reads]
        execution.run(body, z, rows, problem.head, out, compiled=lengths.compiled, group=forming.group)
        gemm.accumulate_gradients(*gradients, z, hidden[chunk], weight, active, chunk.start, 0, None)
    del z
    return [*gradients.with_weight_in(kept(weight.dtype, lengths)).present(), *found]


def _formed(
    problem: Problem, coefficients: Coefficients, needs: Needs, forming: _Forming, lengths: Lengths
) -> tuple[Formed, Tensor, RowStatistics | None]:
    """The gradients, and each row's loss and statistics, the loss still to be multiplied by the same scale."""
    scale = unit_scale(problem.hidden.dtype, *coefficients)
    if scale is not None:
        coefficients = coefficients.map(lambda c: c / scale)
    packed = Problem.of(problem.hidden, problem.weight, problem.head.packed(), problem.labels)
    found = _form(packed, coefficients, needs, forming, lengths)
    gradients = Gradients.taken(found, needs, problem.bias)
    losses, *rest = found
    known = None
    if rest:
        known = RowStatistics.of(rest, total=coefficients.total is not None, entropy=forming.with_entropy)
    return Formed(gradients, scale), losses, known


class _Saved(NamedTuple):
    """What backward needs beside the inputs, which it needs a second time."""

    d_hidden: Tensor | None
    d_weight: Tensor | None
    d_bias: Tensor | None
    scale: Tensor | None
    nll: Tensor | None
    lse: Tensor | None
    total: Tensor | None


class _TokenChunks(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *args: Any) -> tuple[Tensor | None, ...]:
        problem, coefficients, (needs, forming, lengths) = unpack(args, Problem, Coefficients)
        _, wanted, _ = unpack(ctx.needs_input_grad, Problem, Coefficients)
        forming = forming._replace(with_statistics=any(wanted))
        formed, losses, found = _formed(problem, coefficients, needs, forming, lengths)
        active = looked_at(problem.labels)
        loss = torch.where(active, losses, 0.0).sum()
        if formed.scale is not None:
            loss = loss * formed.scale
        known = none(RowStatistics) if found is None else masked(found, active)
        rows = (known.nll, known.lse, known.total) if any(wanted) else (None, None, None)
        inputs = (none(Problem), none(Coefficients)) if torch.compiler.is_compiling() else (problem, coefficients)
        ctx.save_for_backward(*_Saved(*formed.gradients, formed.scale, *rows), *inputs[0], *inputs[1])
        ctx.dtypes = [None if v is None else v.dtype for v in (problem.hidden, problem.weight, problem.bias)]
        ctx.options, ctx.spent = (needs, forming, lengths), False
        ctx.set_materialize_grads(False)
        return loss, *(known if forming.with_entropy else none(RowStatistics))

    @staticmethod
    def backward(ctx: Any, g: Tensor | None, *_statistics: None) -> tuple[Tensor | None, ...]:
        checks.first_derivative()
        d_problem, d_coefficients = none(Problem), none(Coefficients)
        if g is None:
            return *d_problem, *d_coefficients, None, None, None
        saved, problem, coefficients, _ = unpack(ctx.saved_tensors, _Saved, Problem, Coefficients)
        formed = Formed(Gradients(*saved[:3]), saved.scale)
        found = hand_out(ctx, formed, g, ctx.dtypes, lambda: _formed(problem, coefficients, *ctx.options)[0])
        d_problem = d_problem._replace(hidden=found.d_hidden, weight=found.d_weight, bias=found.d_bias)
        _, wanted, _ = unpack(ctx.needs_input_grad, Problem, Coefficients)
        if any(wanted):
            values = (saved.nll, saved.lse, saved.total, saved.lse.square())
            rows = [g * v if wants else None for v, wants in zip(values, wanted, strict=True)]
            d_coefficients = Coefficients(*rows)  # type: ignore[arg-type]
        return *d_problem, *d_coefficients, None, None, None
