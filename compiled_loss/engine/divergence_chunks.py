"""Autograd Functions of divergences chunked over tokens; the passes are in `divergence_operators`.

N tokens, H width, H' the target's width, V vocabulary. `weighted_sum` forms gradients in forward. If both gradients of
the student are wanted, it runs three GEMMs, 6 N H V operations; if the target is a head too, 2 N H' V more. It keeps
dH, dW and O(N). `divergence` returns each row's divergence and takes any upstream gradient. It computes the logits
again in backward, 8 N H V and 4 N H' V operations, and keeps O(N).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from compiled_loss import checks
from compiled_loss.engine import divergence_operators as operators
from compiled_loss.engine import gemm
from compiled_loss.engine.divergence_operators import Counts, How, Problem
from compiled_loss.engine.gradients import Gradients, Needs, UnscaledGradients, scaled_gradients
from compiled_loss.engine.math.coefficients import unit_scale
from compiled_loss.engine.math.divergence_kinds import Kind, Pair
from compiled_loss.engine.math.divergences import Found, RowGradients, Rows, Target
from compiled_loss.engine.math.logit_maps import times
from compiled_loss.engine.operators import composite, is_compiling, none, unpack
from compiled_loss.engine.transforms import without_autocast
from compiled_loss.planner.plan import Lengths


class Weighted(NamedTuple):
    """A loss as data: soft * divergence + hard * cross-entropy with the labels, summed over active tokens; [N] each."""

    soft: Tensor
    hard: Tensor | None
    labels: Tensor | None
    active: Tensor

    def map(self, change: Callable[[Tensor], Tensor]) -> Weighted:
        """Returns a copy with `change` applied to each tensor; None stays None."""
        hard, labels = (None if v is None else change(v) for v in (self.hard, self.labels))
        return Weighted(change(self.soft), hard, labels, change(self.active))

    def of(self, found: Found) -> Tensor:
        """Returns each token's loss.

        Results of tokens that are not active are not used: 0 * NaN would be NaN.
        """
        losses = self.soft * torch.where(self.active, found.divergence, 0.0)
        if found.cross_entropy is not None and self.hard is not None:
            losses = losses + self.hard * torch.where(self.active, found.cross_entropy, 0.0)
        return losses


def weighted_sum(
    hidden: Tensor,  # [N, H]
    weight: Tensor,  # [V, H]
    target: Target,  # [N, V] probabilities, [N, H'], or [N, k]
    kind: Kind,
    pair: Pair,
    weighted: Weighted,
    lengths: Lengths,
    group: str | None,
    needs: Needs,
) -> tuple[Tensor, Found]:
    """Returns the loss, differentiable in hidden, weight, bias and coefficients, and the `Found` of each row.

    Over a group: NOTE [Ranks]. If gradients are formed and no statistic is wanted, all fields of the `Found` are None.
    """
    problem, how = Problem(hidden, weight, *target, weighted.labels), How(*kind, group)
    if any(needs):
        upstream = RowGradients(weighted.soft, weighted.hard)
        loss, *seen = _weighted_sum(problem, pair, upstream, Counts(weighted.active), needs, how, lengths)
        return loss, Found.of(seen, kind, weighted.labels, target.indices) if seen else none(Found)
    _, found = _folded(problem, pair, how, lengths)
    return weighted.of(found).sum(), found


def divergence(
    hidden: Tensor,  # [N, H]
    weight: Tensor,  # [V, H]
    target: Target,  # as above
    labels: Tensor | None,  # [N]
    kind: Kind,
    pair: Pair,
    lengths: Lengths,
    group: str | None,
) -> Found:
    """Returns the `Found` of each row; divergence and cross-entropy are differentiable in hidden, weight and bias."""
    problem = Problem(hidden, weight, *target, labels)
    return Found.of(_divergence(problem, pair, How(*kind, group), lengths), kind, labels, target.indices)


def _folded(problem: Problem, pair: Pair, how: How, lengths: Lengths) -> tuple[Rows, Found]:
    found = operators.fold(problem, pair, how, lengths)
    rows, left = Rows.of(found, how.kind, problem.labels, problem.indices)
    return rows, Found.of(left, how.kind, problem.labels, problem.indices)


def _formed(
    problem: Problem, pair: Pair, upstream: RowGradients, counts: Counts, needs: Needs, how: How, lengths: Lengths
) -> tuple[UnscaledGradients, Found]:
    """Returns the gradients, still to be multiplied by their scale, and the `Found` of each row."""
    of_logits = upstream.map(lambda g: times(g, pair.student.factor()))
    scale = unit_scale(problem.hidden.dtype, *of_logits)
    upstream = upstream.map(lambda g: torch.where(counts.active, g if scale is None else g / scale, 0.0))
    found = operators.form(problem, pair, upstream, counts, needs, how, lengths)
    gradients = Gradients.pop_from(found, needs, pair.bias)
    return UnscaledGradients(gradients, scale), Found.of(found, how.kind, problem.labels, problem.indices)


class _Saved(NamedTuple):
    """Tensors that backward needs besides the inputs, which only a second backward needs."""

    d_hidden: Tensor | None
    d_weight: Tensor | None
    d_bias: Tensor | None
    scale: Tensor | None
    soft: Tensor | None  # each row's divergence, if its coefficient's gradient is wanted
    hard: Tensor | None


class _WeightedSum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *args: Any) -> tuple[Tensor, ...]:
        problem, pair, upstream, counts, options = unpack(args, Problem, Pair, RowGradients, Counts)
        _, _, wanted, _ = unpack(ctx.needs_input_grad, Problem, Pair, RowGradients)
        needs, how, lengths = options
        unscaled, found = _formed(problem, pair, upstream, counts, needs, how, lengths)
        loss = Weighted(upstream.soft, upstream.hard, problem.labels, counts.active).of(found).sum()
        ctx.dtypes = [None if v is None else v.dtype for v in (problem.hidden, problem.weight, pair.bias)]
        seen = none(RowGradients)
        if any(wanted):
            seen = RowGradients(found.divergence, found.cross_entropy).map(lambda v: torch.where(counts.active, v, 0.0))
        if is_compiling():  # where there is no second backward
            problem, pair, upstream, counts = none(Problem), none(Pair), none(RowGradients), none(Counts)
        saved = _Saved(*unscaled.gradients, unscaled.scale, *seen)
        ctx.save_for_backward(*saved, *problem, *pair, *upstream, *counts)
        ctx.options, ctx.spent = options, False
        ctx.set_materialize_grads(False)
        statistics = found.present() if how.statistics else ()
        ctx.mark_non_differentiable(*statistics)
        return loss, *statistics

    @staticmethod
    def backward(ctx: Any, g: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
        checks.first_derivative()
        d_problem, d_pair, d_upstream = none(Problem), none(Pair), none(RowGradients)
        if g is not None:
            saved, *inputs, _ = unpack(ctx.saved_tensors, _Saved, Problem, Pair, RowGradients, Counts)
            unscaled = UnscaledGradients(Gradients(saved.d_hidden, saved.d_weight, saved.d_bias), saved.scale)
            d = scaled_gradients(ctx, unscaled, g, ctx.dtypes, lambda: _formed(*inputs, *ctx.options)[0])
            d_problem = d_problem._replace(hidden=d.d_hidden, weight=d.d_weight)
            d_pair = d_pair._replace(bias=d.d_bias)
            d_upstream = d_upstream._replace(soft=_product(g, saved.soft), hard=_product(g, saved.hard))
        return *d_problem, *d_pair, *d_upstream, *none(Counts), None, None, None


class _Divergence(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *args: Any) -> tuple[Tensor, ...]:
        problem, pair, options = unpack(args, Problem, Pair)
        known, found = _folded(problem, pair, *options)
        ctx.save_for_backward(*problem, *pair, *known)
        ctx.set_materialize_grads(False)
        ctx.options = options
        ctx.mark_non_differentiable(*found.statistics())
        return found.present()

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> tuple[Tensor | None, ...]:
        checks.first_derivative()
        problem, pair, known, _ = unpack(ctx.saved_tensors, Problem, Pair, Rows)
        of_problem, of_pair, _ = unpack(ctx.needs_input_grad, Problem, Pair)
        needs = Needs(of_problem.hidden, of_problem.weight, of_pair.bias)
        how, _ = ctx.options
        g, like = Found.of(gradients, how.kind, problem.labels, problem.indices), known.log_sum
        soft = torch.zeros_like(like) if g.divergence is None else g.divergence.to(like.dtype)
        hard = None
        if problem.labels is not None:
            hard = torch.zeros_like(like) if g.cross_entropy is None else g.cross_entropy.to(like.dtype)
        upstream = RowGradients(soft, hard)
        counts = Counts(upstream.counts())
        with without_autocast(problem.hidden.device):  # backward may be called under autocast
            scale = unit_scale(problem.hidden.dtype, *upstream.map(lambda g: times(g, pair.student.factor())))
            if scale is not None:
                upstream = upstream.map(lambda g: g / scale)
            found = operators.gradients(problem, pair, known, upstream, counts, needs, *ctx.options)
            d = _in_dtypes(Gradients.pop_from(found, needs, pair.bias), scale, problem, pair)
        d_problem = none(Problem)._replace(hidden=d.d_hidden, weight=d.d_weight)
        return *d_problem, *none(Pair)._replace(bias=d.d_bias), None, None


@composite("weighted_divergence_chunks", Problem, Pair, RowGradients, Counts, Needs, How, Lengths)
def _weighted_sum(
    problem: Problem, pair: Pair, upstream: RowGradients, counts: Counts, needs: Needs, how: How, lengths: Lengths
) -> tuple[Tensor, ...]:
    """Returns the loss and the statistics of each row."""
    return _WeightedSum.apply(*problem, *pair, *upstream, *counts, needs, how, lengths)  # type: ignore[no-any-return]


@composite("divergence_chunks", Problem, Pair, How, Lengths)
def _divergence(problem: Problem, pair: Pair, how: How, lengths: Lengths) -> tuple[Tensor, ...]:
    """Returns the fields of `Found` that are not None."""
    return _Divergence.apply(*problem, *pair, how, lengths)  # type: ignore[no-any-return]


def _in_dtypes(gradients: Gradients, scale: Tensor | None, problem: Problem, pair: Pair) -> Gradients:
    """Returns the gradients times the scale, each in the dtype of its input."""
    found: list[Tensor | None] = []
    for d, source in zip(gradients, (problem.hidden, problem.weight, pair.bias), strict=True):
        if d is None or source is None:
            found.append(None)
        else:
            found.append(d.to(source.dtype) if scale is None else gemm.scaled(d, scale, source.dtype))
    return Gradients(*found)


def _product(g: Tensor, value: Tensor | None) -> Tensor | None:
    return None if value is None else g * value
