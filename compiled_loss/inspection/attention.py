"""Fused attention as launches: the operations of a library's kernel, and memory that it may take unseen."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Mapping, Sequence
from importlib import metadata
from typing import Any

from torch import Tensor


def is_attention(name: str) -> bool:
    """Returns True if an operator is a kernel of fused attention, forward or backward."""
    return "attention" in name and name.startswith(("_scaled_dot_product", "_flash", "_efficient", "_cudnn"))


def is_causal(func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> bool:
    """Returns True if half of the scores are known to be masked, and left out."""
    names = [argument.name for argument in func._schema.arguments]
    return bool({**dict(zip(names, args, strict=False)), **kwargs}.get("is_causal"))


def scratch(name: str, args: Sequence[Any]) -> int:
    """Returns a bound of the bytes that a backward takes for itself: dQ in fp32, dK and dV of each head of the queries.

    Rows and widths are rounded up, as in flash attention. The kernels of cuDNN and of efficient attention are assumed
    to take no more. A forward takes nothing of this size.
    """
    if "backward" not in name:
        return 0
    _, query, key = [value for value in args if isinstance(value, Tensor)][:3]
    batch, heads, rows, width = query.shape
    rounded = batch * heads * (-(-int(rows) // 128) * 128)
    single = 4 * rounded * (-(-int(width) // 32) * 32 + 1)
    fewer = heads != key.shape[1] or "efficient" in name
    return int(single + (2 * batch * heads * key.shape[2] * width * query.element_size() if fewer else 0))


def notes(device: str, kernels: Iterable[str]) -> tuple[str, ...]:
    """Returns the facts that are not known of the kernels that were chosen; `kernels` are those of attention."""
    found, kernels = [], list(kernels)
    unknown = device in ("cuda:sm_90", "cuda:sm_100") and not cudnn_versions()
    if unknown and any(name.startswith("_scaled_dot_product_flash") for name in kernels):
        found.append("flash attention, or cuDNN's from its version 9.15.1 on: a build of torch for CPUs does not say")
    if any(name.startswith("triton") for name in kernels):
        found.append("operations of FlexAttention depend on what its mask leaves out, and are not counted")
    return tuple(found)


def cudnn_versions() -> list[tuple[int, ...]]:
    """Returns the versions of cuDNN that packages of a CUDA build of torch bring."""
    found = []
    for name in ("nvidia-cudnn-cu13", "nvidia-cudnn-cu12"):
        with contextlib.suppress(metadata.PackageNotFoundError):
            found.append(tuple(map(int, metadata.version(name).split(".")[:3])))
    return found
