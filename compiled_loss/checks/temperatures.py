"""Checks of temperatures that differ between tokens."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from compiled_loss.checks import arguments, numbers


def of_tokens(value: Any) -> bool:
    """Returns True if the value is a tensor with a value for each token, and not a number."""
    return isinstance(value, Tensor) and value.dim() > 0 and not numbers.holds(value.numel() == 1, otherwise=False)


def one(value: Tensor | None, where: str) -> None:
    """Raises where tokens have their own temperatures, and a loss takes only one."""
    if value is not None:
        raise ValueError(f"temperature: expected a number where {where}, got a tensor {list(value.shape)}")


def given(value: Tensor, own: torch.Size, shape: torch.Size, device: torch.device) -> None:
    """Raises unless the temperatures, of which the rank has `own`, fit labels of this shape."""
    arguments.floating("temperature", value)
    if value.requires_grad:
        raise ValueError("temperature: expected a tensor without gradient, got requires_grad=True: use .detach()")
    arguments.per_token("temperature", value, own, shape, device)


def positive(values: Tensor) -> None:
    """Raises unless the temperatures of all tokens that count are > 0. It reads the tensor: for eager CPU code only."""
    wrong = ~((values > 0) & values.isfinite())
    if wrong.any():
        raise ValueError(f"temperature: expected numbers > 0 where tokens count, got {values[wrong][0].item()}")
