"""Masks, weights and normalisation: each token's coefficients from a loss's keywords. The one owner of `reduction`.

N tokens (or any leading shape), V vocabulary. Everything here is [N] and cheap, and no logit is read. The normalisation
is in the coefficients, so every path that reaches the engine is normalised in the same way. An empty batch is a batch
of zero coefficients: its loss is 0, attached to the graph, with zero gradients.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from compiled_loss import checks
from compiled_loss.checks import numbers
from compiled_loss.engine.compaction import Compaction
from compiled_loss.engine.math.coefficients import Classes, Coefficients, Divisor
from compiled_loss.engine.math.statistics import statistics_dtype
from compiled_loss.planner.chunking import Chunking


class Tokens(NamedTuple):
    """The tokens of a loss, with their labels and weights, [...] each.

    `classes` says which labels do not count: those that are `ignore_index`, or where a mask is 0. Where labels alone
    say it, no weight is computed, so that a compiled loss needs no kernel for it.
    """

    labels: Tensor
    weight: Tensor | None  # in the statistics' dtype, 0 where ignored; None for 1 wherever a token counts
    classes: Classes

    @property
    def active(self) -> Tensor:
        """True for tokens that count."""
        return self.classes.active(self.labels)

    def weights(self, dtype: torch.dtype) -> Tensor:
        """Returns the weight of each token, 0 where it is ignored."""
        return self.active.to(dtype) if self.weight is None else self.weight

    def map(self, change: Callable[[Tensor], Tensor]) -> Tokens:
        """Returns a copy with `change` applied to each tensor."""
        return self._replace(labels=change(self.labels), weight=None if self.weight is None else change(self.weight))

    def gathered(self, compact: Compaction) -> Tokens:
        """Returns the tokens of [N] that count, in their rows. Rows that are left over do not count."""
        moved = self.map(compact.gathered)
        return moved._replace(labels=torch.where(compact.taken, moved.labels, self.classes.ignored))


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
    """Returns the tokens of a loss. A label out of range makes its token NaN; eager CPU code raises instead.

    Without `vocab` labels only tell which tokens count.
    """
    classes = Classes(ignore_index, -(2**63), 2**63 - 1) if vocab is None else Classes(ignore_index, 0, vocab)
    dtype = statistics_dtype(dtype)
    weight = None
    if mask is not None:
        labels = torch.where(mask != 0, labels, ignore_index)
    factors = [f for f in (mask, token_weights) if f is not None and f.dtype != torch.bool]
    if factors:
        active = classes.active(labels)
        weight = active.to(dtype)
        for factor in factors:
            weight = weight * torch.where(active, factor.to(dtype), 0.0)
    if shift:
        labels, weight = shifted(labels, shift, ignore_index), None if weight is None else shifted(weight, shift, 0)
    if vocab is not None and numbers.can_read_values(labels):
        checks.labels_in_range(classes.invalid(labels), labels, vocab, ignore_index)
    return Tokens(labels, weight, classes)


def compacted(active: Tensor, chunking: Chunking) -> Compaction | None:
    """Returns the compaction of the tokens, [...], that are computed; None if all of them are, as they are."""
    active = active.reshape(-1)
    rows = chunking.rows(active.shape[0])
    if rows is None:
        return None
    if numbers.can_read_values(active):
        checks.chunking.label_tokens_fit(int(active.sum()), rows, active.shape[0])
    return Compaction.of(active, rows)


class Terms(NamedTuple):
    """The checked numbers of a cross-entropy."""

    class_weights: Tensor | None  # [V], of all ranks
    label_smoothing: float | Tensor
    z_loss: float | Tensor


def normalised(
    tokens: Tokens, terms: Terms, reduction: str, num_label_tokens: int | Tensor | None, dtype: torch.dtype
) -> tuple[Coefficients, Divisor]:
    """Returns the coefficients of each token's statistics, [...] each, and the divisor of the sum.

    cross-entropy = c_y (1 - e) nll + e / V (sum(c) lse - total), with c the class weights and e the smoothing.
    """
    class_weights, label_smoothing, z_loss = terms
    smooth, squared = (not numbers.known(v, 0) for v in (label_smoothing, z_loss))
    if tokens.weight is None and class_weights is None and not smooth and not squared:
        return Coefficients(None, None, None, None), _divisor(reduction, num_label_tokens)
    weight, vocab = tokens.weights(dtype), tokens.classes.last
    class_total: int | Tensor
    if class_weights is None:
        label_weight, class_total = torch.ones_like(weight), vocab
    else:
        class_weights = class_weights.to(dtype)
        label_weight = torch.where(tokens.active, class_weights[tokens.labels.clamp(0, vocab - 1)], 0.0)
        class_total = class_weights.sum()
    cross_entropy = divided(weight, weight * label_weight, reduction, num_label_tokens)
    smoothed = label_smoothing / vocab * cross_entropy if smooth else None
    nan_if_invalid = tokens.classes.nan_if_invalid(tokens.labels, dtype)
    square = z_loss * divided(weight, weight, reduction, num_label_tokens) if squared else None
    return Coefficients(
        nll=(1 - label_smoothing) * label_weight * cross_entropy * nan_if_invalid,
        lse=None if smoothed is None else smoothed * class_total,
        total=None if smoothed is None else -smoothed,
        square=square,
    ), Divisor(of_rows=False, divisor=None, number=None)


def _divisor(reduction: str, num_label_tokens: int | Tensor | None) -> Divisor:
    tensor = isinstance(num_label_tokens, Tensor)
    return Divisor(
        of_rows=reduction == "mean",
        divisor=num_label_tokens if tensor else None,  # type: ignore[arg-type]
        number=None if tensor else num_label_tokens,  # type: ignore[arg-type]
    )


def divided(weight: Tensor, by: Tensor, reduction: str, num_label_tokens: int | Tensor | None) -> Tensor:
    """Returns each token's weight over the reduction's divisor: the sum of `by`, `num_label_tokens`, or nothing."""
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
    """Returns the rows, [...], or their sum: "mean" is in the coefficients."""
    return rows if reduction == "none" else rows.sum()


def shifted(values: Tensor, shift: int, fill: float) -> Tensor:
    """Returns values[..., t + shift] at t, and `fill` at the last `shift` positions."""
    shift = min(shift, values.shape[-1])
    return torch.nn.functional.pad(values[..., shift:], (0, shift), value=fill)


def _reciprocal(value: Tensor) -> Tensor:
    """Returns 1 / value, or 0 where the value is 0; without a NaN gradient there."""
    empty = value == 0
    return torch.where(empty, 0.0, 1.0 / torch.where(empty, 1.0, value))
