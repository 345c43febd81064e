"""Transforms and modes of the caller: functorch and autocast."""

from __future__ import annotations

import contextlib

import torch


def traced() -> bool:
    """Returns True if a functorch transform (grad, vmap, jvp, ...) is active; then only plain operators are used."""
    return torch._C._are_functorch_transforms_active()


def without_autocast(device: torch.device) -> contextlib.AbstractContextManager[object]:
    """Returns a context in which computations keep the dtypes of their operands.

    It does nothing where autocast is off already: AOTAutograd's cache takes no graph with an autocast context. By
    default it takes no graph with an autograd Function either: NOTE [Composites].
    """
    return contextlib.nullcontext() if autocast_dtype(device) is None else torch.autocast(device.type, enabled=False)


def autocast_dtype(device: torch.device) -> torch.dtype | None:
    """Returns the dtype of GEMMs under autocast; None outside of autocast, and on meta, which has none.

    Asking for autocast on meta raises. `torch.amp.is_autocast_available` would say so, but Dynamo 2.11 does not trace
    it.
    """
    if device.type != "meta" and torch.is_autocast_enabled(device.type):
        return torch.get_autocast_dtype(device.type)
    return None
