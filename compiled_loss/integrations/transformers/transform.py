"""A model's transform of its logits, and the keywords of `linear_cross_entropy` that mean the same."""

from __future__ import annotations

from typing import Any, NamedTuple

from torch import Tensor

from compiled_loss.models.output_head import OutputHead


class Fraction(NamedTuple):
    """A product of numbers and reciprocals: x / 30 * 30 is x."""

    numerator: float
    denominator: float

    def times(self, number: float) -> Fraction:
        """Returns the product."""
        return Fraction(self.numerator * number, self.denominator)

    def over(self, number: float) -> Fraction:
        """Returns the quotient."""
        return Fraction(self.numerator, self.denominator * number)


class Transform(NamedTuple):
    """The map outer * tanh(inner * (logits + bias)) of the first classes; inner * (logits + bias) if outer is None."""

    classes: int
    bias: Tensor | None
    inner: Fraction
    outer: Fraction | None

    @staticmethod
    def identity(classes: int) -> Transform:
        """Returns the transform of a head with this many classes."""
        return Transform(classes, None, Fraction(1.0, 1.0), None)

    def of_first(self, classes: int) -> Transform:
        """Returns the same transform of fewer classes."""
        if classes == self.classes:
            return self
        bias = None if self.bias is None else self.bias[:classes]
        return Transform(classes, bias, self.inner, self.outer)

    def times(self, number: float) -> Transform:
        """Returns this transform followed by a product."""
        if self.outer is None:
            return Transform(self.classes, self.bias, self.inner.times(number), None)
        return Transform(self.classes, self.bias, self.inner, self.outer.times(number))

    def over(self, number: float) -> Transform:
        """Returns this transform followed by a quotient."""
        if self.outer is None:
            return Transform(self.classes, self.bias, self.inner.over(number), None)
        return Transform(self.classes, self.bias, self.inner, self.outer.over(number))

    def tanh(self) -> Transform | None:
        """Returns this transform followed by tanh; None if it has one already."""
        return None if self.outer is not None else Transform(self.classes, self.bias, self.inner, Fraction(1.0, 1.0))

    def plus(self, bias: Tensor) -> Transform | None:
        """Returns this transform with a sum; None unless it is a bias [V] that comes first."""
        first = self.outer is None and self.inner.numerator == self.inner.denominator
        if not first or bias.shape[-1] != self.classes or bias.numel() != self.classes:
            return None
        bias = bias.reshape(-1)
        return Transform(self.classes, bias if self.bias is None else self.bias + bias, self.inner, None)

    def head(self, head: OutputHead) -> OutputHead:
        """Returns the head of these classes, with its own bias and this one."""
        weight, bias = head
        if self.classes != weight.shape[0]:
            weight, bias = weight[: self.classes], None if bias is None else bias[: self.classes]
        if self.bias is not None:
            bias = self.bias if bias is None else bias + self.bias
        return OutputHead(weight, bias)

    def keywords(self) -> dict[str, Any]:
        """Returns softcap and logit_scale."""
        if self.outer is None:
            return {"logit_scale": self.inner.numerator / self.inner.denominator}
        both = self.inner.times(self.outer.numerator).over(self.outer.denominator)
        return {
            "softcap": self.outer.numerator / self.outer.denominator,
            "logit_scale": both.numerator / both.denominator,
        }
