"""Reductions over ranks that share a vocabulary: they continue a body's sums and maxima over columns across a group.

NOTE [Ranks]
Each rank has some columns of every row. A rank first reduces its own columns. Then the ranks reduce the results, which
are [rows]. The bytes sent do not depend on V. Afterwards every rank knows every row's statistics, which is all it needs
for the losses and for their gradients with respect to its own columns. The gradient of the hidden states from a rank's
columns is that rank's part of a sum over the ranks; the engine leaves this sum to its caller. A group is named by a
string: every torch can trace a name, and a graph is specialised to it. No group means that a rank has all columns.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor


def all_reduced(parts: Sequence[Tensor], how: Literal["max", "sum"], group: str | None) -> list[Tensor]:
    """Returns each part reduced over the group, in one collective; without a group, the parts themselves."""
    if group is None:
        return list(parts)
    sent = [part.contiguous() for part in parts]
    if len(sent) == 1:
        received = [torch.ops._c10d_functional.all_reduce(sent[0], how, group)]
    else:  # not stacked: no region returns views, and Inductor lost the place in the stack of a part that is kept
        received = torch.ops._c10d_functional.all_reduce_coalesced(sent, how, group)
    return [torch.ops._c10d_functional.wait_tensor(part) for part in received]


def all_gathered(part: Tensor, ranks: int, group: str) -> Tensor:
    """Returns the parts [rows, k] of all ranks, side by side."""
    sent = part.contiguous()
    received = torch.ops._c10d_functional.all_gather_into_tensor(sent, ranks, group)
    gathered: Tensor = torch.ops._c10d_functional.wait_tensor(received)
    return gathered.view(ranks, *part.shape).transpose(0, 1).reshape(part.shape[0], -1)


def largest(values: Tensor) -> Tensor:
    """Returns the maximum of each row; the least finite number if a rank has no column."""
    if values.shape[-1] == 0:
        return values.new_full(values.shape[:-1], torch.finfo(values.dtype).min)
    return values.amax(-1)
