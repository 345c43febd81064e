"""The gradients dH, dW and db of a chunked loss: where chunks add them up, and how autograd gets them.

N tokens, H width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from compiled_loss.engine import gemm
from compiled_loss.engine.math.statistics import statistics_dtype
from compiled_loss.engine.operators import is_compiling


class Needs(NamedTuple):
    """The inputs whose gradients are needed."""

    needs_hidden: bool
    needs_weight: bool
    needs_bias: bool


class Gradients(NamedTuple):
    """The gradients of the inputs that need one."""

    d_hidden: Tensor | None  # [N, H]
    d_weight: Tensor | None  # [V, H]
    d_bias: Tensor | None  # [V], in the statistics' dtype while it is added up

    @staticmethod
    def empty(
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        needs: Needs,
        *,
        hidden_dtype: torch.dtype | None = None,
        weight_dtype: torch.dtype | None = None,
    ) -> Gradients:
        """Makes uninitialised gradients; a dtype of None is that of the input."""
        d_bias = None
        if bias is not None and needs.needs_bias:
            d_bias = bias.new_empty(weight.shape[:1], dtype=statistics_dtype(hidden.dtype))
        return Gradients(
            torch.empty_like(hidden, dtype=hidden_dtype) if needs.needs_hidden else None,
            torch.empty_like(weight, dtype=weight_dtype) if needs.needs_weight else None,
            d_bias,
        )

    @staticmethod
    def pop_from(found: list[Tensor], needs: Needs, bias: Tensor | None) -> Gradients:
        """Takes the gradients from the front of a list."""
        there = (needs.needs_hidden, needs.needs_weight, needs.needs_bias and bias is not None)
        return Gradients(*[found.pop(0) if one else None for one in there])

    def with_weight_in(self, dtype: torch.dtype) -> Gradients:
        """The same gradients with dW in a dtype."""
        return self if self.d_weight is None else self._replace(d_weight=self.d_weight.to(dtype))

    def present(self) -> list[Tensor]:
        """The gradients that are not None."""
        return [v for v in self if v is not None]


class UnscaledGradients(NamedTuple):
    """Gradients of a loss that forward has formed, still to be multiplied by `scale` and by the upstream gradient."""

    gradients: Gradients
    scale: Tensor | None


def scaled_gradients(
    ctx: Any,
    unscaled: UnscaledGradients,
    g: Tensor,
    dtypes: Iterable[torch.dtype | None],
    form: Callable[[], UnscaledGradients],
) -> Gradients:
    """Returns the gradients times the upstream gradient g, in the dtypes of their inputs.

    Eager code writes them over the gradients that forward kept. A second backward, which `ctx.spent` tells, forms the
    gradients again from the inputs. In compiled code the compiler decides what is overwritten.
    """
    scaled = gemm.scaled
    if not is_compiling():
        if ctx.spent:
            unscaled = form()
        ctx.spent, scaled = True, gemm.scaled_
    factor = g if unscaled.scale is None else g * unscaled.scale
    pairs = zip(unscaled.gradients, dtypes, strict=True)
    return Gradients(*[None if d is None or dtype is None else scaled(d, factor, dtype) for d, dtype in pairs])
