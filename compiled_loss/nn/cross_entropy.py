"""Modules of cross-entropy."""

from dataclasses import dataclass

from compiled_loss.functional.cross_entropy import cross_entropy, linear_cross_entropy
from compiled_loss.nn.base import ClassWeighted, loss_module
from compiled_loss.planner.chunking import Chunking


@dataclass(kw_only=True, eq=False, repr=False)
class HardLabelOptions:
    """The keywords that cross-entropy of logits and of a head share."""

    ignore_index: int = -100
    """Label of tokens to ignore."""
    label_smoothing: float = 0.0
    """Share of a uniform distribution in the target, from 0 to 1."""
    z_loss: float = 0.0
    """Weight of the squared log-sum-exp, >= 0."""
    softcap: float | None = None
    """Bound of the scaled logits, > 0; None for none."""
    logit_scale: float = 1.0
    """Multiplies the logits before the softcap, > 0."""
    temperature: float = 1.0
    """Divides the logits, > 0."""
    shift: int = 0
    """The distance of labels: position t predicts label t + shift."""
    reduction: str = "mean"
    """"mean", "sum" or "none"."""


@dataclass(kw_only=True, eq=False, repr=False)
class CrossEntropyOptions(HardLabelOptions):
    """The keywords that `CrossEntropy` and its config keep."""

    class_dim: int = -1
    """The dimension of the logits that is the vocabulary."""


@dataclass(kw_only=True, eq=False, repr=False)
class LinearCrossEntropyOptions(HardLabelOptions):
    """The keywords that `LinearCrossEntropy` and its config keep."""

    chunking: Chunking = Chunking()
    """The chunks of the loss. They change speed and memory, and never the result."""


@loss_module(cross_entropy)
@dataclass(kw_only=True, eq=False, repr=False)
class CrossEntropy(CrossEntropyOptions, ClassWeighted):
    """:func:`compiled_loss.cross_entropy` with its keywords kept.

    Example:
        >>> import torch
        >>> from compiled_loss import nn
        >>> nn.CrossEntropy(reduction="sum")(torch.zeros(2, 4), torch.tensor([1, -100]))
        tensor(1.3863)

    """


@loss_module(linear_cross_entropy)
@dataclass(kw_only=True, eq=False, repr=False)
class LinearCrossEntropy(LinearCrossEntropyOptions, ClassWeighted):
    """:func:`compiled_loss.linear_cross_entropy` with its keywords kept; weight and bias come with each call.

    Example:
        >>> import torch
        >>> from compiled_loss import nn
        >>> loss = nn.LinearCrossEntropy(softcap=30.0)
        >>> loss(torch.zeros(2, 8), torch.zeros(4, 8), torch.tensor([1, -100]))
        tensor(1.3863)

    """
