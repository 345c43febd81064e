"""Multi-token prediction."""

from __future__ import annotations

import torch
from torch import Tensor

from compiled_loss.reference.cross_entropy import cross_entropy
from compiled_loss.reference.tokens import aligned, token_logits


def multi_token_targets(
    labels: Tensor,
    depth: int,
    *,
    ignore_index: int = -100,
    seq_idx: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
) -> Tensor:
    """Computes the targets position by position, as they are defined."""
    rows = labels.reshape(-1, labels.shape[-1]).tolist()
    ids = None if seq_idx is None else seq_idx.reshape(-1, labels.shape[-1]).expand(len(rows), -1).tolist()
    bounds = [] if cu_seqlens is None else cu_seqlens.reshape(-1).tolist()

    def sequence(row: int, position: int) -> int | None:
        if ids is not None:
            return int(ids[row][position])
        if not bounds:
            return 0
        return next((i for i in range(len(bounds) - 1) if bounds[i] <= position < bounds[i + 1]), None)

    found = []
    for row, values in enumerate(rows):
        for t in range(len(values)):
            ahead = t + depth + 1
            inside = ahead < len(values) and sequence(row, t) is not None and sequence(row, t) == sequence(row, ahead)
            found.append(values[ahead] if inside else ignore_index)
    return torch.tensor(found, dtype=labels.dtype, device=labels.device).reshape(labels.shape)


def multi_token_prediction(
    hidden: list[Tensor],
    weight: Tensor,
    labels: Tensor,
    *,
    scaling_factor: float = 0.1,
    ignore_index: int = -100,
    seq_idx: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    targets: list[Tensor] | None = None,
    mask: Tensor | None = None,
    token_weights: Tensor | None = None,
    num_label_tokens: int | Tensor | None = None,
    bias: Tensor | None = None,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    temperature: float | Tensor = 1.0,
) -> Tensor:
    """Computes scaling_factor / D times the sum over the depths."""
    total = torch.zeros((), dtype=hidden[0].dtype)
    for k, states in enumerate(hidden):
        packing = {"ignore_index": ignore_index, "seq_idx": seq_idx, "cu_seqlens": cu_seqlens}
        target = multi_token_targets(labels, k, **packing) if targets is None else targets[k]  # type: ignore[arg-type]
        z = token_logits(states, weight, bias, softcap, temperature, logit_scale).reshape(*target.shape, -1)
        moved = torch.ones(labels.shape, dtype=z.dtype)
        for factor in (mask, token_weights):
            if factor is not None:
                moved = moved * factor.expand(labels.shape)
        moved = moved if targets is not None else aligned(moved, k + 1, 0.0)
        reduction = "mean" if num_label_tokens is None else "sum"
        total = total + cross_entropy(
            z, target, mask=moved, ignore_index=ignore_index, reduction=reduction, num_label_tokens=num_label_tokens
        )
    return scaling_factor / len(hidden) * total
