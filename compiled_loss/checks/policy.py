"""Checks of policy losses and of token weights."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from compiled_loss.checks import arguments, numbers

NORMALISATIONS = ("token_mean", "sequence_mean", "sequence_sum", "fixed_length", "sum")


def one_of(name: str, value: object, names: tuple[str, ...]) -> None:
    """Raises unless the value is one of the names."""
    if value not in names:
        raise ValueError(f"{name}: expected one of {', '.join(map(repr, names))}, got {value!r}")


def normalisation(
    mask: Any, name: str, segment_ids: Tensor | None, num_tokens: Any, num_sequences: Any, length: Any
) -> None:
    """Raises unless token weights can be made from these arguments."""
    arguments.tensor("mask", mask)
    one_of("normalisation", name, NORMALISATIONS)
    if mask.dtype.is_complex:
        raise TypeError(f"mask: expected bool, integer or floating, got {mask.dtype}")
    segments(segment_ids, mask.shape, mask.device, mask)
    for argument, value in (("num_tokens", num_tokens), ("num_sequences", num_sequences)):
        if value is not None:
            at_least_zero(argument, value)
    if (name == "fixed_length") != (length is not None):
        raise ValueError(f"length: expected beside normalisation='fixed_length' and nowhere else, got {length!r}")
    if length is not None:
        positive("length", length)


def segments(segment_ids: Any, shape: torch.Size, device: torch.device, mask: Tensor | None = None) -> None:
    """Raises unless `segment_ids` give the sequence of each token. It reads their values only in eager CPU code."""
    if segment_ids is None:
        return
    segment_tensor(segment_ids, shape, device)
    counts = None if mask is None else mask != 0
    segments_in_range(segment_ids, counts, segment_ids.numel(), "the number of tokens")


def segment_tensor(segment_ids: Any, shape: torch.Size, device: torch.device) -> None:
    """Raises unless `segment_ids` have an int64 for each token."""
    arguments.tensor("segment_ids", segment_ids)
    if segment_ids.dtype != torch.int64:
        raise TypeError(f"segment_ids: expected int64, got {segment_ids.dtype}")
    of_tokens("segment_ids", segment_ids, shape, device)


def segments_in_range(segment_ids: Tensor, counts: Tensor | None, number: int, of: str) -> None:
    """Raises where a token that counts is in no sequence, as far as can be read; `of` names what `number` counts."""
    if numbers.can_read_values(segment_ids):
        outside = (segment_ids < 0) | (segment_ids >= number)
        outside = outside if counts is None else outside & counts
        if outside.any():
            first = segment_ids[outside].reshape(-1)[0].item()
            raise ValueError(f"segment_ids: expected from 0 to {of} - 1, {number - 1}, got {first}")


def of_tokens(
    name: str, value: Any, shape: torch.Size, device: torch.device, *, floating: bool = False, hint: str = ""
) -> None:
    """Raises unless the value is a tensor with a value for each token of [...]."""
    arguments.tensor(name, value)
    if floating:
        arguments.floating(name, value)
    if arguments.differ(value.shape, shape):
        expected = f"{arguments.sizes(shape)}, a value for each token"
        raise ValueError(f"{name}: expected {expected}, got {list(value.shape)}{hint}")
    arguments.same_device(name, value, device)


def tensor(name: str, value: Any) -> None:
    """Raises unless the value is a tensor."""
    arguments.tensor(name, value)


def expanded(name: str, value: Any, shape: torch.Size, device: torch.device) -> Tensor:
    """Returns a value for each token. Raises unless there is one for each token, or for each sequence, [B, 1]."""
    arguments.tensor(name, value)
    arguments.floating(name, value)
    arguments.same_device(name, value, device)
    tensor_: Tensor = value
    of_sequences = len(shape) > 1 and tensor_.dim() == len(shape) and tensor_.shape[-1] == 1 and shape[-1] != 1
    if of_sequences and not arguments.differ(tensor_.shape[:-1], shape[:-1]):
        return tensor_.expand(shape)
    hint = (
        ": a value for each sequence is [B, 1], .unsqueeze(-1)"
        if tensor_.shape == shape[:-1] and len(shape) > 1
        else ""
    )
    of_tokens(name, tensor_, shape, device, hint=hint)
    return tensor_


def broadcast(name: str, value: Any, shape: torch.Size, device: torch.device) -> Tensor | None:
    """Returns a tensor that broadcasts to the tokens in their shape; None for None."""
    if value is None:
        return None
    arguments.tensor(name, value)
    arguments.per_token(name, value, value.shape, shape, device)
    tensor_: Tensor = value
    whole = tensor_.dim() == len(shape) and not arguments.differ(tensor_.shape, shape)
    return tensor_ if whole else tensor_.expand(shape)


def is_zero(value: Any) -> bool:
    """Returns True if a number is known to be 0."""
    return numbers.known(value, 0)


def number(name: str, value: Any) -> Any:
    """Returns the number. Raises unless it is finite."""
    found = numbers.number(name, value)
    if not isinstance(found, Tensor) and not -math.inf < found < math.inf:
        raise ValueError(f"{name}: expected a finite number, got {value!r}")
    return found


def positive(name: str, value: Any) -> Any:
    """Returns the number. Raises unless it is > 0."""
    number = numbers.number(name, value)
    if not isinstance(number, Tensor) and not number > 0:
        raise ValueError(f"{name}: expected a number > 0, got {value!r}")
    return number


def at_least_zero(name: str, value: Any) -> Any:
    """Returns the number. Raises unless it is >= 0."""
    number = numbers.number(name, value)
    if not isinstance(number, Tensor) and not number >= 0:
        raise ValueError(f"{name}: expected a number >= 0, got {value!r}")
    return number


def dual_clip(value: Any, kind: str) -> Any:
    """Returns the number, or None for none. Raises unless it is > 1."""
    if value is None:
        return None
    if kind != "clip":
        raise ValueError(f"dual_clip: expected None beside kind={kind!r}, got {value!r}")
    number = numbers.number("dual_clip", value)
    if not isinstance(number, Tensor) and not number > 1:
        raise ValueError(f"dual_clip: expected a number > 1 or None, got {value!r}")
    return number


def sequences_alone(kind: str, importance: str) -> None:
    """Raises where a kind that is defined for sequences is used with token importance."""
    if kind == "gmpo" and importance != "sequence":
        raise ValueError(f"importance: expected 'sequence' beside kind='gmpo', got {importance!r}")


def needed(name: str, value: object, reason: str) -> None:
    """Raises unless the value is given."""
    if value is None:
        raise ValueError(f"{name}: expected a Tensor where {reason}, got None")


def unused(name: str, value: object, reason: str) -> None:
    """Raises unless the value is None."""
    if value is not None:
        raise ValueError(f"{name}: expected None where {reason}, got a {type(value).__name__}")
