"""From raw logits to the logits that a head means: bias, scale, softcap and temperature, and their derivative."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from compiled_loss.engine.math.statistics import statistics_dtype


class LogitMap(NamedTuple):
    """What makes z of raw logits: z = outer * tanh(inner * (raw + bias)), or outer * (raw + bias) without `inner`.

    The scalars are tensors and positive, so z is in the order of raw + bias; `outer` may be each row's own, [rows, 1].
    None stands for a bias of 0 and a scale of 1. Rows are shifted by their maximum before `outer` multiplies them: that
    difference is exact where it is small.
    """

    bias: Tensor | None  # [V]
    inner: Tensor | None
    outer: Tensor | None

    def biased(self, raw: Tensor) -> Tensor:
        """Logits with their bias, in the dtype of statistics."""
        wide = raw.to(statistics_dtype(raw.dtype))
        return wide if self.bias is None else wide + self.bias.to(wide.dtype)

    def bounded(self, biased: Tensor) -> Tensor:
        """The tanh, which `outer` has still to multiply."""
        return biased if self.inner is None else torch.tanh(biased * self.inner)

    def scaled(self, bounded: Tensor) -> Tensor:
        """Bounded logits, or their differences, times `outer`."""
        return times(bounded, self.outer)

    def factor(self) -> Tensor | None:
        """The part of dz / d raw that all logits share; None for 1."""
        return self.outer if self.inner is None else times(self.inner, self.outer)

    def slope(self, bounded: Tensor) -> Tensor | None:
        """The part of dz / d raw that is each logit's own, the tanh's derivative; None for 1."""
        return None if self.inner is None else 1 - bounded * bounded


def times_row(value: Tensor, factor: Tensor | None) -> Tensor:
    """The product of each row's value, [rows], and a factor, which may be each row's, [rows, 1]."""
    return times(value, factor if factor is None or factor.dim() == 0 else factor.squeeze(-1))


def times(value: Tensor, factor: Tensor | None) -> Tensor:
    """The product, of which None is the factor 1."""
    return value if factor is None else value * factor
