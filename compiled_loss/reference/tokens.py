"""Helpers of the definitions: the z of a head, and tokens aligned, weighted and summed."""

from __future__ import annotations

import torch
from torch import Tensor


def token_logits(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    softcap: float | None = None,
    temperature: float | Tensor = 1.0,
    logit_scale: float = 1.0,
) -> Tensor:
    """Returns z = softcap tanh(logit_scale (hidden @ weight.T + bias) / softcap) / temperature, [..., V]."""
    return transformed(hidden @ weight.transpose(0, 1), bias, softcap, temperature, logit_scale)


def transformed(
    logits: Tensor, bias: Tensor | None, softcap: float | None, temperature: float | Tensor, logit_scale: float = 1.0
) -> Tensor:
    """Returns the z of raw logits."""
    z = logits if logits.dtype == torch.float64 else logits.float()
    if bias is not None:
        z = z + bias.to(z.dtype)
    z = logit_scale * z
    if softcap is not None:
        z = softcap * torch.tanh(z / softcap)
    return over(z, temperature)


def over(z: Tensor, temperature: float | Tensor) -> Tensor:
    """Returns z / temperature, which may differ between tokens."""
    return z / (temperature.unsqueeze(-1) if isinstance(temperature, Tensor) and temperature.dim() else temperature)


def aligned(values: Tensor, shift: int, fill: float) -> Tensor:
    """Returns values[..., t + shift] at position t."""
    if shift == 0:
        return values
    length = values.shape[-1]
    tail = torch.full_like(values[..., : min(shift, length)], fill)
    return torch.cat([values[..., min(shift, length) :], tail], dim=-1)


def weighed(
    rows: Tensor, weight: Tensor, valid: Tensor, reduction: str, num_label_tokens: int | Tensor | None
) -> Tensor:
    """Returns the rows times their weight, reduced: a mean divides by the sum of the weights."""
    weight = torch.where(valid, weight, 0.0)
    rows = torch.where(valid, weight * rows, 0.0)
    if reduction == "none":
        return rows
    if reduction == "mean":
        return ratio(rows.sum(), weight.sum())
    return rows.sum() if num_label_tokens is None else ratio(rows.sum(), torch.as_tensor(num_label_tokens))


def ratio(total: Tensor, count: Tensor) -> Tensor:
    """Returns total / count, and 0 where the count is 0."""
    return torch.where(count == 0, 0.0 * total, total / torch.where(count == 0, 1.0, count))
