"""Soft cross-entropy on logits and on heads, by its values and gradients."""

from functools import partial

import pytest
import torch
from comparing import assert_matches
from divergence_cases import CHUNKS, SHAPES, TARGETS, heads, soft_targets
from torch.nn import functional as F

import compiled_loss
from compiled_loss import linear_soft_cross_entropy, masked_soft_cross_entropy, reference


@pytest.mark.parametrize("mask", ["[B, S, 1]", "[B, S]", "fractions", "bool"])
def test_masked_soft_cross_entropy(mask):
    logits = torch.randn(3, 5, 29, dtype=torch.float64, requires_grad=True)
    target = torch.randn(3, 5, 29, dtype=torch.float64).softmax(-1).requires_grad_()
    position_mask = {
        "[B, S, 1]": torch.randint(0, 2, (3, 5, 1)),
        "[B, S]": torch.randint(0, 2, (3, 5)),
        "fractions": torch.rand(3, 5, 1) * torch.randint(0, 2, (3, 5, 1)),
        "bool": torch.rand(3, 5) < 0.5,
    }[mask]
    inputs = (logits, target, position_mask)
    assert_matches(masked_soft_cross_entropy, reference.masked_soft_cross_entropy, inputs)


def test_one_hot_targets_are_cross_entropy():
    logits, labels = torch.randn(4, 6, 11), torch.randint(0, 11, (4, 6))
    soft = masked_soft_cross_entropy(logits, F.one_hot(labels, 11).float(), torch.ones(4, 6, 1))
    torch.testing.assert_close(soft, compiled_loss.cross_entropy(logits, labels))


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("keywords", [{}, {"temperature": 1.7}, {"num_label_tokens": 9}], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_linear_soft_cross_entropy(target, keywords, shape):
    rows, _, teacher_width, vocab = shape
    (hidden, weight, *_), _ = heads(*shape)
    mask = torch.rand(*rows, 1) * (torch.rand(*rows, 1) < 0.7)
    options = {**soft_targets(target, rows, vocab, teacher_width), **keywords}
    loss = partial(linear_soft_cross_entropy, chunking=CHUNKS, **options)
    assert_matches(loss, partial(reference.linear_soft_cross_entropy, **options), (hidden, weight, mask))


def test_empty_position_mask_is_zero_and_attached():
    logits = torch.randn(2, 3, 5, requires_grad=True)
    loss = masked_soft_cross_entropy(logits, torch.rand(2, 3, 5), torch.zeros(2, 3, 1))
    assert loss == 0 and torch.autograd.grad(loss, logits)[0].abs().max() == 0
