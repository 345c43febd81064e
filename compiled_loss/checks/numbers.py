"""Numbers as arguments: Python's and numpy's numbers, and tensors of one element without gradient."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def number(name: str, value: Any, alternative: str = "") -> Any:
    """Returns `value` as a number. Raises unless it is one, or an array or a tensor without gradient that holds one.

    A tensor that cannot be read without a synchronisation stays a tensor, and its value is not checked.
    """
    value = _scalar(name, value)
    if isinstance(value, bool) or not isinstance(value, (int, float, torch.SymInt, torch.SymFloat, Tensor)):
        raise TypeError(f"{name}: expected a number{alternative}, got {type(value).__name__}")
    return value


def integer(name: str, value: Any, alternative: str = "") -> Any:
    """Returns `value` as an int. Raises unless it is one, or a whole number of another type."""
    scalar = _scalar(name, value)
    if isinstance(scalar, float) and scalar.is_integer():
        scalar = int(scalar)
    if isinstance(scalar, bool) or not isinstance(scalar, (int, torch.SymInt)):
        raise TypeError(f"{name}: expected an int{alternative}, got {type(value).__name__}")
    return scalar


def _scalar(name: str, value: Any) -> Any:
    """Returns the number in an array or a tensor, if it may be read; any other value as it is."""
    if isinstance(value, Tensor):
        if value.numel() != 1 or value.dtype == torch.bool or value.dtype.is_complex:
            raise TypeError(f"{name}: expected a number, got a Tensor {list(value.shape)} of {value.dtype}")
        if value.requires_grad:
            raise ValueError(f"{name}: expected a number without gradient, got requires_grad=True: use .detach()")
        return value.item() if can_read_values(value) else value.detach().reshape(())
    kind = type(value)
    return value.item() if kind.__module__ == "numpy" and not getattr(value, "ndim", 0) else value


def known(value: Any, is_: float) -> bool:
    """Returns True if a number is this one, as far as can be known without reading a tensor."""
    return not isinstance(value, Tensor) and value == is_


def holds(comparison: Any, otherwise: bool) -> bool:
    """Returns True if a comparison of sizes holds; `otherwise` if nothing is known of a size while tracing."""
    if not torch.compiler.is_compiling():
        return bool(comparison)
    from torch.fx.experimental.symbolic_shapes import guard_or_false, guard_or_true

    return guard_or_true(comparison) if otherwise else guard_or_false(comparison)


def can_read_values(values: Tensor) -> bool:
    """Returns True if values can be read without a synchronisation, which is only in eager CPU code."""
    special = torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active()
    return values.device.type == "cpu" and type(values) in (Tensor, torch.nn.Parameter) and not special
