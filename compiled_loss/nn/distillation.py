"""Modules of distillation."""

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from compiled_loss.functional.distillation import distillation, linear_distillation
from compiled_loss.nn.base import Loss, loss_module
from compiled_loss.planner.chunking import Chunking


@dataclass(kw_only=True, eq=False, repr=False)
class TeacherOptions:
    """The keywords that distillation of logits and of heads share."""

    divergence: str | Mapping[str, float | Tensor] = "forward_kl"
    """A name of :func:`compiled_loss.distillation`'s table, or weights by name."""
    jsd_weight: float = 0.5
    """Share of the teacher in the mixture of "jsd", between 0 and 1."""
    lk_decay: float = 3.0
    """Decay with which "lk" turns from KL to total variation, >= 0."""
    temperature: float = 1.0
    """Divides both logits, > 0."""
    temperature_squared: bool = True
    """True to multiply the divergence by the temperature's square."""
    softcap: float | None = None
    """Bound of the student's scaled logits, > 0; None for none."""
    logit_scale: float = 1.0
    """Multiplies the student's logits before the softcap, > 0."""
    teacher_softcap: float | None = None
    """Bound of the teacher's scaled logits, > 0; None for none."""
    teacher_logit_scale: float | None = None
    """Multiplies the teacher's logits before their softcap, > 0; None for 1."""
    hard_label_weight: float = 0.0
    """Share of the labels' own cross-entropy, from 0 to 1."""
    ignore_index: int = -100
    """Label of tokens to ignore."""
    shift: int = 0
    """The distance of labels: position t predicts label t + shift."""
    reduction: str = "mean"
    """"mean", "sum" or "none"."""


@dataclass(kw_only=True, eq=False, repr=False)
class DistillationOptions(TeacherOptions):
    """The keywords that `Distillation` and its config keep."""

    fp32_upcast: bool = True
    """Accepted and ignored."""
    class_dim: int = -1
    """The dimension of both logits that is the vocabulary."""
    chunk_size: int = 0
    """Accepted and ignored, an int >= 0."""


@dataclass(kw_only=True, eq=False, repr=False)
class LinearDistillationOptions(TeacherOptions):
    """The keywords that `LinearDistillation` and its config keep."""

    chunking: Chunking = Chunking()
    """The chunks of the loss. They change speed and memory, and never the result."""


@loss_module(distillation)
@dataclass(kw_only=True, eq=False, repr=False)
class Distillation(DistillationOptions, Loss):
    """:func:`compiled_loss.distillation` with its keywords kept; a cached teacher comes with each call.

    Example:
        >>> import torch
        >>> from compiled_loss import nn
        >>> student, teacher = torch.tensor([[2.0, 0.0]]), torch.tensor([[0.0, 0.0]])
        >>> nn.Distillation()(student, teacher, torch.tensor([1]))
        tensor(0.4338)

    """


@loss_module(linear_distillation)
@dataclass(kw_only=True, eq=False, repr=False)
class LinearDistillation(LinearDistillationOptions, Loss):
    """:func:`compiled_loss.linear_distillation` with its keywords kept; both heads come with each call.

    Example:
        >>> import torch
        >>> from compiled_loss import nn
        >>> student, teacher = torch.tensor([[2.0], [0.0]]), torch.zeros(2, 3)
        >>> nn.LinearDistillation()(torch.ones(1, 1), student, torch.ones(1, 3), teacher, torch.tensor([1]))
        tensor(0.4338)

    """
