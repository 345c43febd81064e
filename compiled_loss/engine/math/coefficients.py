"""Losses as data: which rows count, what multiplies their statistics, and what the sum is divided by.

N tokens, V vocabulary. Every tensor here is [N] (or the leading shape of the logits) in fp32; fp64 for fp64 inputs.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from compiled_loss.engine.math.statistics import RowStatistics


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
        """The same classes, for labels that are counted from the class `start`."""
        return Classes(self.ignored - start, self.first - start, self.last - start)


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
        """The coefficients that are not None."""
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
