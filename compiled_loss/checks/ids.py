"""Checks of ids, [..., K], of classes that tokens ask for or keep; negative ids are padding."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import torch
from torch import Tensor

from compiled_loss.checks import arguments, numbers


def given(name: str, value: Tensor, own: torch.Size, shape: torch.Size, device: torch.device, *, shared: bool) -> None:
    """Raises unless ids, of which the rank has `own`, belong to labels of this shape, or may be `shared` by all."""
    if value.dtype != torch.int64:
        raise TypeError(f"{name}: expected int64, got {value.dtype}")
    if not (shared and len(own) == 1) and (len(own) != len(shape) + 1 or arguments.differ(own[:-1], shape)):
        expected = f"[{', '.join([*map(str, shape), 'K'])}]{' or [K]' if shared else ''}"
        raise ValueError(f"{name}: expected {expected}, classes for each token, got {arguments.sizes(own)}")
    arguments.same_device(name, value, device)


def classes(name: str, ids: Tensor, active: Tensor, vocab: int) -> None:
    """Raises unless ids [N, K] are classes or padding. It reads the tensor only in eager CPU code."""
    if numbers.can_read_values(ids):
        outside = ids[active][ids[active] >= vocab]
        if outside.numel():
            raise ValueError(f"{name}: expected < V = {vocab}, negative for padding, got {outside[0].item()}")


def padded(offsets: object, ids: object, width: Any) -> None:
    """Raises unless ids that are stored one row after another can be padded to rows of `width`."""
    arguments.tensor("offsets", offsets)
    arguments.tensor("ids", ids)
    for name, value in (("offsets", offsets), ("ids", ids)):
        assert isinstance(value, Tensor)
        if value.dtype not in (torch.int64, torch.int32):
            raise TypeError(f"{name}: expected int64 or int32, got {value.dtype}")
        if value.dim() != 1:
            raise ValueError(f"{name}: expected one dimension, got {arguments.sizes(value.shape)}")
    assert isinstance(offsets, Tensor) and isinstance(ids, Tensor)
    arguments.same_device("offsets", offsets, ids.device)
    if offsets.shape[0] == 0:
        raise ValueError("offsets: expected [N + 1], got [0]")
    width = numbers.integer("width", width)
    if width < 1:
        raise ValueError(f"width: expected an int > 0, got {width}")
    if numbers.can_read_values(offsets):
        lengths = offsets[1:] - offsets[:-1]
        if offsets[0] != 0 or offsets[-1] != ids.shape[0] or (lengths < 0).any():
            raise ValueError(f"offsets: expected to rise from 0 to {ids.shape[0]}, the number of ids")
        longest = int(lengths.max()) if lengths.numel() else 0
        if longest > width:
            raise ValueError(f"width: expected >= {longest}, the most ids of a token, got {width}")


def top(k: Any, vocab: int) -> None:
    """Raises unless the k largest of `vocab` classes exist, or k is None."""
    if k is not None and not 0 < numbers.integer("top_k", k, " or None") <= vocab:
        raise ValueError(f"top_k: expected from 1 to V = {vocab}, or None, got {k}")


def over_kept(kept_ids: object, wanted: Collection[str], top_k: object) -> None:
    """Raises where kept classes are given, and a result over all classes is wanted."""
    if kept_ids is not None and top_k is not None:
        raise ValueError(f"top_k: expected None beside kept_ids, got {top_k}")
    if kept_ids is not None and "mean_logit" in wanted:
        raise ValueError(f"wanted: expected no 'mean_logit' beside kept_ids, got {wanted!r}")
