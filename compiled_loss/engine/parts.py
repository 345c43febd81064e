"""The parts of its tensors that a walk gives to its chunks.

NOTE [Parts]
Torch remembers what a region returns by all that is known of its operands, how far into their storage they begin
included; where that differs it runs the region again on tensors without data, five times a chunk. So under the compiler
a part is a copy, which begins at 0: once a chunk, and 64 chunks compile in 7.9 s instead of 9.4. Inductor drops a copy
that lies as its original does, and reads that: in the end nothing is copied. One that would lie otherwise is not made.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import torch
from torch import Tensor

from compiled_loss.engine import hosts
from compiled_loss.engine.plan import Plan


def planned(plan: Plan, *tensors: Tensor | None) -> Plan:
    """The plan, for parts of these tensors. Asked in forward: how a backward's tensors lie Dynamo does not tell."""
    regions = torch.compiler.is_compiling() and hosts.REGIONS_WORK
    return dataclasses.replace(plan, copied=regions and all(v is None or v.is_contiguous() for v in tensors))


def part(x: Tensor, start: int, size: int, plan: Plan) -> Tensor:
    """Rows of a tensor from `start` on."""
    rows = x.narrow(0, start, size)
    return rows.clone() if plan.copied else rows


def parts(plan: Plan, x: Tensor, *rest: Tensor | None) -> Iterator[tuple[Tensor, list[Tensor | None]]]:
    """`plan.count` parts of x and of what has as many rows, equal but for the last; of None, None.

    All are taken before the first chunk: not for what chunks wait for, gemm's NOTE [Order]. A compiled graph is
    specialised to the count, not to the rows.
    """
    others = [[None] * plan.count if v is None else _split(v, plan) for v in rest]
    for i, own in enumerate(_split(x, plan)):
        yield own, [other[i] for other in others]


def _split(x: Tensor, plan: Plan) -> list[Tensor]:
    done = (plan.count - 1) * plan.chunk
    last = part(x, done, x.shape[0] - done, plan)  # apart: of a split Dynamo 2.13 loses a varying size of its own
    if plan.count == 1:
        return [last]
    whole, sizes = x.narrow(0, 0, done), [plan.chunk] * (plan.count - 1)
    aten = torch.ops.aten
    return [*(aten.split_with_sizes_copy if plan.copied else aten.split_with_sizes)(whole, sizes), last]
