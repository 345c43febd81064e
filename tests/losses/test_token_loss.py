"""Losses that users write: the specification's numbers and gradients on either strategy."""

import functools

import cases
import pytest
import torch
from comparing import assert_matches
from gpu_cases import clipped, of_everything
from token_losses import TOKENS, VOCAB, WIDTH, batch, loss
from torch._dynamo.testing import CompileCounter

from compiled_loss import Chunking, linear_token_loss, reference
from compiled_loss.engine import execution
from compiled_loss.testing import head_inputs

KEYWORDS = {
    "plain": {},
    "weights": {"token_weights": torch.linspace(2, 0.1, TOKENS, dtype=torch.float64)},
    "mask": {"mask": torch.arange(TOKENS) % 3 != 0, "reduction": "sum", "num_label_tokens": torch.tensor(7)},
    "head": {"softcap": 3.0, "logit_scale": 1.3, "temperature": 0.7, "shift": 2, "ignore_index": 1},
    "none": {"reduction": "none", "mask": torch.arange(TOKENS) % 4},
    "all masked": {"mask": torch.zeros(TOKENS)},
}


@pytest.mark.parametrize("strategy", cases.CHUNKINGS)
@pytest.mark.parametrize("name", KEYWORDS)
@pytest.mark.parametrize("token_loss", [clipped, of_everything])
def test_matches_the_reference(token_loss, name, strategy):
    keywords = KEYWORDS[name]
    chunking = cases.chunking_of(strategy, keywords)
    assert_matches(
        loss(token_loss, chunking=chunking, **keywords), loss(token_loss, reference, **keywords), batch(keywords)
    )


FIRST = (("head", "tokens"), ("weights", "vocab"))


COMPILED = [(name, strategy) for name in ("plain", "weights", "head") for strategy in ("tokens", "vocab")]


@pytest.mark.parametrize(
    ("name", "strategy"), [c if c in FIRST else pytest.param(*c, marks=pytest.mark.slow) for c in COMPILED]
)
def test_compiled(name, strategy):
    keywords = KEYWORDS[name]
    run = torch.compile(loss(of_everything, chunking=cases.CHUNKINGS[strategy], **keywords), fullgraph=True)
    assert_matches(run, loss(of_everything, reference, **keywords), batch(keywords))


def test_eager_kernels():
    run = loss(of_everything, chunking=Chunking(strategy="tokens", chunk_size=5, compile=True))
    assert_matches(run, loss(of_everything, reference), batch({}))


def test_weights_get_gradients():
    hidden, weight, labels, _, old, advantages = batch({})
    weights = torch.rand(TOKENS, dtype=torch.float64, requires_grad=True)

    def of(lib):
        return lambda hidden, weights: lib(
            hidden, weight, labels, clipped, old, advantages.detach(), 0.2, 0.3, token_weights=weights
        )

    assert_matches(of(linear_token_loss), of(reference.linear_token_loss), (hidden, weights))


@pytest.mark.parametrize("strategy", ["tokens", "vocab"])
def test_ignored_tokens_may_hold_anything(strategy):
    hidden, weight, labels, _, old, advantages = batch({})
    ignored = labels == -100
    poisoned = [
        torch.where(ignored.unsqueeze(1), torch.nan, hidden.detach()).requires_grad_(),
        torch.where(ignored, torch.inf, old),
        torch.where(ignored, torch.nan, advantages.detach()).requires_grad_(),
    ]
    call = functools.partial(linear_token_loss, chunking=cases.CHUNKINGS[strategy])
    clean = call(hidden, weight, labels, of_everything, old, advantages, 0.2, 0.3)
    dirty = call(poisoned[0], weight, labels, of_everything, *poisoned[1:], 0.2, 0.3)
    assert torch.equal(clean, dirty)
    for mine, theirs in zip(
        torch.autograd.grad(dirty, [poisoned[0], weight, poisoned[2]]),
        torch.autograd.grad(clean, [hidden, weight, advantages]),
        strict=True,
    ):
        assert torch.equal(mine, theirs)


def test_inputs_of_every_shape_and_dtype():
    """[..., k] a token, integers and booleans, numbers as tensors and as Python's."""
    hidden, weight, labels, _ = head_inputs(84, WIDTH, VOCAB, dtype=torch.float64)
    hidden, labels = hidden.detach().reshape(3, 4, 7, WIDTH).requires_grad_(), labels.reshape(3, 4, 7)

    def mixed(statistics, several, kind, flag, number, scale):
        return torch.where(flag, several.sum(-1) * statistics.logprob, scale * kind * statistics.entropy) * number

    several = torch.randn(3, 4, 7, 2, dtype=torch.float64, requires_grad=True)
    kind, flag = torch.randint(0, 3, (3, 4, 7)), torch.rand(3, 4, 7) < 0.5
    more = (kind, flag, torch.tensor(2), 0.5)

    def of(lib, **keywords):
        return lambda h, w, several: lib(h, w, labels, mixed, several, *more, **keywords)

    for chunking in cases.CHUNKINGS.values():
        fn = of(linear_token_loss, chunking=chunking)
        assert_matches(fn, of(reference.linear_token_loss), (hidden, weight, several))


def test_graphs():
    """A graph for a static, one for a dynamic number of tokens, one for a number that changes."""
    execution.forget()
    counter, numbers = CompileCounter(), (0.1, 0.2, 0.3, 0.4)
    run = torch.compile(
        lambda h, w, y, old, adv, low: linear_token_loss(h, w, y, clipped, old, adv, low, 0.3, chunking=Chunking()),
        fullgraph=True,
        backend=counter,
    )
    for tokens, low in zip((13, 11, 17, 19), numbers, strict=True):
        hidden, weight, labels, _ = head_inputs(tokens, WIDTH, VOCAB)
        old, advantages = torch.randn(tokens), torch.randn(tokens)
        run(hidden, weight, labels, old, advantages, low).backward()
    assert counter.frame_count <= 3


def test_errors_name_the_argument():
    hidden, weight, labels, _, old, advantages = batch({})
    with pytest.raises(TypeError, match=r"^token_loss: expected a function .* got str"):
        linear_token_loss(hidden, weight, labels, "dpo", old)
    with pytest.raises(ValueError, match=r"^inputs\[1\]: expected \[23\] first, a value for each token, got \[22\]"):
        linear_token_loss(hidden, weight, labels, clipped, old, advantages[1:], 0.2, 0.3)
    with pytest.raises(TypeError, match=r"^inputs\[0\]: expected a number or a Tensor \[\.\.\., C\], got str"):
        linear_token_loss(hidden, weight, labels, clipped, "old")
    with pytest.raises(ValueError, match=r"^inputs\[2\]: expected a number without gradient"):
        linear_token_loss(hidden, weight, labels, clipped, old, advantages, torch.ones((), requires_grad=True), 0.3)


def test_half_precision_within_budget():
    """fp16, whose gradients at 1 / 65536 would be zero without a scale; against fp64."""
    hidden, weight, labels, _, old, advantages = batch({}, torch.float32)
    exact = reference.linear_token_loss(
        *[v.double() if v.is_floating_point() else v for v in (hidden, weight, labels)],
        clipped,
        old.double(),
        advantages.double(),
        0.2,
        0.3,
        reduction="sum",
        num_label_tokens=65536,
    )
    half = hidden.detach().half().requires_grad_()
    mine = linear_token_loss(
        half,
        weight.detach().half(),
        labels,
        clipped,
        old,
        advantages.detach(),
        0.2,
        0.3,
        reduction="sum",
        num_label_tokens=65536,
        chunking=cases.CHUNKINGS["tokens"],
    )
    truth = torch.autograd.grad(exact, hidden)[0]
    (found,) = torch.autograd.grad(mine * 65536, half)
    torch.testing.assert_close(found.float() / 65536, truth.float(), rtol=2e-2, atol=2e-2 * truth.abs().max().item())


def test_functorch_transforms_take_it():
    hidden, weight, labels, bias, old, advantages = batch({})
    fixed = functools.partial(loss(clipped), weight=weight, labels=labels, bias=bias, old=old, advantages=advantages)
    found = torch.func.grad(lambda h: fixed(hidden=h))(hidden.detach())
    expected = torch.autograd.grad(loss(clipped, reference)(hidden, weight, labels, bias, old, advantages), hidden)[0]
    torch.testing.assert_close(found, expected)


def test_inputs_whose_width_changes():
    hidden, weight, labels, _, *_ = batch({})

    def summed(statistics, several):
        return statistics.logprob * several.sum(-1)

    run = torch.compile(lambda h, k: linear_token_loss(h, weight, labels, summed, k), backend="eager", fullgraph=True)
    for width in (2, 3, 5):
        several = torch.rand(TOKENS, width, dtype=torch.float64)
        torch.testing.assert_close(
            run(hidden, several), reference.linear_token_loss(hidden, weight, labels, summed, several)
        )


@pytest.mark.parametrize("strategy", ["tokens", "vocab"])
def test_a_loss_that_is_nan_where_a_token_is_ignored(strategy):
    hidden, weight, labels, _, *_ = batch({})

    def ratio(statistics):
        return statistics.logprob / statistics.entropy

    weights = torch.rand(TOKENS, dtype=torch.float64, requires_grad=True)

    def of(lib, **more):
        return lambda h, w, t: lib.linear_token_loss(h, w, labels, ratio, token_weights=t, **more)

    import compiled_loss

    assert_matches(of(compiled_loss, chunking=cases.CHUNKINGS[strategy]), of(reference), (hidden, weight, weights))


def test_autocast_leaves_the_function_alone():
    """The head is cast, what the function multiplies is not, in either strategy."""
    hidden, weight, labels, _, *_ = batch({}, torch.float32)
    several = torch.randn(TOKENS, 64)

    def multiplied(statistics, several):
        return statistics.logprob * torch.bmm(several.unsqueeze(1), several.unsqueeze(2)).flatten()

    with torch.autocast("cpu", torch.bfloat16):
        found = [
            linear_token_loss(hidden, weight, labels, multiplied, several, chunking=cases.CHUNKINGS[strategy])
            for strategy in ("tokens", "vocab")
        ]
    torch.testing.assert_close(*found, rtol=1e-5, atol=0)
