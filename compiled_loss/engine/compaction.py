"""Tokens that count, moved together, so that those that are masked cost no GEMM.

N tokens, K rows. A device does not say how many tokens count without being waited for, so K is the user's bound: rows
that no token needs are zero and inactive. Where more tokens count than there are rows everything is NaN.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from compiled_loss import checks
from compiled_loss.engine.transforms import traced


class Compaction(NamedTuple):
    """Which token each row has, and which row each token."""

    token: Tensor  # [K]
    taken: Tensor  # [K] bool, whether the row has a token
    row: Tensor  # [N]
    active: Tensor  # [N] bool, whether the token counts
    fits: Tensor  # [] 1, or NaN

    @staticmethod
    def of(active: Tensor, rows: int) -> Compaction:
        """The active of [N] tokens in the first of [rows], in their order."""
        tokens, device = active.shape[0], active.device
        row = active.cumsum(0) - 1
        last = torch.where(active, row, rows).clamp(max=rows)  # the row behind the last is for all others
        count = active.sum()
        token = (count * 0).expand(rows + 1).scatter(0, last, torch.arange(tokens, device=device))
        fits = torch.where(count > rows, float("nan"), 1.0).to(torch.float32)
        taken = torch.arange(rows, device=device) < count
        return Compaction(token.narrow(0, 0, rows), taken, row.clamp(0, max(0, rows - 1)), active, fits)

    def gathered(self, tokens: Tensor) -> Tensor:
        """[N, ...] as [K, ...], differentiable."""
        return _moved(tokens, self.token, self.taken, self.row, self.active)

    def scattered(self, rows: Tensor) -> Tensor:
        """[K, ...] as [N, ...], 0 where a token does not count; differentiable."""
        return _moved(rows, self.row, self.active, self.token, self.taken)


def _moved(values: Tensor, source: Tensor, there: Tensor, back: Tensor, here: Tensor) -> Tensor:
    if traced():
        return _picked(values, source, there)
    moved: Tensor = _Moved.apply(values, source, there, back, here)
    return moved


def _picked(values: Tensor, source: Tensor, there: Tensor) -> Tensor:
    # Not filled in place: Dynamo 2.11 returns what was written from forward as well, and the gradient is lost.
    return values.index_select(0, source).masked_fill(~there.reshape(-1, *(1,) * (values.dim() - 1)), 0)


class _Moved(torch.autograd.Function):
    """Some rows of a tensor in other places, 0 elsewhere: either direction of either pass gathers, and adds nothing."""

    @staticmethod
    def forward(ctx: Any, values: Tensor, source: Tensor, there: Tensor, back: Tensor, here: Tensor) -> Tensor:
        ctx.save_for_backward(back, here)
        return _picked(values, source, there)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        checks.first_derivative()
        return _picked(g, *ctx.saved_tensors), None, None, None, None
