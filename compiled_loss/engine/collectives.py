"""Reductions over ranks that share a vocabulary: what a body does along columns, continued over a process group.

NOTE [Ranks]
Each rank has some columns of every row. A rank reduces its own first, then the ranks reduce the [rows] that this gives:
bytes do not depend on V, and every rank knows every row's statistics, so that losses and their gradients with respect
to its own columns need no more. What a rank's columns give to the hidden states is its part of a sum over the ranks,
which the engine leaves to its caller. A group is named by a string: a name traces in every torch, and a graph is
specialised to it. No group means that a rank has all columns.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor


def all_reduced(parts: Sequence[Tensor], how: Literal["max", "sum"], group: str | None) -> list[Tensor]:
    """Each part's reduction over the group, in one collective; the parts themselves without a group."""
    if group is None:
        return list(parts)
    sent = [part.contiguous() for part in parts]
    if len(sent) == 1:
        received = [torch.ops._c10d_functional.all_reduce(sent[0], how, group)]
    else:  # not stacked: no region returns views, and of a part that is kept Inductor lost where in the stack it was
        received = torch.ops._c10d_functional.all_reduce_coalesced(sent, how, group)
    return [torch.ops._c10d_functional.wait_tensor(part) for part in received]


def all_gathered(part: Tensor, ranks: int, group: str) -> Tensor:
    """The parts [rows, k] of all ranks, side by side."""
    sent = part.contiguous()
    received = torch.ops._c10d_functional.all_gather_into_tensor(sent, ranks, group)
    gathered: Tensor = torch.ops._c10d_functional.wait_tensor(received)
    return gathered.view(ranks, *part.shape).transpose(0, 1).reshape(part.shape[0], -1)


def largest(values: Tensor) -> Tensor:
    """The maximum of each row; the smallest number there is if a rank has no column."""
    if values.shape[-1] == 0:
        return values.new_full(values.shape[:-1], torch.finfo(values.dtype).min)
    return values.amax(-1)
