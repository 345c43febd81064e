"""Sequences of tokens: the rows of [B, S], or the segments that `segment_ids` gives to packed tokens [...]."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Sequences(NamedTuple):
    """The number of sequences, and the sequence of each token; without `segment_ids` each row of [B, S] is one."""

    number: int
    segment_ids: Tensor | None = None  # [...]

    def sums(self, values: Tensor) -> Tensor:
        """Returns the sum over the tokens of each sequence, [number]. Values of tokens in no sequence are not used."""
        if self.segment_ids is None:
            return values.sum(-1)
        segments, inside = self._segments(self.segment_ids)
        sums = values.new_zeros(self.number)
        return sums.index_add(0, segments, torch.where(inside, values.reshape(-1), 0.0))

    def at_tokens(self, of_sequences: Tensor) -> Tensor:
        """Returns at each token, [...], the value of its sequence, and 0 where it is in none."""
        assert self.segment_ids is not None
        segments, inside = self._segments(self.segment_ids)
        return torch.where(inside, of_sequences[segments], 0.0).view(self.segment_ids.shape)

    def _segments(self, segment_ids: Tensor) -> tuple[Tensor, Tensor]:
        """Returns the sequence of each token, [T], 0 where it is in none, and True where it is in one."""
        segments = segment_ids.reshape(-1)
        inside = (segments >= 0) & (segments < self.number)
        return torch.where(inside, segments, 0), inside
