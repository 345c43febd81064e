"""Modules of the losses. Each keeps keywords and calls the function of its name. None has mathematics or weights.

The fields of a Module are keywords of its function, with the same defaults. The tensors of a batch, and `compile`, come
with the call. A Module returns what its function does.
"""

from compiled_loss.nn.cross_entropy import CrossEntropy, LinearCrossEntropy
from compiled_loss.nn.distillation import Distillation, LinearDistillation
from compiled_loss.nn.multi_token import MultiTokenPrediction
from compiled_loss.nn.policy import LinearPolicyLoss, PolicyLoss
from compiled_loss.nn.preference import (
    BradleyTerryLoss,
    KTOLoss,
    LinearKTOLoss,
    LinearPreferenceLoss,
    PreferenceLoss,
)
from compiled_loss.nn.soft_cross_entropy import LinearSoftCrossEntropy

__all__ = [
    "BradleyTerryLoss",
    "CrossEntropy",
    "Distillation",
    "KTOLoss",
    "LinearCrossEntropy",
    "LinearDistillation",
    "LinearKTOLoss",
    "LinearPolicyLoss",
    "LinearPreferenceLoss",
    "LinearSoftCrossEntropy",
    "MultiTokenPrediction",
    "PolicyLoss",
    "PreferenceLoss",
]
