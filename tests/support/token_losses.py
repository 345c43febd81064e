"""A batch for losses that users write, and how they are called."""

import torch

from compiled_loss import linear_token_loss
from compiled_loss.testing import head_inputs

TOKENS, WIDTH, VOCAB = 23, 7, 29


def batch(keywords, dtype=torch.float64):
    """(hidden, weight, labels, bias, old log-probabilities, advantages), the last of which want a gradient."""
    random = torch.Generator().manual_seed(1)
    ignore_index = keywords.get("ignore_index", -100)
    inputs = head_inputs(TOKENS, WIDTH, VOCAB, dtype=dtype, ignored=0.2, ignore_index=ignore_index)
    old = -4 + torch.randn(TOKENS, generator=random, dtype=dtype)
    return *inputs, old, torch.randn(TOKENS, generator=random, dtype=dtype).requires_grad_()


def loss(token_loss, lib=None, **keywords):
    """A function of `batch`."""

    def of_batch(hidden, weight, labels, bias, old, advantages):
        call = linear_token_loss if lib is None else lib.linear_token_loss
        return call(hidden, weight, labels, token_loss, old, advantages, 0.2, 0.3, bias=bias, **keywords)

    return of_batch
