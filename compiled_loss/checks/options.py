"""Checks of a loss's numbers and names: each error names the argument, what was expected and what came."""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from typing import Any

import torch
from torch import Tensor

from compiled_loss.checks import arguments, numbers

_REDUCTIONS = ("none", "sum", "mean")


def transform(softcap: Any, temperature: Any) -> tuple[Any, Any]:
    """Returns both as numbers. Raises unless each is in its range."""
    if softcap is not None:
        softcap = numbers.number("softcap", softcap, " or None")
        if not (isinstance(softcap, Tensor) or 0 < softcap < math.inf):  # inf * tanh(z / inf) is NaN
            raise ValueError(f"softcap: expected a number > 0 or None, got {softcap}")
    return softcap, positive("temperature", temperature)


def positive(name: str, value: Any) -> Any:
    """Returns the number. Raises unless logits can be multiplied or divided by it."""
    value = numbers.number(name, value)
    if not (isinstance(value, Tensor) or 0 < value < math.inf):
        raise ValueError(f"{name}: expected a number > 0, got {value}")
    return value


def alignment(shift: Any, ignore_index: Any, dimensions: int) -> tuple[int, int]:
    """Returns both as ints. Raises unless labels with so many dimensions can be shifted."""
    shift, ignore_index = numbers.integer("shift", shift), numbers.integer("ignore_index", ignore_index)
    if shift < 0:
        raise ValueError(f"shift: expected an int >= 0, got {shift}")
    shift_fits(shift, dimensions)
    return shift, ignore_index


def shift_fits(shift: int, dimensions: int) -> None:
    """Raises where there is nothing to shift along."""
    if shift and not dimensions:
        raise ValueError(f"shift: expected 0 where labels have no dimension, got {shift}")


def terms(label_smoothing: Any, z_loss: Any) -> tuple[Any, Any]:
    """Returns both as numbers. Raises unless each is in its range."""
    label_smoothing, z_loss = numbers.number("label_smoothing", label_smoothing), numbers.number("z_loss", z_loss)
    if not (isinstance(label_smoothing, Tensor) or 0 <= label_smoothing <= 1):
        raise ValueError(f"label_smoothing: expected a number from 0 to 1, got {label_smoothing}")
    if not (isinstance(z_loss, Tensor) or z_loss >= 0):
        raise ValueError(f"z_loss: expected a number >= 0, got {z_loss}")
    return label_smoothing, z_loss


def reduction(value: str) -> None:
    """Raises unless the reduction exists."""
    if value not in _REDUCTIONS:
        raise ValueError(f"reduction: expected one of {', '.join(map(repr, _REDUCTIONS))}, got {value!r}")


def statistics_wanted(wanted: Any, names: Sequence[str]) -> None:
    """Raises unless the value is a collection of names of statistics."""
    expected = f"wanted: expected some of {', '.join(map(repr, names))}"
    if isinstance(wanted, str) or not isinstance(wanted, Collection):
        raise TypeError(f"{expected} in a tuple, got {wanted!r}")
    for name in wanted:
        if name not in names:
            raise ValueError(f"{expected}, got {name!r}")


def argmax_wanted(wanted: bool, vocab: int) -> None:
    """Raises where there are more columns than fp32, in which they are compared, can distinguish."""
    if wanted and vocab > 2**24:
        raise ValueError(f"wanted: expected no 'first_argmax' of more than {2**24} classes, got V = {vocab}")


def flag(name: str, value: object) -> None:
    """Raises unless `value` is True or False."""
    if not isinstance(value, bool):
        raise TypeError(f"{name}: expected True or False, got {type(value).__name__}")


def count(num_label_tokens: Any, value: str) -> Any:
    """Returns the count as an int, a tensor or None. Raises unless it is one, and the reduction `value` takes it."""
    if num_label_tokens is None:
        return None
    if value != "sum":
        raise ValueError(
            f"num_label_tokens: expected None unless reduction='sum', which it divides, got reduction={value!r}"
        )
    if isinstance(num_label_tokens, Tensor):
        if num_label_tokens.dtype.is_complex or num_label_tokens.dtype == torch.bool:
            raise TypeError(f"num_label_tokens: expected integer or floating, got {num_label_tokens.dtype}")
        if num_label_tokens.numel() != 1:
            raise ValueError(f"num_label_tokens: expected one element, got {arguments.sizes(num_label_tokens.shape)}")
        return num_label_tokens
    num_label_tokens = numbers.integer("num_label_tokens", num_label_tokens, ", a tensor or None")
    if num_label_tokens < 0:
        raise ValueError(f"num_label_tokens: expected >= 0, got {num_label_tokens}")
    return num_label_tokens


def count_device(count_: Any, device: torch.device) -> None:
    """Raises unless the count is on a device where it can be used without a synchronisation."""
    if isinstance(count_, Tensor) and count_.device != device and (count_.device.type != "cpu" or count_.dim()):
        raise ValueError(f"num_label_tokens: expected on {device}, got {count_.device}")
