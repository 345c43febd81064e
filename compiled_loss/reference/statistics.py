"""Statistics of tokens, and the losses that users make of statistics or of logits."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection
from typing import Any, NamedTuple

import torch
from torch import Tensor

from compiled_loss.reference.tokens import aligned, token_logits, transformed, weighed


class Statistics(NamedTuple):
    """The statistics of each token."""

    logprob: Tensor
    logsumexp: Tensor
    entropy: Tensor
    correct: Tensor
    mean_logit: Tensor | None = None
    log_sum_sq_probs: Tensor | None = None
    first_argmax: Tensor | None = None
    ids_logprob: Tensor | None = None
    top_k: tuple[Tensor, Tensor] | None = None


def token_statistics(
    logits: Tensor,
    labels: Tensor,
    *,
    mask: Tensor | None = None,
    ignore_index: int = -100,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    temperature: float | Tensor = 1.0,
    shift: int = 0,
    class_dim: int = -1,
    wanted: Collection[str] = ("logprob", "logsumexp", "entropy", "correct"),
) -> Statistics:
    """Computes all statistics of each token."""
    z = transformed(logits.movedim(class_dim, -1), None, softcap, temperature, logit_scale)
    valid = labels != ignore_index
    if mask is not None:
        valid = valid & (mask != 0).expand(labels.shape)
    labels, valid = aligned(labels, shift, ignore_index), aligned(valid, shift, False)
    target = torch.where(valid, labels, 0)
    log_p = torch.log_softmax(z, dim=-1)
    logprob = log_p.gather(-1, target.unsqueeze(-1)).squeeze(-1)
    entropy = -(log_p.exp() * torch.where(log_p == -math.inf, 0.0, log_p)).sum(-1)
    correct = z.gather(-1, target.unsqueeze(-1)).squeeze(-1) == z.amax(-1)
    lse, squares = torch.logsumexp(z, dim=-1), torch.logsumexp(2 * log_p, dim=-1)
    ordered = torch.arange(z.shape[-1], device=z.device).expand(z.shape)
    first = torch.where(z == z.amax(-1, keepdim=True), ordered, z.shape[-1]).amin(-1)
    every = (logprob, lse, entropy, correct, z.mean(-1), squares, first)
    masked = [v & valid if v.dtype == torch.bool else torch.where(valid, v, 0) for v in every]
    return Statistics(*[v if name in wanted else None for name, v in zip(Statistics._fields, masked, strict=False)])  # type: ignore[arg-type]


def linear_token_statistics(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    bias: Tensor | None = None,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    temperature: float | Tensor = 1.0,
    ids: Tensor | None = None,
    top_k: int | None = None,
    kept_ids: Tensor | None = None,
    **keywords: object,
) -> Statistics:
    """Computes `token_statistics` of the head's logits, over the kept classes if there are any."""
    z = every = token_logits(hidden, weight, bias, softcap, temperature, logit_scale)
    if kept_ids is not None:
        z = torch.where(_kept(kept_ids, labels, z.shape[-1]), z, -math.inf)
    found = token_statistics(z, labels, **keywords)  # type: ignore[arg-type]
    active = torch.ne(labels, keywords.get("ignore_index", -100)).unsqueeze(-1)  # type: ignore[call-overload]
    if ids is not None:
        rows = ids.expand(*labels.shape, -1)
        log_p = every - torch.logsumexp(z, -1, keepdim=True)
        chosen = torch.where(rows < 0, -math.inf, log_p.gather(-1, rows.clamp(min=0)))
        found = found._replace(ids_logprob=torch.where(active, chosen, 0.0))
    if top_k is not None:
        values, order = torch.log_softmax(z.detach(), -1).topk(top_k, -1)
        found = found._replace(top_k=(torch.where(active, values, 0.0), torch.where(active, order, 0)))
    return found


def _kept(kept_ids: Tensor, labels: Tensor, vocab: int) -> Tensor:
    """Returns True for the classes that are kept, [..., V]."""
    ids = torch.cat([kept_ids, labels.unsqueeze(-1)], -1)
    ids = torch.where(ids < 0, vocab, ids)
    none = torch.zeros(*labels.shape, vocab + 1, dtype=torch.bool, device=ids.device)
    return none.scatter(-1, ids, True)[..., :vocab]


def linear_token_loss(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    token_loss: Callable[..., Tensor],
    *inputs: Tensor | float,
    bias: Tensor | None = None,
    mask: Tensor | None = None,
    token_weights: Tensor | None = None,
    ignore_index: int = -100,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    temperature: float | Tensor = 1.0,
    shift: int = 0,
    reduction: str = "mean",
    num_label_tokens: int | Tensor | None = None,
) -> Tensor:
    """Computes `token_loss` of the tokens' statistics and of the rows of `inputs`, weighted like cross-entropy."""
    z = token_logits(hidden, weight, bias, softcap, temperature, logit_scale)
    more = {"mask": mask, "ignore_index": ignore_index, "shift": shift, "wanted": Statistics._fields}
    statistics = token_statistics(z, labels, **more)  # type: ignore[arg-type]
    flat: list[Any] = [v.reshape(-1) for v in statistics[:7]]  # type: ignore[union-attr]
    rows = [v.flatten(0, labels.dim() - 1) if isinstance(v, Tensor) and v.dim() else v for v in inputs]
    losses = token_loss(Statistics(*flat), *rows).reshape(labels.shape)
    counts = torch.ones(labels.shape, dtype=z.dtype, device=z.device)
    for factor in (mask, token_weights):
        if factor is not None:
            counts = counts * factor.to(z.dtype).expand(labels.shape)
    valid = (labels != ignore_index) & (True if mask is None else (mask != 0).expand(labels.shape))
    valid, counts = aligned(valid, shift, False), aligned(counts, shift, 0.0)
    return weighed(losses, counts, valid, reduction, num_label_tokens)


def linear_logits_loss(
    hidden: Tensor,
    weight: Tensor,
    logits_loss: Callable[..., Tensor],
    *inputs: Tensor | float,
    bias: Tensor | None = None,
    mask: Tensor | None = None,
    token_weights: Tensor | None = None,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    temperature: float | Tensor = 1.0,
    reduction: str = "mean",
    num_label_tokens: int | Tensor | None = None,
) -> Tensor:
    """Computes `logits_loss` of all logits at once, weighted like cross-entropy."""
    z = token_logits(hidden, weight, bias, softcap, temperature, logit_scale)
    rows = [v.flatten(0, z.dim() - 2) if isinstance(v, Tensor) and v.dim() else v for v in inputs]
    losses = logits_loss(z.flatten(0, -2), *rows).reshape(z.shape[:-1])
    counts = torch.ones_like(losses)
    for factor in (mask, token_weights):
        if factor is not None:
            counts = counts * factor.to(z.dtype).expand(losses.shape)
    return weighed(losses, counts, counts != 0, reduction, num_label_tokens)
