"""Checks of divergences: their names, their weights and their numbers."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from compiled_loss.checks import numbers
from compiled_loss.checks.options import flag

NAMES = ("forward_kl", "reverse_kl", "jsd", "total_variation", "acceptance", "lk")


def named(value: Any) -> tuple[tuple[str, ...], tuple[Any, ...] | None]:
    """Returns the names of divergences, in a fixed order, and their weights as numbers; None for a single name.

    Raises unless `value` is a name, or a mapping of names to numbers.
    """
    expected = f"divergence: expected one of {', '.join(map(repr, NAMES))}"
    if not isinstance(value, (dict, Mapping)):
        if value not in NAMES:
            raise ValueError(f"{expected}, got {value!r}")
        return (value,), None
    if not value:
        raise ValueError(f"{expected}, or their weights by name, got none")
    for name in value:
        if name not in NAMES:
            raise ValueError(f"{expected}, got {name!r}")
    names = tuple([name for name in NAMES if name in value])
    return names, tuple([_weight(name, value[name]) for name in names])


def options(jsd_weight: Any, lk_decay: Any, temperature_squared: Any, hard_label_weight: Any) -> tuple[Any, Any, Any]:
    """Returns the options that are numbers as numbers. Raises unless each option is in its range."""
    jsd_weight = numbers.number("jsd_weight", jsd_weight)
    if not (isinstance(jsd_weight, Tensor) or 0 < jsd_weight < 1):
        raise ValueError(f"jsd_weight: expected a number between 0 and 1, got {jsd_weight}")
    lk_decay = numbers.number("lk_decay", lk_decay)
    if not (isinstance(lk_decay, Tensor) or 0 <= lk_decay < math.inf):
        raise ValueError(f"lk_decay: expected a number >= 0, got {lk_decay}")
    flag("temperature_squared", temperature_squared)
    hard_label_weight = numbers.number("hard_label_weight", hard_label_weight)
    if not (isinstance(hard_label_weight, Tensor) or 0 <= hard_label_weight <= 1):
        raise ValueError(f"hard_label_weight: expected a number from 0 to 1, got {hard_label_weight}")
    return jsd_weight, lk_decay, hard_label_weight


def _weight(name: str, value: Any) -> Any:
    value = numbers.number(f"divergence[{name!r}]", value)
    if not (isinstance(value, Tensor) or 0 <= value < math.inf):
        raise ValueError(f"divergence[{name!r}]: expected a number >= 0, got {value}")
    return value
