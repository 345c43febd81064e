"""Statistics chunked over the vocabulary: streamed over columns, logits computed again in backward.

N tokens, H width, V vocabulary, C columns per chunk. If both gradients are wanted there are four GEMMs, 8 N H V
operations. Any upstream gradient is possible. O(N) is kept between forward and backward. No [N, V] tensor is created,
but one [N, C].
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from compiled_loss import checks
from compiled_loss.engine import execution, gemm
from compiled_loss.engine.gradients import Gradients, Needs
from compiled_loss.engine.math import bodies
from compiled_loss.engine.math.bodies import Upstream
from compiled_loss.engine.math.coefficients import Classes, Coefficients, Divisor, combine, unit_scale
from compiled_loss.engine.math.problem import Head, Problem, slack
from compiled_loss.engine.math.statistics import (
    RowStatistics,
    State,
    Wanted,
    finish,
    initial_state,
    masked,
    statistics_dtype,
)
from compiled_loss.engine.operators import Loop, composite, none, operator, unpack
from compiled_loss.engine.token_statistics import Asked, fold_operations, found_statistics, product, statistics_like
from compiled_loss.engine.top import Top, top
from compiled_loss.engine.transforms import without_autocast
from compiled_loss.planner.plan import Lengths


class _Sought(NamedTuple):
    """Gradients of the rows' statistics, [N] each.

    For a loss they are its `Coefficients`, still to be multiplied by `g` and `factor`, [] each.
    """

    d_nll: Tensor | None
    d_lse: Tensor | None
    d_total: Tensor | None
    d_square: Tensor | None
    d_entropy: Tensor | None
    d_squares: Tensor | None
    g: Tensor | None
    factor: Tensor | None

    def upstream(self, state: State, labels: Tensor, classes: Classes) -> Upstream:
        """Returns the coefficients of the logits' gradient."""
        nll, lse, total, square, entropy, squares, g, factor = self
        if square is not None:  # the coefficient of lse squared
            square = 2 * square * finish(state).lse
            lse = square if lse is None else lse + square
        if g is not None and factor is not None:
            nll = Coefficients(nll, None, None, None).label_weight(labels, classes, factor.dtype)
            by = g * factor
            nll, lse, total = (None if v is None else v * by for v in (nll, lse, total))
        return Upstream.of(state, nll, lse, total, entropy, squares)


class _Options(NamedTuple):
    """The arguments that are not tensors."""

    classes: Classes
    asked: Asked
    lengths: Lengths


def statistics(problem: Problem, classes: Classes, asked: Asked, lengths: Lengths) -> tuple[RowStatistics, Top | None]:
    """Returns the statistics of NOTE [Relative statistics], and the top, detached.

    Statistics of a floating dtype are differentiable. Over a group: NOTE [Ranks].
    """
    rows, top_ = found_statistics(_statistics(problem, classes, asked, lengths), asked)
    return rows, None if top_ is None else Top(*map(Tensor.detach, top_))


def weighted_sum(
    problem: Problem,
    classes: Classes,
    coefficients: Coefficients,
    divisor: Divisor,
    lengths: Lengths,
    group: str | None,
    *,
    with_statistics: bool,
) -> tuple[Tensor, RowStatistics | None]:
    """Returns sum(combine(statistics, coefficients)) / divisor, differentiable, and the masked statistics, detached.

    The statistics are None unless they are wanted.
    """
    wanted = Wanted(total=coefficients.total is not None, entropy=with_statistics)
    loss, *rest = _weighted_sum(problem, coefficients, divisor, classes, Asked(*wanted, group), lengths)
    return loss, RowStatistics.of(rest, wanted).map(Tensor.detach) if with_statistics else None


def _chunks(problem: Problem, lengths: Lengths) -> Iterator[tuple[int, Tensor, Head, Tensor]]:
    """Yields the first column of each chunk, its weight, its head and its logits. All chunks share one buffer.

    A rank without columns has one chunk of no columns.
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
        gemm.logits(hidden, weight[part], out=z)
        yield start, weight[part], head._replace(bias=bias, class_weights=class_weights, start=starts[i : i + 1]), z


def _finished(problem: Problem, state: State) -> RowStatistics:
    return finish(state, slack(problem.head, problem.inverse_temperature))


def _state_like(problem: Problem, asked: Asked) -> list[Tensor]:
    rows = problem.labels.new_empty(problem.labels.shape, dtype=statistics_dtype(problem.hidden.dtype))
    return [torch.empty_like(rows) for _ in range(3 + sum(asked.wanted))]


def _pop_state(found: list[Tensor], asked: Asked) -> State:
    """Takes the state from the front of a list."""
    return State.of([found.pop(0) for _ in range(3 + sum(asked.wanted))], asked.wanted)


def _fold_like(problem: Problem, asked: Asked, _lengths: Lengths) -> list[Tensor]:
    dtype = statistics_dtype(problem.hidden.dtype)
    return [*_state_like(problem, asked), *Top.like(problem.labels, asked.top_k, dtype)]


def _fold(problem: Problem, asked: Asked, lengths: Lengths) -> list[Tensor]:
    """Returns the state of every row, and its top if it is asked for."""
    state = initial_state(problem.hidden, problem.labels.shape, asked.wanted)
    best: Top | None = None
    for _, _, head, z in _chunks(problem, lengths):
        if asked.top_k:
            of_chunk = top(z, head.bias, problem.labels, head.start, asked.top_k)
            best = of_chunk if best is None else best.merged(of_chunk)
        found = state.map(torch.empty_like)
        rows = (problem.labels, problem.inverse_temperature, *state)
        execution.run(bodies.fold, z, rows, head, found.present(), compiled=lengths.compiled)
        state = found
    present = state.all_reduced(asked.group).present()
    return [*present, *(() if best is None else best.of_ranks(lengths.ranks, asked.group))]


_FOLD = Loop(
    "vocab",
    _fold,
    operator("loop_vocab_chunks", *(Problem, Asked, Lengths), like=_fold_like, operations=fold_operations)(_fold),
)


@operator(
    "fold_vocab_chunks",
    *(Problem, Asked, Lengths),
    like=lambda problem, asked, _lengths: _state_like(problem, asked) + statistics_like(problem, asked),
    operations=fold_operations,
    loop=_FOLD,
)
def _statistics_of(fold: Callable[..., list[Tensor]], problem: Problem, asked: Asked, lengths: Lengths) -> list[Tensor]:
    """Returns the state of every row, its statistics, and its top if it is asked for."""
    best = fold(problem, asked, lengths)
    state = _pop_state(best, asked)
    rows = [v.clone() if v is state.total else v for v in _finished(problem, state).present()]
    return [*state.present(), *rows, *best]


class _Summing(NamedTuple):
    """The options of the pass that sums a loss."""

    with_statistics: bool


def _sum_like(
    problem: Problem,
    _coefficients: Coefficients,
    _divisor: Divisor,
    _classes: Classes,
    asked: Asked,
    summing: _Summing,
    _lengths: Lengths,
) -> list[Tensor]:
    one = problem.hidden.new_empty((), dtype=statistics_dtype(problem.hidden.dtype))
    rows = statistics_like(problem, asked) if summing.with_statistics else ()
    return [*_state_like(problem, asked), one, torch.empty_like(one), *rows]


@operator(
    "sum_vocab_chunks",
    *(Problem, Coefficients, Divisor, Classes, Asked, _Summing, Lengths),
    like=_sum_like,
    operations=fold_operations,
    loop=_FOLD,
)
def _sum(
    fold: Callable[..., list[Tensor]],
    problem: Problem,
    coefficients: Coefficients,
    divisor: Divisor,
    classes: Classes,
    asked: Asked,
    summing: _Summing,
    lengths: Lengths,
) -> list[Tensor]:
    """Returns the state of every row, the factor of its gradients, the loss, and, if wanted, the masked statistics."""
    state = _pop_state(fold(problem, asked, lengths), asked)
    known, active = _finished(problem, state), classes.active(problem.labels)
    loss = combine(known, coefficients, problem.labels, classes).sum()
    loss, factor = divisor.divide_with_factor(active, loss, None)
    rows = masked(known, active).present() if summing.with_statistics else ()
    return [*state.present(), factor, loss, *rows]


class _Relative(NamedTuple):
    """The numbers to which an `Upstream` is relative."""

    maximum: Tensor  # of each row
    scale: Tensor | None  # a divisor, for fp16


def _gradients_like(problem: Problem, needs: Needs) -> list[Tensor]:
    gradients = Gradients.empty(*problem[:3], needs)
    if gradients.d_bias is not None and problem.bias is not None:
        gradients = gradients._replace(d_bias=torch.empty_like(problem.bias))
    return gradients.present()


def _gradient_operations(problem: Problem, needs: Needs) -> int:
    return (1 + needs.needs_hidden + needs.needs_weight) * product(problem)


def _accumulated(
    problem: Problem, upstream: Upstream, relative: _Relative, classes: Classes, needs: Needs, lengths: Lengths
) -> list[Tensor]:
    """Returns the gradients that are needed, of the coefficients of the logits' gradient."""
    hidden, weight, bias = problem[:3]
    maximum, scale = relative
    accumulate_dtype = lengths.plan("vocab", hidden).accumulate_dtype
    gradients = Gradients.empty(hidden, weight, bias, needs, hidden_dtype=accumulate_dtype)
    counted = gemm.Counted.of(classes.active(problem.labels), hidden)
    rows = (problem.labels, problem.inverse_temperature, maximum, *upstream)
    for start, columns, head, z in _chunks(problem, lengths):
        execution.run(bodies.gradient, z, rows, head, [z], compiled=lengths.compiled, classes=classes)
        gemm.accumulate_gradients(*gradients, z, hidden, columns, counted, 0, start, scale)
    del z
    d_hidden, _, d_bias = gradients
    if d_hidden is not None and (scale is not None or d_hidden.dtype != hidden.dtype):
        d_hidden = gemm.scaled_(d_hidden, maximum.new_ones(()) if scale is None else scale, hidden.dtype)
    if bias is not None and d_bias is not None:
        d_bias = (d_bias if scale is None else d_bias * scale).to(bias.dtype)
    return gradients._replace(d_hidden=d_hidden, d_bias=d_bias).present()


_ACCUMULATED = Loop(
    "vocab",
    _accumulated,
    operator(
        "accumulate_vocab_chunks",
        *(Problem, Upstream, _Relative, Classes, Needs, Lengths),
        like=lambda problem, _upstream, _relative, _classes, needs, _lengths: _gradients_like(problem, needs),
        operations=lambda problem, _upstream, _relative, _classes, needs, _lengths: _gradient_operations(
            problem, needs
        ),
    )(_accumulated),
)


@operator(
    "vocab_chunks_gradients",
    *(Problem, State, _Sought, Classes, Needs, Lengths),
    like=lambda problem, _state, _sought, _classes, needs, _lengths: _gradients_like(problem, needs),
    operations=lambda problem, _state, _sought, _classes, needs, _lengths: _gradient_operations(problem, needs),
    loop=_ACCUMULATED,
)
def _gradients(
    accumulated: Callable[..., list[Tensor]],
    problem: Problem,
    state: State,
    sought: _Sought,
    classes: Classes,
    needs: Needs,
    lengths: Lengths,
) -> list[Tensor]:
    """Returns the gradients that are needed."""
    upstream = sought.upstream(state, problem.labels, classes)
    scale = unit_scale(problem.hidden.dtype, *upstream)
    if scale is not None:
        upstream = upstream.map(lambda g: g / scale)
    return accumulated(problem, upstream, _Relative(state.maximum, scale), classes, needs, lengths)


def _d_problem(ctx: Any, problem: Problem, state: State, sought: _Sought, options: _Options) -> Problem:
    """Returns the gradients of the parts of the problem that may have one."""
    wanted, _ = unpack(ctx.needs_input_grad, Problem)
    needs = Needs(wanted.hidden, wanted.weight, wanted.bias)
    with without_autocast(problem.hidden.device):  # backward may be called under autocast
        found = _gradients(problem, state, sought, options.classes, needs, options.lengths)
    hidden, weight, bias = Gradients.pop_from(found, needs, problem.bias)
    return none(Problem)._replace(hidden=hidden, weight=weight, bias=bias)  # type: ignore[no-any-return]


class _Statistics(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *args: Any) -> tuple[Tensor | None, ...]:
        problem, options, _ = unpack(args, Problem, _Options)
        found, asked = _statistics_of(problem, options.asked, options.lengths), options.asked
        state = _pop_state(found, asked)
        ctx.save_for_backward(*problem, *state)
        ctx.set_materialize_grads(False)
        ctx.options = options
        rows, top_ = found_statistics(found, asked)
        return *rows, *(() if top_ is None else top_)

    @staticmethod
    def backward(
        ctx: Any,
        g_nll: Tensor | None,
        g_lse: Tensor | None,
        g_total: Tensor | None,
        g_entropy: Tensor | None,
        g_squares: Tensor | None,
        *_constants: None,
    ) -> tuple[Tensor | None, ...]:
        checks.first_derivative()
        problem, state, _ = unpack(ctx.saved_tensors, Problem, State)
        sought = _Sought(g_nll, g_lse, g_total, None, g_entropy, g_squares, None, None)
        return *_d_problem(ctx, problem, state, sought, ctx.options), *none(_Options)


class _WeightedSum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *args: Any) -> tuple[Tensor | None, ...]:
        problem, coefficients, divisor, options, _ = unpack(args, Problem, Coefficients, Divisor, _Options)
        classes, asked, lengths = options
        _, wanted, _ = unpack(ctx.needs_input_grad, Problem, Coefficients)
        summing = _Summing(with_statistics=asked.with_entropy or any(wanted))
        found = _sum(problem, coefficients, divisor, classes, asked, summing, lengths)
        state = _pop_state(found, asked)
        factor, loss, *rest = found
        known = none(RowStatistics)
        if rest:
            known = RowStatistics.of(rest, asked.wanted)
        rows = (known.nll, known.lse, known.total) if any(wanted) else (None, None, None)
        ctx.save_for_backward(*problem, *state, *coefficients, factor, *rows)
        ctx.set_materialize_grads(False)
        ctx.options = options
        return loss, *(known if asked.with_entropy else none(RowStatistics))

    @staticmethod
    def backward(ctx: Any, g: Tensor | None, *_statistics: None) -> tuple[Tensor | None, ...]:
        checks.first_derivative()
        d_problem, d_coefficients, rest = none(Problem), none(Coefficients), (*none(Divisor), *none(_Options))
        if g is None:
            return *d_problem, *d_coefficients, *rest
        found = unpack(ctx.saved_tensors, Problem, State, Coefficients)
        problem, state, coefficients, (factor, nll, lse, total) = found
        nll_, lse_, total_, square = coefficients
        sought = _Sought(nll_, lse_, total_, square, None, None, g, factor)
        d_problem = _d_problem(ctx, problem, state, sought, ctx.options)
        _, wanted, _ = unpack(ctx.needs_input_grad, Problem, Coefficients)
        if any(wanted):
            values = (nll, lse, total, lse.square())
            rows = [g * v if wants else None for v, wants in zip(values, wanted, strict=True)]
            d_coefficients = Coefficients(*rows)
        return *d_problem, *d_coefficients, *rest


@composite("vocab_chunks_statistics", Problem, Classes, Asked, Lengths)
def _statistics(problem: Problem, classes: Classes, asked: Asked, lengths: Lengths) -> list[Tensor]:
    """Returns the statistics and the top that are asked for."""
    found = _Statistics.apply(*problem, *_Options(classes, asked, lengths))
    return [v for v in found if v is not None]


@composite("weighted_vocab_chunks", Problem, Coefficients, Divisor, Classes, Asked, Lengths)
def _weighted_sum(
    problem: Problem, coefficients: Coefficients, divisor: Divisor, classes: Classes, asked: Asked, lengths: Lengths
) -> list[Tensor]:
    """Returns the loss and the masked statistics that are wanted."""
    found = _WeightedSum.apply(*problem, *coefficients, *divisor, *_Options(classes, asked, lengths))
    return [v for v in found if v is not None]
