"""From two distributions' arguments to losses: what distillation and soft cross-entropy share.

N tokens, H width, V vocabulary. The engine sees [N, H], [N, V] and [N].
"""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor

from compiled_loss import checks, reduction
from compiled_loss.engine import divergence_chunks, divergence_logits
from compiled_loss.engine.divergence_chunks import Weighted
from compiled_loss.engine.divergences import Kind, Pair
from compiled_loss.engine.plan import Chunking, plan
from compiled_loss.engine.statistics import statistics_dtype
from compiled_loss.engine.token_chunks import Wanted


def scalars(like: Tensor, temperature: float, jsd_weight: float | None = None) -> Pair:
    """The engine's `Pair`, its scalars as tensors: see `head.transform`."""
    one = torch.ones((), dtype=statistics_dtype(like.dtype), device=like.device)
    return Pair(
        None if temperature == 1 else one / temperature,
        None if jsd_weight is None else one * jsd_weight,
        None,
    )


def on_logits(
    logits: Tensor,  # [..., V]
    target: Tensor,  # [..., V]
    labels: Tensor | None,  # [...]
    kind: str,
    pair: Pair,
) -> tuple[Tensor, Tensor | None]:
    """Each token's divergence and, with labels, cross-entropy, [...] each."""
    kind = cast(Kind, kind)
    if reduction.traced():
        return divergence_logits.plain_divergence(logits, target, labels, kind, pair)
    # Flat where that is free; other strides stay as they are, for a reshape would copy.
    shape, vocab = logits.shape[:-1], logits.shape[-1]
    if logits.dim() < 2 or logits.numel() == 0 or (logits.is_contiguous() and target.is_contiguous()):
        logits, target = logits.reshape(-1, vocab), target.reshape(-1, vocab)
        labels = None if labels is None else labels.reshape(-1)
    with torch.autocast(logits.device.type, enabled=False):
        soft, hard = divergence_logits.divergence(logits, target, labels, kind, pair)
    return soft.reshape(shape), None if hard is None else hard.reshape(shape)


def on_head(
    hidden: Tensor,  # [..., H]
    weight: Tensor,  # [V, H]
    target: Tensor,  # [..., V] probabilities, or [..., H'] where `pair` has a weight
    kind: str,
    pair: Pair,
    weighted: Weighted,  # of [...]
    chunking: Chunking,
) -> Tensor:
    """The sum over the active tokens of soft * divergence + hard * cross-entropy."""
    checks.instance("chunking", chunking, Chunking)
    checks.walks_tokens(chunking.strategy)
    kind = cast(Kind, kind)
    hidden, target = hidden.reshape(-1, hidden.shape[-1]), target.reshape(-1, target.shape[-1])
    weighted = Weighted(*(None if v is None else v.reshape(-1) for v in weighted))  # type: ignore[arg-type]
    (tokens, width), vocab, dtype = hidden.shape, weight.shape[0], hidden.dtype
    if reduction.traced():
        logits = target if pair.target_weight is None else target @ pair.target_weight.t()
        pair = pair._replace(target_weight=None)
        soft, hard = divergence_logits.plain_divergence(hidden @ weight.t(), logits, weighted.labels, kind, pair)
        losses = weighted.soft * soft
        if hard is not None and weighted.hard is not None:
            losses = losses + weighted.hard * hard
        return torch.where(weighted.active, losses, 0.0).sum()
    if chunking.accumulate_dtype is not None:
        checks.accumulator(chunking.accumulate_dtype, dtype)
    columns = vocab if pair.target_weight is None else 2 * vocab  # that a chunk holds
    chosen = plan(tokens, width, columns, dtype, chunking, strategies=("tokens",))
    if chunking.memory_budget is not None:
        checks.memory_budget(chunking.memory_budget, "token", columns * dtype.itemsize)
    enabled = torch.is_grad_enabled()
    wanted = Wanted(enabled and hidden.requires_grad, enabled and weight.requires_grad, False)
    with torch.autocast(hidden.device.type, enabled=False):
        return divergence_chunks.weighted_sum(hidden, weight, target, kind, pair, weighted, chosen, wanted)
