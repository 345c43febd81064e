"""Token streams and labels as NeMo Automodel's losses take them."""

from __future__ import annotations

from typing import Any

from torch import Tensor

DATASET_IGNORE_INDEX = -100


def beside(values: Tensor, labels: Tensor) -> Tensor:
    """Returns logits or hidden states [..., X] in the shape of the labels, if one of both is flat or has one more 1."""
    if not isinstance(values, Tensor) or not isinstance(labels, Tensor) or not values.dim():
        return values
    theirs, shape = values.shape[:-1], labels.shape
    if theirs == shape or theirs.numel() != shape.numel():
        return values
    flat = len(theirs) <= 1 or len(shape) <= 1 or [n for n in theirs if n != 1] == [n for n in shape if n != 1]
    return values.reshape(*shape, values.shape[-1]) if flat else values


def mask_beside(mask: Tensor | None, labels: Tensor) -> Tensor | None:
    """Returns a mask with as many elements as labels in the shape of the labels; see `beside`."""
    if not isinstance(mask, Tensor) or mask.shape == labels.shape:
        return mask
    return beside(mask.unsqueeze(-1), labels).squeeze(-1)


def with_own_ignore_index(labels: Any, ignore_index: int) -> Any:
    """Returns labels in which -100, which data sets use, is the label that the loss ignores."""
    if ignore_index == DATASET_IGNORE_INDEX or not isinstance(labels, Tensor) or labels.is_floating_point():
        return labels
    return labels.masked_fill(labels == DATASET_IGNORE_INDEX, ignore_index)
