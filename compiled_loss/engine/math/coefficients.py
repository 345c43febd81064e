"""Losses as data: the rows that count, the coefficients of their statistics, and the divisor of the sum.

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
    """The meaning of labels: `ignored` marks a row that does not count, and `first` to `last` - 1 are classes.

    A row that does not count has no gradient, whatever its logits and its statistics hold. The three numbers are not
    tensors: they are constants of a kernel.
    """

    ignored: int
    first: int
    last: int

    def active(self, labels: Tensor) -> Tensor:
        """Returns True for the rows that count."""
        return labels != self.ignored

    def invalid(self, labels: Tensor) -> Tensor:
        """Returns True for the rows that count and whose label is no class."""
        return self.active(labels) & ((labels < self.first) | (labels >= self.last))

    def nan_if_invalid(self, labels: Tensor, dtype: torch.dtype) -> Tensor:
        """Returns NaN for the invalid rows, and 1 for the rest."""
        return torch.ones_like(labels, dtype=dtype).masked_fill(self.invalid(labels), math.nan)

    def counted_from(self, start: int) -> Classes:
        """The same classes, for labels that are counted from the class `start`."""
        return Classes(self.ignored - start, self.first - start, self.last - start)


class Coefficients(NamedTuple):
    """A loss as data: nll * stats.nll + lse * stats.lse + total * stats.total + square * stats.lse**2, summed.

    If `nll` is None, it is 1, but NaN for a row that counts and whose label is no class. The others are 0 if None.
    """

    nll: Tensor | None
    lse: Tensor | None
    total: Tensor | None
    square: Tensor | None

    def map(self, change: Callable[[Tensor], Tensor]) -> Coefficients:
        """Returns a copy with `change` applied to each coefficient; None stays None."""
        return Coefficients(*[None if v is None else change(v) for v in self])

    def present(self) -> list[Tensor]:
        """The coefficients that are not None."""
        return [v for v in self if v is not None]

    def label_weight(self, labels: Tensor, classes: Classes, dtype: torch.dtype) -> Tensor:
        """The coefficient of nll."""
        return classes.nan_if_invalid(labels, dtype) if self.nll is None else self.nll


class Divisor(NamedTuple):
    """The divisor of a sum of losses: the number of rows that count, a given tensor, a given number, or none."""

    of_rows: bool
    divisor: Tensor | None
    number: int | None

    def divide(self, active: Tensor, total: Tensor) -> Tensor:
        """Returns the total divided, with one rounding; 0 where the divisor is 0 and the total is finite.

        `active` marks the rows that count.
        """
        value = self._value(active, total.dtype)
        return total if value is None else total / value

    def divide_with_factor(self, active: Tensor, total: Tensor, unit: Tensor | None) -> tuple[Tensor, Tensor]:
        """Returns total * unit divided, and the factor unit / divisor of its gradients; a unit of None is 1."""
        value = self._value(active, total.dtype)
        if unit is not None:
            total = total * unit
        if value is None:
            return total, torch.ones_like(total) if unit is None else unit
        return total / value, value.reciprocal() if unit is None else unit / value

    def _value(self, active: Tensor, dtype: torch.dtype) -> Tensor | None:
        if self.of_rows:
            return active.sum(dtype=dtype).clamp(min=1)  # the total of no row is 0
        if self.number is not None:
            value = torch.full((), self.number, dtype=dtype, device=active.device)
        elif self.divisor is not None:
            value = self.divisor.to(dtype).reshape(())  # on its own device: no synchronisation
        else:
            return None
        return value.masked_fill(value == 0, math.inf)  # the gradient is 0, too


def combine(statistics: RowStatistics, coefficients: Coefficients, labels: Tensor, classes: Classes) -> Tensor:
    """Returns each row's loss, 0 where the row does not count."""
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
    """Returns a power of two near the largest of the rows' gradients; None if `dtype` needs no scale.

    The rows' gradients are divided by it before the gradient of the logits is formed. Without it, 99.8% of the entries
    of fp16 logits' gradients became zero at a normalisation of 1/65536. bf16 and fp32 have the exponent range and need
    none.
    """
    if dtype != torch.float16:
        return None
    present = [g for g in gradients if g is not None]
    if not present or not present[0].numel():
        return None
    largest = torch.stack([torch.where(g.isfinite(), g.abs(), 0.0).amax() for g in present]).amax()
    return torch.where(largest > 0, torch.exp2(largest.log2().floor()), 1.0)
