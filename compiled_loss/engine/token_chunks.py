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
from compiled_loss.engine.gradients import Gradients, Needs, UnscaledGradients, scaled_gradients
from compiled_loss.engine.math import bodies
from compiled_loss.engine.math.bodies import Problem
from compiled_loss.engine.math.statistics import (
    Classes,
    Coefficients,
    Divisor,
    RowStatistics,
    finish,
    initial_state,
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


class _Options(NamedTuple):
    """What is no tensor."""

    classes: Classes
    needs: Needs
    forming: _Forming
    lengths: Lengths


def statistics(problem: Problem, asked: Asked, lengths: Lengths) -> RowStatistics:
    """The statistics of NOTE [Relative statistics], without gradients: one GEMM, 2 N H V operations."""
    return RowStatistics.of(_fold(problem, asked, lengths), total=asked.with_total, entropy=asked.with_entropy)


def weighted_sum(
    problem: Problem,
    classes: Classes,
    coefficients: Coefficients,
    divisor: Divisor,
    needs: Needs,
    lengths: Lengths,
    group: str | None,
    *,
    with_statistics: bool,
) -> tuple[Tensor, RowStatistics | None]:
    """sum(combine(statistics, coefficients)) / divisor, differentiable; if wanted the masked statistics, detached."""
    forming = _Forming(group, with_statistics=False, with_entropy=with_statistics)
    options = _Options(classes, needs, forming, lengths)
    loss, *rest = _TokenChunks.apply(*problem, *coefficients, *divisor, *options)
    return loss, RowStatistics(*rest).map(Tensor.detach) if with_statistics else None


def statistics_like(problem: Problem, asked: Asked, _lengths: Lengths | None = None) -> list[Tensor]:
    """`RowStatistics` without data."""
    dtype = statistics_dtype(problem.hidden.dtype)
    dtypes = [dtype] * (2 + asked.with_total + asked.with_entropy) + [torch.bool]
    return [problem.labels.new_empty(problem.labels.shape, dtype=d) for d in dtypes]


def fold_operations(problem: Problem, *_rest: Any) -> int:
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
    found, head = state.map(torch.empty_like), problem.head.packed()
    for chunk, z in chunks(problem.hidden, problem.weight, lengths):
        rows, out = of_chunk(chunk, problem.labels, *state), of_chunk(chunk, *found.present())
        execution.run(bodies.fold, z, rows, head, out, compiled=lengths.compiled)
    return list(finish(found.all_reduced(group)).present())


def kept(dtype: torch.dtype, lengths: Lengths) -> torch.dtype:
    """The dtype in which dW waits for backward: wider than the weight's for fp16, whose sums are not yet scaled."""
    return lengths.accumulate_dtype or (torch.float32 if dtype == torch.float16 else dtype)


def _known_like(problem: Problem, coefficients: Coefficients, forming: _Forming) -> list[Tensor]:
    """The statistics that are wanted, without data."""
    if not (forming.with_statistics or forming.with_entropy):
        return []
    return statistics_like(problem, Asked(coefficients.total is not None, forming.with_entropy, forming.group))


def _formed_like(
    problem: Problem,
    coefficients: Coefficients,
    _divisor: Divisor,
    _classes: Classes,
    needs: Needs,
    forming: _Forming,
    lengths: Lengths,
) -> list[Tensor]:
    hidden, weight, bias = problem[:3]
    gradients = Gradients.empty(hidden, weight, bias, needs, weight_dtype=kept(weight.dtype, lengths))
    one = hidden.new_empty((), dtype=statistics_dtype(hidden.dtype))
    return [*gradients.present(), one, torch.empty_like(one), *_known_like(problem, coefficients, forming)]


def _form_operations(
    problem: Problem, _coefficients: Any, _divisor: Any, _classes: Any, needs: Needs, *_rest: Any
) -> int:
    return (1 + needs.needs_hidden + needs.needs_weight) * product(problem)


@operator(
    "form_token_chunks",
    Problem,
    Coefficients,
    Divisor,
    Classes,
    Needs,
    _Forming,
    Lengths,
    like=_formed_like,
    operations=_form_operations,
)
def _form(
    problem: Problem,
    coefficients: Coefficients,
    divisor: Divisor,
    classes: Classes,
    needs: Needs,
    forming: _Forming,
    lengths: Lengths,
) -> list[Tensor]:
    """The gradients that are wanted, by what to multiply them, the loss, and the statistics that are wanted, masked."""
    hidden, weight, bias = problem[:3]
    labels, head = problem.labels, problem.head.packed()
    unit = unit_scale(hidden.dtype, *coefficients)
    if unit is not None:
        coefficients = coefficients.map(lambda c: c / unit)
    accumulate_dtype = lengths.plan("tokens", hidden).accumulate_dtype
    gradients = Gradients.empty(hidden, weight, bias, needs, weight_dtype=accumulate_dtype)
    losses = labels.new_empty(labels.shape, dtype=statistics_dtype(hidden.dtype))
    known = _known_like(problem, coefficients, forming)
    static: dict[str, Any] = {"classes": classes, "group": forming.group}
    if known:
        static |= {"statistics": True, "entropy": forming.with_entropy}
    active = classes.active(labels)
    for chunk, z in chunks(hidden, weight, lengths):
        rows = of_chunk(chunk, labels, *coefficients)
        out = [z, losses[chunk], None, *of_chunk(chunk, *known)]  # None: bodies.py, NOTE [Few reads]
        execution.run(bodies.fold_and_gradient, z, rows, head, out, compiled=lengths.compiled, **static)
        gemm.accumulate_gradients(*gradients, z, hidden[chunk], weight, active, chunk.start, 0, None)
    del z
    total = losses.sum()
    loss, factor = divisor.divide(active, *((total, torch.ones_like(total)) if unit is None else (total * unit, unit)))
    gradients = gradients.with_weight_in(kept(weight.dtype, lengths))
    statistics_ = [v & active if v.dtype == torch.bool else v.masked_fill_(~active, 0) for v in known]
    return [*gradients.present(), factor, loss, *statistics_]


class _Saved(NamedTuple):
    """What backward needs beside the inputs, which it needs a second time."""

    d_hidden: Tensor | None
    d_weight: Tensor | None
    d_bias: Tensor | None
    factor: Tensor
    nll: Tensor | None
    lse: Tensor | None
    total: Tensor | None


class _TokenChunks(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *args: Any) -> tuple[Tensor | None, ...]:
        problem, coefficients, divisor, options, _ = unpack(args, Problem, Coefficients, Divisor, _Options)
        _, wanted, _ = unpack(ctx.needs_input_grad, Problem, Coefficients)
        forming = options.forming._replace(with_statistics=any(wanted))
        options = options._replace(forming=forming)
        found = _form(problem, coefficients, divisor, *options)
        gradients = Gradients.pop_from(found, options.needs, problem.bias)
        factor, loss, *rest = found
        known = none(RowStatistics)
        if rest:
            known = RowStatistics.of(rest, total=coefficients.total is not None, entropy=forming.with_entropy)
        rows = (known.nll, known.lse, known.total) if any(wanted) else (None, None, None)
        again = (*problem, *coefficients, divisor.divisor)
        if torch.compiler.is_compiling():
            again = (None,) * len(again)
        ctx.save_for_backward(*_Saved(*gradients, factor, *rows), *again)
        ctx.dtypes = [None if v is None else v.dtype for v in (problem.hidden, problem.weight, problem.bias)]
        ctx.divisor, ctx.options, ctx.spent = divisor._replace(divisor=None), options, False
        ctx.set_materialize_grads(False)
        return loss, *(known if forming.with_entropy else none(RowStatistics))

    @staticmethod
    def backward(ctx: Any, g: Tensor | None, *_statistics: None) -> tuple[Tensor | None, ...]:
        checks.first_derivative()
        d_problem, d_coefficients, rest = none(Problem), none(Coefficients), (*none(Divisor), *none(_Options))
        if g is None:
            return *d_problem, *d_coefficients, *rest
        saved, problem, coefficients, (count,) = unpack(ctx.saved_tensors, _Saved, Problem, Coefficients)

        def form() -> UnscaledGradients:
            again = _form(problem, coefficients, ctx.divisor._replace(divisor=count), *ctx.options)
            return UnscaledGradients(Gradients.pop_from(again, ctx.options.needs, problem.bias), again[0])

        found = scaled_gradients(ctx, UnscaledGradients(Gradients(*saved[:3]), saved.factor), g, ctx.dtypes, form)
        d_problem = d_problem._replace(hidden=found.d_hidden, weight=found.d_weight, bias=found.d_bias)
        _, wanted, _ = unpack(ctx.needs_input_grad, Problem, Coefficients)
        if any(wanted):
            values = (saved.nll, saved.lse, saved.total, saved.lse.square())
            rows = [g * v if wants else None for v, wants in zip(values, wanted, strict=True)]
            d_coefficients = Coefficients(*rows)
        return *d_problem, *d_coefficients, *rest
