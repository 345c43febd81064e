"""Module shells: they keep keywords and call the function of the same name. No mathematics, no weights.

Each field is a keyword of its function, with the same default; the tensors stay arguments of the call. A test walks
both signatures and fails where they differ.
"""

from compiled_loss.nn.cross_entropy import CrossEntropy, LinearCrossEntropy
from compiled_loss.nn.distillation import Distillation, LinearDistillation
from compiled_loss.nn.multi_token import MultiTokenPrediction
from compiled_loss.nn.soft_cross_entropy import LinearSoftCrossEntropy

__all__ = [
    "CrossEntropy",
    "Distillation",
    "LinearCrossEntropy",
    "LinearDistillation",
    "LinearSoftCrossEntropy",
    "MultiTokenPrediction",
]
