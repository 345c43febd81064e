"""Checks of the targets of losses: a teacher, its top, probabilities, positions that count."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from compiled_loss.checks import numbers
from compiled_loss.checks.arguments import (
    differ,
    floating,
    head,
    same_device,
    sizes,
    tensor,
    vocabulary_vector,
)
from compiled_loss.checks.options import flag


def same_logits(
    name: str, value: Tensor, other: str, own: torch.Size, expected: torch.Size, device: torch.device
) -> None:
    """Raises unless `value`, of which the rank has `own`, has a number for each of the argument called `other`."""
    tensor(name, value)
    floating(name, value)
    if differ(own, expected):
        raise ValueError(f"{name}: expected the shape of {other}, {sizes(expected)}, got {sizes(own)}")
    same_device(name, value, device)


def ranked(logits: Tensor, target_probs: Tensor, topk: Any) -> None:
    """Raises unless the teacher's probabilities have the shape of the logits, and `topk` classes exist."""
    tensor("logits", logits)
    floating("logits", logits)
    if not logits.dim():
        raise ValueError("logits: expected [..., V], got []")
    tensor("target_probs", target_probs)
    same_logits("target_probs", target_probs, "logits", target_probs.shape, logits.shape, logits.device)
    topk = numbers.integer("topk", topk)
    if not 1 <= topk <= logits.shape[-1]:
        raise ValueError(f"topk: expected a number from 1 to V = {logits.shape[-1]}, got {topk}")


def no_ignore_index(value: object) -> None:
    """Raises where `value` is a class: with probabilities there is no label to ignore."""
    if isinstance(value, bool) or not isinstance(value, (int, torch.SymInt)):
        raise TypeError(f"ignore_index: expected an int, got {type(value).__name__}")
    if value >= 0:
        raise ValueError(
            f"ignore_index: expected a number < 0 beside labels that are probabilities, got {value}: use mask"
        )


def teacher(
    hidden: Tensor, weight: Tensor, vocab: int, own: torch.Size, rows: torch.Size, device: torch.device
) -> None:
    """Raises unless a teacher's head of V classes fits its student's tokens.

    The rank has `own` of the teacher's tokens and `rows` of the student's.
    """
    head(hidden, weight, vocab, ("teacher_hidden", "teacher_weight"))
    if differ(own, rows):
        raise ValueError(
            f"teacher_hidden: expected the student's tokens, {sizes(rows)} and a width, got {sizes(hidden.shape)}"
        )
    same_device("teacher_hidden", hidden, device)


def teacher_rows(weight: Tensor, rows: int) -> None:
    """Raises unless a teacher has the student's classes."""
    if weight.shape[0] != rows:
        raise ValueError(f"teacher_weight: expected the student's V = {rows} rows, got {weight.shape[0]}")


def head_weight(name: str, weight: object, bias_name: str, bias: Tensor | None) -> None:
    """Raises where the weight of a head is a Module that has a bias, too."""
    if isinstance(weight, torch.nn.Module) and bias is None and isinstance(getattr(weight, "bias", None), Tensor):
        kind = type(weight).__name__
        own = kind.lower()
        raise TypeError(f"{name}: expected a Tensor, got {kind}: use {own}.weight and {bias_name}={own}.bias")


def logit_map(softcap: Any, logit_scale: Any, prefix: str = "") -> tuple[Any, Any]:
    """Returns both as numbers. Raises unless each is in its range. The names in errors begin with `prefix`."""
    found = []
    for name, value, none in (("softcap", softcap, True), ("logit_scale", logit_scale, bool(prefix))):
        alternative = " or None" if none else ""
        if not (none and value is None):
            value = numbers.number(prefix + name, value, alternative)
            if not (isinstance(value, Tensor) or 0 < value < math.inf):
                raise ValueError(f"{prefix}{name}: expected a number > 0{alternative}, got {value}")
        found.append(value)
    return found[0], found[1]


def teacher_bias(value: Tensor | None, weight: Tensor) -> None:
    """Raises unless `value` is None or has a number for each row of the teacher's weight."""
    if value is not None:
        vocabulary_vector("teacher_bias", value, weight.shape[0], weight.device)


def no_teacher(beside: str, **others: object) -> None:
    """Raises where an argument of a teacher's head or logits is given together with the argument called `beside`."""
    for name, other in others.items():
        if other is not None:
            raise ValueError(f"{name}: expected None beside {beside}, got a {type(other).__name__}")


def teacher_given(name: str, value: Tensor | None) -> Tensor:
    """Returns the teacher's tensor. Raises where it is missing."""
    if value is None:
        raise ValueError(f"{name}: expected a Tensor, or teacher_topk or teacher_probabilities, got none of them")
    return value


def two_tensors(name: str, value: object) -> None:
    """Raises unless `value` is a pair."""
    if not isinstance(value, tuple) or len(value) != 2:
        raise TypeError(f"{name}: expected (values, indices) or None, got {type(value).__name__}")


def top(name: str, value: Tensor, own: torch.Size, k: torch.Size, rows: torch.Size, vocab: int) -> None:
    """Raises unless `value` has numbers [..., k] for the rows; `own` are the rank's rows of `value`."""
    if not k or differ(own, rows) or not 1 <= k[0] <= vocab:
        expected = sizes(rows)[:-1] + (", " if rows else "") + "k]"
        raise ValueError(f"{name}: expected {expected} with k from 1 to V = {vocab}, got {sizes(value.shape)}")


def teacher_topk(values: Tensor, indices: Tensor) -> None:
    """Raises unless both have their dtypes and the same shape."""
    floating("teacher_topk[0]", values)
    if indices.dtype != torch.int64:
        raise TypeError(f"teacher_topk[1]: expected int64, got {indices.dtype}: use indices.long()")
    if differ(indices.shape, values.shape):
        raise ValueError(f"teacher_topk[1]: expected {sizes(values.shape)} like its values, got {sizes(indices.shape)}")


def teacher_topk_values(values: Tensor, indices: Tensor, vocab: int) -> None:
    """Raises unless rows [rows, k], each class once, are parts of distributions. It reads them, in eager CPU code."""
    outside = indices[((indices < 0) | (indices >= vocab)) & ~values.isneginf()]
    if outside.numel():
        raise ValueError(f"teacher_topk[1]: expected 0 <= index < V = {vocab}, got {outside[0].item()}")
    total = values.double().exp().sum(-1)
    rounding = torch.finfo(values.dtype).eps * (1 + math.log(values.shape[-1]))  # of logarithms: eps times an entropy
    if (total > 1 + rounding).any():
        raise ValueError(
            f"teacher_topk[0]: expected log-probabilities, got probabilities that sum to {total.max().item():.4g}: "
            "use (teacher_logits / temperature).log_softmax(-1).topk(k)"
        )


def kept_for_callers(fp32_upcast: bool, chunk_size: int) -> None:
    """Raises unless arguments that are accepted and ignored have valid values."""
    flag("fp32_upcast", fp32_upcast)
    if numbers.integer("chunk_size", chunk_size, " >= 0") < 0:
        raise ValueError(f"chunk_size: expected an int >= 0, got {chunk_size}")


def position_mask(value: Tensor, own: torch.Size, name: str, rows: torch.Size, device: torch.device) -> None:
    """Raises unless `value`, of which the rank has `own`, has one number for each row of the argument called `name`."""
    if value.dtype.is_complex:
        raise TypeError(f"position_mask: expected bool, integer or floating, got {value.dtype}")
    if own not in (rows, torch.Size([*rows, 1])):
        raise ValueError(
            f"position_mask: expected the shape of {name} with 1 for its last dimension or without it, "
            f"{sizes(torch.Size([*rows, 1]))} or {sizes(rows)}, got {sizes(own)}"
        )
    same_device("position_mask", value, device)


def one_target(target_probs: object, teacher_hidden: object, teacher_weight: object, draft_to_target: object) -> None:
    """Raises unless exactly one form of target is given."""
    head_given = teacher_hidden is not None or teacher_weight is not None
    if (target_probs is not None) == head_given or (teacher_hidden is None) != (teacher_weight is None):
        named = {"target_probs": target_probs, "teacher_hidden": teacher_hidden, "teacher_weight": teacher_weight}
        given = ", ".join([name for name, value in named.items() if value is not None]) or "none of them"
        raise ValueError(f"target_probs: expected it, or teacher_hidden and teacher_weight, got {given}")
    if target_probs is not None and draft_to_target is not None:
        raise ValueError("draft_to_target: expected None beside target_probs, which are the draft's, got one")


def target_probs(value: Tensor, own: torch.Size, expected: torch.Size, device: torch.device) -> None:
    """Raises unless `value`, of which the rank has `own`, is a constant probability of each class."""
    floating("target_probs", value)
    if differ(own, expected):
        raise ValueError(f"target_probs: expected [..., V] = {sizes(expected)}, got {sizes(own)}")
    same_device("target_probs", value, device)
    if value.requires_grad and torch.is_grad_enabled():
        raise ValueError(
            "target_probs: expected a tensor without gradient, got requires_grad=True: use target_probs.detach(), "
            "or masked_soft_cross_entropy() on logits, which gives it"
        )


def draft_to_target(value: Tensor, vocab: int, device: torch.device) -> None:
    """Raises unless `value` names a row of the teacher for each of the draft's classes."""
    tensor("draft_to_target", value)
    if value.dtype != torch.int64:
        raise TypeError(f"draft_to_target: expected int64, got {value.dtype}: use draft_to_target.long()")
    if value.shape != (vocab,):
        raise ValueError(f"draft_to_target: expected [V] = [{vocab}], got {sizes(value.shape)}")
    same_device("draft_to_target", value, device)
