"""Masks, weights and normalisation: from a loss's keywords to each token's coefficients. The one owner of `reduction`.

N tokens (or any leading shape), V vocabulary. Everything here is [N] and cheap; nothing looks at a logit. Because the
normalisation is in the coefficients, every path that reaches the engine is normalised alike, and an empty batch is a
batch of zero coefficients: its loss is 0, attached to the graph, with zero gradients.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from compiled_loss import checks
from compiled_loss.checks import numbers
from compiled_loss.engine.compaction import Compaction
from compiled_loss.engine.math.statistics import IGNORED, Coefficients, statistics_dtype
from compiled_loss.planner.chunking import Chunking


class Tokens(NamedTuple):
    """The tokens of a loss, each [...]: what they predict, how much they weigh, which of them count at all."""

    labels: Tensor
    weight: Tensor  # fp32; 0 where ignored
    active: Tensor  # False where ignored: by the label or by a mask of 0
    poison: Tensor  # 1, or NaN where an active token's label is no class

    @property
    def looked_at(self) -> Tensor:
        """The labels, `IGNORED` where a token does not count."""
        return torch.where(self.active, self.labels.clamp(min=-1), IGNORED)

    def map(self, change: Callable[[Tensor], Tensor]) -> Tokens:
        """Each changed."""
        return Tokens(*(change(v) for v in self))


def tokens(
    labels: Tensor,
    mask: Tensor | None,
    token_weights: Tensor | None,
    *,
    ignore_index: int,
    shift: int,
    vocab: int | None,
    dtype: torch.dtype,
) -> Tokens:
    """Weight and validity of each token. A label out of range poisons its token; eager CPU code raises instead.

    Without `vocab` labels only tell which tokens count.
    """
    shift, ignore_index = checks.alignment(shift, ignore_index, labels.dim())
    active = labels != ignore_index
    if mask is not None:
        active = active & (mask != 0)
    weight = active.to(statistics_dtype(dtype))
    for factor in (mask, token_weights):
        if factor is not None:
            weight = weight * torch.where(active, factor.to(weight.dtype), 0.0)
    if shift:
        labels, weight, active = (
            _shifted(v, shift, f) for v, f in ((labels, ignore_index), (weight, 0), (active, False))
        )
    if vocab is None:
        return Tokens(labels, weight, active, torch.ones_like(weight))
    bad = active & ((labels < 0) | (labels >= vocab))
    if numbers.readable(labels):
        checks.labels_in_range(bad, labels, vocab, ignore_index)
    return Tokens(labels, weight, active, torch.where(bad, float("nan"), 1.0).to(weight.dtype))


def compacted(active: Tensor, chunking: Chunking) -> Compaction | None:
    """Which of the tokens [...] are computed; None for all, as they are."""
    active = active.reshape(-1)
    rows = chunking.rows(active.shape[0])
    if rows is None:
        return None
    if numbers.readable(active):
        checks.chunking.label_tokens_fit(int(active.sum()), rows, active.shape[0])
    return Compaction.of(active, rows)


def coefficients(
    tokens: Tokens,
    *,
    vocab: int,
    class_weights: Tensor | None = None,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    reduction: str = "mean",
    num_label_tokens: int | Tensor | None = None,
) -> Coefficients:
    """Each token's loss as a combination of its statistics, normalised, [...] each.

    cross-entropy = c_y (1 - e) nll + e / V (sum(c) lse - total), with c the class weights and e the smoothing.
    """
    label_smoothing, z_loss = checks.terms(label_smoothing, z_loss)
    checks.reduction(reduction)
    num_label_tokens = checks.count(num_label_tokens, reduction, tokens.labels.device)
    weight = tokens.weight
    class_total: int | Tensor
    if class_weights is None:
        label_weight, class_total = torch.ones_like(weight), vocab
    else:
        class_weights = class_weights.to(weight.dtype)
        label_weight = torch.where(tokens.active, class_weights[tokens.labels.clamp(0, vocab - 1)], 0.0)
        class_total = class_weights.sum()

    cross_entropy = divided(weight, weight * label_weight, reduction, num_label_tokens)
    square = divided(weight, weight, reduction, num_label_tokens)
    smooth = None if numbers.known(label_smoothing, 0) else label_smoothing / vocab * cross_entropy
    return Coefficients(
        nll=(1 - label_smoothing) * label_weight * cross_entropy * tokens.poison,
        lse=None if smooth is None else smooth * class_total,
        total=None if smooth is None else -smooth,
        square=None if numbers.known(z_loss, 0) else z_loss * square,
    )


def divided(weight: Tensor, by: Tensor, reduction: str, num_label_tokens: int | Tensor | None) -> Tensor:
    """Each token's weight over what the reduction divides by: the sum of `by`, `num_label_tokens`, or nothing."""
    if reduction == "mean":
        return weight * _reciprocal(by.sum())
    if num_label_tokens is None:
        return weight
    if isinstance(num_label_tokens, Tensor):
        count = num_label_tokens.reshape(()).to(weight.dtype)
    else:
        count = torch.full((), num_label_tokens, dtype=weight.dtype, device=weight.device)
    return weight * _reciprocal(count)


def reduced(rows: Tensor, reduction: str) -> Tensor:
    """Rows [...], or their sum: "mean" is in the coefficients."""
    return rows if reduction == "none" else rows.sum()


def _shifted(values: Tensor, shift: int, fill: float) -> Tensor:
    """values[..., t + shift] at t, `fill` at the last `shift` positions."""
    shift = min(shift, values.shape[-1])
    return torch.nn.functional.pad(values[..., shift:], (0, shift), value=fill)


def _reciprocal(value: Tensor) -> Tensor:
    """1 / value, or 0 where it is 0; without a NaN gradient there."""
    empty = value == 0
    return torch.where(empty, 0.0, 1.0 / torch.where(empty, 1.0, value))
