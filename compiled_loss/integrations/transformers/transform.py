"""What a model does to the values of its logits, and the keywords of `linear_cross_entropy` that mean the same."""

from __future__ import annotations

from typing import Any, NamedTuple

from torch import Tensor

from compiled_loss.models.output_head import OutputHead


class Fraction(NamedTuple):
    """A product of numbers and reciprocals: x / 30 * 30 is x."""

    numerator: float
    denominator: float

    def times(self, number: float) -> Fraction:
        """The product."""
        return Fraction(self.numerator * number, self.denominator)

    def over(self, number: float) -> Fraction:
        """The quotient."""
        return Fraction(self.numerator, self.denominator * number)


class Transform(NamedTuple):
    """outer * tanh(inner * (logits + bias)) of the first classes; inner * (logits + bias) where outer is None."""

    classes: int
    bias: Tensor | None
    inner: Fraction
    outer: Fraction | None

    @staticmethod
    def identity(classes: int) -> Transform:
        """That of a head with this many classes."""
        return Transform(classes, None, Fraction(1.0, 1.0), None)

    def of_first(self, classes: int) -> Transform:
        """The same of fewer classes."""
        if classes == self.classes:
            return self
        bias = None if self.bias is None else self.bias[:classes]
        return Transform(classes, bias, self.inner, self.outer)

    def times(self, number: float) -> Transform:
        """Then a product."""
        if self.outer is None:
            return Transform(self.classes, self.bias, self.inner.times(number), None)
        return Transform(self.classes, self.bias, self.inner, self.outer.times(number))

    def over(self, number: float) -> Transform:
        """Then a quotient."""
        if self.outer is None:
            return Transform(self.classes, self.bias, self.inner.over(number), None)
        return Transform(self.classes, self.bias, self.inner, self.outer.over(number))

    def tanh(self) -> Transform | None:
        """Then tanh; None where there was one."""
        return None if self.outer is not None else Transform(self.classes, self.bias, self.inner, Fraction(1.0, 1.0))

    def plus(self, bias: Tensor) -> Transform | None:
        """Then a sum; None unless it is a bias [V] before all else."""
        first = self.outer is None and self.inner.numerator == self.inner.denominator
        if not first or bias.shape[-1] != self.classes or bias.numel() != self.classes:
            return None
        bias = bias.reshape(-1)
        return Transform(self.classes, bias if self.bias is None else self.bias + bias, self.inner, None)

    def head(self, head: OutputHead) -> OutputHead:
        """The head of these classes, with its own bias and this."""
        weight, bias = head
        if self.classes != weight.shape[0]:
            weight, bias = weight[: self.classes], None if bias is None else bias[: self.classes]
        if self.bias is not None:
            bias = self.bias if bias is None else bias + self.bias
        return OutputHead(weight, bias)

    def keywords(self) -> dict[str, Any]:
        """Softcap and logit_scale."""
        if self.outer is None:
            return {"logit_scale": self.inner.numerator / self.inner.denominator}
        both = self.inner.times(self.outer.numerator).over(self.outer.denominator)
        return {
            "softcap": self.outer.numerator / self.outer.denominator,
            "logit_scale": both.numerator / both.denominator,
        }
