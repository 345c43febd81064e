"""Divergences of logits that exist already: one pass forward, one back, nothing of [N, V] kept beyond them."""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import torch
from torch import Tensor

from compiled_loss import checks
from compiled_loss.engine import execution, gemm
from compiled_loss.engine.math import divergence_bodies
from compiled_loss.engine.math.divergences import Kind, Pair, Rows, Target
from compiled_loss.engine.math.statistics import statistics_dtype
from compiled_loss.engine.math.top_divergences import Place
from compiled_loss.engine.operators import none, unpack
from compiled_loss.engine.transforms import without_autocast


def divergence(
    logits: Tensor,  # [..., V], two dimensions or more, any strides
    target: Target,  # [..., V] or [..., k]
    labels: Tensor | None,  # [...]
    kind: Kind,
    pair: Pair,
    group: str | None,
    compile: bool | str,
) -> tuple[Tensor, Tensor | None]:
    """Each row's divergence from its target, and with labels its cross-entropy with them; differentiable."""
    soft, hard = _Divergence.apply(logits, *target[:2], *pair, labels, kind, group, compile)
    return soft, hard


def plain_divergence(
    logits: Tensor, target: Target, labels: Tensor | None, kind: Kind, pair: Pair
) -> tuple[Tensor, Tensor | None]:
    """The same by ordinary autograd, for functorch's transforms: any order of derivative, no memory promise."""
    bodies, logits, of_target, _ = _beside(kind, logits, target, None, fold=True)
    found = bodies.fold(logits, labels, *pair, *of_target)
    _, (soft, *hard) = Rows.of(found, kind, labels, target.indices)
    return soft, hard[0] if hard else None


def _beside(
    kind: Kind, logits: Tensor, target: Target, group: str | None, *, fold: bool
) -> tuple[divergence_bodies.Bodies, Tensor, tuple[Tensor, ...], Place | None]:
    """The bodies, the logits and the target as they take them; `fold` takes a copy of the logits without a top."""
    values, indices, _ = target
    if indices is None:
        return divergence_bodies.WHOLE[kind], logits, (values,), None
    place = Place.of(indices, logits.shape[-1])
    top = place.take(logits, values, group)
    if fold:
        logits = place.put(logits, torch.full_like(top, float("-inf")))
    return divergence_bodies.TOP[kind], logits, (indices, values, top), place


class _Inputs(NamedTuple):
    logits: Tensor
    target: Tensor
    indices: Tensor | None
    inverse_temperature: Tensor | None
    jsd_weight: Tensor | None
    labels: Tensor | None


class _Divergence(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *args: Any) -> tuple[Tensor, Tensor | None]:
        inputs, (kind, group, compile) = unpack(args, _Inputs)
        logits, target, indices, *pair, labels = inputs
        bodies, source, of_target, _ = _beside(kind, logits, Target(target, indices), group, fold=True)
        count = sum(Rows.there(kind, labels, indices)) + 1 + (labels is not None)
        dtype = statistics_dtype(logits.dtype)
        found = execution.given(
            bodies.fold,
            source,
            (labels, *of_target),
            pair,
            lambda: [logits.new_empty(logits.shape[:-1], dtype=dtype) for _ in range(count)],
            compile=compile,
            group=group,
        )
        known, (soft, *hard) = Rows.of(found, kind, labels, indices)
        ctx.save_for_backward(*inputs, *known)
        ctx.set_materialize_grads(False)
        ctx.options = kind, group, compile
        return soft, hard[0] if hard else None

    @staticmethod
    def backward(ctx: Any, g_soft: Tensor | None, g_hard: Tensor | None) -> tuple[Tensor | None, ...]:
        checks.first_derivative()
        inputs, known, _ = unpack(ctx.saved_tensors, _Inputs, Rows)
        logits, target, indices, *pair, labels = inputs
        kind, group, compile = ctx.options
        wanted, _ = unpack(ctx.needs_input_grad, _Inputs)
        d = d_target = hard = None
        like = known.log_sum
        given = functools.partial(execution.given, rest=pair, compile=compile)
        with without_autocast(logits.device):  # whatever backward's caller is in
            soft = torch.zeros_like(like) if g_soft is None else g_soft.to(like.dtype)
            # Opaque copies, for the partitioner finds the expressions of forward here, and may keep one of [N, V].
            known = known._replace(maximum=gemm.opaque_copy(known.maximum, [soft]))
            if known.target_maximum is not None:
                known = known._replace(target_maximum=gemm.opaque_copy(known.target_maximum, [soft]))
            if wanted.logits:
                if labels is not None:
                    hard = torch.zeros_like(soft) if g_hard is None else g_hard.to(soft.dtype)
                bodies, _, of_target, place = _beside(kind, logits, Target(target, indices), group, fold=False)
                rows = (labels, *of_target, *known, soft, hard)
                like_top = [] if place is None else [logits.new_empty(place.columns.shape)]
                d, *d_top = given(
                    bodies.gradient,
                    logits,
                    rows,
                    like=lambda: [torch.empty_like(logits), *like_top],
                    group=None if place is None else group,
                )
                if place is not None:
                    place.put_(d, d_top[0])
            if wanted.target and kind == "probabilities":
                rows = (None, target, known.maximum, known.log_sum, soft)
                body = divergence_bodies.target_gradient
                (d_target,) = given(body, logits, rows, like=lambda: [torch.empty_like(target)])
        return *none(_Inputs)._replace(logits=d, target=d_target), None, None, None
