"""What the caller is in: functorch transforms, autocast."""

from __future__ import annotations

import contextlib

import torch


def traced() -> bool:
    """Whether a functorch transform (grad, vmap, jvp, ...) is at work, for which all is composed of plain operators."""
    return torch._C._are_functorch_transforms_active()


def without_autocast(device: torch.device) -> contextlib.AbstractContextManager[object]:
    """What is computed inside is computed in the dtypes it has.

    No context where none is needed: AOTAutograd's cache takes no graph that holds one. Nor, by default, one with an
    autograd Function: README, Limits.
    """
    return contextlib.nullcontext() if autocast_dtype(device) is None else torch.autocast(device.type, enabled=False)


def autocast_dtype(device: torch.device) -> torch.dtype | None:
    """What GEMMs are computed in; None outside of autocast, and on meta, which has none and raises when asked.

    `torch.amp.is_autocast_available` would say so, and Dynamo 2.11 does not trace it.
    """
    if device.type != "meta" and torch.is_autocast_enabled(device.type):
        return torch.get_autocast_dtype(device.type)
    return None
