"""What a body is given: a head, its labels, and the problem that both are a part of.

N tokens, H width, V vocabulary.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Head(NamedTuple):
    """What turns raw = h @ w.T + bias into z: outer * tanh(inner * raw) with a softcap, else outer * raw, or raw.

    bias and class_weights are [V]. `scales` are (inner, outer), [2], or outer, []: a tensor, for numbers kernels would
    be compiled again. `start`, the chunk's first column, is [1].
    """

    bias: Tensor | None
    class_weights: Tensor | None
    scales: Tensor | None
    start: Tensor | None = None

    def packed(self) -> Head:
        """The vectors in one tensor where there are two: NOTE [Few reads]."""
        if self.bias is None or self.class_weights is None:
            return self
        dtype = torch.promote_types(self.bias.dtype, self.class_weights.dtype)
        both = torch.stack((self.bias.to(dtype), self.class_weights.to(dtype)))
        return self._replace(bias=both, class_weights=None)

    def unpacked(self) -> Head:
        """What was packed, or was not."""
        if self.bias is None or self.bias.dim() == 1:
            return self
        bias, class_weights = self.bias.unbind()
        return self._replace(bias=bias, class_weights=class_weights)


def slack(head: Head, inverse_temperature: Tensor | None) -> Tensor | None:
    """How far a logit that equals the largest of its row may be from it; None for not at all.

    On a CPU with a softcap four units in the last place of the bound: there Inductor's tanh of several numbers at a
    time is another than that of one, and which of them a loop takes depends on what else is in it.
    """
    if head.scales is None or head.scales.dim() == 0 or head.scales.device.type != "cpu":
        return None
    outer = head.scales[1] * (4 * torch.finfo(head.scales.dtype).eps)
    return outer if inverse_temperature is None else outer * inverse_temperature


class Labels(NamedTuple):
    """The first operand of every body."""

    labels: Tensor  # [rows]


class Temperature(NamedTuple):
    """What a row's z is multiplied by at last, where rows have temperatures of their own: the `Head` has the others."""

    inverse: Tensor | None  # [rows]


class Problem(NamedTuple):
    """Logits that nobody holds: N tokens' hidden states, a head of V classes, and labels."""

    hidden: Tensor  # [N, H]
    weight: Tensor  # [V, H]
    bias: Tensor | None
    class_weights: Tensor | None
    scales: Tensor | None
    labels: Tensor  # [N], counted from the first of the classes
    inverse_temperature: Tensor | None  # [N]

    @staticmethod
    def of(hidden: Tensor, weight: Tensor, head: Head, labels: Tensor, inverse_temperature: Tensor | None) -> Problem:
        """Make a problem of these parts."""
        return Problem(hidden, weight, *head[:3], labels, inverse_temperature)

    @property
    def head(self) -> Head:
        """The head but for its weight."""
        return Head(self.bias, self.class_weights, self.scales)
