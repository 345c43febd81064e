"""Row statistics of logits: the state that a loop over chunks carries, and the terms of losses that it becomes.

N tokens, V vocabulary. Every tensor here is [N] (or the leading shape of the logits) in fp32; fp64 for fp64 inputs.

NOTE [Relative statistics]
Take logits z with row maximum m. A token with p > 0.99 has a loss far smaller than the rounding error of its
log-sum-exp. At 1 - p < 1e-7, fp32 no longer distinguishes p from 1. So the engine never ends with a difference of two
numbers of the size of z, and it sums the other classes apart from the label's. With g = z[label] - m <= 0:

    o       = sum(exp(z - m)) over all classes but the label    s = o + exp(g)
    nll     = log1p(o exp(-g)), or log s - g where g is small   -log softmax(z)[label]
    entropy = log s - sum(exp(z - m) * (z - m)) / s             of softmax(z)
    lse     = m + log s
    total   = sum(c * z)                                        c the class weights, or 1
    squares = log1p(sum(exp(z - m)**2) exp(-2 g)) - 2 nll       log sum(softmax(z)**2), the sum without the label

The gradient of nll is p, and at the label -o / s, which is p - 1 with all its digits. The gradient of lse is p, of
entropy -p * (log p + entropy), of total c, and of squares 2 (p**2 / sum(p**2) - p).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor

from compiled_loss.engine.collectives import all_reduced
from compiled_loss.engine.operators import is_compiling


class Wanted(NamedTuple):
    """The statistics that are wanted besides nll, lse and `correct`, which are always computed."""

    total: bool = False
    entropy: bool = False
    squares: bool = False
    argmax: bool = False

    def union(self, other: Wanted) -> Wanted:
        """Returns the statistics that either of the two wants."""
        return Wanted(*[mine or theirs for mine, theirs in zip(self, other, strict=True)])


class State(NamedTuple):
    """The running sums that a loop carries from chunk to chunk; None for a statistic that is not wanted."""

    maximum: Tensor
    others: Tensor  # sum(exp(z - m)) without the label
    target_logit: Tensor
    total: Tensor | None
    moment: Tensor | None  # sum(exp(z - m) * (z - m)) without the label
    squares: Tensor | None  # sum(exp(z - m)**2) without the label
    argmax: Tensor | None  # the first maximum's column minus the label's

    def present(self) -> tuple[Tensor, ...]:
        """Returns the parts that are not None."""
        return tuple([v for v in self if v is not None])

    def map(self, change: Callable[[Tensor], Tensor]) -> State:
        """Returns a copy with `change` applied to each part; None stays None."""
        return self.replaced([change(v) for v in self.present()])

    @staticmethod
    def of(present: Iterable[Tensor], wanted: Wanted) -> State:
        """Makes the state from the parts that `present()` returned."""
        return State(*_in_place(present, (True, True, True, *wanted)))

    def replaced(self, present: Iterable[Tensor]) -> State:
        """Returns a state of the same parts with other values."""
        return State(*_in_place(present, [v is not None for v in self]))

    def all_reduced(self, group: str | None) -> State:
        """Returns the state of rows whose columns are spread over the ranks of a group.

        It takes two collectives, and a third for `argmax`.
        """
        if group is None:
            return self
        (maximum,) = all_reduced([self.maximum], "max", group)
        mine = self.rescaled(maximum)._replace(argmax=None)
        reduced = mine.replaced([maximum, *all_reduced(mine.present()[1:], "sum", group)])
        if self.argmax is None:
            return reduced
        first = torch.where(self.maximum == maximum, self.argmax, math.inf)
        return reduced._replace(argmax=-all_reduced([-first], "max", group)[0])

    def rescaled(self, maximum: Tensor) -> State:
        """Returns the same state relative to another maximum, which is at least as large.

        The clamp keeps 0 * -inf from becoming NaN.
        """
        by = self.maximum - maximum
        rescale = by.exp()
        moment, squares, argmax = self.moment, self.squares, self.argmax
        if moment is not None:
            moment = (moment + self.others * by.clamp(min=-1e4)) * rescale
        if squares is not None:
            squares = squares * (rescale * rescale)
        if argmax is not None:
            argmax = torch.where(by == 0, argmax, math.inf)
        others = self.others * rescale
        return self._replace(maximum=maximum, others=others, moment=moment, squares=squares, argmax=argmax)

    def with_(self, seen: State) -> State:
        """Returns the state of the columns of both, which are relative to the same maximum."""
        return self._replace(
            others=self.others + seen.others,
            target_logit=self.target_logit + seen.target_logit,
            total=_sum(self.total, seen.total),
            moment=_sum(self.moment, seen.moment),
            squares=_sum(self.squares, seen.squares),
            argmax=None if self.argmax is None or seen.argmax is None else torch.minimum(self.argmax, seen.argmax),
        )

    def softmax(self) -> Softmax:
        """Returns the softmax of rows of which every column has been seen."""
        gap = self.target_logit - self.maximum
        target = gap.exp()
        total = self.others + target
        moment = None if self.moment is None else (self.moment + target * gap.clamp(min=-1e4)) / total
        squares = None if self.squares is None else self.squares + target * target
        return Softmax(gap, target, total, moment, squares)


class Softmax(NamedTuple):
    """Sums over whole rows, from which the statistics and their gradients are computed."""

    gap: Tensor  # the label's z - m, at most 0
    target: Tensor  # its exponential
    total: Tensor  # sum(exp(z - m))
    moment: Tensor | None  # mean of z - m
    squares: Tensor | None  # sum(exp(z - m)**2)


class RowStatistics(NamedTuple):
    """The statistics of NOTE [Relative statistics].

    `correct` is True where the label's logit equals the maximum. `argmax`, int64, is the first maximum's column minus
    the label's column, so that it does not depend on where a rank's columns start.
    """

    nll: Tensor
    lse: Tensor
    total: Tensor | None
    entropy: Tensor | None
    squares: Tensor | None
    argmax: Tensor | None
    correct: Tensor

    def present(self) -> tuple[Tensor, ...]:
        """Returns the statistics that are not None."""
        return tuple([v for v in self if v is not None])

    @staticmethod
    def of(present: Iterable[Tensor], wanted: Wanted) -> RowStatistics:
        """Makes the statistics from the tensors that `present()` returned."""
        return RowStatistics(*_in_place(present, (True, True, *wanted, True)))

    @staticmethod
    def dtypes(dtype: torch.dtype, wanted: Wanted) -> list[torch.dtype]:
        """Returns the dtypes of `present()` if the dtype of the statistics is `dtype`."""
        every = [dtype] * 5 + [torch.int64, torch.bool]
        return [d for d, there in zip(every, (True, True, *wanted, True), strict=True) if there]

    def only(self, wanted: Wanted) -> RowStatistics:
        """Returns the same without the statistics that are not wanted."""
        optional = zip(self[2:6], wanted, strict=True)
        total, entropy, squares, argmax = [v if one else None for v, one in optional]
        return RowStatistics(self.nll, self.lse, total, entropy, squares, argmax, self.correct)

    def map(self, change: Callable[[Tensor], Tensor]) -> RowStatistics:
        """Returns a copy with `change` applied to each statistic; None stays None."""
        return RowStatistics(*[None if v is None else change(v) for v in self])  # type: ignore[arg-type]


def _in_place(present: Iterable[Tensor], there: Iterable[bool]) -> list[Any]:
    """Returns the values at the places that are there, and None at all others."""
    left = list(present)
    return [left.pop(0) if one else None for one in there]


def _sum(mine: Tensor | None, theirs: Tensor | None) -> Tensor | None:
    return None if mine is None or theirs is None else mine + theirs


class TopK(NamedTuple):
    """The k most probable classes of each token, the most probable first, [..., k] each; 0 where the token is ignored.

    `teacher_topk` of :func:`compiled_loss.linear_distillation` takes it, computed at the same temperature.

    `logprob`: log softmax(z) of these classes, detached.
    `ids`: int64.
    """

    logprob: Tensor
    ids: Tensor


class TokenStatistics(NamedTuple):
    """Statistics of each token, shaped like the labels; 0 and False where the token is ignored.

    `logprob`: log softmax(z)[label], fp32 (fp64 for fp64 inputs), at most 0.
    `logsumexp`: log sum exp(z).
    `entropy`: the entropy of softmax(z), from 0 to log V.
    `correct`: bool, True if the label's logit equals the largest one. Ties count, so it does not depend on the column
    order.
    `mean_logit`: sum(z) / V.
    `log_sum_sq_probs`: log sum softmax(z)**2, from -log V to 0: minus the Renyi entropy of order 2.
    `first_argmax`: int64, the class whose logit is the largest, the first of equal ones.
    `ids_logprob`: log-probabilities of the requested classes, [..., K].
    `top_k`: the most probable classes.

    A statistic that was not requested is None.
    """

    logprob: Tensor
    logsumexp: Tensor
    entropy: Tensor
    correct: Tensor
    mean_logit: Tensor | None = None
    log_sum_sq_probs: Tensor | None = None
    first_argmax: Tensor | None = None
    ids_logprob: Tensor | None = None
    top_k: TopK | None = None


NAMES = ("logprob", "logsumexp", "entropy", "correct", "mean_logit", "log_sum_sq_probs", "first_argmax")  # per token


def wanted(names: Mapping[str, bool]) -> Wanted:
    """Returns the row statistics from which the token statistics of these names are made, where they are True."""
    pairs = zip(Wanted._fields, ("mean_logit", "entropy", "log_sum_sq_probs", "first_argmax"), strict=True)
    return Wanted(**{field: names[name] for field, name in pairs})


def of_rows(rows: RowStatistics, labels: Tensor, size: int) -> TokenStatistics:
    """Returns the token statistics of rows with `size` classes; labels are counted from the first class of all."""
    return TokenStatistics(
        -rows.nll,
        rows.lse,
        cast(Tensor, rows.entropy),
        rows.correct,
        None if rows.total is None else rows.total / size,
        rows.squares,
        None if rows.argmax is None else rows.argmax + labels,
    )


def statistics_dtype(dtype: torch.dtype) -> torch.dtype:
    """Returns the dtype of statistics, losses and everything else that is [N]."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def initial_state(like: Tensor, shape: tuple[int, ...], wanted: Wanted) -> State:
    """Returns the state of rows of which no column has been seen.

    The maximum starts with a finite number, because -inf - -inf would be NaN.
    """
    dtype = statistics_dtype(like.dtype)
    every = (torch.finfo(dtype).min, 0.0, 0.0, 0.0, 0.0, 0.0, math.inf)
    there = (True, True, True, *wanted)
    values = [value for value, one in zip(every, there, strict=True) if one]
    return State.of([torch.full(shape, value, dtype=dtype, device=like.device) for value in values], wanted)


def finish(state: State, slack: Tensor | None = None) -> RowStatistics:
    """Returns the statistics of rows of which every column has been seen. `slack`: see `problem.slack`."""
    gap, _, total, moment, squares = state.softmax()
    near = gap > -1
    up = (-gap.clamp(min=-1)).exp()
    nll = torch.log1p(state.others * up)
    log_sum = torch.where(near, nll + gap, total.log())
    if squares is not None and state.squares is not None:
        squares = torch.where(near, torch.log1p(state.squares * (up * up)) - 2 * nll, squares.log() - 2 * log_sum)
    return RowStatistics(
        nll=torch.where(near, nll, log_sum - gap),
        lse=state.maximum + log_sum,
        total=state.total,
        entropy=None if moment is None else log_sum - moment,
        squares=squares,
        argmax=None
        if state.argmax is None
        else torch.where(state.argmax.isfinite(), state.argmax, 0.0).to(torch.int64),
        correct=state.target_logit >= (state.maximum if slack is None else state.maximum - slack),
    )


def masked(statistics: RowStatistics, active: Tensor) -> RowStatistics:
    """Returns the statistics with 0 and False for inactive rows, whatever their logits hold.

    The values are selected, not multiplied: 0 * NaN would be NaN.
    """
    return statistics.map(lambda v: v & active if v.dtype == torch.bool else torch.where(active, v, 0))


def depends_on(value: Tensor, *reductions: Tensor | None) -> Tensor:
    """Returns the value, in traced code as a result of the reductions.

    So every reduction of the logits comes before anything that uses the value. The compiler writes a gradient over its
    logits only if all their other readers are known to be done. The value becomes NaN where a reduction is NaN and the
    value is not 0.
    """
    if is_compiling():
        for reduction in reductions:
            if reduction is not None:
                value = torch.where(reduction.isnan() & (value != 0), reduction, value)
    return value


def by_row(value: Tensor) -> Tensor:
    """Returns the same numbers, [rows], in traced code in a form that Inductor computes one row at a time on a CPU.

    NOTE [One loop]
    On a CPU Inductor fuses the loops of a body into one loop over rows. A row then stays in the cache, and code is
    generated once. Inductor does so only if none of the loops takes several rows at a time. An int16 among a loop's
    numbers makes it take one row at a time. In a loop over columns it would do the same to columns. The exponential,
    which is never selected, makes Inductor write out the value instead of computing it again for each column.
    """
    if value.device.type != "cpu" or not is_compiling():
        return value
    if value.dtype == torch.bool:
        return value.to(torch.int16).to(torch.bool)
    never = (value > math.inf).to(torch.int16)
    return torch.where(never.to(torch.bool), value.detach().exp(), value)  # exp may overflow, and 0 * inf is NaN
