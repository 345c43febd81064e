"""Compaction: tokens that count are moved together, so that masked tokens cost no GEMM.

N tokens, K rows. To read from a device how many tokens count would wait for the device, so K is the user's bound. Rows
that no token needs are zero and inactive. If more tokens count than there are rows, everything is NaN.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from compiled_loss import checks
from compiled_loss.engine.operators import composite
from compiled_loss.engine.transforms import traced


class Compaction(NamedTuple):
    """The token of each row, and the row of each token."""

    token: Tensor  # [K]
    taken: Tensor  # [K] bool, whether the row has a token
    row: Tensor  # [N]
    active: Tensor  # [N] bool, whether the token counts
    fits: Tensor  # [] 1, or NaN

    @staticmethod
    def of(active: Tensor, rows: int) -> Compaction:
        """Makes the compaction that puts the active of [N] tokens into the first of [rows], in their order."""
        tokens, device = active.shape[0], active.device
        row = active.cumsum(0) - 1
        last = torch.where(active, row, rows).clamp(max=rows)  # one row more is for all other tokens
        count = active.sum()
        token = (count * 0).expand(rows + 1).scatter(0, last, torch.arange(tokens, device=device))
        fits = torch.where(count > rows, float("nan"), 1.0).to(torch.float32)
        taken = torch.arange(rows, device=device) < count
        return Compaction(token.narrow(0, 0, rows), taken, row.clamp(0, max(0, rows - 1)), active, fits)

    def gathered(self, tokens: Tensor) -> Tensor:
        """Returns the rows [K, ...] of tokens [N, ...], differentiable."""
        return _moved(tokens, _Places(self.token, self.taken, self.row, self.active))

    def scattered(self, rows: Tensor) -> Tensor:
        """Returns the tokens [N, ...] of rows [K, ...], 0 where a token does not count; differentiable."""
        return _moved(rows, _Places(self.row, self.active, self.token, self.taken))


class _Values(NamedTuple):
    values: Tensor  # [..., *]


class _Places(NamedTuple):
    source: Tensor  # the row that each place takes
    there: Tensor  # whether it takes one
    back: Tensor  # the place that each row goes to
    here: Tensor  # whether it goes to one


def _moved(values: Tensor, places: _Places) -> Tensor:
    if traced():
        return _picked(values, places.source, places.there)
    (moved,) = _applied(_Values(values), places)
    return moved


def _picked(values: Tensor, source: Tensor, there: Tensor) -> Tensor:
    # Not filled in place: Dynamo 2.11 would return the tensor that was written from forward as well, and the gradient
    # would be lost.
    return values.index_select(0, source).masked_fill(~there.reshape(-1, *(1,) * (values.dim() - 1)), 0)


class _Moved(torch.autograd.Function):
    """Moves rows of a tensor to other places, with 0 elsewhere. Forward and backward both gather, and never add."""

    @staticmethod
    def forward(ctx: Any, values: Tensor, source: Tensor, there: Tensor, back: Tensor, here: Tensor) -> Tensor:
        ctx.save_for_backward(back, here)
        return _picked(values, source, there)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        checks.first_derivative()
        return _picked(g, *ctx.saved_tensors), None, None, None, None


@composite("moved_rows", _Values, _Places)
def _applied(values: _Values, places: _Places) -> tuple[Tensor]:
    return (_Moved.apply(*values, *places),)
