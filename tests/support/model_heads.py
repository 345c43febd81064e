"""Models that are a head, batches of their hidden states, and what losses of them should be, in plain torch."""

import torch
from torch import nn
from torch.nn import functional as F

from compiled_loss import FusedLinearCrossEntropy

B, S, H, V = 2, 5, 4, 11
FUSED = FusedLinearCrossEntropy(reduction="mean")


class Model(nn.Module):
    def __init__(self, head):
        super().__init__()
        self.lm_head = head


def linear(bias=True, width=H, vocab=V):
    head = nn.Linear(width, vocab, bias=bias, dtype=torch.float64)
    if bias:
        nn.init.normal_(head.bias)
    return head


def batch():
    hidden = torch.randn(B, S, H, dtype=torch.float64, requires_grad=True)
    further = [torch.randn(B, S, H, dtype=torch.float64, requires_grad=True) for _ in range(2)]
    labels = torch.randint(0, V, (B, S))
    labels[0, 2] = -100
    return hidden, further, labels


def plain(head, states, labels, ahead=0):
    """The mean of the logits' cross-entropy with the labels so far ahead."""
    targets = torch.cat([labels[:, ahead:], torch.full((B, ahead), -100)], 1)
    return F.cross_entropy(head(states).flatten(0, 1), targets.flatten())


def auxiliary(head, further, labels, factor):
    return factor / len(further) * sum(plain(head, h, labels, k + 1) for k, h in enumerate(further))


class Parallel(nn.parallel.DistributedDataParallel):
    def __init__(self, module):
        nn.Module.__init__(self)
        self.module = module
