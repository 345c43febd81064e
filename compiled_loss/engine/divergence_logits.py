"""Divergences of logits that exist already: one pass forward, one back, nothing of [N, V] kept beyond them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from compiled_loss import checks
from compiled_loss.engine import gemm, hosts
from compiled_loss.engine.divergence_bodies import BODIES, target_gradient
from compiled_loss.engine.divergences import Kind, Pair, Rows, Target
from compiled_loss.engine.transforms import without_autocast


def divergence(
    logits: Tensor,  # [..., V], two dimensions or more, any strides
    target: Target,  # [..., V] or [..., k]
    labels: Tensor | None,  # [...]
    kind: Kind,
    pair: Pair,
    group: str | None,
) -> tuple[Tensor, Tensor | None]:
    """Each row's divergence from its target, and with labels its cross-entropy with them; differentiable."""
    soft, hard = _Divergence.apply(logits, *target, labels, pair.inverse_temperature, pair.jsd_weight, kind, group)
    return soft, hard


def plain_divergence(
    logits: Tensor, target: Target, labels: Tensor | None, kind: Kind, pair: Pair
) -> tuple[Tensor, Tensor | None]:
    """The same by ordinary autograd, for functorch's transforms: any order of derivative, no memory promise."""
    _, (soft, *hard) = Rows.of(BODIES[kind].fold(logits, None, labels, *pair, *target), kind, labels, target.indices)
    return soft, hard[0] if hard else None


class _Divergence(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        logits: Tensor,
        target: Tensor,
        indices: Tensor | None,
        labels: Tensor | None,
        inverse_temperature: Tensor | None,
        jsd_weight: Tensor | None,
        kind: Kind,
        group: str | None,
    ) -> tuple[Tensor, Tensor | None]:
        pair = Pair(inverse_temperature, jsd_weight, None)
        run = hosts.choose(logits.device, "auto", loop=False)
        outputs = run(BODIES[kind].fold, logits, None, labels, *pair, target, indices, group=group)
        rows, (soft, *hard) = Rows.of(outputs, kind, labels, indices)
        ctx.save_for_backward(logits, target, indices, labels, *pair[:2], *rows)
        ctx.set_materialize_grads(False)
        ctx.kind, ctx.group = kind, group if indices is not None else None
        return soft, hard[0] if hard else None

    @staticmethod
    def backward(ctx: Any, g_soft: Tensor | None, g_hard: Tensor | None) -> tuple[Tensor | None, ...]:
        checks.first_derivative()
        logits, target, indices, labels, inverse_temperature, jsd_weight, *saved = ctx.saved_tensors
        pair, rows = Pair(inverse_temperature, jsd_weight, None), Rows(*saved)
        d = d_target = None
        with without_autocast(logits.device):  # whatever backward's caller is in
            run = hosts.choose(logits.device, "auto", loop=False)
            # New tensors: Dynamo traces a backward with example gradients that alias each other.
            soft = torch.zeros_like(rows.log_sum) if g_soft is None else g_soft.to(rows.log_sum.dtype, copy=True)
            # Opaque copies, for the partitioner finds the expressions of forward here, and may keep one of [N, V].
            rows = rows._replace(maximum=gemm.in_turn(rows.maximum, [soft]))
            if rows.target_maximum is not None:
                rows = rows._replace(target_maximum=gemm.in_turn(rows.target_maximum, [soft]))
            if ctx.needs_input_grad[0]:
                hard = None
                if labels is not None:
                    hard = torch.zeros_like(soft) if g_hard is None else g_hard.to(soft.dtype, copy=True)
                operands = (labels, *pair, target, indices, *rows, soft, hard)
                (d,) = run(BODIES[ctx.kind].gradient, logits, None, *operands, group=ctx.group)
            if ctx.needs_input_grad[1] and ctx.kind == "probabilities":
                known = (target, rows.maximum, rows.log_sum, soft)
                (d_target,) = run(target_gradient, logits, None, None, *pair, *known)
        return d, d_target, *(None,) * 6
