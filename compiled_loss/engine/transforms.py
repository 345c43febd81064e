"""Whether functorch transforms are at work, for which everything has to be composed of ordinary operators."""

import torch


def traced() -> bool:
    """Whether one (grad, vmap, jvp, ...) is."""
    return torch._C._are_functorch_transforms_active()
