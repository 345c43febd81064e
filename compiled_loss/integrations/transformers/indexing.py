"""Arguments of operations, in the forms that torch takes."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def integers(given: Any) -> list[int]:
    """Returns sizes or dimensions as a list, given each by itself or all in one sequence."""
    return list(given[0] if len(given) == 1 and not isinstance(given[0], int) else given)


def split(index: Any, dims: int) -> tuple[Any, Any]:
    """Returns the index of all dimensions but the last, and that of the last, which is a full slice if it has none."""
    index = index if isinstance(index, tuple) else (index,)
    taken = sum(_dims(part) for part in index if part is not Ellipsis)
    if index[-1] is Ellipsis or (taken < dims and all(part is not Ellipsis for part in index)):
        return index, slice(None)
    return (*index[:-1], slice(None)), index[-1]


def first(kind: type[Any], args: Any, keywords: Any) -> Any:
    """Returns the first argument of this kind, or the first in a sequence that is an argument."""
    for given in (*args, *keywords.values()):
        for value in given if isinstance(given, (list, tuple)) else (given,):
            if isinstance(value, kind):
                return value
    raise TypeError("logits: expected operations on a training step's that fuse_head(model) knows, got another")


def _dims(part: Any) -> int:
    """Returns the number of dimensions that a part of an index takes."""
    if part is None:
        return 0
    return part.dim() if isinstance(part, Tensor) and part.dtype == torch.bool else 1
