"""Row statistics of logits, and the linear combinations of them that losses are.

N tokens, V vocabulary. Every tensor here is [N] (or the leading shape of the logits) in fp32; fp64 for fp64 inputs.

NOTE [Relative statistics]
For logits z with row maximum m, a token with p > 0.99 has a loss far smaller than the rounding error of its
log-sum-exp, and at 1 - p < 1e-7 fp32 no longer tells p from 1. So the engine never subtracts two numbers of the size of
z at the end, and keeps the other classes apart from the label's: with g = z[label] - m <= 0,

    o       = sum(exp(z - m)) over all classes but the label    s = o + exp(g)
    nll     = log1p(o exp(-g)), or log s - g where g is small   -log softmax(z)[label]
    entropy = log s - sum(exp(z - m) * (z - m)) / s             of softmax(z)
    lse     = m + log s
    total   = sum(c * z)                                        c the class weights, or 1

The gradient of nll is p, and at the label -o / s, which is p - 1 with all its digits. Those of the others are
-p * (log p + entropy), p and c.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from compiled_loss.engine.collectives import all_reduced


class Classes(NamedTuple):
    """What labels mean: `ignored` is a row that does not count, from `first` to `last` - 1 they are classes.

    A row that does not count has no gradient, whatever its logits and its statistics hold. The numbers are not in
    tensors: a kernel knows them.
    """

    ignored: int
    first: int
    last: int

    def active(self, labels: Tensor) -> Tensor:
        """Which rows count."""
        return labels != self.ignored

    def invalid(self, labels: Tensor) -> Tensor:
        """Which rows count and have no class."""
        return self.active(labels) & ((labels < self.first) | (labels >= self.last))

    def nan_if_invalid(self, labels: Tensor, dtype: torch.dtype) -> Tensor:
        """NaN for the invalid rows, 1 for the others."""
        return torch.ones_like(labels, dtype=dtype).masked_fill(self.invalid(labels), math.nan)

    def counted_from(self, start: int) -> Classes:
        """The same, for labels that are counted from the class `start`."""
        return Classes(self.ignored - start, self.first - start, self.last - start)


class State(NamedTuple):
    """What a loop carries from chunk to chunk; `total` and `moment` are None where nobody asked for them."""

    maximum: Tensor
    others: Tensor  # sum(exp(z - m)) without the label
    target_logit: Tensor
    total: Tensor | None
    moment: Tensor | None  # sum(exp(z - m) * (z - m)) without the label

    def present(self) -> tuple[Tensor, ...]:
        """The parts that somebody asked for."""
        return tuple([v for v in self if v is not None])

    def map(self, change: Callable[[Tensor], Tensor]) -> State:
        """Each part changed; what is None stays None."""
        return self.replaced([change(v) for v in self.present()])

    @staticmethod
    def of(present: Sequence[Tensor], *, total: bool, entropy: bool) -> State:
        """From `present()`."""
        maximum, others, target_logit, *rest = present
        return State(maximum, others, target_logit, rest[0] if total else None, rest[-1] if entropy else None)

    def replaced(self, present: Sequence[Tensor]) -> State:
        """The same parts with other values."""
        values = list(present)
        total = None if self.total is None else values[3]
        return State(values[0], values[1], values[2], total, None if self.moment is None else values[-1])

    def all_reduced(self, group: str | None) -> State:
        """The state of rows whose columns are spread over the ranks of a group: two collectives."""
        if group is None:
            return self
        (maximum,) = all_reduced([self.maximum], "max", group)
        return self.replaced([maximum, *all_reduced(self.rescaled(maximum).present()[1:], "sum", group)])

    def rescaled(self, maximum: Tensor) -> State:
        """The same relative to a maximum at least as large; the clamp keeps 0 * -inf from becoming NaN."""
        by = self.maximum - maximum
        rescale = by.exp()
        moment = self.moment
        if moment is not None:
            moment = (moment + self.others * by.clamp(min=-1e4)) * rescale
        return self._replace(maximum=maximum, others=self.others * rescale, moment=moment)

    def softmax(self) -> Softmax:
        """Of rows whose every column has been seen."""
        gap = self.target_logit - self.maximum
        target = gap.exp()
        total = self.others + target
        moment = None if self.moment is None else (self.moment + target * gap.clamp(min=-1e4)) / total
        return Softmax(gap, target, total, moment)


class Softmax(NamedTuple):
    """What the statistics and their gradients are made of."""

    gap: Tensor  # the label's z - m, at most 0
    target: Tensor  # its exponential
    total: Tensor  # sum(exp(z - m))
    moment: Tensor | None  # mean of z - m


class RowStatistics(NamedTuple):
    """The statistics of NOTE [Relative statistics]; `correct` is True where the label's logit equals the maximum."""

    nll: Tensor
    lse: Tensor
    total: Tensor | None
    entropy: Tensor | None
    correct: Tensor

    def present(self) -> tuple[Tensor, ...]:
        """The statistics that somebody asked for."""
        return tuple([v for v in self if v is not None])

    @staticmethod
    def of(present: Sequence[Tensor], *, total: bool, entropy: bool) -> RowStatistics:
        """From `present()`."""
        nll, lse, *rest, correct = present
        return RowStatistics(nll, lse, rest[0] if total else None, rest[-1] if entropy else None, correct)

    def map(self, change: Callable[[Tensor], Tensor]) -> RowStatistics:
        """Each statistic changed; what is None stays None."""
        total, entropy = (None if v is None else change(v) for v in (self.total, self.entropy))
        return RowStatistics(change(self.nll), change(self.lse), total, entropy, change(self.correct))


class TokenStatistics(NamedTuple):
    """Statistics of each token, shaped like the labels; 0 and False where ignored.

    `logprob`: log softmax(z)[label], fp32 (fp64 for fp64 inputs), at most 0.
    `logsumexp`: log sum exp(z).
    `entropy`: of softmax(z), from 0 to log V.
    `correct`: bool, whether the label's logit equals the largest one. Ties count, so it depends on no order of columns.
    `mean_logit`: sum(z) / V.

    What was not wanted is None.
    """

    logprob: Tensor
    logsumexp: Tensor
    entropy: Tensor
    correct: Tensor
    mean_logit: Tensor | None = None


class Coefficients(NamedTuple):
    """A loss as data: nll * stats.nll + lse * stats.lse + total * stats.total + square * stats.lse**2, summed.

    None for `nll` is 1 for the rows that count, and NaN for those whose label is no class.
    """

    nll: Tensor | None
    lse: Tensor | None
    total: Tensor | None
    square: Tensor | None

    def map(self, change: Callable[[Tensor], Tensor]) -> Coefficients:
        """Each coefficient changed; what is None stays None."""
        return Coefficients(*[None if v is None else change(v) for v in self])

    def present(self) -> list[Tensor]:
        """Those that there are."""
        return [v for v in self if v is not None]

    def label_weight(self, labels: Tensor, classes: Classes, dtype: torch.dtype) -> Tensor:
        """The coefficient of nll."""
        return classes.nan_if_invalid(labels, dtype) if self.nll is None else self.nll


class Divisor(NamedTuple):
    """What a sum of losses is divided by: the number of rows that count, a number of its own, or nothing."""

    of_rows: bool
    divisor: Tensor | None
    number: int | None

    def divide(self, active: Tensor, *totals: Tensor) -> list[Tensor]:
        """Each total divided with one rounding; 0 where the divisor is 0 and the total finite. `active` rows count."""
        dtype = totals[0].dtype
        if self.of_rows:
            value = active.sum(dtype=dtype).clamp(min=1)  # a sum over no row is 0
        elif self.number is None and self.divisor is None:
            return list(totals)
        else:
            if self.number is not None:
                value = torch.full((), self.number, dtype=dtype, device=active.device)
            else:
                assert self.divisor is not None
                value = self.divisor.to(dtype).reshape(())  # on its own device: nothing waits for it
            value = value.masked_fill(value == 0, math.inf)  # the gradient is 0, too
        return [total / value for total in totals]


def statistics_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of statistics, losses and everything else that is [N]."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def initial_state(like: Tensor, shape: tuple[int, ...], *, total: bool, entropy: bool) -> State:
    """A state that has seen no column. The maximum starts finite: -inf - -inf would be NaN."""
    dtype = statistics_dtype(like.dtype)

    def full(value: float) -> Tensor:
        return torch.full(shape, value, dtype=dtype, device=like.device)

    return State(
        full(torch.finfo(dtype).min), full(0.0), full(0.0), full(0.0) if total else None, full(0.0) if entropy else None
    )


def finish(state: State) -> RowStatistics:
    """Statistics of rows whose every column has been seen."""
    gap, _, total, moment = state.softmax()
    near = gap > -1
    nll = torch.log1p(state.others * (-gap.clamp(min=-1)).exp())
    log_sum = torch.where(near, nll + gap, total.log())
    return RowStatistics(
        nll=torch.where(near, nll, log_sum - gap),
        lse=state.maximum + log_sum,
        total=state.total,
        entropy=None if moment is None else log_sum - moment,
        correct=state.target_logit == state.maximum,
    )


def masked(statistics: RowStatistics, active: Tensor) -> RowStatistics:
    """0 and False for inactive rows, whatever their logits hold: 0 * NaN would be NaN."""
    return statistics.map(lambda v: v & active if v.dtype == torch.bool else torch.where(active, v, 0.0))


def depends_on(value: Tensor, *reductions: Tensor | None) -> Tensor:
    """value, NaN where a reduction is NaN and it is not 0: every reduction of the logits comes before what uses it.

    The compiler writes a gradient over its logits only if all their other readers are known to be done.
    """
    for reduction in reductions:
        if reduction is not None:
            value = torch.where(reduction.isnan() & (value != 0), reduction, value)
    return value


def combine(statistics: RowStatistics, coefficients: Coefficients, labels: Tensor, classes: Classes) -> Tensor:
    """Each row's loss, 0 where it does not count."""
    loss = coefficients.label_weight(labels, classes, statistics.nll.dtype) * statistics.nll
    if coefficients.lse is not None:
        loss = loss + coefficients.lse * statistics.lse
    if coefficients.total is not None:
        assert statistics.total is not None
        loss = loss + coefficients.total * statistics.total
    if coefficients.square is not None:
        loss = loss + coefficients.square * statistics.lse.square()
    return loss.masked_fill(labels == classes.ignored, 0.0)


def unit_scale(dtype: torch.dtype, *gradients: Tensor | None) -> Tensor | None:
    """A power of two near the largest of the rows' gradients, to be taken out of them before they meet the logits.

    fp16 logits' gradients flushed to zero in 99.8% of entries at a normalisation of 1/65536; bf16 and fp32 have the
    exponent range and need none (None).
    """
    if dtype != torch.float16:
        return None
    present = [g for g in gradients if g is not None]
    if not present or not present[0].numel():
        return None
    largest = torch.stack([torch.where(g.isfinite(), g.abs(), 0.0).amax() for g in present]).amax()
    return torch.where(largest > 0, torch.exp2(largest.log2().floor()), 1.0)
