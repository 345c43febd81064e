"""The token walk: rows in chunks, their gradient formed while their logits are alive.

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
from compiled_loss.engine import bodies, execution, gemm
from compiled_loss.engine.bodies import Head, Problem
from compiled_loss.engine.operators import none, operator, unpack
from compiled_loss.engine.plan import Lengths
from compiled_loss.engine.statistics import (
    IGNORED,
    Coefficients,
    RowStatistics,
    State,
    finish,
    initial_state,
    looked_at,
    masked,
    statistics_dtype,
    unit_scale,
)
from compiled_loss.engine.token_chunks import Wanted


class Asked(NamedTuple):
    """Which of the statistics are asked for beside nll and lse."""

    with_total: bool
    with_entropy: bool


class _Forming(NamedTuple):
    """What the pass that forms gradients does besides."""

    group: str | None
    wants_hidden: bool
    wants_weight: bool
    wants_bias: bool
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
    state = _fold(Problem.of(hidden, weight, head.packed(), labels), Asked(total, entropy), lengths)
    return finish(State.of(state, total=total, entropy=entropy).merged(group))


def weighted_sum(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    head: Head,
    lengths: Lengths,
    group: str | None,
    coefficients: Coefficients,
    active: Tensor,  # [N] bool
    wanted: Wanted,
    *,
    with_statistics: bool,
) -> tuple[Tensor, RowStatistics | None]:
    """sum(combine(statistics, coefficients)), differentiable, and if wanted the masked statistics, detached."""
    labels = torch.where(active, labels, IGNORED)
    forming = _Forming(group, *wanted, with_statistics=False, with_entropy=with_statistics)
    loss, *rest = _TokenLoop.apply(*Problem.of(hidden, weight, head, labels), *coefficients, forming, lengths)
    return loss, RowStatistics(*rest).map(Tensor.detach) if with_statistics else None


def state_like(problem: Problem, asked: Asked, _lengths: Lengths) -> list[Tensor]:
    """A `State` without data."""
    dtype = statistics_dtype(problem.hidden.dtype)
    return [problem.labels.new_empty(problem.labels.shape, dtype=dtype) for _ in range(3 + sum(asked))]


def fold_operations(problem: Problem, _asked: Asked, _lengths: Lengths) -> int:
    """Of one GEMM."""
    return product(problem)


def product(problem: Problem) -> int:
    """Operations of the logits' GEMM, and of each of the gradients'; the problem has shapes for tensors."""
    tokens, width = problem.hidden
    return 2 * int(tokens * width) * int(next(iter(problem.weight)))


def _chunks(problem: Problem, lengths: Lengths) -> Iterator[tuple[slice, Tensor]]:
    """The rows of each chunk, and its logits, in one buffer for all."""
    hidden, weight = problem.hidden, problem.weight
    rows, plan = hidden.shape[0], lengths.plan("tokens", hidden)
    buffer = hidden.new_empty(min(plan.chunk, rows), weight.shape[0])
    for i in range(plan.count):
        chunk = slice(min(rows, i * plan.chunk), min(rows, (i + 1) * plan.chunk))
        z = buffer[: chunk.stop - chunk.start]
        torch.mm(hidden[chunk], weight.t(), out=z)
        yield chunk, z


def _of(chunk: slice, *rows: Tensor | None) -> list[Tensor | None]:
    return [None if v is None else v[chunk] for v in rows]


@operator("fold_token_chunks", Problem, Asked, Lengths, like=state_like, operations=fold_operations)
def _fold(problem: Problem, asked: Asked, lengths: Lengths) -> list[Tensor]:
    """The state of every row."""
    state = initial_state(problem.hidden, problem.labels.shape, total=asked.with_total, entropy=asked.with_entropy)
    found = [torch.empty_like(v) for v in state.present()]
    for chunk, z in _chunks(problem, lengths):
        rows, out = _of(chunk, problem.labels, *state), _of(chunk, *found)
        execution.run(bodies.fold, z, rows, problem.head, out, compiled=lengths.compiled)
    return found


def _kept(dtype: torch.dtype, lengths: Lengths) -> torch.dtype:
    """The dtype in which dW waits for backward: wider than the weight's for fp16, whose sums are not yet scaled."""
    return lengths.accumulate_dtype or (torch.float32 if dtype == torch.float16 else dtype)


def _rows_like(problem: Problem, coefficients: Coefficients, forming: _Forming) -> list[Tensor]:
    """Each row's loss, and its statistics."""
    dtype = statistics_dtype(problem.hidden.dtype)
    dtypes = [dtype]
    if forming.with_statistics or forming.with_entropy:
        dtypes += [dtype] * (2 + (coefficients.total is not None) + forming.with_entropy) + [torch.bool]
    return [problem.labels.new_empty(problem.labels.shape, dtype=d) for d in dtypes]


def _formed_like(problem: Problem, coefficients: Coefficients, forming: _Forming, lengths: Lengths) -> list[Tensor]:
    dtype = statistics_dtype(problem.hidden.dtype)
    outputs = [torch.empty_like(problem.hidden)] if forming.wants_hidden else []
    if forming.wants_weight:
        outputs.append(torch.empty_like(problem.weight, dtype=_kept(problem.weight.dtype, lengths)))
    if forming.wants_bias and problem.bias is not None:
        outputs.append(problem.bias.new_empty(problem.weight.shape[:1], dtype=dtype))
    return outputs + _rows_like(problem, coefficients, forming)


def _form_operations(problem: Problem, _coefficients: Coefficients, forming: _Forming, _lengths: Lengths) -> int:
    return (1 + forming.wants_hidden + forming.wants_weight) * product(problem)


@operator(
    "form_token_chunks",
    Problem,
    Coefficients,
    _Forming,
    Lengths,
    like=_formed_like,
    operations=_form_operations,
)
def _form(problem: Problem, coefficients: Coefficients, forming: _Forming, lengths: Lengths) -> list[Tensor]:
    """dH, dW and db of those that are wanted, each row's loss, and its statistics."""
    hidden, weight = problem.hidden, problem.weight
    body = bodies.statistics_and_gradient if forming.with_statistics else bodies.fold_and_gradient
    if forming.with_entropy:
        body = bodies.all_statistics_and_gradient
    accumulate_dtype = lengths.plan("tokens", hidden).accumulate_dtype
    d_hidden = torch.empty_like(hidden) if forming.wants_hidden else None
    d_weight = torch.empty_like(weight, dtype=accumulate_dtype) if forming.wants_weight else None
    d_bias = None
    if forming.wants_bias and problem.bias is not None:
        d_bias = problem.bias.new_empty(weight.shape[:1], dtype=statistics_dtype(hidden.dtype))
    active = looked_at(problem.labels)
    losses, *known = found = _rows_like(problem, coefficients, forming)
    for chunk, z in _chunks(problem, lengths):
        rows = _of(chunk, problem.labels, *coefficients)
        out = [z, losses[chunk], None, *_of(chunk, *known)]  # None: bodies.py, NOTE [Few reads]
        execution.run(body, z, rows, problem.head, out, compiled=lengths.compiled, group=forming.group)
        states = hidden[chunk]
        gemm.accumulate_gradients(d_hidden, d_weight, d_bias, z, states, weight, active, chunk.start, 0, None)
    del z
    if d_weight is not None:
        d_weight = d_weight.to(_kept(weight.dtype, lengths))
    return [*(v for v in (d_hidden, d_weight, d_bias) if v is not None), *found]


class _Formed(NamedTuple):
    """What forward forms. The gradients and the losses are still to be multiplied by `scale`."""

    hidden: Tensor | None
    weight: Tensor | None
    bias: Tensor | None
    scale: Tensor | None
    losses: Tensor
    statistics: RowStatistics | None


def _formed(problem: Problem, coefficients: Coefficients, forming: _Forming, lengths: Lengths) -> _Formed:
    scale = unit_scale(problem.hidden.dtype, *coefficients)
    if scale is not None:
        coefficients = coefficients.map(lambda c: c / scale)
    packed = Problem.of(problem.hidden, problem.weight, problem.head.packed(), problem.labels)
    found = _form(packed, coefficients, forming, lengths)
    wants = (forming.wants_hidden, forming.wants_weight, forming.wants_bias and problem.bias is not None)
    hidden, weight, bias = [found.pop(0) if wanted else None for wanted in wants]
    losses, *rest = found
    known = None
    if rest:
        known = RowStatistics.of(rest, total=coefficients.total is not None, entropy=forming.with_entropy)
    return _Formed(hidden, weight, bias, scale, losses, known)


class _Saved(NamedTuple):
    """What backward needs beside the inputs, which it needs a second time."""

    hidden: Tensor | None
    weight: Tensor | None
    bias: Tensor | None
    scale: Tensor | None
    nll: Tensor | None
    lse: Tensor | None
    total: Tensor | None


class _TokenLoop(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *args: Any) -> tuple[Tensor | None, ...]:
        problem, coefficients, (forming, lengths) = unpack(args, Problem, Coefficients)
        _, needs, _ = unpack(ctx.needs_input_grad, Problem, Coefficients)
        formed = _formed(problem, coefficients, forming._replace(with_statistics=any(needs)), lengths)
        active = looked_at(problem.labels)
        loss = torch.where(active, formed.losses, 0.0).sum()
        if formed.scale is not None:
            loss = loss * formed.scale
        known = none(RowStatistics) if formed.statistics is None else masked(formed.statistics, active)
        rows = (known.nll, known.lse, known.total) if any(needs) else (None, None, None)
        again = none(Problem), none(Coefficients)
        if not torch.compiler.is_compiling():
            again = problem, coefficients
        ctx.save_for_backward(*_Saved(*formed[:4], *rows), *again[0], *again[1])
        ctx.dtypes = [None if v is None else v.dtype for v in (problem.hidden, problem.weight, problem.bias)]
        ctx.options, ctx.spent = (forming, lengths), False
        ctx.set_materialize_grads(False)
        return loss, *(known if forming.with_entropy else none(RowStatistics))

    @staticmethod
    def backward(ctx: Any, g: Tensor | None, *_statistics: None) -> tuple[Tensor | None, ...]:
        checks.first_derivative()
        d_problem, d_coefficients = none(Problem), none(Coefficients)
        if g is None:
            return *d_problem, *d_coefficients, None, None
        saved, problem, coefficients, _ = unpack(ctx.saved_tensors, _Saved, Problem, Coefficients)
        gradients, scale = saved[:3], saved.scale
        scaled = gemm.scaled
        if not torch.compiler.is_compiling():
            if ctx.spent:
                formed = _formed(problem, coefficients, *ctx.options)
                gradients, scale = formed[:3], formed.scale
            ctx.spent, scaled = True, gemm.scaled_
        factor = g if scale is None else g * scale
        dense = [None if d is None else scaled(d, factor, t) for d, t in zip(gradients, ctx.dtypes, strict=True)]
        d_problem = d_problem._replace(hidden=dense[0], weight=dense[1], bias=dense[2])
        _, needs, _ = unpack(ctx.needs_input_grad, Problem, Coefficients)
        if any(needs):
            values = (saved.nll, saved.lse, saved.total, saved.lse.square())
            rows = [g * v if wants else None for v, wants in zip(values, needs, strict=True)]
            d_coefficients = Coefficients(*rows)  # type: ignore[arg-type]
        return *d_problem, *d_coefficients, None, None
