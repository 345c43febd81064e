"""Sequences of tokens: the rows of [B, S], or what `segment_ids` says of packed tokens [...]."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Sequences(NamedTuple):
    """How many sequences there are, and which each token is of; without `segment_ids` each row of [B, S] is one."""

    number: int
    segment_ids: Tensor | None = None  # [...]

    def sums(self, values: Tensor) -> Tensor:
        """The sum over the tokens of each [number]. What is of no sequence is not looked at."""
        if self.segment_ids is None:
            return values.sum(-1)
        segments, inside = self._segments(self.segment_ids)
        sums = values.new_zeros(self.number)
        return sums.index_add(0, segments, torch.where(inside, values.reshape(-1), 0.0))

    def at_tokens(self, of_sequences: Tensor) -> Tensor:
        """At each token [...] the value of its sequence, 0 where it is of none."""
        assert self.segment_ids is not None
        segments, inside = self._segments(self.segment_ids)
        return torch.where(inside, of_sequences[segments], 0.0).view(self.segment_ids.shape)

    def _segments(self, segment_ids: Tensor) -> tuple[Tensor, Tensor]:
        """That of each token [T], 0 where it is of none, and whether it is of one."""
        segments = segment_ids.reshape(-1)
        inside = (segments >= 0) & (segments < self.number)
        return torch.where(inside, segments, 0), inside
