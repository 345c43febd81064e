"""The mathematics of `divergences` where a target is known by its top alone: k classes of each row.

NOTE [Tail]
All other classes are compared as one, the tail: its probability is the sum of theirs on either side. That is the
divergence of the two distributions over k + 1 classes, at most that over all (data processing), and equal to it where k
is V. Within the tail the target says nothing, and the gradient leaves the student's proportions as they are.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from compiled_loss.engine.divergences import Compared, Kind, Pair, Rows, Target, hit, over, row, warmed
from compiled_loss.engine.gemm import logits
from compiled_loss.engine.statistics import statistics_dtype


class TopCompared(NamedTuple):
    """Rows of logits beside the top of a target."""

    kind: Kind
    pair: Pair
    rest: Tensor  # [rows, V], the student's logits before the temperature, in fp32
    top: Tensor  # [rows, k], of them
    indices: Tensor  # [rows, k]
    values: Tensor  # [rows, k], the target's log-probabilities, in fp32

    @staticmethod
    def of(kind: Kind, source: Tensor, weight: Tensor | None, target: Target, pair: Pair, *, fold: bool) -> TopCompared:
        """From logits, or from hidden states and a weight; `fold` needs a copy of the logits without the top."""
        assert target.indices is not None
        raw = logits(source, weight)
        dtype = statistics_dtype(raw.dtype)
        top = raw.gather(-1, target.indices)
        if fold:
            raw = raw.scatter(-1, target.indices, float("-inf"))
        return TopCompared(kind, pair, raw.to(dtype), top.to(dtype), target.indices, target.values.to(dtype))

    def fold(self, labels: Tensor | None, group: str | None) -> tuple[Rows, Tensor, Tensor | None]:
        """The rows, their divergence, and their cross-entropy with the labels; no rank has but some columns."""
        assert group is None
        maximum = torch.maximum(self.rest.detach().amax(-1), self.top.detach().amax(-1))
        rest, top = self.rest - row(maximum), self.top - row(maximum)
        rows = Rows(maximum, warmed(rest, self.pair).exp().sum(-1).log(), None, None, None, None)
        _, divergence, _ = self._coarse(rows).fold(None, None)
        if labels is None:
            return rows, divergence, None
        hard_log_sum = (rest.exp().sum(-1) + top.exp().sum(-1)).log()
        known = self.indices == row(labels)
        picked = torch.where(
            known.any(-1),
            torch.where(known, top, 0.0).sum(-1),
            torch.where(hit(rest, labels), rest, 0.0).sum(-1),
        )
        return rows._replace(hard_log_sum=hard_log_sum), divergence, hard_log_sum - picked

    def gradient(
        self, labels: Tensor | None, rows: Rows, soft: Tensor, hard: Tensor | None, dtype: torch.dtype
    ) -> Tensor:
        """Of sum(soft * divergence + hard * cross-entropy) with respect to the student's logits."""
        coarse = self._coarse(rows)
        known, _, _ = coarse.fold(None, None)
        inverse = self.pair.inverse_temperature
        d = coarse.gradient(None, known, soft if inverse is None else soft * inverse, None, soft.dtype)
        rest, d_top = self.rest - row(rows.maximum), d[..., : self.indices.shape[-1]]
        last = torch.arange(d.shape[-1], device=d.device) == d.shape[-1] - 1
        d_tail = torch.where(last, d, 0.0).sum(-1)  # a sum is written out: NOTE [Few reads]
        d_rest = row(d_tail) * (warmed(rest, self.pair) - row(_finite(rows.log_sum))).exp()
        if labels is not None and hard is not None and rows.hard_log_sum is not None:
            top = (self.top - row(rows.maximum)) - row(rows.hard_log_sum)
            d_top = d_top + row(hard) * (top.exp() - torch.where(self.indices == row(labels), 1.0, 0.0))
            rest = rest - row(rows.hard_log_sum)
            d_rest = d_rest + row(hard) * (rest.exp() - torch.where(hit(rest, labels), 1.0, 0.0))
        return over(self.rest, d_rest).to(dtype).scatter(-1, self.indices, d_top.to(dtype))

    def _coarse(self, rows: Rows) -> Compared:
        """The k classes and the tail, which is not there where k is V."""
        z = warmed(self.top - row(rows.maximum), self.pair)
        t = self.values
        if self.indices.shape[-1] < self.rest.shape[-1]:
            # 1 - sum(p), which for a confident teacher would cancel: the largest apart, and 1 - p as -expm1(log p).
            largest = torch.arange(t.shape[-1], device=t.device) == row(t.argmax(-1))
            left = torch.where(largest, -torch.expm1(t), -t.exp()).sum(-1)
            # Less than what 1 - sum can tell counts as that little, or a reverse KL were infinite; and as nothing where
            # the student, too, forbids the tail.
            least = torch.where(rows.log_sum.isinf(), 0.0, torch.finfo(t.dtype).eps)
            z = torch.cat([z, row(rows.log_sum)], -1)
            t = torch.cat([t, row(torch.where(left > torch.finfo(t.dtype).eps, left, least).log())], -1)
        return Compared(self.kind, Pair(None, self.pair.jsd_weight, None), z, t)


def _finite(log_sum: Tensor) -> Tensor:
    return torch.where(log_sum.isinf(), 0.0, log_sum)
