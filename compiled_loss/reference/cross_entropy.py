"""Cross-entropy."""

from __future__ import annotations

import torch
from torch import Tensor

from compiled_loss.reference.tokens import aligned, ratio, token_logits, transformed


def cross_entropy(
    logits: Tensor,
    labels: Tensor,
    *,
    mask: Tensor | None = None,
    token_weights: Tensor | None = None,
    class_weights: Tensor | None = None,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    temperature: float | Tensor = 1.0,
    shift: int = 0,
    reduction: str = "mean",
    num_label_tokens: int | Tensor | None = None,
    class_dim: int = -1,
) -> Tensor:
    """Masked, weighted cross-entropy plus z-loss."""
    logits = logits.movedim(class_dim, -1)
    z = transformed(logits, None, softcap, temperature, logit_scale)
    vocab = z.shape[-1]
    probabilities = None
    if labels.is_floating_point():
        probabilities = labels.movedim(class_dim, -1).to(z.dtype)
        labels = torch.zeros(z.shape[:-1], dtype=torch.int64, device=z.device)  # every position has a target
    valid = labels != ignore_index
    weight = torch.ones(labels.shape, dtype=z.dtype, device=z.device)
    for factor in (mask, token_weights):
        if factor is not None:
            weight = weight * factor.to(z.dtype).expand(labels.shape)
    if mask is not None:
        valid = valid & (mask != 0).expand(labels.shape)
    labels, weight = aligned(labels, shift, ignore_index), aligned(weight, shift, 0.0)
    valid = aligned(valid, shift, False)
    weight = torch.where(valid, weight, 0.0)
    target = torch.where(valid, labels, 0)
    out_of_range = (target < 0) | (target >= vocab)
    target = target.clamp(0, vocab - 1)

    classes = torch.ones(vocab, dtype=z.dtype, device=z.device) if class_weights is None else class_weights.to(z.dtype)
    log_p = torch.log_softmax(z, dim=-1)
    picked = log_p.gather(-1, target.unsqueeze(-1)).squeeze(-1)
    label_weight = classes[target]
    ce = -(1 - label_smoothing) * label_weight * picked
    if label_smoothing:  # otherwise 0 * inf where a column is forbidden by -inf
        ce = ce - label_smoothing * (log_p * classes).sum(-1) / vocab
    if probabilities is not None:
        label_weight = torch.ones_like(weight)
        if shift:  # the last positions get any, because their weight is 0
            probabilities = probabilities.roll(-shift, dims=-2)
        smoothed = (1 - label_smoothing) * probabilities + label_smoothing / vocab
        ce = -(log_p * smoothed * classes).sum(-1)
    ce = torch.where(out_of_range, float("nan"), ce)
    square = z_loss * torch.logsumexp(z, dim=-1) ** 2

    if reduction == "none":
        return torch.where(valid, weight * (ce + square), 0.0)
    ce_sum = torch.where(valid, weight * ce, 0.0).sum()
    square_sum = torch.where(valid, weight * square, 0.0).sum()
    if reduction == "sum":
        if num_label_tokens is None:
            return ce_sum + square_sum
        return ratio(ce_sum + square_sum, torch.as_tensor(num_label_tokens, dtype=z.dtype, device=z.device))
    return ratio(ce_sum, (weight * label_weight).sum()) + ratio(square_sum, weight.sum())


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    bias: Tensor | None = None,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    temperature: float | Tensor = 1.0,
    **keywords: object,
) -> Tensor:
    """`cross_entropy` of the head's logits."""
    z = token_logits(hidden, weight, bias, softcap, temperature, logit_scale)
    return cross_entropy(z, labels, **keywords)  # type: ignore[arg-type]
