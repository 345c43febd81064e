"""The k largest logits of each row, found chunk by chunk; no gradient.

N tokens, V vocabulary, C columns of a chunk.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from compiled_loss.engine.collectives import all_gathered
from compiled_loss.engine.math.statistics import statistics_dtype

_BLOCKS = 16  # blocks of a chunk with a bias: one block at a time is copied in fp32


class Top(NamedTuple):
    """The k largest logits of each row, the largest first."""

    logits: Tensor  # [..., k], with their bias, in the statistics' dtype
    behind: Tensor  # [..., k], the column of each minus the label's

    @staticmethod
    def like(labels: Tensor, k: int, dtype: torch.dtype) -> list[Tensor]:
        """Returns uninitialised tensors like those of a top; none for k = 0."""
        if not k:
            return []
        return [labels.new_empty((*labels.shape, k), dtype=d) for d in (statistics_dtype(dtype), torch.int64)]

    def merged(self, other: Top) -> Top:
        """Returns the k largest of both tops."""
        logits = torch.cat([self.logits, other.logits], -1)
        logits, order = logits.topk(self.logits.shape[-1], dim=-1)
        return Top(logits, torch.cat([self.behind, other.behind], -1).gather(-1, order))

    def of_ranks(self, ranks: int, group: str | None) -> Top:
        """Returns the top of rows whose columns are spread over the ranks of a group; this takes two collectives."""
        if group is None:
            return self
        logits, behind = (all_gathered(v, ranks, group) for v in self)
        logits, order = logits.topk(self.logits.shape[-1], dim=-1)
        return Top(logits, behind.gather(-1, order))


def top(z: Tensor, bias: Tensor | None, labels: Tensor, start: Tensor | None, k: int) -> Top:
    """Returns the top of z + bias, z [..., C] from the column `start` on; if C < k, the rest of the top is -inf."""
    dtype, columns = statistics_dtype(z.dtype), z.shape[-1]
    few = min(k, columns)
    if bias is None:
        logits, index = z.topk(few, dim=-1)
    else:
        rows = max(1, -(-z.shape[0] // _BLOCKS))
        found = [(block.to(dtype) + bias.to(dtype)).topk(few, dim=-1) for block in z.split(rows)]
        logits, index = (torch.cat([pair[i] for pair in found]) for i in range(2))
    index = index if start is None else index + start
    behind = index - labels.unsqueeze(-1)
    logits = logits.to(dtype)
    if few < k:
        logits = torch.nn.functional.pad(logits, (0, k - few), value=float("-inf"))
        behind = torch.nn.functional.pad(behind, (0, k - few))
    return Top(logits, behind)
