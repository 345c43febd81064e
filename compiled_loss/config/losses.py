"""The config of each loss.

A config has the fields of the Module that it makes, from the same dataclass of options. It has no `class_weights`,
because a tensor is no plain value. They are a buffer of the Module that is built.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from torch import nn

from compiled_loss import checks
from compiled_loss import nn as ours
from compiled_loss.compat import linear
from compiled_loss.compat import modules as compat
from compiled_loss.compat.pipeline import PipelineCausalLMLoss
from compiled_loss.config.base import LossConfig, Typed
from compiled_loss.nn.cross_entropy import CrossEntropyOptions, LinearCrossEntropyOptions
from compiled_loss.nn.distillation import DistillationOptions, LinearDistillationOptions
from compiled_loss.nn.heads import AnswersHeadOptions, HeadOptions
from compiled_loss.nn.multi_token import MultiTokenOptions
from compiled_loss.nn.policy import PolicyOptions
from compiled_loss.nn.preference import BradleyTerryOptions, KTOOptions, PreferenceOptions
from compiled_loss.nn.soft_cross_entropy import LinearSoftCrossEntropyOptions


@dataclass
class MaskedCrossEntropyConfig(compat.MaskedCrossEntropyOptions, LossConfig):
    """The config of :class:`compiled_loss.MaskedCrossEntropy`."""

    module: ClassVar[type[nn.Module] | None] = compat.MaskedCrossEntropy


@dataclass
class FusedLinearCEConfig(linear.FusedLinearCrossEntropyOptions, LossConfig):
    """The config of :class:`compiled_loss.FusedLinearCrossEntropy`."""

    module: ClassVar[type[nn.Module] | None] = linear.FusedLinearCrossEntropy


@dataclass
class ChunkedCEConfig(linear.ChunkedCrossEntropyOptions, LossConfig):
    """The config of :class:`compiled_loss.ChunkedCrossEntropy`."""

    module: ClassVar[type[nn.Module] | None] = linear.ChunkedCrossEntropy


@dataclass
class TEParallelCEConfig(compat.TEParallelCrossEntropyOptions, LossConfig):
    """The config of :class:`compiled_loss.TEParallelCrossEntropy`."""

    module: ClassVar[type[nn.Module] | None] = compat.TEParallelCrossEntropy


@dataclass
class KDLossConfig(compat.KDLossOptions, LossConfig):
    """The config of :class:`compiled_loss.KDLoss`."""

    module: ClassVar[type[nn.Module] | None] = compat.KDLoss


@dataclass
class CrossEntropyConfig(CrossEntropyOptions, LossConfig):
    """The config of `nn.CrossEntropy`; see :func:`compiled_loss.cross_entropy`.

    The class weights, a tensor, are assigned to the Module that is built: `loss.class_weights = weights`.
    """

    module: ClassVar[type[nn.Module] | None] = ours.CrossEntropy


@dataclass
class LinearCrossEntropyConfig(LinearCrossEntropyOptions, LossConfig):
    """The config of `nn.LinearCrossEntropy`; see :func:`compiled_loss.linear_cross_entropy`.

    The class weights, a tensor, are assigned to the Module that is built: `loss.class_weights = weights`.
    """

    module: ClassVar[type[nn.Module] | None] = ours.LinearCrossEntropy


@dataclass
class DistillationConfig(DistillationOptions, LossConfig):
    """The config of `nn.Distillation`; see :func:`compiled_loss.distillation`."""

    module: ClassVar[type[nn.Module] | None] = ours.Distillation


@dataclass
class LinearDistillationConfig(LinearDistillationOptions, LossConfig):
    """The config of `nn.LinearDistillation`; see :func:`compiled_loss.linear_distillation`."""

    module: ClassVar[type[nn.Module] | None] = ours.LinearDistillation


@dataclass
class LinearSoftCrossEntropyConfig(LinearSoftCrossEntropyOptions, LossConfig):
    """The config of `nn.LinearSoftCrossEntropy`; see :func:`compiled_loss.linear_soft_cross_entropy`."""

    module: ClassVar[type[nn.Module] | None] = ours.LinearSoftCrossEntropy


@dataclass
class MultiTokenPredictionConfig(MultiTokenOptions, LossConfig):
    """The config of `nn.MultiTokenPrediction`; see :func:`compiled_loss.multi_token_prediction`."""

    module: ClassVar[type[nn.Module] | None] = ours.MultiTokenPrediction


@dataclass
class PolicyLossConfig(PolicyOptions, LossConfig):
    """The config of `nn.PolicyLoss`; see :func:`compiled_loss.policy_loss`."""

    module: ClassVar[type[nn.Module] | None] = ours.PolicyLoss


@dataclass
class LinearPolicyLossConfig(HeadOptions, PolicyOptions, LossConfig):
    """The config of `nn.LinearPolicyLoss`; see :func:`compiled_loss.linear_policy_loss`."""

    module: ClassVar[type[nn.Module] | None] = ours.LinearPolicyLoss


@dataclass
class PreferenceLossConfig(PreferenceOptions, LossConfig):
    """The config of `nn.PreferenceLoss`; see :func:`compiled_loss.preference_loss`."""

    module: ClassVar[type[nn.Module] | None] = ours.PreferenceLoss


@dataclass
class LinearPreferenceLossConfig(AnswersHeadOptions, PreferenceOptions, LossConfig):
    """The config of `nn.LinearPreferenceLoss`; see :func:`compiled_loss.linear_preference_loss`."""

    module: ClassVar[type[nn.Module] | None] = ours.LinearPreferenceLoss


@dataclass
class KTOLossConfig(KTOOptions, LossConfig):
    """The config of `nn.KTOLoss`; see :func:`compiled_loss.kto_loss`."""

    module: ClassVar[type[nn.Module] | None] = ours.KTOLoss


@dataclass
class LinearKTOLossConfig(AnswersHeadOptions, KTOOptions, LossConfig):
    """The config of `nn.LinearKTOLoss`; see :func:`compiled_loss.linear_kto_loss`."""

    module: ClassVar[type[nn.Module] | None] = ours.LinearKTOLoss


@dataclass
class BradleyTerryLossConfig(BradleyTerryOptions, LossConfig):
    """The config of `nn.BradleyTerryLoss`; see :func:`compiled_loss.bradley_terry_loss`."""

    module: ClassVar[type[nn.Module] | None] = ours.BradleyTerryLoss


@dataclass
class MTPLossConfig(Typed):
    """The config of the multi-token prediction that `PipelineCausalLMLoss` adds.

    It is no `LossConfig`, because `build` needs a loss and a model.
    """

    scaling_factor: float | None = None
    """Weight of the auxiliary loss, >= 0; None for the model's own."""
    ignore_index: int | None = None
    """Label of tokens to ignore; None for the loss's own."""

    def validate(self) -> None:
        """Raises an error where a field has a wrong value."""
        checks.modules.scaling(self.scaling_factor, self.ignore_index)

    def build(self, loss_fn: nn.Module, model: nn.Module, *, grad_reduce_group: Any = None) -> PipelineCausalLMLoss:
        """Returns the loss of a pipeline's last stage."""
        self.validate()
        return PipelineCausalLMLoss(loss_fn, model, self.scaling_factor, self.ignore_index, grad_reduce_group)
