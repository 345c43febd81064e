"""The mathematics of `divergences` for a target of which only the top is known: k classes of each row.

NOTE [Tail]
All other classes are compared as one class, the tail. Its probability is the sum of theirs, for the student as for the
target. The result is the divergence of two distributions over k + 1 classes. It is at most the divergence over all
classes (data processing inequality), and equal to it where k is V. The target says nothing about the classes within the
tail, and the gradient keeps the student's proportions there.

Over ranks, each rank looks up those of the k classes that it has, and the ranks sum [rows, k]. Then every rank knows
the whole top.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from compiled_loss.engine.collectives import all_reduced, largest
from compiled_loss.engine.math.divergence_kinds import Kind, Pair
from compiled_loss.engine.math.divergences import Compared, Found, RowGradients, Rows, is_target, over, row
from compiled_loss.engine.math.logit_maps import LogitMap, times, times_row
from compiled_loss.engine.math.statistics import statistics_dtype


class Place(NamedTuple):
    """The columns of a top's classes among the columns of a rank."""

    columns: Tensor  # [rows, k]; for a class that the rank does not have, a column of the top that it has, or 0
    ours: Tensor  # [rows, k] bool, whether the rank has the class

    @staticmethod
    def of(indices: Tensor, columns: int) -> Place:
        """Makes the place of classes that are counted from the rank's first, among so many columns."""
        ours = (indices >= 0) & (indices < columns)
        found = torch.where(ours, indices, 0)
        return Place(torch.where(ours, indices, row(found.amax(-1))), ours)

    def take(self, logits: Tensor, values: Tensor, student: LogitMap, group: str | None) -> Tensor:
        """Returns the top's logits with bias, in fp32, of all ranks; -inf where the target's `values` are -inf."""
        if logits.shape[-1] == 0:
            top = logits.new_zeros(self.columns.shape, dtype=statistics_dtype(logits.dtype))
        else:
            bias = None if student.bias is None else student.bias[self.columns]
            chosen = student._replace(bias=bias).biased(finite(logits.gather(-1, self.columns), student))
            top = torch.where(self.ours, chosen, 0.0)
        (top,) = all_reduced([top], "sum", group)
        return torch.where(values.isneginf(), float("-inf"), top)

    def put(self, base: Tensor, values: Tensor) -> Tensor:
        """Returns a copy of `base`, [rows, columns], with the values of the top's classes that the rank has."""
        return base.clone() if base.shape[-1] == 0 else base.scatter(-1, self.columns, self._written(base, values))

    def put_(self, base: Tensor, values: Tensor) -> None:
        """Writes into `base` the values of the top's classes that the rank has."""
        if base.shape[-1]:
            base.scatter_(-1, self.columns, self._written(base, values))

    def _written(self, base: Tensor, values: Tensor) -> Tensor:
        """Returns the values to write at `columns`.

        A class that the rank does not have points to the column of a class that it has, and writes the same value as
        that one. If the rank has none of the row's classes, the value that is there is written again.
        """
        pointed = self.ours & (self.columns == row(self.columns.amax(-1)))
        again = torch.where(pointed, values, 0.0).sum(-1)
        again = torch.where(self.ours.any(-1), again, base[..., 0])
        return torch.where(self.ours, values, row(again)).to(base.dtype)


def finite(logits: Tensor, student: LogitMap) -> Tensor:
    """Returns the logits with -inf replaced by the least finite number, if there is a tanh.

    Then -inf marks only the classes of the top, which are taken out.
    """
    return logits if student.inner is None else logits.clamp(min=torch.finfo(logits.dtype).min)


def finite_(logits: Tensor, student: LogitMap) -> None:
    """Makes the logits finite in place."""
    if student.inner is not None:
        logits.clamp_(min=torch.finfo(logits.dtype).min)


class TopCompared(NamedTuple):
    """Rows of a student's logits with a target of which only the top is known."""

    kind: Kind
    pair: Pair
    rest: Tensor  # [rows, V], the student's logits with their bias, in fp32; in `fold` -inf where the top is
    top: Tensor  # [rows, k], the top's, of all ranks
    indices: Tensor  # [rows, k], counted from a rank's first class
    values: Tensor  # [rows, k], the target's log-probabilities, in fp32; -inf where there is no class
    whole: bool  # whether all classes may be in the top
    absent: Tensor | None  # [rows, V] bool, where the rest's logits are -inf; only with a tanh, which makes them finite

    @staticmethod
    def of(
        kind: Kind, logits: Tensor, top: Tensor, indices: Tensor, values: Tensor, pair: Pair, group: str | None
    ) -> TopCompared:
        """Makes it from the logits, and from the logits of the top with their bias."""
        whole = group is None and indices.shape[-1] == logits.shape[-1]
        rest, absent = pair.student.biased(logits), None
        if pair.inner is not None:
            absent = logits == float("-inf")
            rest = torch.where(absent, float("-inf"), rest)
        return TopCompared(kind, pair, rest, top, indices, values.to(top.dtype), whole, absent)

    def fold(self, labels: Tensor | None, group: str | None) -> tuple[Rows, Found]:
        """Returns the `Rows` and the `Found`; over a group this takes two collectives, after that of `Place.take`."""
        pair, student = self.pair, self.pair.student
        (maximum,) = all_reduced([largest(self.rest.detach())], "max", group)
        maximum = student.bounded(torch.maximum(maximum, self.top.detach().amax(-1)))
        rest, top = (student.scaled(v - row(maximum)) for v in self._bounded())
        sums = [pair.over_temperature(rest).exp().sum(-1)]
        if labels is not None:
            sums += [rest.exp().sum(-1), torch.where(is_target(rest, labels), rest, 0.0).sum(-1)]
        log_sum, *hard = all_reduced(sums, "sum", group)
        rows = Rows(maximum, log_sum.log(), None, None, None, None, None)
        found = self._found(rows)
        if labels is None:
            return rows, found
        hard_log_sum = (hard[0] + top.exp().sum(-1)).log()
        known = self.indices == row(labels)
        target_logit = torch.where(known.any(-1), torch.where(known, top, 0.0).sum(-1), hard[1])
        return rows._replace(hard_log_sum=hard_log_sum), found._replace(cross_entropy=hard_log_sum - target_logit)

    def gradient(
        self, labels: Tensor | None, rows: Rows, upstream: RowGradients, dtype: torch.dtype
    ) -> tuple[Tensor, Tensor]:
        """Returns the gradients by the student's raw logits and by those of the top.

        They are of sum(soft * divergence + hard * cross-entropy).
        """
        coarse, pair, student = self._coarse(rows), self.pair, self.pair.student
        coarse = coarse._replace(kind=coarse.kind._replace(statistics=""))
        known, _ = coarse.fold(None, None)
        soft, hard = upstream.map(lambda g: times_row(g, student.factor()))
        d = coarse.gradient(None, known, RowGradients(times_row(soft, pair.inverse_temperature), None), soft.dtype)
        d_top = d[..., : self.indices.shape[-1]]
        d_tail = torch.where(_is_tail(d), d, 0.0).sum(-1)  # a sum is written out: NOTE [Few reads]
        rest, top = (student.scaled(v - row(rows.maximum)) for v in self._bounded())
        d_rest = row(d_tail) * (pair.over_temperature(rest) - row(_finite(rows.log_sum))).exp()
        if labels is not None and hard is not None and rows.hard_log_sum is not None:
            rest, top = rest - row(rows.hard_log_sum), top - row(rows.hard_log_sum)
            d_rest = d_rest + row(hard) * (rest.exp() - torch.where(is_target(rest, labels), 1.0, 0.0))
            d_top = d_top + row(hard) * (top.exp() - torch.where(self.indices == row(labels), 1.0, 0.0))
        # These are slopes of the tanh itself, 0 at -inf. Slopes of `_bounded`, which is -inf there, would give NaN.
        slopes = [student.slope(student.bounded(v)) for v in (self.rest, self.top)]
        d_rest, d_top = times(d_rest, slopes[0]), times(d_top, slopes[1])
        d_top = torch.where(row(upstream.counts()), d_top, 0.0)
        return over(self.rest, d_rest, upstream).to(dtype), d_top.to(dtype)

    def _bounded(self) -> tuple[Tensor, Tensor]:
        """Returns the rest and the top after the tanh, with -inf where they were -inf."""
        rest, top = (self.pair.student.bounded(v) for v in (self.rest, self.top))
        if self.absent is None:
            return rest, top
        return torch.where(self.absent, float("-inf"), rest), torch.where(self.top.isneginf(), float("-inf"), top)

    def _found(self, rows: Rows) -> Found:
        """Returns the results for the k classes and the tail, with the mass of the k classes on both sides."""
        coarse = self._coarse(rows)
        known, found = coarse.fold(None, None)
        both = coarse.distributions(known)
        if self.kind.wants("student_mass"):
            found = found._replace(student_mass=torch.where(_is_tail(both.a), 0.0, both.a.exp()).sum(-1))
        if self.kind.wants("teacher_mass"):
            found = found._replace(teacher_mass=torch.where(_is_tail(both.p), 0.0, both.p).sum(-1))
        return found

    def _coarse(self, rows: Rows) -> Compared:
        """Returns the comparison of the k classes and the tail; with all V classes in the top the tail is empty."""
        _, top = self._bounded()
        z = self.pair.over_temperature(self.pair.student.scaled(top - row(rows.maximum)))
        t = self.values
        # The tail's 1 - sum(p) would cancel for a confident teacher. So the largest p is taken apart from the others,
        # and its 1 - p is computed as -expm1(log p).
        largest = torch.arange(t.shape[-1], device=t.device) == row(t.argmax(-1))
        left = torch.where(largest, -torch.expm1(t), -t.exp()).sum(-1)
        if self.whole:
            left = torch.where((t > float("-inf")).all(-1), 0.0, left)
        # Below eps, which 1 - sum cannot resolve, it counts as eps: otherwise a reverse KL would be infinite. It
        # counts as 0 where the student's tail has probability 0, too.
        least = torch.where(rows.log_sum.isinf(), 0.0, torch.finfo(t.dtype).eps)
        z = torch.cat([z, row(rows.log_sum)], -1)
        t = torch.cat([t, row(torch.where(left > torch.finfo(t.dtype).eps, left, least).log())], -1)
        return Compared(self.kind, self.pair.without_maps(), z, t)


def _is_tail(coarse: Tensor) -> Tensor:
    """Returns True at the tail's column, the last one."""
    return torch.arange(coarse.shape[-1], device=coarse.device) == coarse.shape[-1] - 1


def _finite(log_sum: Tensor) -> Tensor:
    return torch.where(log_sum.isinf(), 0.0, log_sum)
