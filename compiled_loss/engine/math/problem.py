"""The operands of bodies: a head, labels, and the problem that both are parts of.

N tokens, H width, V vocabulary.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Head(NamedTuple):
    """The parameters of a head besides its weight: they turn raw = h @ w.T + bias into z.

    z is outer * tanh(inner * raw) with a softcap, outer * raw with only a scale, and raw with neither.

    bias and class_weights are [V]. `scales` is (inner, outer), [2], with a softcap, and outer, [], with only a scale.
    It is a tensor because kernels would be compiled again for each new number. `start`, [1], is the first column of the
    chunk.
    """

    bias: Tensor | None
    class_weights: Tensor | None
    scales: Tensor | None
    start: Tensor | None = None

    def packed(self) -> Head:
        """Returns the head with bias and class weights in one tensor if it has both: NOTE [Few reads]."""
        if self.bias is None or self.class_weights is None:
            return self
        dtype = torch.promote_types(self.bias.dtype, self.class_weights.dtype)
        both = torch.stack((self.bias.to(dtype), self.class_weights.to(dtype)))
        return self._replace(bias=both, class_weights=None)

    def unpacked(self) -> Head:
        """Returns the head with bias and class weights apart, whether it was packed or not."""
        if self.bias is None or self.bias.dim() == 1:
            return self
        bias, class_weights = self.bias.unbind()
        return self._replace(bias=bias, class_weights=class_weights)


def slack(head: Head, inverse_temperature: Tensor | None) -> Tensor | None:
    """Returns the distance from the largest logit of a row within which a logit counts as equal to it; None for 0.

    With a softcap on a CPU it is four units in the last place of the bound. There Inductor's vectorised tanh differs
    from its scalar tanh, and which of the two a loop uses depends on what else is in the loop.
    """
    if head.scales is None or head.scales.dim() == 0 or head.scales.device.type != "cpu":
        return None
    outer = head.scales[1] * (4 * torch.finfo(head.scales.dtype).eps)
    return outer if inverse_temperature is None else outer * inverse_temperature


class Labels(NamedTuple):
    """The first operand of every body."""

    labels: Tensor  # [rows]


class Temperature(NamedTuple):
    """The rows' own temperatures, which divide z last; a temperature of all rows is in the scales of the `Head`."""

    inverse: Tensor | None  # [rows]


class Problem(NamedTuple):
    """Logits that are never stored whole: N tokens' hidden states, a head of V classes, and labels."""

    hidden: Tensor  # [N, H]
    weight: Tensor  # [V, H]
    bias: Tensor | None
    class_weights: Tensor | None
    scales: Tensor | None
    labels: Tensor  # [N], counted from the first of the classes
    inverse_temperature: Tensor | None  # [N]

    @staticmethod
    def of(hidden: Tensor, weight: Tensor, head: Head, labels: Tensor, inverse_temperature: Tensor | None) -> Problem:
        """Makes a problem of these parts."""
        return Problem(hidden, weight, *head[:3], labels, inverse_temperature)

    @property
    def head(self) -> Head:
        """The head without its weight."""
        return Head(self.bias, self.class_weights, self.scales)
