"""The config of each loss."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from torch import nn

from compiled_loss import checks
from compiled_loss import nn as ours
from compiled_loss.compat.modules import FusedLinearCrossEntropy, KDLoss, MaskedCrossEntropy, TEParallelCrossEntropy
from compiled_loss.compat.pipeline import PipelineCausalLMLoss
from compiled_loss.config.base import LossConfig, Typed
from compiled_loss.planner.chunking import Chunking


@dataclass
class MaskedCrossEntropyConfig(LossConfig):
    """Of `MaskedCrossEntropy`.

    Attributes:
        fp32_upcast: kept for its callers; see :func:`compiled_loss.masked_cross_entropy`.
        ignore_index: label of tokens to ignore.
        reduction: "sum", "mean" or "none".

    """

    module: ClassVar[type[nn.Module] | None] = MaskedCrossEntropy
    fp32_upcast: bool = True
    ignore_index: int = -100
    reduction: str = "sum"


@dataclass
class FusedLinearCEConfig(LossConfig):
    """Of `FusedLinearCrossEntropy`.

    Attributes:
        ignore_index: label of tokens to ignore.
        logit_softcapping: bound of the logits; 0 for none.
        reduction: "sum", "mean" or "none".

    """

    module: ClassVar[type[nn.Module] | None] = FusedLinearCrossEntropy
    ignore_index: int = -100
    logit_softcapping: float = 0.0
    reduction: str = "sum"


@dataclass
class TEParallelCEConfig(LossConfig):
    """Of `TEParallelCrossEntropy`.

    Attributes:
        ignore_index: label of tokens to ignore.
        reduction: "sum", "mean" or "none".
        tp_group: the tensor-parallel process group; given where the program runs.

    """

    module: ClassVar[type[nn.Module] | None] = TEParallelCrossEntropy
    ignore_index: int = -100
    reduction: str = "sum"
    tp_group: Any = None


@dataclass
class KDLossConfig(LossConfig):
    """Of `KDLoss`.

    Attributes:
        ignore_index: label of tokens to ignore.
        temperature: divides both logits, > 0; the loss is multiplied by its square.
        fp32_upcast: kept for its callers; see :func:`compiled_loss.distillation`.
        tp_group: the tensor-parallel process group; given where the program runs.
        chunk_size: kept for its callers, an int >= 0.

    """

    module: ClassVar[type[nn.Module] | None] = KDLoss
    ignore_index: int = -100
    temperature: float = 1.0
    fp32_upcast: bool = True
    tp_group: Any = None
    chunk_size: int = 0


@dataclass
class _HardLabels(LossConfig):
    """What cross-entropy on logits and on a head share."""

    ignore_index: int = -100
    label_smoothing: float = 0.0
    z_loss: float = 0.0
    softcap: float | None = None
    temperature: float = 1.0
    shift: int = 0
    reduction: str = "mean"


@dataclass
class CrossEntropyConfig(_HardLabels):
    """Of `nn.CrossEntropy`; see :func:`compiled_loss.cross_entropy`.

    Attributes:
        ignore_index: label of tokens to ignore.
        label_smoothing: from 0 to 1.
        z_loss: weight of the squared log-sum-exp, >= 0.
        softcap: bound of the logits, > 0, or None.
        temperature: divides the logits, > 0.
        shift: position t predicts label t + shift.
        reduction: "mean", "sum" or "none".
        class_dim: the dimension of the logits that is the vocabulary.

    """

    module: ClassVar[type[nn.Module] | None] = ours.CrossEntropy
    class_dim: int = -1


@dataclass
class LinearCrossEntropyConfig(_HardLabels):
    """Of `nn.LinearCrossEntropy`; see :func:`compiled_loss.linear_cross_entropy`.

    Attributes:
        ignore_index: label of tokens to ignore.
        label_smoothing: from 0 to 1.
        z_loss: weight of the squared log-sum-exp, >= 0.
        softcap: bound of the logits, > 0, or None.
        temperature: divides the logits, > 0.
        shift: position t predicts label t + shift.
        reduction: "mean", "sum" or "none".
        chunking: how, never what.

    """

    module: ClassVar[type[nn.Module] | None] = ours.LinearCrossEntropy
    chunking: Chunking = Chunking()


@dataclass
class _Distillation(LossConfig):
    """What distillation on logits and on heads share."""

    divergence: str = "forward_kl"
    jsd_weight: float = 0.5
    temperature: float = 1.0
    hard_label_weight: float = 0.0
    ignore_index: int = -100
    reduction: str = "mean"


@dataclass
class DistillationConfig(_Distillation):
    """Of `nn.Distillation`; see :func:`compiled_loss.distillation`.

    Attributes:
        divergence: "forward_kl", "reverse_kl" or "jsd".
        jsd_weight: the teacher's part of the mixture, for "jsd".
        temperature: divides both logits, > 0.
        hard_label_weight: from 0 to 1, the part of the labels' own cross-entropy.
        ignore_index: label of tokens to ignore.
        reduction: "mean", "sum" or "none".
        class_dim: the dimension of both logits that is the vocabulary.

    """

    module: ClassVar[type[nn.Module] | None] = ours.Distillation
    class_dim: int = -1


@dataclass
class LinearDistillationConfig(_Distillation):
    """Of `nn.LinearDistillation`; see :func:`compiled_loss.linear_distillation`.

    Attributes:
        divergence: "forward_kl", "reverse_kl" or "jsd".
        jsd_weight: the teacher's part of the mixture, for "jsd".
        temperature: divides both logits, > 0.
        hard_label_weight: from 0 to 1, the part of the labels' own cross-entropy.
        ignore_index: label of tokens to ignore.
        reduction: "mean", "sum" or "none".
        chunking: how, never what.

    """

    module: ClassVar[type[nn.Module] | None] = ours.LinearDistillation
    chunking: Chunking = Chunking()


@dataclass
class LinearSoftCrossEntropyConfig(LossConfig):
    """Of `nn.LinearSoftCrossEntropy`; see :func:`compiled_loss.linear_soft_cross_entropy`.

    Attributes:
        temperature: divides both logits, > 0.
        chunking: how, never what.

    """

    module: ClassVar[type[nn.Module] | None] = ours.LinearSoftCrossEntropy
    temperature: float = 1.0
    chunking: Chunking = Chunking()


@dataclass
class MultiTokenPredictionConfig(LossConfig):
    """Of `nn.MultiTokenPrediction`; see :func:`compiled_loss.multi_token_prediction`.

    Attributes:
        scaling_factor: weight of the auxiliary loss, >= 0.
        ignore_index: label of tokens to ignore.
        softcap: bound of the logits, > 0, or None.
        chunking: how, never what.

    """

    module: ClassVar[type[nn.Module] | None] = ours.MultiTokenPrediction
    scaling_factor: float = 0.1
    ignore_index: int = -100
    softcap: float | None = None
    chunking: Chunking = Chunking()


@dataclass
class MTPLossConfig(Typed):
    """Of the multi-token prediction that `PipelineCausalLMLoss` adds. No `LossConfig`: it needs a loss and a model.

    Attributes:
        scaling_factor: weight of the auxiliary loss, >= 0; None for the model's own.
        ignore_index: label of tokens to ignore; None for the loss's own.

    """

    scaling_factor: float | None = None
    ignore_index: int | None = -100

    def validate(self) -> None:
        """Raise where a field is not what it may be."""
        checks.modules.scaling(self.scaling_factor, self.ignore_index)

    def build(self, loss_fn: nn.Module, model: nn.Module) -> PipelineCausalLMLoss:
        """The loss of a pipeline's last stage."""
        self.validate()
        return PipelineCausalLMLoss(loss_fn, model, scaling_factor=self.scaling_factor, ignore_index=self.ignore_index)
