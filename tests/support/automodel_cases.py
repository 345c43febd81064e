"""Automodel's losses on one process, by the file where each stands there, and inputs of them."""

import torch

from compiled_loss import (
    FusedLinearCrossEntropy,
    KDLoss,
    MaskedCrossEntropy,
    TEParallelCrossEntropy,
    masked_soft_cross_entropy,
)

V = 11


def batch(dtype=torch.float64):
    logits = torch.randn(2, 5, V, dtype=dtype, requires_grad=True)
    return logits, torch.where(torch.rand(2, 5) < 0.3, -100, torch.randint(0, V, (2, 5)))


def losses():
    """{name: (loss, inputs)} of every loss of the reference on one process; the first input is the student's."""
    logits, labels = batch(torch.float32)
    other = torch.randn(2, 5, V)
    hidden, weight = torch.randn(2, 5, 4, requires_grad=True), torch.randn(V, 4)
    return {
        "masked_ce": (MaskedCrossEntropy(), (logits, labels, torch.rand(2, 5) < 0.7)),
        "te_parallel_ce": (TEParallelCrossEntropy(), (logits, labels, torch.rand(2, 5) < 0.7)),
        "kd_loss": (KDLoss(temperature=2.0), (logits, other, labels)),
        "soft_ce": (masked_soft_cross_entropy, (logits, other.softmax(-1), torch.rand(2, 5, 1))),
        "linear_ce": (FusedLinearCrossEntropy(), (hidden, labels, weight)),
    }


ALL = ["masked_ce", "te_parallel_ce", "kd_loss", "soft_ce", "linear_ce"]
ON_LOGITS = ALL[:-1]
