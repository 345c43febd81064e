"""Losses chunked over tokens: a chunk's gradient is formed while its logits are alive.

N tokens, H width, V vocabulary, C rows per chunk. If both gradients are wanted there are three GEMMs, 6 N H V
operations, all in forward. Only scalar losses are possible: the gradient of each row is needed before autograd gives
it, and a `RowLoss` supplies it. dH, dW and O(N) are kept between forward and backward. No [N, V] tensor is created, but
one [C, V].
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from compiled_loss import checks
from compiled_loss.engine import execution, gemm
from compiled_loss.engine.gradients import Gradients, Needs, UnscaledGradients, scaled_gradients
from compiled_loss.engine.math import bodies, row_losses
from compiled_loss.engine.math.coefficients import Classes, Divisor, unit_scale
from compiled_loss.engine.math.problem import Problem
from compiled_loss.engine.math.row_losses import Named
from compiled_loss.engine.math.statistics import RowStatistics, Wanted, statistics_dtype
from compiled_loss.engine.operators import Loop, composite, is_compiling, none, operator, unpack
from compiled_loss.engine.token_statistics import Asked, chunks, of_chunk, product, statistics_like
from compiled_loss.planner.plan import Lengths


class Inputs(NamedTuple):
    """The numbers and inputs of a `RowLoss`."""

    numbers: list[Tensor]  # [] each
    inputs: list[Tensor]  # [N, ...] each

    def flat(self) -> list[Tensor]:
        """Returns the numbers and inputs in one list, as autograd takes them."""
        return [*self.numbers, *self.inputs]

    @staticmethod
    def of(flat: Sequence[Tensor], numbers: int) -> Inputs:
        """Makes the inputs from the list that `flat()` returned."""
        return Inputs(list(flat[:numbers]), list(flat[numbers:]))


class _Forming(NamedTuple):
    """The options of the pass that forms gradients."""

    loss: str  # the name of a `RowLoss`
    group: str | None
    with_statistics: bool
    with_entropy: bool  # among the statistics

    def wanted(self) -> Wanted:
        """Returns the statistics that are wanted."""
        return Wanted(total=row_losses.uses_total(self.loss), entropy=self.with_entropy)


class _Options(NamedTuple):
    """The arguments that are not tensors."""

    classes: Classes
    needs: Needs
    forming: _Forming
    lengths: Lengths


def summed(
    problem: Problem,
    classes: Classes,
    loss: Named,
    inputs: Inputs,
    divisor: Divisor,
    needs: Needs,
    lengths: Lengths,
    group: str | None,
    *,
    with_statistics: bool = False,
    with_entropy: bool = False,
) -> tuple[Tensor, RowStatistics | None]:
    """Returns the sum of a `RowLoss` / divisor, differentiable, and, if wanted, the masked statistics, detached."""
    forming = _Forming(loss.name, group, with_statistics, with_entropy)
    total, *rest = _sum(problem, divisor, classes, needs, forming, lengths, loss, inputs)
    return total, RowStatistics.of(rest, forming.wanted()).map(Tensor.detach) if with_statistics else None


def kept(dtype: torch.dtype, lengths: Lengths) -> torch.dtype:
    """Returns the dtype in which dW is kept for backward; for fp16 it is wider, because the sums are not yet scaled."""
    return lengths.accumulate_dtype or (torch.float32 if dtype == torch.float16 else dtype)


def _known_like(problem: Problem, forming: _Forming) -> list[Tensor]:
    """Returns uninitialised tensors like the statistics that are wanted."""
    if not forming.with_statistics:
        return []
    return statistics_like(problem, Asked(*forming.wanted(), forming.group))


def _inputs_like(inputs: Inputs, forming: _Forming) -> list[Tensor]:
    """Returns uninitialised tensors like the inputs' gradients that are wanted."""
    return [torch.empty_like(inputs.inputs[i]) for i in row_losses.of(forming.loss).wanted]


def _loop_like(
    problem: Problem, inputs: Inputs, _classes: Classes, needs: Needs, forming: _Forming, lengths: Lengths
) -> list[Tensor]:
    hidden, weight, bias = problem[:3]
    gradients = Gradients.empty(hidden, weight, bias, needs, weight_dtype=kept(weight.dtype, lengths))
    losses = problem.labels.new_empty(problem.labels.shape, dtype=statistics_dtype(hidden.dtype))
    return [*gradients.present(), losses, *_inputs_like(inputs, forming), *_known_like(problem, forming)]


def _loop_operations(problem: Problem, _inputs: Any, _classes: Any, needs: Needs, *_rest: Any) -> int:
    return (1 + needs.needs_hidden + needs.needs_weight) * product(problem)


def _loop(
    problem: Problem, inputs: Inputs, classes: Classes, needs: Needs, forming: _Forming, lengths: Lengths
) -> list[Tensor]:
    """Returns the problem's gradients that are wanted, the rows' losses, the inputs' gradients, and statistics."""
    hidden, weight, bias = problem[:3]
    labels, head = problem.labels, problem.head.packed()
    body = bodies.logits_loss_and_gradient if row_losses.of(forming.loss).of_logits else bodies.fold_and_gradient
    accumulate_dtype = lengths.plan("tokens", hidden).accumulate_dtype
    gradients = Gradients.empty(hidden, weight, bias, needs, weight_dtype=accumulate_dtype)
    losses = labels.new_empty(labels.shape, dtype=statistics_dtype(hidden.dtype))
    d_inputs, known = _inputs_like(inputs, forming), _known_like(problem, forming)
    static: dict[str, Any] = {"classes": classes, "loss": forming.loss, "group": forming.group}
    if known:
        static |= {"statistics": True, "entropy": forming.with_entropy}
    counted = gemm.Counted.of(classes.active(labels), hidden)
    for chunk, z in chunks(hidden, weight, lengths):
        rows = of_chunk(chunk, labels, problem.inverse_temperature, *inputs.inputs)
        out = [z, *of_chunk(chunk, losses, *d_inputs, *known)]
        execution.run(body, z, rows, (*head, *inputs.numbers), out, compiled=lengths.compiled, **static)
        states = gemm.rows_of(hidden, chunk.start, z.shape[0])
        gemm.accumulate_gradients(*gradients, z, states, weight, counted, chunk.start, 0, None)
    del z
    return [*gradients.with_weight_in(kept(weight.dtype, lengths)).present(), losses, *d_inputs, *known]


_loop_operator = operator(
    "loop_token_chunks",
    *(Problem, Inputs, Classes, Needs, _Forming, Lengths),
    like=_loop_like,
    operations=_loop_operations,
)(_loop)


def _form_like(
    problem: Problem, inputs: Inputs, _divisor: Divisor, classes: Classes, needs: Needs, *rest: Any
) -> list[Tensor]:
    found = _loop_like(problem, inputs, classes, needs, *rest)
    gradients = Gradients.pop_from(found, needs, problem.bias)
    losses, *rows = found
    one = losses.new_empty(())
    return [*gradients.present(), one, torch.empty_like(one), *rows]


@operator(
    "form_token_chunks",
    *(Problem, Inputs, Divisor, Classes, Needs, _Forming, Lengths),
    like=_form_like,
    operations=lambda problem, inputs, _divisor, *rest: _loop_operations(problem, inputs, *rest),
    loop=Loop("tokens", _loop, _loop_operator),
)
def _form(
    loop: Callable[..., list[Tensor]],
    problem: Problem,
    inputs: Inputs,
    divisor: Divisor,
    classes: Classes,
    needs: Needs,
    forming: _Forming,
    lengths: Lengths,
) -> list[Tensor]:
    """Returns the problem's gradients, the factor of all gradients, the loss, the inputs' gradients, and statistics.

    The gradients are those that are wanted. The statistics, if they are wanted, are masked.
    """
    loss, numbers, rows = row_losses.of(forming.loss), *inputs
    unit = unit_scale(problem.hidden.dtype, *rows[: loss.linear])
    if unit is not None:
        rows = [c / unit if i < loss.linear else c for i, c in enumerate(rows)]
    found = loop(problem, Inputs(numbers, rows), classes, needs, forming, lengths)
    gradients = Gradients.pop_from(found, needs, problem.bias)
    active = classes.active(problem.labels)
    total, factor = divisor.divide_with_factor(active, found.pop(0).sum(), unit)
    d_inputs, known = found[: len(loss.wanted)], found[len(loss.wanted) :]
    if unit is not None:
        d_inputs = [d / unit if i < loss.linear else d for i, d in zip(loss.wanted, d_inputs, strict=True)]
    statistics_ = [v & active if v.dtype == torch.bool else v.masked_fill(~active, 0) for v in known]
    return [*gradients.present(), factor, total, *d_inputs, *statistics_]


class _Saved(NamedTuple):
    """Tensors that backward needs besides the inputs, which only a second backward needs."""

    d_hidden: Tensor | None
    d_weight: Tensor | None
    d_bias: Tensor | None
    factor: Tensor


class _TokenChunks(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *args: Any) -> tuple[Tensor, ...]:
        problem, divisor, options, loss, flat = unpack(args, Problem, Divisor, _Options, Named)
        inputs = Inputs.of(flat, loss.number_count)
        found = _form(problem, inputs, divisor, *options)
        gradients = Gradients.pop_from(found, options.needs, problem.bias)
        factor, total, *rest = found
        d_inputs, rest = rest[: len(loss.wanted)], rest[len(loss.wanted) :]
        again = (*problem, divisor.divisor, *flat)
        if is_compiling():
            again = (None,) * len(again)
        ctx.save_for_backward(*_Saved(*gradients, factor), *d_inputs, *again)
        ctx.dtypes = [None if v is None else v.dtype for v in (problem.hidden, problem.weight, problem.bias)]
        ctx.divisor, ctx.options, ctx.loss = divisor._replace(divisor=None), options, loss
        ctx.inputs, ctx.spent = len(inputs.inputs), False
        ctx.set_materialize_grads(False)
        return total, *rest

    @staticmethod
    def backward(ctx: Any, g: Tensor | None, *_statistics: None) -> tuple[Tensor | None, ...]:
        checks.first_derivative()
        loss, rest = ctx.loss, (*none(Divisor), *none(_Options), *none(Named), *[None] * ctx.loss.number_count)
        d_flat: list[Tensor | None] = [None] * ctx.inputs
        if g is None:
            return *none(Problem), *rest, *d_flat
        saved, left = unpack(ctx.saved_tensors, _Saved)
        d_inputs, again = left[: len(loss.wanted)], left[len(loss.wanted) :]

        def form() -> UnscaledGradients:
            problem, (divisor, *flat) = unpack(again, Problem)
            found = _form(
                problem, Inputs.of(flat, loss.number_count), ctx.divisor._replace(divisor=divisor), *ctx.options
            )
            return UnscaledGradients(Gradients.pop_from(found, ctx.options.needs, problem.bias), found[0])

        found = scaled_gradients(ctx, UnscaledGradients(Gradients(*saved[:3]), saved.factor), g, ctx.dtypes, form)
        d_problem = none(Problem)._replace(hidden=found.d_hidden, weight=found.d_weight, bias=found.d_bias)
        for i, d in zip(loss.wanted, d_inputs, strict=True):
            d_flat[i] = g * saved.factor * d
        return *d_problem, *rest, *d_flat


@composite("sum_token_chunks", Problem, Divisor, Classes, Needs, _Forming, Lengths, Named, Inputs)
def _sum(
    problem: Problem,
    divisor: Divisor,
    classes: Classes,
    needs: Needs,
    forming: _Forming,
    lengths: Lengths,
    loss: Named,
    inputs: Inputs,
) -> tuple[Tensor, ...]:
    """Returns the loss and the masked statistics that are wanted."""
    options = _Options(classes, needs, forming, lengths)
    return _TokenChunks.apply(*problem, *divisor, *options, *loss, *inputs.flat())  # type: ignore[no-any-return]
