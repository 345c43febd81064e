"""Statistics chunked over tokens, without gradients, and the chunks themselves.

N tokens, H width, V vocabulary, C rows per chunk. No [N, V] tensor is created, but one [C, V].
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from compiled_loss.engine import execution, gemm
from compiled_loss.engine.math import bodies
from compiled_loss.engine.math.problem import Problem, slack
from compiled_loss.engine.math.statistics import RowStatistics, Wanted, finish, initial_state, statistics_dtype
from compiled_loss.engine.operators import operator
from compiled_loss.engine.top import Top, top
from compiled_loss.planner.plan import Lengths


class Asked(NamedTuple):
    """The statistics that are asked for, first the fields of `Wanted`, and the group of ranks."""

    with_total: bool
    with_entropy: bool
    with_squares: bool
    with_argmax: bool
    group: str | None
    top_k: int = 0

    @property
    def wanted(self) -> Wanted:
        """The statistics that are one value per row."""
        return Wanted(*self[:4])


def statistics(problem: Problem, asked: Asked, lengths: Lengths) -> tuple[RowStatistics, Top | None]:
    """Returns the statistics of NOTE [Relative statistics], without gradients: one GEMM, 2 N H V operations."""
    return found_statistics(_fold(problem, asked, lengths), asked)


def found_statistics(found: list[Tensor], asked: Asked) -> tuple[RowStatistics, Top | None]:
    """Takes the statistics and the top from the list that a fold returns."""
    count = 3 + sum(asked.wanted)
    return RowStatistics.of(found[:count], asked.wanted), Top(*found[count:]) if asked.top_k else None


def statistics_like(problem: Problem, asked: Asked, _lengths: Lengths | None = None) -> list[Tensor]:
    """Returns uninitialised tensors like `RowStatistics`, and like `Top` if it is asked for."""
    dtype = statistics_dtype(problem.hidden.dtype)
    labels, dtypes = problem.labels, RowStatistics.dtypes(dtype, asked.wanted)
    return [*[labels.new_empty(labels.shape, dtype=d) for d in dtypes], *Top.like(labels, asked.top_k, dtype)]


def fold_operations(problem: Problem, *_rest: Any) -> int:
    """Counts the operations of the one GEMM."""
    return product(problem)


def product(problem: Problem) -> int:
    """Counts the operations of the logits' GEMM, which each gradient's GEMM has too. The problem holds shapes."""
    tokens, width = problem.hidden
    return 2 * int(tokens * width) * int(next(iter(problem.weight)))


def chunks(hidden: Tensor, weight: Tensor, lengths: Lengths) -> Iterator[tuple[slice, Tensor]]:
    """Yields the rows of each chunk, and its logits. All chunks share one buffer."""
    rows, plan = hidden.shape[0], lengths.plan("tokens", hidden)
    buffer = hidden.new_empty(min(plan.chunk, rows), weight.shape[0])
    for i in range(plan.count):
        chunk = slice(min(rows, i * plan.chunk), min(rows, (i + 1) * plan.chunk))
        z = gemm.rows_of(buffer, 0, chunk.stop - chunk.start)
        gemm.logits(gemm.rows_of(hidden, chunk.start, z.shape[0]), weight, out=z)
        yield chunk, z


def of_chunk(chunk: slice, *rows: Tensor | None) -> list[Tensor | None]:
    """Returns a chunk's rows of each tensor; None stays None."""
    return [None if v is None else gemm.rows_of(v, chunk.start, chunk.stop - chunk.start) for v in rows]


@operator("fold_token_chunks", Problem, Asked, Lengths, like=statistics_like, operations=fold_operations)
def _fold(problem: Problem, asked: Asked, lengths: Lengths) -> list[Tensor]:
    """Returns the statistics of every row."""
    state = initial_state(problem.hidden, problem.labels.shape, asked.wanted)
    found, head = state.map(torch.empty_like), problem.head.packed()
    tops = Top.like(problem.labels, asked.top_k, problem.hidden.dtype)
    for chunk, z in chunks(problem.hidden, problem.weight, lengths):
        if tops:
            of_rows = top(z, problem.bias, problem.labels[chunk], None, asked.top_k)
            for whole, part in zip(tops, of_rows, strict=True):
                whole[chunk].copy_(part)
        rows = of_chunk(chunk, problem.labels, problem.inverse_temperature, *state)
        out = of_chunk(chunk, *found.present())
        execution.run(bodies.fold, z, rows, head, out, compiled=lengths.compiled)
    present = finish(found.all_reduced(asked.group), slack(head, problem.inverse_temperature)).present()
    return [*present, *(Top(*tops).of_ranks(lengths.ranks, asked.group) if tops else ())]
