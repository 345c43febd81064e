"""What the caller is in: functorch transforms, autocast."""

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
    device_type = device.type
    if torch.is_autocast_enabled(device_type):
        return torch.autocast(device_type, enabled=False)
    return contextlib.nullcontext()
