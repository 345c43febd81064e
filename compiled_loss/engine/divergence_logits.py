"""Divergences of logits that exist already: one pass forward, one back, and no further [N, V] tensor is kept."""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import torch
from torch import Tensor

from compiled_loss import checks
from compiled_loss.engine import execution, gemm
from compiled_loss.engine.execution import Execution
from compiled_loss.engine.math import divergence_bodies
from compiled_loss.engine.math.divergence_bodies import Bodies, Known, Top, Whole
from compiled_loss.engine.math.divergence_kinds import Kind, Pair
from compiled_loss.engine.math.divergences import Found, RowGradients, Rows, Target
from compiled_loss.engine.math.statistics import statistics_dtype
from compiled_loss.engine.math.top_divergences import Place, finite
from compiled_loss.engine.operators import composite, none, unpack
from compiled_loss.engine.transforms import without_autocast
from compiled_loss.planner.chunking import is_compiled


def divergence(
    logits: Tensor,  # [..., V], two dimensions or more, any strides
    target: Target,  # [..., V] or [..., k]
    labels: Tensor | None,  # [...]
    kind: Kind,
    pair: Pair,
    group: str | None,
    compile: bool | str,
) -> Found:
    """Returns the `Found` of each row; its divergence and, with labels, its cross-entropy are differentiable."""
    inputs = _Inputs(logits, target.values, target.indices, target.inverse_temperature, labels)
    found = _divergence(inputs, pair, kind, Execution(group, is_compiled(logits.device, compile)))
    return Found.of(found, kind, labels, target.indices)


def plain_divergence(logits: Tensor, target: Target, labels: Tensor | None, kind: Kind, pair: Pair) -> Found:
    """Computes the divergence by ordinary autograd, for functorch's transforms: any derivative, no memory promise."""
    beside = _beside(logits, target, pair, None, fold=True)
    found = beside.bodies.fold(beside.logits, labels, *pair, *beside.target, kind=kind)
    _, left = Rows.of(found, kind, labels, target.indices)
    return Found.of(left, kind, labels, target.indices)


class _Beside(NamedTuple):
    """The bodies for a target, with the logits and the target as the bodies take them."""

    bodies: Bodies
    logits: Tensor
    target: Whole | Top
    place: Place | None


def _beside(logits: Tensor, target: Target, pair: Pair, group: str | None, *, fold: bool) -> _Beside:
    """Returns the bodies and their operands; for `fold` the logits are a copy without the target's top."""
    values, indices, _, inverse = target
    if indices is None:
        return _Beside(divergence_bodies.WHOLE, logits, Whole(values, inverse), None)
    place = Place.of(indices, logits.shape[-1])
    top = place.take(logits, values, pair.student, group)
    if fold:
        logits = place.put(finite(logits, pair.student), torch.full_like(top, float("-inf")))
    return _Beside(divergence_bodies.TOP, logits, Top(indices, values, top, inverse), place)


class _Inputs(NamedTuple):
    logits: Tensor
    target: Tensor
    indices: Tensor | None
    inverse_temperatures: Tensor | None  # [..., 1]
    labels: Tensor | None

    def as_target(self) -> Target:
        """Returns the target that the logits are compared with."""
        return Target(self.target, self.indices, None, self.inverse_temperatures)


class _Divergence(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *args: Any) -> tuple[Tensor, ...]:
        inputs, pair, (kind, group, compiled) = unpack(args, _Inputs, Pair)
        logits, _, indices, _, labels = inputs
        beside = _beside(logits, inputs.as_target(), pair, group, fold=True)
        count = sum(Rows.there(kind, labels, indices)) + sum(Found.there(kind, labels, indices))
        dtype = statistics_dtype(logits.dtype)
        found = execution.given(
            beside.bodies.fold,
            beside.logits,
            (labels, *beside.target),
            pair,
            lambda: [logits.new_empty(logits.shape[:-1], dtype=dtype) for _ in range(count)],
            compiled=compiled,
            kind=kind,
            group=group,
        )
        known, left = Rows.of(found, kind, labels, indices)
        ctx.mark_non_differentiable(*Found.of(left, kind, labels, indices).statistics())
        ctx.save_for_backward(*inputs, *pair, *known)
        ctx.set_materialize_grads(False)
        ctx.options = kind, group, compiled
        return tuple(left)

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> tuple[Tensor | None, ...]:
        checks.first_derivative()
        inputs, pair, known, _ = unpack(ctx.saved_tensors, _Inputs, Pair, Rows)
        logits, target, indices, inverse, labels = inputs
        kind, group, compiled = ctx.options
        g = Found.of(gradients, kind, labels, indices)
        wanted, _ = unpack(ctx.needs_input_grad, _Inputs)
        d = d_target = hard = None
        like = known.log_sum
        given = functools.partial(execution.given, rest=pair, compiled=compiled)
        with without_autocast(logits.device):  # backward may be called under autocast
            soft = torch.zeros_like(like) if g.divergence is None else g.divergence.to(like.dtype)
            # Opaque copies: otherwise the partitioner finds forward's expressions here, and may keep one of [N, V].
            known = known._replace(maximum=gemm.opaque_copy(known.maximum, [soft]))
            if known.target_maximum is not None:
                known = known._replace(target_maximum=gemm.opaque_copy(known.target_maximum, [soft]))
            if wanted.logits:
                if labels is not None:
                    hard = torch.zeros_like(soft) if g.cross_entropy is None else g.cross_entropy.to(soft.dtype)
                bodies, _, beside, place = _beside(logits, inputs.as_target(), pair, group, fold=False)
                like_top = [] if place is None else [logits.new_empty(place.columns.shape)]
                d, *d_top = given(
                    bodies.gradient,
                    logits,
                    (labels, *beside, *known, *RowGradients(soft, hard)),
                    like=lambda: [torch.empty_like(logits), *like_top],
                    kind=kind,
                    group=None if place is None else group,
                )
                if place is not None:
                    place.put_(d, d_top[0])
            if wanted.target and kind.probabilities:
                rows = (None, *Whole(target, inverse), *Known(known.maximum, known.log_sum, soft))
                body = divergence_bodies.target_gradient
                (d_target,) = given(body, logits, rows, like=lambda: [torch.empty_like(target)])
        return *none(_Inputs)._replace(logits=d, target=d_target), *none(Pair), None, None, None


@composite("logits_divergence", _Inputs, Pair, Kind, Execution)
def _divergence(inputs: _Inputs, pair: Pair, kind: Kind, options: Execution) -> tuple[Tensor, ...]:
    """Returns the fields of `Found` that are not None."""
    return _Divergence.apply(*inputs, *pair, kind, *options)  # type: ignore[no-any-return]
