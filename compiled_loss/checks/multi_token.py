"""Checks of multi-token prediction: depths, their targets, packed sequences."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from compiled_loss.checks import arguments, numbers, options


def multi_token(
    labels_: Tensor,
    depth: int,
    ignore_index: int,
    seq_idx: Tensor | None,
    cu_seqlens: Tensor | None,
    mask: Tensor | None,
) -> None:
    """Raises unless targets of a depth can be made of the labels."""
    arguments.tensor("labels", labels_)
    arguments.labels(labels_, labels_.shape, "labels", labels_.shape, labels_.device)
    if labels_.dim() not in (1, 2):
        raise ValueError(f"labels: expected [B, S] or [S], got {arguments.sizes(labels_.shape)}")
    if isinstance(depth, bool) or not isinstance(depth, int):
        raise TypeError(f"depth: expected an int >= 0, got {type(depth).__name__}")
    if depth < 0:
        raise ValueError(f"depth: expected an int >= 0, got {depth}")
    options.alignment(0, ignore_index, labels_.dim())
    _mask(mask, labels_)
    length = labels_.shape[-1:]
    for name, value in (("seq_idx", seq_idx), ("cu_seqlens", cu_seqlens)):
        if value is None:
            continue
        arguments.tensor(name, value)
        if value.dtype.is_floating_point or value.dtype.is_complex or value.dtype == torch.bool:
            raise TypeError(f"{name}: expected an integer dtype, got {value.dtype}")
        arguments.same_device(name, value, labels_.device)
    if seq_idx is not None and seq_idx.shape not in (labels_.shape, length, torch.Size([1, *length])):
        raise ValueError(
            f"seq_idx: expected the labels' shape {arguments.sizes(labels_.shape)} or {arguments.sizes(length)}, "
            f"got {arguments.sizes(seq_idx.shape)}: under pipelining give each microbatch its own"
        )
    if cu_seqlens is not None and (cu_seqlens.numel() < 2 or cu_seqlens.numel() != cu_seqlens.shape[-1]):
        raise ValueError(f"cu_seqlens: expected [sequences + 1], 2 at least, got {arguments.sizes(cu_seqlens.shape)}")


def sequence(name: str, value: Sequence[Tensor]) -> None:
    """Raises unless the value is a sequence with an element for each depth."""
    if isinstance(value, Tensor) or not len(value):
        raise ValueError(f"{name}: expected a sequence of each depth's hidden states, one at least, got a tensor or []")


def depths(
    shapes: Sequence[torch.Size],
    own: torch.Size,
    labels: Tensor,
    targets: Sequence[Tensor] | None,
    seq_idx: Tensor | None,
    cu_seqlens: Tensor | None,
    *,
    weighed: Sequence[str],
) -> torch.Size:
    """Returns the shape of a depth's tokens. Raises unless each depth has hidden states and targets for all labels.

    `shapes` and `own` are the shapes of a rank's hidden states and labels; `weighed` names the arguments that weigh
    labels.
    """
    arguments.labels(labels, own, "labels", own, labels.device)
    for k, shape in enumerate(shapes):
        if shape != shapes[0] or shape[:-1].numel() != own.numel():
            raise ValueError(
                f"hidden[{k}]: expected the labels' {arguments.sizes(own)} tokens and one width, "
                f"got {arguments.sizes(shape)}"
            )
    if targets is None:
        multi_token(labels, 0, -100, seq_idx, cu_seqlens, None)
        return shapes[0][:-1]
    if seq_idx is not None or cu_seqlens is not None:
        raise ValueError("targets: expected None beside seq_idx or cu_seqlens, which they know already, got both")
    for name in weighed:
        raise ValueError(f"targets: expected None beside {name}, for theirs are ignored already, got both")
    if len(targets) != len(shapes):
        raise ValueError(f"targets: expected one for each of {len(shapes)} depths, got {len(targets)}")
    for k, target in enumerate(targets):
        arguments.tensor(f"targets[{k}]", target)
        if target.dtype == torch.int64 and target.shape != own:
            raise ValueError(f"targets[{k}]: expected {arguments.sizes(own)}, got {arguments.sizes(target.shape)}")
        arguments.labels(target, target.shape, "labels", own, labels.device, name=f"targets[{k}]")
    return shapes[0][:-1]


def scaling(scaling_factor: Any, alternative: str = "") -> Any:
    """Returns the factor as a number. Raises unless it is >= 0."""
    scaling_factor = numbers.number("scaling_factor", scaling_factor, alternative)
    if not (isinstance(scaling_factor, Tensor) or scaling_factor >= 0):
        raise ValueError(f"scaling_factor: expected a number >= 0{alternative}, got {scaling_factor}")
    return scaling_factor


def _mask(mask: Tensor | None, labels: Tensor) -> None:
    if mask is not None:
        arguments.tensor("mask", mask)
        arguments.per_token("mask", mask, mask.shape, labels.shape, labels.device)
