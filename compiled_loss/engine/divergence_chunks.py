"""The token walk for two distributions: a head's logits against a target's, rows streamed, neither held.

N tokens, H width, H' the target's, V vocabulary, C rows a chunk. `weighted_sum` forms gradients in forward: three GEMMs
of the student where both its gradients are wanted, 6 N H V operations, and the target's 2 N H' V where it is a head
too; it keeps dH, dW and O(N). `divergence` gives each row's own and takes any upstream gradient: it walks again in
backward, 8 N H V and 4 N H' V, and keeps O(N). Both hold the student's [C, V] and, where it is a head, the target's.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from compiled_loss import checks
from compiled_loss.engine import gemm, hosts
from compiled_loss.engine.divergence_bodies import BODIES
from compiled_loss.engine.divergences import Kind, Output, Pair, Rows, Target
from compiled_loss.engine.parts import parts, planned
from compiled_loss.engine.plan import Plan
from compiled_loss.engine.statistics import unit_scale
from compiled_loss.engine.token_chunks import Wanted, form_gradients, scaled_gradients
from compiled_loss.engine.transforms import without_autocast


class Weighted(NamedTuple):
    """A loss as data: soft * divergence + hard * cross-entropy with the labels, summed over the active; [N] each."""

    soft: Tensor
    hard: Tensor | None
    labels: Tensor | None
    active: Tensor

    def map(self, change: Callable[[Tensor], Tensor]) -> Weighted:
        """Each changed; what is None stays None."""
        hard, labels = (None if v is None else change(v) for v in (self.hard, self.labels))
        return Weighted(change(self.soft), hard, labels, change(self.active))

    def of(self, soft: Tensor, hard: Tensor | None) -> Tensor:
        """Each token's loss, of its divergence and cross-entropy."""
        losses = self.soft * soft
        if hard is not None and self.hard is not None:
            losses = losses + self.hard * hard
        return torch.where(self.active, losses, 0.0)


def weighted_sum(
    hidden: Tensor,  # [N, H]
    weight: Tensor,  # [V, H]
    target: Target,  # [N, V] probabilities, [N, H'], or [N, k]
    kind: Kind,
    pair: Pair,
    weighted: Weighted,
    plan: Plan,
    group: str | None,
    wanted: Wanted,
) -> Tensor:
    """The loss, differentiable with respect to hidden and weight. Over a group: NOTE [Ranks]."""
    if any(wanted):
        loss: Tensor = _WeightedSum.apply(hidden, weight, *target, *pair, *weighted, kind, plan, group, wanted)
        return loss
    _, soft, hard = _fold(hidden, weight, target, weighted.labels, kind, pair, plan, group)
    return weighted.of(soft, hard).sum()


def divergence(
    hidden: Tensor,  # [N, H]
    weight: Tensor,  # [V, H]
    target: Target,  # as above
    labels: Tensor | None,  # [N]
    kind: Kind,
    pair: Pair,
    plan: Plan,
    group: str | None,
) -> tuple[Tensor, Tensor | None]:
    """Each row's divergence and, with labels, cross-entropy; differentiable with respect to hidden and weight."""
    soft, hard = _Divergence.apply(hidden, weight, *target, *pair, labels, kind, plan, group)
    return soft, hard


def _fold(
    hidden: Tensor,
    weight: Tensor,
    target: Target,
    labels: Tensor | None,
    kind: Kind,
    pair: Pair,
    plan: Plan,
    group: str | None,
) -> tuple[Rows, Tensor, Tensor | None]:
    """What is known of each row, its divergence and its cross-entropy, [N] each."""
    run = hosts.choose(hidden.device, plan.compile)
    plan = _planned(plan, pair, hidden, target, labels)
    outputs: list[Output] = []
    for states, rows in parts(plan, hidden, labels, *target):
        states = gemm.taking_turns(states, group, outputs[-1] if outputs else [])
        outputs.append(run(BODIES[kind].fold, states, weight, rows[0], *pair, *rows[1:], group=group))
    joined = tuple([gemm.join(rows, []) for rows in zip(*outputs, strict=True)])
    known, (soft, *hard) = Rows.of(joined, kind, labels, target.indices)
    return known, soft, hard[0] if hard else None


def _planned(plan: Plan, pair: Pair, hidden: Tensor, target: Target, *rows: Tensor | None) -> Plan:
    """No parts are copied where the target is [N, V]: parts.py, NOTE [Parts]."""
    whole = target.indices is None and pair.target_weight is None
    return plan if whole else planned(plan, hidden, *target, *rows)


class _WeightedSum(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        target: Tensor,
        indices: Tensor | None,
        inverse_temperature: Tensor | None,
        jsd_weight: Tensor | None,
        target_weight: Tensor | None,
        soft: Tensor,
        hard: Tensor | None,
        labels: Tensor | None,
        active: Tensor,
        kind: Kind,
        plan: Plan,
        group: str | None,
        wanted: Wanted,
    ) -> Tensor:
        pair = Pair(inverse_temperature, jsd_weight, target_weight)
        scale = unit_scale(hidden.dtype, soft, hard)
        soft = torch.where(active, soft if scale is None else soft / scale, 0.0)  # to be fenced: NOTE [Order]
        if scale is not None and hard is not None:
            hard = hard / scale

        def chunk(run: hosts.Host, states: Tensor, soft: Tensor, *rows: Tensor | None) -> Output:
            hard, labels, *target = rows
            operands = (labels, *pair, *target, soft, hard)
            d, loss, *_ = run(BODIES[kind].fold_and_gradient, states, weight, *operands, group=group)
            return d, loss

        rest = (hard, labels, target, indices)
        plan = _planned(plan, pair, hidden, Target(target, indices), hard, labels)
        gradients, (losses,) = form_gradients(hidden, weight, None, plan, group, wanted, soft, active, rest, chunk)
        loss = torch.where(active, losses, 0.0).sum()
        if scale is not None:
            loss = loss * scale
        ctx.dtypes = [hidden.dtype, weight.dtype, None]
        ctx.save_for_backward(*gradients, scale)
        ctx.set_materialize_grads(False)
        return loss

    @staticmethod
    def backward(ctx: Any, g: Tensor | None) -> tuple[Tensor | None, ...]:
        checks.first_derivative()
        if g is None:
            return (None,) * 15
        *gradients, scale = ctx.saved_tensors
        d_hidden, d_weight, _ = scaled_gradients(gradients, g if scale is None else g * scale, ctx.dtypes)
        return d_hidden, d_weight, *(None,) * 13


class _Divergence(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        target: Tensor,
        indices: Tensor | None,
        inverse_temperature: Tensor | None,
        jsd_weight: Tensor | None,
        target_weight: Tensor | None,
        labels: Tensor | None,
        kind: Kind,
        plan: Plan,
        group: str | None,
    ) -> tuple[Tensor, Tensor | None]:
        pair = Pair(inverse_temperature, jsd_weight, target_weight)
        known, soft, hard = _fold(hidden, weight, Target(target, indices), labels, kind, pair, plan, group)
        ctx.save_for_backward(hidden, weight, target, indices, labels, *pair, *known)
        ctx.set_materialize_grads(False)
        ctx.kind, ctx.plan, ctx.group = kind, plan, group if indices is not None else None
        return soft, hard

    @staticmethod
    def backward(ctx: Any, g_soft: Tensor | None, g_hard: Tensor | None) -> tuple[Tensor | None, ...]:
        checks.first_derivative()
        hidden, weight, target, indices, labels, *saved = ctx.saved_tensors
        pair, known = Pair(*saved[:3]), Rows(*saved[3:])
        soft = _upstream(g_soft, known.log_sum)
        hard = None if labels is None else _upstream(g_hard, known.log_sum)
        with without_autocast(hidden.device):  # whatever backward's caller is in
            scale = unit_scale(hidden.dtype, soft, hard)
            if scale is not None:
                soft, hard = soft / scale, None if hard is None else hard / scale

            def chunk(run: hosts.Host, states: Tensor, soft: Tensor, *rows: Tensor | None) -> Output:
                hard, labels, *target = rows
                operands = (labels, *pair, *target, soft, hard)
                return run(BODIES[ctx.kind].gradient, states, weight, *operands, group=ctx.group)

            wanted = Wanted(ctx.needs_input_grad[0], ctx.needs_input_grad[1], False)
            active = soft != 0 if hard is None else (soft != 0) | (hard != 0)
            rest = (hard, labels, target, indices, *known)
            gradients, _ = form_gradients(hidden, weight, None, ctx.plan, ctx.group, wanted, soft, active, rest, chunk)
            if scale is not None:
                gradients = scaled_gradients(gradients, scale, [hidden.dtype, weight.dtype, None])
        d_hidden, d_weight, _ = gradients
        return d_hidden, None if d_weight is None else d_weight.to(weight.dtype), *(None,) * 9


def _upstream(g: Tensor | None, like: Tensor) -> Tensor:
    """A new tensor, to be fenced; Dynamo traces a backward with example gradients that alias each other."""
    return torch.zeros_like(like) if g is None else g.to(like.dtype, copy=True)
