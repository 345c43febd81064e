"""From two distributions' arguments to losses: what distillation and soft cross-entropy share.

N tokens, H width, V vocabulary. The engine sees [N, H], [N, V] and [N].
"""

from __future__ import annotations

from math import prod
from typing import cast

import torch
from torch import Tensor

from compiled_loss import checks, reduction
from compiled_loss.checks import numbers
from compiled_loss.dispatch.layout import merged
from compiled_loss.distributed.vocab_shard import Vocabulary
from compiled_loss.engine import divergence_chunks, divergence_logits
from compiled_loss.engine.divergence_chunks import Weighted
from compiled_loss.engine.gradients import Needs
from compiled_loss.engine.math.divergences import Kind, Pair, Target
from compiled_loss.engine.math.statistics import statistics_dtype
from compiled_loss.engine.transforms import traced, without_autocast
from compiled_loss.planner.chunking import Chunking
from compiled_loss.planner.plan import lengths


def scalars(like: Tensor, temperature: float, jsd_weight: float | None = None) -> Pair:
    """The engine's `Pair`, its scalars as tensors: see `head.transform`."""
    one = torch.ones((), dtype=statistics_dtype(like.dtype), device=like.device)
    return Pair(
        None if numbers.known(temperature, 1) else one / temperature,
        None if jsd_weight is None else one * jsd_weight,
    )


def on_logits(
    logits: Tensor,  # [..., V]
    target: Target,  # [..., V] or [..., k]
    labels: Tensor | None,  # [...]
    active: Tensor,  # [...] bool
    kind: str,
    pair: Pair,
    vocabulary: Vocabulary,
    compile: bool | str,
) -> tuple[Tensor, Tensor | None]:
    """Each token's divergence and, with labels, cross-entropy, [...] each."""
    kind = cast(Kind, kind)
    labels = None if labels is None else vocabulary.labels(labels)
    if traced():
        logits, target = _looked_at(logits, active), target.map(lambda v: _looked_at(v, active))
        return divergence_logits.plain_divergence(logits, target, labels, kind, pair)
    shape = logits.shape[:-1]
    logits, *present = merged(logits, *[v for v in target if v is not None])
    target = Target(*present)
    labels = None if labels is None else labels.reshape(logits.shape[:-1])
    with without_autocast(logits.device):
        soft, hard = divergence_logits.divergence(logits, target, labels, kind, pair, vocabulary.group, compile)
    return soft.reshape(shape), None if hard is None else hard.reshape(shape)


def on_head(
    hidden: Tensor,  # [..., H]
    weight: Tensor,  # [V, H]
    target: Target,  # [..., V] probabilities, [..., H'] with a weight, or [..., k]
    kind: str,
    pair: Pair,
    weighted: Weighted,  # of [...]
    vocabulary: Vocabulary,
    chunking: Chunking,
    *,
    scalar: bool = True,
) -> Tensor:
    """Each active token's soft * divergence + hard * cross-entropy, [...], or their sum."""
    checks.instance("chunking", chunking, Chunking)
    checks.chunking.walks_tokens(chunking.strategy)
    shape = hidden.shape[:-1]
    hidden, target = hidden.reshape(-1, hidden.shape[-1]), _flat(target)
    weighted = weighted.map(lambda v: v.reshape(-1))
    compact = reduction.compacted(weighted.active, chunking)
    if compact is None:
        loss = _on_rows(hidden, weight, target, kind, pair, weighted, vocabulary, chunking, scalar=scalar)
        return loss if scalar else loss.reshape(shape)
    hidden, target, weighted = compact.gathered(hidden), target.map(compact.gathered), weighted.map(compact.gathered)
    loss = _on_rows(hidden, weight, target, kind, pair, weighted, vocabulary, chunking, scalar=scalar)
    return (loss if scalar else compact.scattered(loss).reshape(shape)) * compact.fits


def _on_rows(
    hidden: Tensor,  # [N, H]
    weight: Tensor,
    target: Target,
    kind: str,
    pair: Pair,
    weighted: Weighted,  # of [N]
    vocabulary: Vocabulary,
    chunking: Chunking,
    *,
    scalar: bool,
) -> Tensor:
    """`on_head`, [N], of all rows that there are."""
    kind = cast(Kind, kind)
    if weighted.labels is not None:
        weighted = weighted._replace(labels=vocabulary.labels(weighted.labels))
    if traced():
        hidden, target = _looked_at(hidden, weighted.active), target.map(lambda v: _looked_at(v, weighted.active))
        if target.weight is not None:
            target = Target(target.values @ target.weight.detach().t())
        logits = hidden @ weight.t()
        losses = weighted.of(*divergence_logits.plain_divergence(logits, target, weighted.labels, kind, pair))
        return losses.sum() if scalar else losses
    share, group = vocabulary.share, vocabulary.group
    columns = share if target.weight is None else 2 * share  # that a chunk holds
    tokens, width = hidden.shape
    of = (columns, hidden.dtype, hidden.device)
    _, how = lengths(tokens, width, *of, chunking, ranks=vocabulary.ranks, strategies=("tokens",))
    with without_autocast(hidden.device):
        if not scalar:
            rows = divergence_chunks.divergence(hidden, weight, target, weighted.labels, kind, pair, how, group)
            return weighted.of(*rows)
        enabled = torch.is_grad_enabled()
        needs = Needs(enabled and hidden.requires_grad, enabled and weight.requires_grad, needs_bias=False)
        return divergence_chunks.weighted_sum(hidden, weight, target, kind, pair, weighted, how, group, needs)


def _looked_at(rows: Tensor, active: Tensor) -> Tensor:
    """Rows that count, 0 in all others."""
    return torch.where(active.unsqueeze(-1), rows, 0)


def _flat(target: Target) -> Target:
    return target.map(_rows)


def _rows(values: Tensor) -> Tensor:
    """[rows, columns], of which there may be none."""
    return values.reshape(prod(values.shape[:-1]), values.shape[-1])
