"""The elementwise mathematics of two distributions over one vocabulary: a student's logits, and a target.

`divergence_kinds` defines the summands. Here are the passes over rows that sum them over the vocabulary, and that form
the gradient with respect to the student's logits. A `LogitMap` turns the logits of each side into z. The cross-entropy
with labels is that of the student's z at temperature 1.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from compiled_loss.engine.collectives import all_reduced, largest
from compiled_loss.engine.math import divergence_kinds as kinds
from compiled_loss.engine.math.divergence_kinds import OVERLAP, Distributions, Kind, Pair
from compiled_loss.engine.math.logit_maps import times, times_row
from compiled_loss.engine.math.statistics import by_row
from compiled_loss.engine.operators import is_compiling

Output = tuple[Tensor, ...]


class Target(NamedTuple):
    """The target that the student's rows are compared with."""

    values: Tensor  # [rows, V] probabilities or logits, [rows, H of the target], or [rows, k] log-probabilities
    indices: Tensor | None = None  # [rows, k], the classes of the values, if no other log-probabilities are known
    weight: Tensor | None = None  # [V, H of the target], where the values are hidden states
    inverse_temperature: Tensor | None = None  # [rows, 1], of both sides, where rows have their own temperatures

    def map(self, change: Callable[[Tensor], Tensor]) -> Target:
        """Returns a copy with `change` applied to each tensor that has rows."""
        indices, inverse = (None if v is None else change(v) for v in (self.indices, self.inverse_temperature))
        return self._replace(values=change(self.values), indices=indices, inverse_temperature=inverse)


class Rows(NamedTuple):
    """Results of the first pass, [rows] each, from which a second pass forms the gradient.

    The maxima are of bounded logits, `LogitMap.bounded`; the log_sums are log sum(exp(z - max z)).
    """

    maximum: Tensor  # of the student
    log_sum: Tensor  # of the student, over the temperature; where only the target's top is known, of all other classes
    slope: Tensor | None  # sum(slope)
    target_maximum: Tensor | None
    target_log_sum: Tensor | None
    hard_log_sum: Tensor | None  # of the student's whole row at temperature 1
    overlap: Tensor | None  # alpha, where the slopes' coefficients depend on it

    def present(self) -> Output:
        """The fields that are not None."""
        return tuple([v for v in self if v is not None])

    @staticmethod
    def there(kind: Kind, labels: object, indices: object) -> tuple[bool, ...]:
        """Returns for each field whether it is present, given labels and indices that may be None."""
        whole = indices is None
        logits = whole and not kind.probabilities
        return (True, True, whole, logits, logits, labels is not None, whole and kind.of_overlap())

    @staticmethod
    def of(present: Sequence[Tensor], kind: Kind, labels: object, indices: object) -> tuple[Rows, list[Tensor]]:
        """Takes the fields from the front of a body's outputs, and returns the rest."""
        left = list(present)
        rows = Rows(*[left.pop(0) if field else None for field in Rows.there(kind, labels, indices)])  # type: ignore[arg-type]
        return rows, left


class Found(NamedTuple):
    """Results of a pass, [rows] each: first the terms of losses, then the statistics that are wanted."""

    divergence: Tensor
    cross_entropy: Tensor | None = None  # where there are labels
    student_entropy: Tensor | None = None
    teacher_entropy: Tensor | None = None
    acceptance: Tensor | None = None  # alpha
    student_mass: Tensor | None = None  # the probability of the target's top, where only the top is known
    teacher_mass: Tensor | None = None

    def present(self) -> Output:
        """The fields that are not None."""
        return tuple([v for v in self if v is not None])

    def statistics(self) -> Output:
        """Returns the fields that are part of no loss and have no gradient, if they are not None."""
        _, _, *statistics = self
        return tuple([v for v in statistics if v is not None])

    def map(self, change: Callable[[Tensor], Tensor]) -> Found:
        """Returns a copy with `change` applied to each field; None stays None."""
        return Found(*[None if v is None else change(v) for v in self])  # type: ignore[arg-type]

    @staticmethod
    def there(kind: Kind, labels: object, indices: object) -> tuple[bool, ...]:
        """Returns for each field whether it is present, given labels and indices that may be None."""
        whole = [kind.wants(name) for name in ("student_entropy", "teacher_entropy", "acceptance")]
        top = [indices is not None and kind.wants(name) for name in ("student_mass", "teacher_mass")]
        return (True, labels is not None, *whole, *top)

    @staticmethod
    def of(present: Sequence[Tensor], kind: Kind, labels: object, indices: object) -> Found:
        """Takes the fields from a body's outputs, of which there may be more."""
        left = list(present)
        return Found(*[left.pop(0) if field else None for field in Found.there(kind, labels, indices)])  # type: ignore[arg-type]


class RowGradients(NamedTuple):
    """The gradients with respect to each row's divergence and cross-entropy, [rows] each."""

    soft: Tensor
    hard: Tensor | None

    def counts(self) -> Tensor:
        """Returns True for the rows that have a gradient other than 0."""
        return self.soft != 0 if self.hard is None else (self.soft != 0) | (self.hard != 0)

    def map(self, change: Callable[[Tensor], Tensor]) -> RowGradients:
        """Returns a copy with `change` applied to each gradient; None stays None."""
        return RowGradients(change(self.soft), None if self.hard is None else change(self.hard))


def row(values: Tensor) -> Tensor:
    """Returns values of rows with a dimension for columns, [..., 1]."""
    return values.unsqueeze(-1)


def is_target(logits: Tensor, labels: Tensor) -> Tensor:
    """Returns True at the label's column of each row."""
    return torch.arange(logits.shape[-1], device=logits.device) == row(labels)


class Compared(NamedTuple):
    """Rows of a student's logits with a target of which all classes are known."""

    kind: Kind
    pair: Pair
    logits: Tensor  # [rows, V], the student's with their bias, in fp32
    target: Tensor  # [rows, V], probabilities, or logits with their bias
    kept: Tensor | None = None  # [rows, V], the bounded logits, in eager code: bodies.py, NOTE [Computed again]

    @staticmethod
    def of(kind: Kind, logits: Tensor, target: Tensor, pair: Pair) -> Compared:
        """Makes it from the student's logits and the target's logits or probabilities."""
        biased = pair.student.biased(logits)
        kept = None if is_compiling() else pair.student.bounded(biased)
        return Compared(kind, pair, biased, pair.target.biased(target), kept)

    def _relative(self, maximum: Tensor) -> Tensor:
        """Returns the student's z minus a row's maximum, without the temperature of `over_temperature`."""
        return self.pair.student.scaled(self._bounded() - row(maximum))

    def _bounded(self) -> Tensor:
        return self.pair.student.bounded(self.logits) if self.kept is None else self.kept

    def fold(self, labels: Tensor | None, group: str | None) -> tuple[Rows, Found]:
        """Returns the `Rows` and the `Found`; over a group this takes three collectives."""
        kind, pair, logits, target, _ = self
        student, beside = pair.student, pair.target
        # The maximum is taken before the tanh, which keeps the order: this saves one tanh per logit. It is detached,
        # because no result depends on the shift.
        maxima = [largest(logits.detach()), *([] if kind.probabilities else [largest(target.detach())])]
        maximum, *target_maximum = all_reduced(maxima, "max", group)
        maximum, target_maximum = by_row(student.bounded(maximum)), [by_row(beside.bounded(m)) for m in target_maximum]
        exponentials = [pair.over_temperature(self._relative(maximum)).exp().sum(-1)]
        exponentials += [beside.scaled(beside.bounded(target) - row(m)).exp().sum(-1) for m in target_maximum]
        exponentials += [] if labels is None else [self._relative(maximum).exp().sum(-1)]
        log_sum, *log_sums = [by_row(value.log()) for value in all_reduced(exponentials, "sum", group)]
        rows = Rows(maximum, log_sum, None, None, None, None, None)
        if target_maximum:
            rows = rows._replace(target_maximum=target_maximum[0], target_log_sum=log_sums[0])
        addends = kinds.addends(kind, self.distributions(rows), pair)
        if labels is not None:
            addends["label"] = torch.where(is_target(logits, labels), self._relative(maximum), 0.0)
        sums = dict(zip(addends, all_reduced([v.sum(-1) for v in addends.values()], "sum", group), strict=True))
        rows = rows._replace(slope=kinds.slope_sum(kind, pair, sums))
        if kind.of_overlap():
            rows = rows._replace(overlap=sums[OVERLAP])
        found = Found(
            kinds.divergence(kind, pair, sums),
            student_entropy=sums.get("student_entropy"),
            teacher_entropy=sums.get("teacher_entropy"),
            acceptance=sums[OVERLAP].clone() if kind.wants("acceptance") else None,  # no body returns a tensor twice
        )
        if labels is None:
            return rows, found.map(by_row)
        found = found._replace(cross_entropy=log_sums[-1] - sums["label"])
        return rows._replace(hard_log_sum=log_sums[-1]), found.map(by_row)

    def gradient(self, labels: Tensor | None, rows: Rows, upstream: RowGradients, dtype: torch.dtype) -> Tensor:
        """Returns the gradient of sum(soft * divergence + hard * cross-entropy) by the student's raw logits."""
        kind, pair, student = self.kind, self.pair, self.pair.student
        assert rows.slope is not None
        soft, hard = upstream.map(lambda g: times_row(g, student.factor()))
        both = self.distributions(rows)
        slopes = kinds.slope(kind, both, pair, rows.overlap)
        d = row(times_row(soft, pair.inverse_temperature)) * (slopes - both.a.exp() * row(rows.slope))
        if labels is not None and hard is not None and rows.hard_log_sum is not None:
            p = (self._relative(rows.maximum) - row(rows.hard_log_sum)).exp()
            d = d + row(hard) * (p - torch.where(is_target(d, labels), 1.0, 0.0))
        return over(self.logits, times(d, student.slope(self._bounded())), upstream).to(dtype)

    def distributions(self, rows: Rows) -> Distributions:
        """Returns both distributions, given the `Rows`."""
        pair, target, beside = self.pair, self.target, self.pair.target
        a = pair.over_temperature(self._relative(rows.maximum)) - row(rows.log_sum)
        if rows.target_maximum is None or rows.target_log_sum is None:
            return Distributions(a, target, None)
        b = beside.scaled(beside.bounded(target) - row(rows.target_maximum)) - row(rows.target_log_sum)
        return Distributions(a, b.exp(), b)


def over(logits: Tensor, d: Tensor, upstream: RowGradients) -> Tensor:
    """Returns the gradient d, with 0 in rows that have no loss, whatever these rows and their target hold.

    Where a logit is NaN the result is set to NaN, which d is there anyway. This makes the last expression read the
    logits. Inductor cuts a long expression in two, and would otherwise not write the result over the logits. The test
    is a comparison, because Inductor's `isnan` takes one number at a time on a CPU.
    """
    return torch.where(row(upstream.counts()), torch.where(logits <= math.inf, d, logits), 0.0)
