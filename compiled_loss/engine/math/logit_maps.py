"""The map from raw logits to z, by bias, scale, softcap and temperature, and its derivative."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from compiled_loss.engine.math.statistics import statistics_dtype


class LogitMap(NamedTuple):
    """The map from raw logits to z: outer * tanh(inner * (raw + bias)), or outer * (raw + bias) without `inner`.

    The scalars are positive tensors, so z has the order of raw + bias. `outer` may differ between rows, [rows, 1]. None
    stands for a bias of 0 and a scale of 1. A row's maximum is subtracted before `outer` multiplies, because that
    difference is exact where it is small.
    """

    bias: Tensor | None  # [V]
    inner: Tensor | None
    outer: Tensor | None

    def biased(self, raw: Tensor) -> Tensor:
        """Returns the logits with their bias, in the dtype of statistics."""
        wide = raw.to(statistics_dtype(raw.dtype))
        return wide if self.bias is None else wide + self.bias.to(wide.dtype)

    def bounded(self, biased: Tensor) -> Tensor:
        """Returns the tanh of the logits, which is still to be multiplied by `outer`; without a softcap, the logits."""
        return biased if self.inner is None else torch.tanh(biased * self.inner)

    def scaled(self, bounded: Tensor) -> Tensor:
        """Returns bounded logits, or their differences, times `outer`."""
        return times(bounded, self.outer)

    def factor(self) -> Tensor | None:
        """Returns the part of dz / d raw that all logits share; None for 1."""
        return self.outer if self.inner is None else times(self.inner, self.outer)

    def slope(self, bounded: Tensor) -> Tensor | None:
        """Returns the part of dz / d raw that is each logit's own, the derivative of tanh; None for 1."""
        return None if self.inner is None else 1 - bounded * bounded


def times_row(value: Tensor, factor: Tensor | None) -> Tensor:
    """Returns each row's value, [rows], times a factor, which may be each row's own, [rows, 1]."""
    return times(value, factor if factor is None or factor.dim() == 0 else factor.squeeze(-1))


def times(value: Tensor, factor: Tensor | None) -> Tensor:
    """Returns value * factor; None is the factor 1."""
    return value if factor is None else value * factor
