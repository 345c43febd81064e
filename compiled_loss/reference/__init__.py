"""The full-logits definition of every loss: the specification. It imports only torch, and no code of the fast paths.

It is written for the reader, in the order of the formulas, with ordinary autograd; every [N, V] tensor is held.
Statistics and losses are in fp32, or fp64 for fp64 inputs. Arguments are those of the functions of the same names in
`compiled_loss`.
"""

from compiled_loss.reference.cross_entropy import cross_entropy, linear_cross_entropy
from compiled_loss.reference.distillation import (
    distillation,
    distillation_statistics,
    linear_distillation,
    linear_soft_cross_entropy,
    masked_soft_cross_entropy,
)
from compiled_loss.reference.multi_token import multi_token_prediction, multi_token_targets
from compiled_loss.reference.policy import policy_loss
from compiled_loss.reference.preference import bradley_terry_loss, kto_loss, preference_loss
from compiled_loss.reference.statistics import (
    Statistics,
    linear_logits_loss,
    linear_token_loss,
    linear_token_statistics,
    token_statistics,
)
from compiled_loss.reference.tokens import aligned, token_logits, transformed

__all__ = [
    "Statistics",
    "aligned",
    "bradley_terry_loss",
    "cross_entropy",
    "distillation",
    "distillation_statistics",
    "kto_loss",
    "linear_cross_entropy",
    "linear_distillation",
    "linear_logits_loss",
    "linear_soft_cross_entropy",
    "linear_token_loss",
    "linear_token_statistics",
    "masked_soft_cross_entropy",
    "multi_token_prediction",
    "multi_token_targets",
    "policy_loss",
    "preference_loss",
    "token_logits",
    "token_statistics",
    "transformed",
]
