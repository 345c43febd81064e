"""Keyword combinations and chunkings that several files test."""

import torch

import compiled_loss
from compiled_loss import Chunking, reference
from compiled_loss.testing import head_inputs

CHUNKINGS = {
    "tokens": Chunking(strategy="tokens", chunk_size=5),
    "vocab": Chunking(strategy="vocab", chunk_size=9),
    "default": Chunking(),
}


def everything(tokens, vocab, dtype=torch.float64, seed=0):
    """Every keyword that changes the mathematics, at once; fractional weights, masks with zeros."""
    random = torch.Generator().manual_seed(seed)
    return {
        "mask": torch.randint(0, 3, (tokens,), generator=random),
        "token_weights": torch.rand(tokens, generator=random, dtype=torch.float64).to(dtype),
        "class_weights": torch.rand(vocab, generator=random, dtype=torch.float64).to(dtype),
        "label_smoothing": 0.1,
        "z_loss": 1e-2,
        "softcap": 3.0,
        "logit_scale": 1.3,
        "temperature": 0.7,
        "shift": 2,
        "ignore_index": 1,
    }


KEYWORDS = {
    "plain": lambda n, v: {},
    "mask": lambda n, v: {"mask": torch.arange(n) % 3 != 0},
    "fractions": lambda n, v: {"mask": torch.arange(n) / n, "token_weights": torch.linspace(2, 0.1, n)},
    "class_weights": lambda n, v: {"class_weights": torch.linspace(0, 1, v)},
    "smoothing": lambda n, v: {"label_smoothing": 0.2},
    "smoothing and class_weights": lambda n, v: {"label_smoothing": 0.2, "class_weights": torch.linspace(0, 1, v)},
    "z_loss": lambda n, v: {"z_loss": 0.1},
    "z_loss and class_weights": lambda n, v: {"z_loss": 0.1, "class_weights": torch.linspace(0, 1, v)},
    "softcap": lambda n, v: {"softcap": 2.0},
    "logit_scale": lambda n, v: {"logit_scale": 0.4},
    "logit_scale and softcap": lambda n, v: {"logit_scale": 0.4, "softcap": 2.0},
    "temperature": lambda n, v: {"temperature": 1.7},
    "shift": lambda n, v: {"shift": 1},
    "shift past the end": lambda n, v: {"shift": n + 3},
    "ignore_index": lambda n, v: {"ignore_index": 0},
    "sum": lambda n, v: {"reduction": "sum"},
    "num_label_tokens": lambda n, v: {"reduction": "sum", "num_label_tokens": 13},
    "num_label_tokens tensor": lambda n, v: {"reduction": "sum", "num_label_tokens": torch.tensor(13)},
    "num_label_tokens 0": lambda n, v: {"reduction": "sum", "num_label_tokens": 0},
    "none": lambda n, v: {"reduction": "none"},
    "all masked": lambda n, v: {"mask": torch.zeros(n)},
    "everything": everything,
    "everything, sum": lambda n, v: {**everything(n, v), "reduction": "sum", "num_label_tokens": 7},
    "everything, none": lambda n, v: {**everything(n, v), "reduction": "none"},
}


def chunking_of(strategy, keywords):
    """The strategy's chunking, or that of "vocab" where the token strategy cannot do what the keywords ask."""
    return CHUNKINGS["vocab"] if strategy == "tokens" and keywords.get("reduction") == "none" else CHUNKINGS[strategy]


def inputs_for(keywords, tokens, width, vocab):
    """Inputs in fp64, a fifth of whose labels are what the keywords ignore."""
    ignore_index = keywords.get("ignore_index", -100)
    return head_inputs(tokens, width, vocab, dtype=torch.float64, ignored=0.2, ignore_index=ignore_index)


def gradients(loss, inputs, upstream=None):
    return torch.autograd.grad(loss, [v for v in inputs if v.requires_grad], upstream)


def linear(chunking=CHUNKINGS["default"], **keywords):
    """linear_cross_entropy as a function of (hidden, weight, labels, bias)."""

    def loss(hidden, weight, labels, bias):
        return compiled_loss.linear_cross_entropy(hidden, weight, labels, bias=bias, chunking=chunking, **keywords)

    return loss


def truth(**keywords):
    """The specification as a function of the same."""

    def loss(hidden, weight, labels, bias):
        return reference.linear_cross_entropy(hidden, weight, labels, bias=bias, **keywords)

    return loss
