"""Ids of classes, K of each token: rows of padded ids from those that a sampler kept."""

from __future__ import annotations

import torch
from torch import Tensor

from compiled_loss import checks


def pad_ids(offsets: Tensor, ids: Tensor, width: int) -> Tensor:  # [N + 1], [nnz]
    """Pads the ids of N tokens, stored one after the other (CSR), to rows of `width`, with -1.

    Args:
        offsets: where each token's ids begin, and the last end, [N + 1], int64 or int32: from 0 up to nnz.
        ids: classes, [nnz], int64 or int32.
        width: how many ids a row has, at least as many as any token has. A number of the host: nothing waits for a
            device.

    Returns:
        [N, width], int64, what `kept_ids` and `ids` of :func:`linear_token_statistics` take. A token with more than
        `width` ids gets one that is no class, which makes its statistics NaN; eager CPU code raises.

    Memory:
        [N, width].

    Raises:
        ValueError: a shape or device is wrong, `width` is below 1, or, in eager CPU code, offsets fall or a token has
            more ids than `width`.
        TypeError: a dtype is wrong.

    Example:
        >>> import torch
        >>> from compiled_loss import pad_ids
        >>> pad_ids(torch.tensor([0, 2, 3]), torch.tensor([7, 1, 4]), width=2)
        tensor([[ 7,  1],
                [ 4, -1]])

    """
    checks.ids.padded(offsets, ids, width)
    offsets = offsets.to(torch.int64)
    start, stop = offsets[:-1].unsqueeze(-1), offsets[1:].unsqueeze(-1)
    place = start + torch.arange(width, device=offsets.device)
    there = place < stop
    if not ids.shape[0]:
        return torch.full_like(place, -1)
    rows = torch.where(there, ids.to(torch.int64)[torch.where(there, place, 0)], -1)
    return torch.where(stop - start > width, torch.iinfo(torch.int64).max, rows)
