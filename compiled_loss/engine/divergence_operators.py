"""The passes of divergences chunked over tokens: a head's logits against a target, neither of which is stored whole.

N tokens, H width, H' the target's width, V vocabulary, C rows per chunk. Each pass is an operator with a plain loop
inside: NOTE [Operators]. It holds one [C, V] of the student's logits and, if the target is a head too, one of the
target's.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from compiled_loss.engine import execution, gemm
from compiled_loss.engine.gradients import Gradients, Needs
from compiled_loss.engine.math import divergence_bodies
from compiled_loss.engine.math.divergence_bodies import Top, Whole
from compiled_loss.engine.math.divergence_kinds import Kind, Pair
from compiled_loss.engine.math.divergences import Found, RowGradients, Rows
from compiled_loss.engine.math.statistics import statistics_dtype
from compiled_loss.engine.math.top_divergences import Place, finite_
from compiled_loss.engine.operators import operator
from compiled_loss.engine.token_chunks import kept
from compiled_loss.engine.token_statistics import chunks, of_chunk
from compiled_loss.planner.plan import Lengths


class Problem(NamedTuple):
    """Two distributions that are never stored whole: N hidden states and a head of V classes, and a target."""

    hidden: Tensor  # [N, H]
    weight: Tensor  # [V, H]
    values: Tensor  # of the `Target`
    indices: Tensor | None
    target_weight: Tensor | None
    inverse_temperatures: Tensor | None  # [N, 1]
    labels: Tensor | None  # [N], counted from the first of the classes


class How(NamedTuple):
    """The kind of divergence, and the group of ranks."""

    divergences: str  # the first three fields are those of the `Kind`
    statistics: str
    probabilities: bool
    group: str | None

    @property
    def kind(self) -> Kind:
        """The kind of divergence."""
        return Kind(self.divergences, self.statistics, self.probabilities)


class Counts(NamedTuple):
    """The rows that have a gradient."""

    active: Tensor  # [N] bool


class _Chunk(NamedTuple):
    """Rows of both distributions: the student's logits, and the target as a body takes it."""

    rows: slice
    z: Tensor  # [rows, V]
    target: Whole | Top
    place: Place | None


def _chunks(problem: Problem, pair: Pair, group: str | None, lengths: Lengths, *, fold: bool) -> Iterator[_Chunk]:
    """Yields each chunk. All chunks share one buffer, and a second one if the target is a head.

    For `fold` with a top, the logits are -inf at the top's classes.
    """
    hidden, weight, values, indices, target_weight, inverse, _ = problem
    buffer = None
    for rows, z in chunks(hidden, weight, lengths):
        of_target = values[rows]
        if target_weight is not None:
            if buffer is None:
                buffer = values.new_empty(z.shape)
            of_target = gemm.logits(of_target, target_weight, out=buffer[: z.shape[0]])
        of_rows = None if inverse is None else inverse[rows]
        if indices is None:
            yield _Chunk(rows, z, Whole(of_target, of_rows), None)
            continue
        place = Place.of(indices[rows], z.shape[1])
        top = place.take(z, of_target, pair.student, group)
        if fold:
            finite_(z, pair.student)
            place.put_(z, torch.full_like(top, float("-inf")))
        yield _Chunk(rows, z, Top(indices[rows], of_target, top, of_rows), place)


def _new_rows(problem: Problem, count: int) -> list[Tensor]:
    dtype = statistics_dtype(problem.hidden.dtype)
    return [problem.hidden.new_empty(problem.hidden.shape[:1], dtype=dtype) for _ in range(count)]


def _found_like(problem: Problem, how: How) -> list[Tensor]:
    """Returns uninitialised tensors like those of `Found`."""
    return _new_rows(problem, sum(Found.there(how.kind, problem.labels, problem.indices)))


def _known_like(problem: Problem, how: How) -> list[Tensor]:
    """Returns uninitialised tensors like those of `Rows`."""
    return _new_rows(problem, sum(Rows.there(how.kind, problem.labels, problem.indices)))


def _gradients_like(problem: Problem, pair: Pair, needs: Needs, lengths: Lengths) -> list[Tensor]:
    dtype = kept(problem.weight.dtype, lengths)
    return Gradients.empty(problem.hidden, problem.weight, pair.bias, needs, weight_dtype=dtype).present()


def _operations(problem: Problem, needs: Needs | None = None) -> int:
    """Counts the GEMMs' operations: both heads' logits and the student's gradients. The problem holds shapes."""
    (tokens, width), (vocab, *_) = problem.hidden, problem.weight
    gradients = 0 if needs is None else needs.needs_hidden + needs.needs_weight
    columns = (1 + gradients) * int(width) + (0 if problem.target_weight is None else int(problem.values[1]))
    return 2 * int(tokens) * columns * int(vocab)


def _bodies(problem: Problem) -> divergence_bodies.Bodies:
    return divergence_bodies.WHOLE if problem.indices is None else divergence_bodies.TOP


@operator(
    "fold_divergence_chunks",
    Problem,
    Pair,
    How,
    Lengths,
    like=lambda problem, _pair, how, _lengths: [*_known_like(problem, how), *_found_like(problem, how)],
    operations=lambda problem, _pair, _how, _lengths: _operations(problem),
)
def fold(problem: Problem, pair: Pair, how: How, lengths: Lengths) -> list[Tensor]:
    """Returns the `Rows` and the `Found`."""
    found = [*_known_like(problem, how), *_found_like(problem, how)]
    body = _bodies(problem).fold
    for rows, z, target, _ in _chunks(problem, pair, how.group, lengths, fold=True):
        operands = (*of_chunk(rows, problem.labels), *target)
        out = of_chunk(rows, *found)
        execution.run(body, z, operands, pair, out, compiled=lengths.compiled, kind=how.kind, group=how.group)
    return found


@operator(
    "form_divergence_chunks",
    Problem,
    Pair,
    RowGradients,
    Counts,
    Needs,
    How,
    Lengths,
    like=lambda problem, pair, _upstream, _counts, needs, how, lengths: [
        *_gradients_like(problem, pair, needs, lengths),
        *_found_like(problem, how),
    ],
    operations=lambda problem, _pair, _upstream, _counts, needs, _how, _lengths: _operations(problem, needs),
)
def form(
    problem: Problem, pair: Pair, upstream: RowGradients, counts: Counts, needs: Needs, how: How, lengths: Lengths
) -> list[Tensor]:
    """Returns the gradients that are needed, and the `Found`."""
    found = _found_like(problem, how)
    return [*_summed(problem, pair, upstream, counts, needs, how, lengths, None, found), *found]


@operator(
    "divergence_chunks_gradients",
    Problem,
    Pair,
    Rows,
    RowGradients,
    Counts,
    Needs,
    How,
    Lengths,
    like=lambda problem, pair, _rows, _upstream, _counts, needs, _how, lengths: _gradients_like(
        problem, pair, needs, lengths
    ),
    operations=lambda problem, _pair, _rows, _upstream, _counts, needs, _how, _lengths: _operations(problem, needs),
)
def gradients(
    problem: Problem,
    pair: Pair,
    known: Rows,
    upstream: RowGradients,
    counts: Counts,
    needs: Needs,
    how: How,
    lengths: Lengths,
) -> list[Tensor]:
    """Returns the gradients that are needed, given the `Rows`."""
    return _summed(problem, pair, upstream, counts, needs, how, lengths, known, [])


def _summed(
    problem: Problem,
    pair: Pair,
    upstream: RowGradients,
    counts: Counts,
    needs: Needs,
    how: How,
    lengths: Lengths,
    known: Rows | None,
    found: list[Tensor],
) -> list[Tensor]:
    """Returns the gradients that are needed, given the `Rows`; without them, each chunk finds its own."""
    hidden, weight, bias = problem.hidden, problem.weight, pair.bias
    accumulate_dtype = lengths.plan("tokens", hidden).accumulate_dtype
    gradients = Gradients.empty(hidden, weight, bias, needs, weight_dtype=accumulate_dtype)
    bodies, group = _bodies(problem), how.group
    counted = gemm.Counted.of(counts.active, hidden)
    body = bodies.fold_and_gradient if known is None else bodies.gradient
    if known is not None and problem.indices is None:
        group = None  # nothing is reduced over ranks
    for rows, z, target, place in _chunks(problem, pair, how.group, lengths, fold=known is None):
        of_rows = of_chunk(rows, *(() if known is None else known), *upstream)
        operands = (*of_chunk(rows, problem.labels), *target, *of_rows)
        d_top = [] if place is None else [z.new_empty(place.columns.shape)]
        out = [z, *d_top, *of_chunk(rows, *found)]
        execution.run(body, z, operands, pair, out, compiled=lengths.compiled, kind=how.kind, group=group)
        if place is not None:
            place.put_(z, d_top[0])
        states = gemm.rows_of(hidden, rows.start, z.shape[0])
        gemm.accumulate_gradients(*gradients, z, states, weight, counted, rows.start, 0, None)
    del z
    return gradients.with_weight_in(kept(weight.dtype, lengths)).present()
