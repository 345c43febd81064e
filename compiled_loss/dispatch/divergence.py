"""Dispatch from the arguments of two distributions to losses, shared by distillation and soft cross-entropy.

N tokens, H width, V vocabulary. The engine sees [N, H], [N, V] and [N].
"""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from typing import Any, NamedTuple

import torch
from torch import Tensor

from compiled_loss import checks, reduction
from compiled_loss.checks import numbers
from compiled_loss.dispatch.keywords import Keywords
from compiled_loss.dispatch.layout import merged
from compiled_loss.distributed.vocab_shard import Vocabulary
from compiled_loss.engine import divergence_chunks, divergence_logits
from compiled_loss.engine.divergence_chunks import Weighted
from compiled_loss.engine.gradients import Needs
from compiled_loss.engine.math.divergence_kinds import Kind, Pair
from compiled_loss.engine.math.divergences import Found, Target
from compiled_loss.engine.math.statistics import statistics_dtype
from compiled_loss.engine.operators import none
from compiled_loss.engine.transforms import traced, without_autocast
from compiled_loss.planner.plan import Lengths, lengths


class Transform(NamedTuple):
    """A head's transform of h @ w.T, with the caller's arguments.

    z is softcap * tanh(logit_scale * (h @ w.T + bias) / softcap).
    """

    softcap: Any = None  # a number, or None for none
    logit_scale: Any = None  # a number, or None for 1
    bias: Tensor | None = None  # [V], a rank's own


def pair(
    like: Tensor,
    temperature: Any,
    student: Transform,
    target: Transform = Transform(),
    *,
    weights: Sequence[Any] | None = None,
    jsd_weight: Any = None,
    lk_decay: Any = None,
    hard: bool = False,
) -> Pair:
    """Returns the engine's `Pair`.

    `hard` says that a cross-entropy with labels is wanted, which is at temperature 1.
    """
    # Products with a number, not torch.full. If a number changes from step to step, the compiler makes it an input only
    # where it meets a tensor in arithmetic. Elsewhere it recompiles for every value.
    one = torch.ones((), dtype=statistics_dtype(like.dtype), device=like.device)

    def scalars(transform: Transform, temperature: Any) -> tuple[Tensor | None, Tensor | None]:
        softcap, scale = transform.softcap, 1 if transform.logit_scale is None else transform.logit_scale
        if softcap is not None:
            return one * scale / softcap, one * softcap / temperature
        unchanged = numbers.known(scale, 1) and numbers.known(temperature, 1)
        return None, None if unchanged else one * scale / temperature

    return Pair(
        one / temperature if hard and not numbers.known(temperature, 1) else None,
        None if weights is None else torch.stack([one * weight for weight in weights]),
        None if jsd_weight is None else one * jsd_weight,
        None if lk_decay is None else one * lk_decay,
        student.bias,
        *scalars(student, 1 if hard else temperature),
        target.bias,
        *scalars(target, temperature),
    )


def at_temperatures(target: Target, keywords: Keywords, tokens: reduction.Tokens, dtype: torch.dtype) -> Target:
    """Returns the target with the tokens' own temperatures, [...], if they have some."""
    inverse = keywords.inverse_temperature(tokens, dtype)
    if inverse is None:
        return target
    return target._replace(inverse_temperature=inverse.expand(tokens.labels.shape).unsqueeze(-1))


def on_logits(
    logits: Tensor,  # [..., V]
    target: Target,  # [..., V] or [..., k]
    kind: Kind,
    pair: Pair,
    weighted: Weighted,  # of [...]
    vocabulary: Vocabulary,
    compile: bool | str,
) -> tuple[Tensor, Found]:
    """Returns each active token's soft * divergence + hard * cross-entropy, [...], and the `Found` of each."""
    labels = None if weighted.labels is None else vocabulary.labels(weighted.labels)
    if traced():
        logits, target = _looked_at(logits, target, kind, weighted.active)
        found = divergence_logits.plain_divergence(logits, target, labels, kind, pair)
        return weighted.of(found), found
    shape = logits.shape[:-1]
    logits, *rest = merged(logits, *[v for v in target if v is not None])
    present = list(rest)  # Dynamo 2.11 makes a tuple of them
    target = Target(*[None if v is None else present.pop(0) for v in target])  # type: ignore[arg-type]
    labels = None if labels is None else labels.reshape(logits.shape[:-1])
    with without_autocast(logits.device):
        found = divergence_logits.divergence(logits, target, labels, kind, pair, vocabulary.group, compile)
    found = found.map(lambda v: v.reshape(shape))
    return weighted.of(found), found


def planned(
    shape: torch.Size,  # a rank's hidden states
    part: Vocabulary,
    keywords: Keywords,
    dtype: torch.dtype,
    device: torch.device,
    *,
    heads: int,  # whose logits a chunk holds
) -> Lengths:
    """Returns the chunk lengths of heads, chunked over tokens. Raises an error if another strategy is asked for."""
    chunking = keywords.chunking
    checks.chunking.whole_rows(chunking.strategy)
    tokens = prod(shape[:-1])
    rows = chunking.rows(tokens)
    return lengths(
        tokens if rows is None else rows,
        shape[-1],
        heads * part.share,
        dtype,
        device,
        chunking,
        ranks=part.ranks,
        strategies=("tokens",),
    )[1]


def on_head(
    hidden: Tensor,  # [..., H]
    weight: Tensor,  # [V, H]
    target: Target,  # [..., V] probabilities, [..., H'] with a weight, or [..., k]
    kind: Kind,
    pair: Pair,
    weighted: Weighted,  # of [...]
    part: Vocabulary,
    how: Lengths,
    keywords: Keywords,
) -> tuple[Tensor, Found]:
    """Returns active tokens' soft * divergence + hard * cross-entropy, [...], or their sum; and statistics, [...]."""
    shape, scalar = hidden.shape[:-1], keywords.reduction != "none"
    hidden, target = hidden.reshape(-1, hidden.shape[-1]), target.map(_rows)
    weighted = weighted.map(lambda v: v.reshape(-1))
    compact = reduction.compacted(weighted.active, keywords.chunking)
    if compact is not None:
        hidden, target = compact.gathered(hidden), target.map(compact.gathered)
        weighted = weighted.map(compact.gathered)
    loss, found = _on_rows(hidden, weight, target, kind, pair, weighted, part, how, scalar=scalar)

    def back(rows: Tensor) -> Tensor:
        return rows.reshape(shape) if compact is None else compact.scattered(rows).reshape(shape) * compact.fits

    statistics = found.map(lambda v: back(v.detach())) if kind.statistics else none(Found)
    if not scalar:
        return back(loss), statistics
    return loss if compact is None else loss * compact.fits, statistics


def _on_rows(
    hidden: Tensor,  # [N, H]
    weight: Tensor,
    target: Target,
    kind: Kind,
    pair: Pair,
    weighted: Weighted,  # of [N]
    part: Vocabulary,
    how: Lengths,
    *,
    scalar: bool,
) -> tuple[Tensor, Found]:
    """Does what `on_head` does, for rows [N] that are compacted already."""
    group = part.group
    if weighted.labels is not None:
        weighted = weighted._replace(labels=part.labels(weighted.labels))
    if traced():
        hidden, target = _looked_at(hidden, target, kind, weighted.active)
        if target.weight is not None:
            target = target._replace(values=target.values @ target.weight.detach().t(), weight=None)
        logits = hidden @ weight.t()
        found = divergence_logits.plain_divergence(logits, target, weighted.labels, kind, pair)
        losses = weighted.of(found)
        return losses.sum() if scalar else losses, found
    with without_autocast(hidden.device):
        if not scalar:
            found = divergence_chunks.divergence(hidden, weight, target, weighted.labels, kind, pair, how, group)
            return weighted.of(found), found
        enabled, bias = torch.is_grad_enabled(), pair.bias
        needs = Needs(
            enabled and hidden.requires_grad,
            enabled and weight.requires_grad,
            enabled and bias is not None and bias.requires_grad,
        )
        return divergence_chunks.weighted_sum(hidden, weight, target, kind, pair, weighted, how, group, needs)


def _looked_at(rows: Tensor, target: Target, kind: Kind, active: Tensor) -> tuple[Tensor, Target]:
    """Returns the rows that count; in all others, values whose divergence is finite."""
    count, other = active.unsqueeze(-1), 1 if kind.probabilities else 0
    return torch.where(count, rows, 0), target.map(lambda v: torch.where(count, v, other))


def _rows(values: Tensor) -> Tensor:
    """Returns values as [rows, columns], either of which may be 0."""
    return values.reshape(prod(values.shape[:-1]), values.shape[-1])
