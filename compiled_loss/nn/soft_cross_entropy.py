"""Module of cross-entropy with soft targets."""

from dataclasses import dataclass

from compiled_loss.functional.soft_cross_entropy import linear_soft_cross_entropy
from compiled_loss.nn.base import Loss, loss_module
from compiled_loss.planner.chunking import Chunking


@dataclass(kw_only=True, eq=False, repr=False)
class LinearSoftCrossEntropyOptions:
    """The keywords that `LinearSoftCrossEntropy` and its config keep."""

    softcap: float | None = None
    """Bound of the draft's scaled logits, > 0; None for none."""
    logit_scale: float = 1.0
    """Multiplies the draft's logits before the softcap, > 0."""
    teacher_softcap: float | None = None
    """Bound of the teacher's scaled logits, > 0; None for none."""
    teacher_logit_scale: float | None = None
    """Multiplies the teacher's logits before their softcap, > 0; None for 1."""
    temperature: float = 1.0
    """Divides both logits, > 0."""
    reduction: str = "mean"
    """"mean", "sum" or "none"."""
    chunking: Chunking = Chunking()
    """The chunks of the loss. They change speed and memory, and never the result."""


@loss_module(linear_soft_cross_entropy)
@dataclass(kw_only=True, eq=False, repr=False)
class LinearSoftCrossEntropy(LinearSoftCrossEntropyOptions, Loss):
    """:func:`compiled_loss.linear_soft_cross_entropy` with its keywords kept; the target comes with each call.

    Example:
        >>> import torch
        >>> from compiled_loss import nn
        >>> loss = nn.LinearSoftCrossEntropy()
        >>> loss(torch.zeros(1, 8), torch.zeros(4, 8), torch.ones(1), target_probs=torch.full((1, 4), 0.25))
        tensor(1.3863)

    """
