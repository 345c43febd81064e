"""The errors of what a loss is compared with: a teacher, its top, probabilities, positions that count."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from compiled_loss.checks import numbers
from compiled_loss.checks.arguments import (
    differ,
    flag,
    floating,
    head,
    same_device,
    sizes,
    tensor,
    transform,
    vocabulary_vector,
)

_DIVERGENCES = ("forward_kl", "reverse_kl", "jsd")


def same_logits(name: str, value: Tensor, other: str, source: Tensor) -> None:
    """Raise unless `value` has a number for each of those of `source`, the argument called `other`."""
    tensor(name, value)
    floating(name, value)
    if differ(value.shape, source.shape):
        raise ValueError(f"{name}: expected the shape of {other}, {sizes(source.shape)}, got {sizes(value.shape)}")
    same_device(name, value, source.device)


def no_ignore_index(value: object) -> None:
    """Raise where `value` is a class: beside probabilities there is no label to ignore."""
    if isinstance(value, bool) or not isinstance(value, (int, torch.SymInt)):
        raise TypeError(f"ignore_index: expected an int, got {type(value).__name__}")
    if value >= 0:
        raise ValueError(
            f"ignore_index: expected a number < 0 beside labels that are probabilities, got {value}: use mask"
        )


def teacher(hidden: Tensor, weight: Tensor, student: Tensor, rows: int | None) -> None:
    """Raise unless a teacher's head fits the hidden states of its student; `rows`, if any, are its weight's."""
    names = ("teacher_hidden", "teacher_weight")
    for name, value in zip(names, (hidden, weight), strict=True):
        tensor(name, value)
    head(hidden, weight, None, weight.shape[0] if rows is None else 1, names)
    if differ(hidden.shape[:-1], student.shape[:-1]):
        raise ValueError(
            f"teacher_hidden: expected the student's tokens, {sizes(student.shape[:-1])} and a width, "
            f"got {sizes(hidden.shape)}"
        )
    if rows is not None and weight.shape[0] != rows:
        raise ValueError(f"teacher_weight: expected the student's V = {rows} rows, got {weight.shape[0]}")
    same_device("teacher_hidden", hidden, student.device)


def head_weight(name: str, weight: object, bias_name: str, bias: Tensor | None) -> None:
    """Raise where the weight of a head is a Module that has a bias, too."""
    if isinstance(weight, torch.nn.Module) and bias is None and isinstance(getattr(weight, "bias", None), Tensor):
        kind = type(weight).__name__
        own = kind.lower()
        raise TypeError(f"{name}: expected a Tensor, got {kind}: use {own}.weight and {bias_name}={own}.bias")


def logit_map(softcap: Any, logit_scale: Any, prefix: str = "") -> tuple[Any, Any]:
    """Both as numbers; raise unless z is defined. The names begin with `prefix`."""
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
    """Raise unless `value` is None or has a number for each row of the teacher's weight."""
    if value is not None:
        vocabulary_vector("teacher_bias", value, weight.shape[0], weight.device)


def no_teacher(beside: str, **others: object) -> None:
    """Raise unless nothing that speaks of a teacher's head or logits is given beside the argument called `beside`."""
    for name, other in others.items():
        if other is not None:
            raise ValueError(f"{name}: expected None beside {beside}, got a {type(other).__name__}")


def teacher_given(name: str, value: Tensor | None) -> Tensor:
    """The teacher; raise where it is missing, and no cached one came instead."""
    if value is None:
        raise ValueError(f"{name}: expected a Tensor, or teacher_topk, got neither")
    return value


def teacher_topk(value: object, source: Tensor, vocab: int) -> None:
    """Raise unless `value` holds the top of a distribution for each row of `source`."""
    if not isinstance(value, tuple) or len(value) != 2:
        raise TypeError(f"teacher_topk: expected (values, indices) or None, got {type(value).__name__}")
    values, indices = value
    for name, part in (("teacher_topk[0]", values), ("teacher_topk[1]", indices)):
        tensor(name, part)
        if differ(part.shape[:-1], source.shape[:-1]) or not 1 <= part.shape[-1] <= vocab:
            expected = sizes(source.shape[:-1])[:-1] + (", " if source.dim() > 1 else "") + "k]"
            raise ValueError(f"{name}: expected {expected} with k from 1 to V = {vocab}, got {sizes(part.shape)}")
        same_device(name, part, source.device)
    floating("teacher_topk[0]", values)
    if indices.dtype != torch.int64:
        raise TypeError(f"teacher_topk[1]: expected int64, got {indices.dtype}: use indices.long()")
    if differ(indices.shape, values.shape):
        raise ValueError(f"teacher_topk[1]: expected {sizes(values.shape)} like its values, got {sizes(indices.shape)}")


def teacher_topk_values(values: Tensor, indices: Tensor, vocab: int) -> None:
    """Raise unless rows [rows, k], each class once, are parts of distributions. For eager CPU code alone: it reads."""
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


def distillation(
    divergence: str,
    jsd_weight: float,
    temperature: float,
    hard_label_weight: float,
    fp32_upcast: bool,
    chunk_size: int,
) -> tuple[Any, Any, Any]:
    """`jsd_weight`, `temperature` and `hard_label_weight` as numbers; raise unless each is in its range."""
    if divergence not in _DIVERGENCES:
        raise ValueError(f"divergence: expected one of {', '.join(map(repr, _DIVERGENCES))}, got {divergence!r}")
    jsd_weight = numbers.number("jsd_weight", jsd_weight)
    if not (isinstance(jsd_weight, Tensor) or 0 < jsd_weight < 1):
        raise ValueError(f"jsd_weight: expected a number between 0 and 1, got {jsd_weight}")
    _, temperature = transform(None, temperature)
    hard_label_weight = numbers.number("hard_label_weight", hard_label_weight)
    if not (isinstance(hard_label_weight, Tensor) or 0 <= hard_label_weight <= 1):
        raise ValueError(f"hard_label_weight: expected a number from 0 to 1, got {hard_label_weight}")
    flag("fp32_upcast", fp32_upcast)
    if numbers.integer("chunk_size", chunk_size, " >= 0") < 0:
        raise ValueError(f"chunk_size: expected an int >= 0, got {chunk_size}")
    return jsd_weight, temperature, hard_label_weight


def position_mask(value: Tensor, name: str, source: Tensor) -> None:
    """Raise unless `value` has one number for each row of `source`, the argument called `name`; nothing broadcasts."""
    tensor("position_mask", value)
    if value.dtype.is_complex:
        raise TypeError(f"position_mask: expected bool, integer or floating, got {value.dtype}")
    rows = source.shape[:-1]
    if value.shape not in (rows, torch.Size([*rows, 1])):
        raise ValueError(
            f"position_mask: expected the shape of {name} with 1 for its last dimension or without it, "
            f"{sizes(torch.Size([*rows, 1]))} or {sizes(rows)}, got {sizes(value.shape)}"
        )
    same_device("position_mask", value, source.device)


def soft_target(
    target_probs: Tensor | None,
    teacher_hidden: Tensor | None,
    teacher_weight: Tensor | None,
    draft_to_target: Tensor | None,
    hidden: Tensor,
    columns: int,
    vocab: int,
) -> None:
    """Raise unless exactly one form of target is given, and fits; a rank has `columns` of V."""
    head_given = teacher_hidden is not None or teacher_weight is not None
    if (target_probs is not None) == head_given or (teacher_hidden is None) != (teacher_weight is None):
        named = {"target_probs": target_probs, "teacher_hidden": teacher_hidden, "teacher_weight": teacher_weight}
        given = ", ".join([name for name, value in named.items() if value is not None]) or "none of them"
        raise ValueError(f"target_probs: expected it, or teacher_hidden and teacher_weight, got {given}")
    if target_probs is not None:
        if draft_to_target is not None:
            raise ValueError("draft_to_target: expected None beside target_probs, which are the draft's, got one")
        tensor("target_probs", target_probs)
        floating("target_probs", target_probs)
        if differ(target_probs.shape, (*hidden.shape[:-1], columns)):
            expected = torch.Size([*hidden.shape[:-1], columns])
            raise ValueError(f"target_probs: expected [..., V] = {sizes(expected)}, got {sizes(target_probs.shape)}")
        same_device("target_probs", target_probs, hidden.device)
        if target_probs.requires_grad and torch.is_grad_enabled():
            raise ValueError(
                "target_probs: expected a tensor without gradient, got requires_grad=True: use target_probs.detach(), "
                "or masked_soft_cross_entropy() on logits, which gives it"
            )
        return
    assert teacher_hidden is not None and teacher_weight is not None
    teacher(teacher_hidden, teacher_weight, hidden, columns if draft_to_target is None else None)
    if draft_to_target is not None:
        tensor("draft_to_target", draft_to_target)
        if draft_to_target.dtype != torch.int64:
            raise TypeError(f"draft_to_target: expected int64, got {draft_to_target.dtype}: use draft_to_target.long()")
        if draft_to_target.shape != (vocab,):
            raise ValueError(f"draft_to_target: expected [V] = [{vocab}], got {sizes(draft_to_target.shape)}")
        same_device("draft_to_target", draft_to_target, hidden.device)
