"""Policy losses."""

from __future__ import annotations

import torch
from torch import Tensor


def policy_loss(
    logprob: Tensor,  # [B, S]
    old_logprob: Tensor,
    advantages: Tensor,
    *,
    entropy: Tensor | None = None,
    mask: Tensor | None = None,
    token_weights: Tensor | None = None,
    kind: str = "clip",
    importance: str = "token",
    clip_low: float = 0.2,
    clip_high: float = 0.2,
    dual_clip: float | None = None,
    temperature_positive: float = 1.0,
    temperature_negative: float = 1.05,
    reference_logprob: Tensor | None = None,
    kl: str = "k3",
    kl_coefficient: float = 0.0,
    correction: Tensor | None = None,
    entropy_coefficient: float = 0.0,
    entropy_weights: Tensor | None = None,
) -> Tensor:
    """Computes the loss of :class:`compiled_loss.PolicyLoss`, one token after another."""
    total = logprob.new_zeros(())
    valid = torch.ones_like(logprob, dtype=torch.bool) if mask is None else mask != 0
    weights = valid.to(logprob.dtype) / valid.sum().clamp(min=1) if token_weights is None else token_weights
    bonus = weights if entropy_weights is None else entropy_weights
    for b, s in valid.nonzero().tolist():
        ratio = (logprob[b, s] - old_logprob[b, s]).exp()
        if importance == "sequence":
            own = logprob[b] - old_logprob[b]
            if kind == "gmpo":
                low = advantages[b].expand(own.shape) < 0
                own = torch.where(low, own.clamp(min=-clip_low), own.clamp(max=clip_high))
            mean = own[valid[b]].mean().detach()
            ratio = (mean + own[s] - own[s].detach()).exp()
        advantage = advantages.expand(logprob.shape)[b, s]
        if kind == "clip":
            loss = -min(ratio * advantage, ratio.clamp(1 - clip_low, 1 + clip_high) * advantage)
            if dual_clip is not None and advantage < 0:
                loss = min(loss, -dual_clip * advantage)
        elif kind == "cispo":
            loss = -min(ratio.item(), clip_high) * advantage * logprob[b, s]
        elif kind == "cispo_two_sided":
            loss = -min(max(ratio.item(), 1 - clip_low), 1 + clip_high) * advantage * logprob[b, s]
        elif kind == "gmpo":
            loss = -ratio * advantage
        elif kind == "sapo":
            temperature = temperature_positive if advantage > 0 else temperature_negative
            loss = -torch.sigmoid(temperature * (ratio - 1)) * 4 / temperature * advantage
        else:
            loss = -logprob[b, s] * advantage
        if correction is not None:
            loss = loss * correction[b, s]
        if reference_logprob is not None:
            loss = loss + kl_coefficient * _kl(kl, logprob[b, s], reference_logprob[b, s])
        total = total + weights[b, s] * loss
        if entropy is not None:
            total = total - bonus[b, s] * entropy_coefficient * entropy[b, s]
    return total


def _kl(kl: str, logprob: Tensor, reference_logprob: Tensor) -> Tensor:
    difference = reference_logprob - logprob
    if kl == "k1":
        return -difference
    if kl == "k2":
        return difference**2 / 2
    if kl == "k3":
        return difference.exp() - 1 - difference
    value = _kl(kl.removesuffix("_straight_through"), logprob, reference_logprob).detach()
    gradient = difference**2 / 2
    return value + gradient - gradient.detach()
