"""Module of multi-token prediction."""

from dataclasses import dataclass

from compiled_loss.functional.multi_token import multi_token_prediction
from compiled_loss.nn.base import Loss, loss_module
from compiled_loss.planner.chunking import Chunking


@dataclass(kw_only=True, eq=False, repr=False)
class MultiTokenOptions:
    """The keywords that `MultiTokenPrediction` and its config keep."""

    scaling_factor: float = 0.1
    """Weight of the auxiliary loss, >= 0."""
    ignore_index: int = -100
    """Label of tokens to ignore."""
    softcap: float | None = None
    """Bound of the scaled logits, > 0; None for none."""
    logit_scale: float = 1.0
    """Multiplies the logits before the softcap, > 0."""
    temperature: float = 1.0
    """Divides the logits, > 0."""
    chunking: Chunking = Chunking()
    """The chunks of the loss. They change speed and memory, and never the result."""


@loss_module(multi_token_prediction)
@dataclass(kw_only=True, eq=False, repr=False)
class MultiTokenPrediction(MultiTokenOptions, Loss):
    """:func:`compiled_loss.multi_token_prediction` with its keywords kept; the packing comes with each call.

    Example:
        >>> import torch
        >>> from compiled_loss import nn
        >>> hidden = [torch.zeros(1, 4, 8), torch.zeros(1, 4, 8)]
        >>> nn.MultiTokenPrediction(scaling_factor=1.0)(hidden, torch.zeros(5, 8), torch.tensor([[0, 1, 2, 3]]))
        tensor(1.6094)

    """
