"""The token walk for two distributions: a head's logits against a target's, rows streamed, neither held.

N tokens, H width, H' the target's, V vocabulary, C rows a chunk. Three GEMMs of the student where both its gradients
are wanted, 6 N H V operations, and the target's 2 N H' V where it is a head too; all in forward, scalar losses only.
Keeps dH, dW and O(N) between forward and backward; holds the student's [C, V] and, where it is a head, the target's.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from compiled_loss import checks
from compiled_loss.engine import gemm, hosts
from compiled_loss.engine.divergences import BODIES, Kind, Output, Pair
from compiled_loss.engine.divergences import Rows as Known
from compiled_loss.engine.plan import Plan
from compiled_loss.engine.statistics import unit_scale
from compiled_loss.engine.token_chunks import Rows, Wanted, chunks, form_gradients, scaled_gradients


class Weighted(NamedTuple):
    """A loss as data: soft * divergence + hard * cross-entropy with the labels, summed over the active; [N] each."""

    soft: Tensor
    hard: Tensor | None
    labels: Tensor | None
    active: Tensor


def weighted_sum(
    hidden: Tensor,  # [N, H]
    weight: Tensor,  # [V, H]
    target: Tensor,  # [N, V] probabilities, or [N, H']
    kind: Kind,
    pair: Pair,
    weighted: Weighted,
    plan: Plan,
    wanted: Wanted,
) -> Tensor:
    """The loss, differentiable with respect to hidden and weight."""
    if any(wanted):
        loss: Tensor = _DivergenceChunks.apply(hidden, weight, target, *pair, *weighted, kind, plan, wanted)
        return loss
    run = hosts.choose(hidden.device, plan.compile)
    parts = []
    for rows in chunks(hidden.shape[0], plan):
        labels = None if weighted.labels is None else rows.of(weighted.labels)
        outputs = run(BODIES[kind].fold, rows.of(hidden), weight, labels, *pair, rows.of(target))
        parts.append(Known.of(outputs, kind, labels)[1])
    soft, *hard = [gemm.join(part) for part in zip(*parts, strict=True)]
    losses = weighted.soft * soft
    if hard and weighted.hard is not None:
        losses = losses + weighted.hard * hard[0]
    return torch.where(weighted.active, losses, 0.0).sum()


class _DivergenceChunks(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        target: Tensor,
        inverse_temperature: Tensor | None,
        jsd_weight: Tensor | None,
        target_weight: Tensor | None,
        soft: Tensor,
        hard: Tensor | None,
        labels: Tensor | None,
        active: Tensor,
        kind: Kind,
        plan: Plan,
        wanted: Wanted,
    ) -> Tensor:
        pair = Pair(inverse_temperature, jsd_weight, target_weight)
        scale = unit_scale(hidden.dtype, soft, hard)
        soft = soft.clone() if scale is None else soft / scale  # new, to be fenced: NOTE [Order]
        if scale is not None and hard is not None:
            hard = hard / scale
        run = hosts.choose(hidden.device, plan.compile)

        def chunk(rows: Rows) -> Output:
            operands = (*rows.of_each([labels]), *pair, *rows.of_each([target, soft, hard]))
            d, _, loss = run(BODIES[kind].fold_and_gradient, rows.of(hidden), weight, *operands)
            return d, loss

        gradients, (losses,) = form_gradients(hidden, weight, None, plan, wanted, soft, chunk)
        loss = torch.where(active, losses, 0.0).sum()
        if scale is not None:
            loss = loss * scale
        gemm.fence_(loss, [v for v in gradients if v is not None])
        ctx.dtypes = [hidden.dtype, weight.dtype, None]
        ctx.save_for_backward(*gradients, scale)
        ctx.set_materialize_grads(False)
        return loss

    @staticmethod
    def backward(ctx: Any, g: Tensor | None) -> tuple[Tensor | None, ...]:
        checks.first_derivative()
        if g is None:
            return (None,) * 13
        *gradients, scale = ctx.saved_tensors
        d_hidden, d_weight, _ = scaled_gradients(gradients, g if scale is None else g * scale, ctx.dtypes)
        return d_hidden, d_weight, *(None,) * 11
