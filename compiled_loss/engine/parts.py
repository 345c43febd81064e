"""The parts of its tensors that a walk gives to its chunks.

NOTE [Parts]
Torch remembers what a region returns by all that is known of its operands, how far into their storage they begin
included; where that differs it runs the region again on tensors without data, five times a chunk. So in a compiled
forward parts are copies, which begin at 0: a region runs once a chunk, and 64 chunks compile in 7.9 s instead of 9.4.
Inductor drops a copy that lies as its original does, and nothing is copied in the end. Hence no copies

- unless all of a walk's tensors are contiguous, since one that is not spoils it for all;
- of rows of V columns, which a backend that is not Inductor would really hold;
- in backward, where Dynamo does not tell how tensors lie;
- for a region of the last chunk's own: on GPUs Inductor would take the slice to be aligned as the copy is.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import torch
from torch import Tensor

from compiled_loss.engine import hosts
from compiled_loss.engine.plan import Plan


def planned(plan: Plan, *tensors: Tensor | None) -> Plan:
    """The plan of a forward over these tensors."""
    regions = torch.compiler.is_compiling() and hosts.REGIONS_WORK
    return dataclasses.replace(plan, copied=regions and all(v is None or v.is_contiguous() for v in tensors))


def part(x: Tensor, start: int, size: int, *, copied: bool) -> Tensor:
    """Rows of a tensor from `start` on."""
    rows = x.narrow(0, start, size)
    return rows.clone() if copied else rows


def parts(
    plan: Plan, x: Tensor, *rest: Tensor | None, alone: bool = False
) -> Iterator[tuple[Tensor, list[Tensor | None]]]:
    """`plan.count` parts of x and of what has as many rows, equal but for the last; of None, None.

    All are taken before the first chunk: not for what chunks wait for, gemm's NOTE [Order]. `alone` if the last chunk
    has a region of its own. A compiled graph is specialised to the count, not to the rows.
    """
    others = [[None] * plan.count if v is None else _split(plan, v, alone) for v in rest]
    for i, own in enumerate(_split(plan, x, alone)):
        yield own, [other[i] for other in others]


def _split(plan: Plan, x: Tensor, alone: bool) -> list[Tensor]:
    chunk, equal = plan.chunk, plan.count - 1
    done = chunk * equal
    # Apart: of a split Dynamo 2.13 loses a varying size of its own.
    last = part(x, done, x.shape[0] - done, copied=plan.copied and not alone)
    if plan.copied and equal:
        return [*torch.ops.aten.split_with_sizes_copy(x.narrow(0, 0, done), [chunk] * equal), last]
    # No split: of its results the partitioner keeps each for a backward that takes the same parts.
    return [*(x.narrow(0, i * chunk, chunk) for i in range(equal)), last]
