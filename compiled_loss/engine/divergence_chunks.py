"""Two distributions chunked over tokens: a head's logits against a target's, neither held.

N tokens, H width, H' the target's, V vocabulary, C rows per chunk. `weighted_sum` forms gradients in forward: three
GEMMs of the student where both its gradients are wanted, 6 N H V operations, and the target's 2 N H' V where it is a
head too; it keeps dH, dW and O(N). `divergence` gives each row's own and takes any upstream gradient: it computes the
logits again in backward, 8 N H V and 4 N H' V, and keeps O(N). Both hold the student's [C, V] and, where it is a head,
the target's.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor

from compiled_loss import checks
from compiled_loss.engine import execution, gemm
from compiled_loss.engine.gradients import Formed, Gradients, Needs, hand_out
from compiled_loss.engine.math import divergence_bodies
from compiled_loss.engine.math.divergences import Kind, Pair, Rows, Target
from compiled_loss.engine.math.statistics import statistics_dtype, unit_scale
from compiled_loss.engine.math.top_divergences import Place
from compiled_loss.engine.operators import none, operator, unpack
from compiled_loss.engine.token_chunks import chunks, kept, of_chunk
from compiled_loss.engine.transforms import without_autocast
from compiled_loss.planner.plan import Lengths


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


class Problem(NamedTuple):
    """Two distributions that nobody holds: N hidden states, a head of V classes, and what it is compared with."""

    hidden: Tensor  # [N, H]
    weight: Tensor  # [V, H]
    values: Tensor  # of the `Target`
    indices: Tensor | None
    target_weight: Tensor | None
    inverse_temperature: Tensor | None
    jsd_weight: Tensor | None
    labels: Tensor | None  # [N], counted from the first of the classes

    @property
    def pair(self) -> Pair:
        """How rows are compared."""
        return Pair(self.inverse_temperature, self.jsd_weight)


class _Upstream(NamedTuple):
    """Gradients of each row's divergence and cross-entropy, and which rows have any."""

    soft: Tensor
    hard: Tensor | None
    active: Tensor


class _How(NamedTuple):
    kind: str
    group: str | None


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
) -> Tensor:
    """The loss, differentiable with respect to hidden and weight. Over a group: NOTE [Ranks]."""
    problem, how = Problem(hidden, weight, *target, *pair, weighted.labels), _How(kind, group)
    if any(needs):
        upstream = _Upstream(weighted.soft, weighted.hard, weighted.active)
        loss: Tensor = _WeightedSum.apply(*problem, *upstream, needs, how, lengths)
        return loss
    _, (soft, *hard) = Rows.of(_fold(problem, how, lengths), kind, weighted.labels, target.indices)
    return weighted.of(soft, hard[0] if hard else None).sum()


def divergence(
    hidden: Tensor,  # [N, H]
    weight: Tensor,  # [V, H]
    target: Target,  # as above
    labels: Tensor | None,  # [N]
    kind: Kind,
    pair: Pair,
    lengths: Lengths,
    group: str | None,
) -> tuple[Tensor, Tensor | None]:
    """Each row's divergence and, with labels, cross-entropy; differentiable with respect to hidden and weight."""
    soft, hard = _Divergence.apply(*Problem(hidden, weight, *target, *pair, labels), _How(kind, group), lengths)
    return soft, hard


class _Chunk(NamedTuple):
    """Rows of both: logits, and what a body takes of the target before and behind its own operands."""

    rows: slice
    z: Tensor  # [rows, V]
    target: tuple[Tensor, ...]
    place: Place | None


def _chunks(problem: Problem, group: str | None, lengths: Lengths, *, fold: bool) -> Iterator[_Chunk]:
    """Each chunk, in one buffer for all, and a second one where the target is a head.

    Beside a top the logits are without it, as `fold` wants them.
    """
    hidden, weight, values, indices, target_weight = problem[:5]
    buffer = None
    for rows, z in chunks(hidden, weight, lengths):
        of_target = values[rows]
        if target_weight is not None:
            if buffer is None:
                buffer = values.new_empty(z.shape)
            of_target = torch.mm(of_target, target_weight.t(), out=buffer[: z.shape[0]])
        if indices is None:
            yield _Chunk(rows, z, (of_target,), None)
            continue
        place = Place.of(indices[rows], z.shape[1])
        top = place.take(z, of_target, group)
        if fold:
            place.put_(z, torch.full_like(top, float("-inf")))
        yield _Chunk(rows, z, (indices[rows], of_target, top), place)


def _rows_like(problem: Problem, how: _How) -> list[Tensor]:
    """`Rows`, each row's divergence, and its cross-entropy, without data."""
    there = sum(Rows.there(cast(Kind, how.kind), problem.labels, problem.indices))
    dtype = statistics_dtype(problem.hidden.dtype)
    count = there + 1 + (problem.labels is not None)
    return [problem.hidden.new_empty(problem.hidden.shape[:1], dtype=dtype) for _ in range(count)]


def _product(problem: Problem, gradients: int) -> int:
    """Operations of the GEMMs of both logits, and of so many of the student's gradients; shapes for tensors."""
    (tokens, width), (vocab, *_) = problem.hidden, problem.weight
    columns = (1 + gradients) * int(width) + (0 if problem.target_weight is None else int(problem.values[1]))
    return 2 * int(tokens) * columns * int(vocab)


def _bodies(problem: Problem, how: _How) -> divergence_bodies.Bodies:
    kinds = divergence_bodies.WHOLE if problem.indices is None else divergence_bodies.TOP
    return kinds[cast(Kind, how.kind)]


@operator(
    "fold_divergence_chunks",
    Problem,
    _How,
    Lengths,
    like=lambda problem, how, _lengths: _rows_like(problem, how),
    operations=lambda problem, _how, _lengths: _product(problem, 0),
)
def _fold(problem: Problem, how: _How, lengths: Lengths) -> list[Tensor]:
    """What is known of each row, its divergence and its cross-entropy."""
    found = _rows_like(problem, how)
    body = _bodies(problem, how).fold
    for rows, z, target, _ in _chunks(problem, how.group, lengths, fold=True):
        operands = (*of_chunk(rows, problem.labels), *target)
        out = of_chunk(rows, *found)
        execution.run(body, z, operands, problem.pair, out, compiled=lengths.compiled, group=how.group)
    return found


def _gradients_like(problem: Problem, needs: Needs, lengths: Lengths) -> list[Tensor]:
    dtype = kept(problem.weight.dtype, lengths)
    return Gradients.empty(problem.hidden, problem.weight, None, needs, weight_dtype=dtype).present()


def _summed(
    problem: Problem,
    upstream: _Upstream,
    needs: Needs,
    how: _How,
    lengths: Lengths,
    *,
    known: Rows | None = None,
    losses: Tensor | None = None,
) -> list[Tensor]:
    """The gradients that are wanted, of rows that are known, or of such that each chunk finds, with their losses."""
    hidden, weight = problem.hidden, problem.weight
    accumulate_dtype = lengths.plan("tokens", hidden).accumulate_dtype
    gradients = Gradients.empty(hidden, weight, None, needs, weight_dtype=accumulate_dtype)
    bodies, group = _bodies(problem, how), how.group
    body = bodies.fold_and_gradient if known is None else bodies.gradient
    if known is not None and problem.indices is None:
        group = None  # nothing is reduced
    for rows, z, target, place in _chunks(problem, how.group, lengths, fold=known is None):
        labels, soft, hard = of_chunk(rows, problem.labels, upstream.soft, upstream.hard)
        operands = (labels, *target, *(() if known is None else of_chunk(rows, *known)), soft, hard)
        d_top = [] if place is None else [z.new_empty(place.columns.shape)]
        out = [z, *d_top, *([] if losses is None else [losses[rows]])]
        execution.run(body, z, operands, problem.pair, out, compiled=lengths.compiled, group=group)
        if place is not None:
            place.put_(z, d_top[0])
        gemm.accumulate_gradients(*gradients, z, hidden[rows], weight, upstream.active, rows.start, 0, None)
    del z
    return gradients.with_weight_in(kept(weight.dtype, lengths)).present()


@operator(
    "form_divergence_chunks",
    Problem,
    _Upstream,
    Needs,
    _How,
    Lengths,
    like=lambda problem, upstream, needs, _how, lengths: [
        *_gradients_like(problem, needs, lengths),
        torch.empty_like(upstream.soft),
    ],
    operations=lambda problem, _upstream, needs, _how, _lengths: _product(problem, sum(needs)),
)
def _form(problem: Problem, upstream: _Upstream, needs: Needs, how: _How, lengths: Lengths) -> list[Tensor]:
    """The gradients that are wanted, and each row's loss."""
    losses = torch.empty_like(upstream.soft)
    return [*_summed(problem, upstream, needs, how, lengths, losses=losses), losses]


@operator(
    "divergence_chunks_gradients",
    Problem,
    Rows,
    _Upstream,
    Needs,
    _How,
    Lengths,
    like=lambda problem, _rows, _upstream, needs, _how, lengths: _gradients_like(problem, needs, lengths),
    operations=lambda problem, _rows, _upstream, needs, _how, _lengths: _product(problem, sum(needs)),
)
def _gradients(
    problem: Problem, known: Rows, upstream: _Upstream, needs: Needs, how: _How, lengths: Lengths
) -> list[Tensor]:
    """Those that are wanted."""
    return _summed(problem, upstream, needs, how, lengths, known=known)


def _formed(problem: Problem, upstream: _Upstream, needs: Needs, how: _How, lengths: Lengths) -> tuple[Formed, Tensor]:
    """The gradients, and each row's loss, which is still to be multiplied by the same scale."""
    scale = unit_scale(problem.hidden.dtype, upstream.soft, upstream.hard)
    soft, hard, active = upstream
    soft = torch.where(active, soft if scale is None else soft / scale, 0.0)
    if scale is not None and hard is not None:
        hard = hard / scale
    found = _form(problem, _Upstream(soft, hard, active), needs, how, lengths)
    return Formed(Gradients.taken(found, needs, None), scale), found[0]


class _WeightedSum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *args: Any) -> Tensor:
        problem, upstream, options = unpack(args, Problem, _Upstream)
        formed, losses = _formed(problem, upstream, *options)
        loss = torch.where(upstream.active, losses, 0.0).sum()
        if formed.scale is not None:
            loss = loss * formed.scale
        inputs = (none(Problem), none(_Upstream)) if torch.compiler.is_compiling() else (problem, upstream)
        ctx.save_for_backward(*formed.gradients, formed.scale, *inputs[0], *inputs[1])
        ctx.dtypes = [problem.hidden.dtype, problem.weight.dtype, None]
        ctx.options, ctx.spent = options, False
        ctx.set_materialize_grads(False)
        return loss

    @staticmethod
    def backward(ctx: Any, g: Tensor | None) -> tuple[Tensor | None, ...]:
        checks.first_derivative()
        d_problem = none(Problem)
        if g is not None:
            gradients, (scale, *inputs) = unpack(ctx.saved_tensors, Gradients)
            problem, upstream, _ = unpack(inputs, Problem, _Upstream)
            formed = Formed(gradients, scale)
            found = hand_out(ctx, formed, g, ctx.dtypes, lambda: _formed(problem, upstream, *ctx.options)[0])
            d_problem = d_problem._replace(hidden=found.d_hidden, weight=found.d_weight)
        return *d_problem, *none(_Upstream), None, None, None


class _Divergence(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *args: Any) -> tuple[Tensor, Tensor | None]:
        problem, (how, lengths) = unpack(args, Problem)
        known, (soft, *hard) = Rows.of(_fold(problem, how, lengths), how.kind, problem.labels, problem.indices)
        ctx.save_for_backward(*problem, *known)
        ctx.set_materialize_grads(False)
        ctx.options = how, lengths
        return soft, hard[0] if hard else None

    @staticmethod
    def backward(ctx: Any, g_soft: Tensor | None, g_hard: Tensor | None) -> tuple[Tensor | None, ...]:
        checks.first_derivative()
        problem, known, _ = unpack(ctx.saved_tensors, Problem, Rows)
        wanted, _ = unpack(ctx.needs_input_grad, Problem)
        needs = Needs(wanted.hidden, wanted.weight, needs_bias=False)
        like = known.log_sum
        soft = torch.zeros_like(like) if g_soft is None else g_soft.to(like.dtype)
        hard = None
        if problem.labels is not None:
            hard = torch.zeros_like(like) if g_hard is None else g_hard.to(like.dtype)
        with without_autocast(problem.hidden.device):  # whatever backward's caller is in
            scale = unit_scale(problem.hidden.dtype, soft, hard)
            active = soft != 0 if hard is None else (soft != 0) | (hard != 0)
            if scale is not None:
                soft, hard = soft / scale, None if hard is None else hard / scale
            found = _gradients(problem, known, _Upstream(soft, hard, active), needs, *ctx.options)
            d_hidden, d_weight, _ = Gradients.taken(found, needs, None)
            if scale is not None:
                d_hidden = None if d_hidden is None else gemm.scaled(d_hidden, scale, d_hidden.dtype)
                d_weight = None if d_weight is None else gemm.scaled(d_weight, scale, problem.weight.dtype)
        d_weight = None if d_weight is None else d_weight.to(problem.weight.dtype)
        return *none(Problem)._replace(hidden=d_hidden, weight=d_weight), None, None
