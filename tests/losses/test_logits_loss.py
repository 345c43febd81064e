"""Losses of a row of logits: the specification's numbers and gradients, and what cannot be had."""

import pytest
import torch
from comparing import assert_matches
from operators import no_operators

from compiled_loss import Chunking, linear_cross_entropy, linear_logits_loss, reference
from compiled_loss.testing import head_inputs

B, S, WIDTH, VOCAB = 3, 7, 5, 29
CHUNKING = Chunking(chunk_size=4)


def margin(logits, label, least):
    """A label beats the best other class by so much."""
    is_label = torch.arange(logits.shape[1]) == label.unsqueeze(1)
    best = logits.masked_fill(is_label, -torch.inf).amax(1)
    return torch.relu(least + best - torch.where(is_label, logits, 0.0).sum(1))


def among_the_best(logits, scale):
    """An entropy of the five likeliest, which sorts."""
    log_p = logits.topk(5, dim=1).values.log_softmax(1)
    return -(log_p.exp() * log_p).sum(1) * scale.sum(1)


def soft(logits, target):
    """Cross-entropy with probabilities."""
    return -(target * logits.log_softmax(1)).sum(1)


def batch(dtype=torch.float64):
    hidden, weight, labels, bias = head_inputs(B * S, WIDTH, VOCAB, dtype=dtype)
    return hidden.detach().reshape(B, S, WIDTH).requires_grad_(), weight, labels.reshape(B, S), bias


KEYWORDS = {
    "plain": {},
    "head": {"softcap": 3.0, "logit_scale": 1.3, "temperature": 0.7},
    "mask": {"mask": torch.arange(S) % 3, "reduction": "sum", "num_label_tokens": 9},
    "all masked": {"mask": torch.zeros(S)},
    "few": {"mask": torch.arange(S) < 3, "chunking": Chunking(chunk_size=4, max_label_tokens=11)},
}


def functions(labels):
    """Each with its inputs, of which some want a gradient."""
    scale = torch.rand(B, S, 2, dtype=torch.float64, requires_grad=True)
    target = torch.rand(B, S, VOCAB, dtype=torch.float64).softmax(-1).requires_grad_()
    return {"margin": (margin, (labels, 1.5)), "best": (among_the_best, (scale,)), "soft": (soft, (target,))}


@pytest.mark.parametrize("name", KEYWORDS)
@pytest.mark.parametrize("function", ["margin", "best", "soft"])
def test_matches_the_reference(function, name):
    hidden, weight, labels, bias = batch()
    weights = torch.rand(B, S, dtype=torch.float64, requires_grad=True)
    logits_loss, inputs = functions(labels)[function]
    tensors = [v for v in inputs if torch.is_tensor(v)]
    numbers = [v for v in inputs if not torch.is_tensor(v)]
    keywords = {"chunking": CHUNKING, **KEYWORDS[name]}
    plain = {k: v for k, v in keywords.items() if k != "chunking"}

    def of(lib, more):
        return lambda h, w, b, t, *inputs: lib(h, w, logits_loss, *inputs, *numbers, bias=b, token_weights=t, **more)

    assert_matches(
        of(linear_logits_loss, keywords),
        of(reference.linear_logits_loss, plain),
        (hidden, weight, bias, weights, *tensors),
    )


@pytest.mark.parametrize("how", ["compiled", "kernels"])
def test_compiled(how):
    hidden, weight, labels, bias = batch()

    def of(lib, **more):
        return lambda h, w, b: lib(h, w, margin, labels, 1.5, bias=b, softcap=3.0, **more)

    run = of(linear_logits_loss, chunking=Chunking(chunk_size=4, compile=how == "kernels"))
    run = torch.compile(run, fullgraph=True) if how == "compiled" else run
    assert_matches(run, of(reference.linear_logits_loss), (hidden, weight, bias))


def test_cross_entropy_as_such_a_loss():
    hidden, weight, labels, _ = batch()

    def cross_entropy(logits, label):
        return torch.nn.functional.cross_entropy(logits, label, reduction="none")

    assert_matches(
        lambda h, w: linear_logits_loss(h, w, cross_entropy, labels),
        lambda h, w: linear_cross_entropy(h, w, labels),
        (hidden, weight),
    )


def test_without_gradients():
    hidden, weight, labels, _ = batch()
    expected = reference.linear_logits_loss(hidden, weight, margin, labels, 1.5).detach()
    with torch.no_grad():
        torch.testing.assert_close(linear_logits_loss(hidden, weight, margin, labels, 1.5), expected)


def test_masked_tokens_may_hold_anything():
    hidden, weight, labels, _ = batch()
    mask = torch.arange(S) % 2 == 0
    poisoned = hidden.detach().masked_fill(~mask.unsqueeze(1), torch.nan).requires_grad_()
    clean = linear_logits_loss(hidden, weight, margin, labels, 1.5, mask=mask, chunking=CHUNKING)
    dirty = linear_logits_loss(poisoned, weight, margin, labels, 1.5, mask=mask, chunking=CHUNKING)
    assert torch.equal(clean, dirty)
    for mine, theirs in zip(
        torch.autograd.grad(dirty, (poisoned, weight)), torch.autograd.grad(clean, (hidden, weight)), strict=True
    ):
        assert torch.equal(mine, theirs)


def test_functorch_transforms_take_it():
    hidden, weight, labels, _ = batch()
    found = torch.func.grad(lambda h: linear_logits_loss(h, weight.detach(), margin, labels, 1.5))(hidden.detach())
    expected = torch.autograd.grad(reference.linear_logits_loss(hidden, weight, margin, labels, 1.5), hidden)[0]
    torch.testing.assert_close(found, expected)


def mixing(logits):
    return logits.softmax(0).amax(1)


def test_errors():
    hidden, weight, labels, _ = batch()
    cases = [
        ({"reduction": "none"}, r"reduction: expected 'mean' or 'sum', got 'none'"),
        ({"chunking": Chunking(strategy="vocab")}, r"strategy: expected 'tokens' or 'auto', got 'vocab'"),
        ({"mask": torch.ones(2)}, r"mask: expected to broadcast to the labels' \[3, 7\], got \[2\]"),
    ]
    for keywords, message in cases:
        with no_operators(), pytest.raises(ValueError, match=f"^{message}"):
            linear_logits_loss(hidden, weight, margin, labels, 1.5, **keywords)
    with pytest.raises(ValueError, match=r"^logits_loss: expected .*depends on other tokens"):
        linear_logits_loss(hidden, weight, mixing)
    with pytest.raises(TypeError, match=r"^logits_loss: expected a function \(logits \[C, V\], .* got Tensor"):
        linear_logits_loss(hidden, weight, labels)
    strength = 0.5
    closing = torch.compile(lambda h: linear_logits_loss(h, weight, lambda z: z.amax(1) * strength), backend="eager")
    with pytest.raises(Exception, match=r"logits_loss: expected under torch\.compile a plain function"):
        closing(hidden)
