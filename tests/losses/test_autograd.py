"""Contracts 1 and 2: ordinary autograd, whatever a trainer does with the loss."""

from functools import partial

import cases
import pytest
import torch
from comparing import TIGHT, assert_matches
from torch.utils.checkpoint import checkpoint

from compiled_loss import (
    Chunking,
    cross_entropy,
    distillation,
    linear_cross_entropy,
    linear_token_statistics,
    nn,
    reference,
)
from compiled_loss.testing import head_inputs

CHUNKINGS = {
    "tokens": Chunking(strategy="tokens", chunk_size=5),
    "vocab": Chunking(strategy="vocab", chunk_size=9),
    "tokens, compiled": Chunking(strategy="tokens", chunk_size=5, compile=True),
    "vocab, compiled": Chunking(strategy="vocab", chunk_size=9, compile=True),
}
EAGER_FIRST = [pytest.param(w, marks=[pytest.mark.slow] * ("compiled" in w)) for w in CHUNKINGS]
WAYS = [*list(CHUNKINGS)[:3], pytest.param("vocab, compiled", marks=pytest.mark.slow)]


@pytest.mark.parametrize("loss", [cross_entropy, distillation])
def test_large_logits_under_functorch_and_compile(loss):
    """What the compiler alone needs has no gradient: exp overflows at 89 in fp32, and 0 * inf would be NaN."""
    torch.manual_seed(0)
    logits, labels = 3 * torch.randn(4, 40), torch.randint(0, 40, (4,))
    logits += torch.tensor([[0.0], [100.0], [-150.0], [300.0]])
    logits[0, 3] = 400.0  # a divergence of hundreds
    more = (60 * torch.randn(4, 40),) if loss is distillation else ()
    found = torch.compile(torch.func.grad(lambda z: loss(z, *more, labels)), fullgraph=True)(logits)
    truth = getattr(reference, loss.__name__)
    expected = torch.func.grad(lambda z: truth(z, *[v.double() for v in more], labels))(logits.double())
    # Each is a difference of probabilities, whose exponents are logits of up to 400, rounded to fp32.
    torch.testing.assert_close(found.double(), expected, rtol=0, atol=400 * torch.finfo(torch.float32).eps)


def inputs_of(tokens=11):
    return head_inputs(tokens, 4, 23, dtype=torch.float64, ignored=0.2)


@pytest.mark.parametrize("strategy", EAGER_FIRST)
def test_gradcheck(strategy):
    inputs = inputs_of()
    keywords = cases.everything(11, 23)
    loss = cases.linear(CHUNKINGS[strategy], **keywords)
    assert torch.autograd.gradcheck(
        lambda h, w, b: loss(h, w, inputs.labels % 23, b), (inputs.hidden, inputs.weight, inputs.bias)
    )


def test_gradcheck_of_statistics_and_logits():
    inputs = inputs_of()
    assert torch.autograd.gradcheck(
        lambda h, w, b: linear_token_statistics(h, w, inputs.labels, bias=b, softcap=3.0, chunking=CHUNKINGS["vocab"])[
            :3
        ],
        (inputs.hidden, inputs.weight, inputs.bias),
    )
    keywords = cases.everything(11, 23)
    logits = torch.randn(11, 23, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda z: cross_entropy(z, inputs.labels % 23, **keywords), logits)


@pytest.mark.parametrize("strategy", WAYS)
def test_retain_graph_and_any_upstream(strategy):
    inputs = inputs_of()
    loss = cases.linear(CHUNKINGS[strategy])(*inputs)
    first = torch.autograd.grad(loss, inputs[:2], retain_graph=True)
    second = torch.autograd.grad(loss, inputs[:2], torch.tensor(-2.5, dtype=torch.float64), retain_graph=True)
    third = torch.autograd.grad(loss, inputs[:2])
    for a, b, c in zip(first, second, third, strict=True):
        torch.testing.assert_close(b, -2.5 * a, **TIGHT)
        assert c.equal(a)


@pytest.mark.parametrize("strategy", WAYS)
def test_two_losses_on_one_hidden(strategy):
    hidden, weight, labels, _ = inputs_of()
    other = torch.randn(23, 4, dtype=torch.float64, requires_grad=True)

    def total(loss):
        return loss(hidden, weight, labels) + 3 * loss(hidden, other, labels) + hidden.square().sum()

    ours = partial(total, partial(linear_cross_entropy, chunking=CHUNKINGS[strategy]))
    assert_matches(ours, partial(total, reference.linear_cross_entropy), (), wanted=(hidden, weight, other))


@pytest.mark.parametrize("strategy", WAYS)
def test_tied_embedding(strategy):
    weight = torch.randn(23, 4, dtype=torch.float64, requires_grad=True)
    tokens = torch.randint(0, 23, (11,))

    def loss(fn, weight):
        return fn(torch.nn.functional.embedding(tokens, weight).tanh(), weight, tokens, shift=1)

    ours = partial(loss, partial(linear_cross_entropy, chunking=CHUNKINGS[strategy]))
    assert_matches(ours, partial(loss, reference.linear_cross_entropy), (weight,))


@pytest.mark.parametrize("strategy", WAYS)
def test_checkpointing_has_the_same_bits(strategy):
    inputs = inputs_of()
    loss = cases.linear(CHUNKINGS[strategy])
    plain = cases.gradients(loss(*inputs), inputs)
    recomputed = cases.gradients(checkpoint(loss, *inputs, use_reentrant=False), inputs)
    assert all(map(torch.equal, recomputed, plain))


def test_retain_graph_has_the_bits_of_the_first_backward():
    """The first one writes over what forward kept; gradients are formed again from the inputs."""
    inputs = head_inputs(13, 7, 29, dtype=torch.float16, ignored=0.2)
    leaves = [v for v in inputs if v.requires_grad]
    loss = cases.linear(cases.CHUNKINGS["tokens"])(*inputs)
    first = torch.autograd.grad(loss * 3, leaves, retain_graph=True)
    kept = [g.clone() for g in first]
    torch._foreach_zero_(list(first))  # they are the caller's
    for again in (torch.autograd.grad(loss * 3, leaves, retain_graph=True), torch.autograd.grad(loss * 3, leaves)):
        assert all(map(torch.equal, again, kept))


def test_backward_allocates_no_second_gradient():
    inputs = head_inputs(13, 7, 29, ignored=0.2)
    loss = cases.linear(cases.CHUNKINGS["tokens"])(*inputs)
    formed = [v.data_ptr() for v in loss.grad_fn.saved_tensors if v is not None][:2]
    assert [g.data_ptr() for g in torch.autograd.grad(loss, [inputs.hidden, inputs.weight])] == formed


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("strategy", ["tokens", "vocab"])
def test_checkpointing_matches_reference(strategy, reentrant):
    inputs = head_inputs(13, 7, 29, dtype=torch.float64, ignored=0.2)
    theirs = cases.gradients(cases.truth()(*inputs), inputs)
    checkpoint(cases.linear(cases.CHUNKINGS[strategy]), *inputs, use_reentrant=reentrant).backward()
    found = tuple(v.grad for v in inputs if v.requires_grad)
    torch.testing.assert_close(found, theirs, **TIGHT)


def gemms(body):
    """How many 2-D products `body()` runs, and what it returns."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        result = body()
    return sum(event.name in ("aten::mm", "aten::addmm", "aten::addmm_") for event in profile.events()), result


@pytest.mark.parametrize(
    ("strategy", "frozen", "forward", "backward"),
    [
        ("tokens", (), 3, 0),
        ("tokens", ("hidden",), 2, 0),
        ("tokens", ("weight",), 2, 0),
        ("tokens", ("hidden", "weight"), 1, 0),
        ("vocab", (), 1, 3),
        ("vocab", ("hidden",), 1, 2),
        ("vocab", ("weight",), 1, 2),
        ("vocab", ("hidden", "weight"), 1, 0),
    ],
)
def test_frozen_inputs_skip_their_gemms(strategy, frozen, forward, backward):
    inputs = inputs_of(12)
    for name in frozen:
        getattr(inputs, name).requires_grad_(False)
    chunking = Chunking(strategy=strategy, chunk_size=3 if strategy == "tokens" else 8)
    chunks = 4 if strategy == "tokens" else 3

    def run():
        return linear_cross_entropy(inputs.hidden, inputs.weight, inputs.labels, chunking=chunking)

    count, loss = gemms(run)
    assert count == forward * chunks
    if len(frozen) < 2:
        assert gemms(loss.backward)[0] == backward * chunks
    else:
        assert not loss.requires_grad
    with torch.no_grad():
        assert gemms(run)[0] == chunks


@pytest.mark.parametrize("strategy", WAYS)
def test_torch_func_transforms(strategy):
    hidden, weight, labels, bias = (v.detach() for v in inputs_of())
    keywords = {"bias": bias, **cases.everything(11, 23), "ignore_index": -100}

    def loss(hidden, weight):
        return linear_cross_entropy(hidden, weight, labels, chunking=CHUNKINGS[strategy], **keywords)

    def truth(hidden, weight):
        return reference.linear_cross_entropy(hidden, weight, labels, **keywords)

    for transform in (
        lambda f: torch.func.grad(f, argnums=(0, 1))(hidden, weight),
        lambda f: torch.func.vjp(f, hidden, weight)[1](torch.tensor(2.0, dtype=torch.float64)),
        lambda f: torch.func.jvp(f, (hidden, weight), (hidden, weight)),
        lambda f: torch.func.hessian(f)(hidden, weight),
    ):
        torch.testing.assert_close(transform(loss), transform(truth), **TIGHT)


def test_vmap_per_sample_gradients():
    hidden = torch.randn(6, 5, 4, dtype=torch.float64)
    weight = torch.randn(23, 4, dtype=torch.float64)
    labels = torch.randint(0, 23, (6, 5))
    per_sample = torch.func.vmap(torch.func.grad(linear_cross_entropy, argnums=(0, 1)), in_dims=(0, None, 0))
    torch.testing.assert_close(
        per_sample(hidden, weight, labels),
        tuple(
            torch.stack(g)
            for g in zip(
                *(
                    torch.func.grad(reference.linear_cross_entropy, argnums=(0, 1))(h, weight, y)
                    for h, y in zip(hidden, labels, strict=True)
                ),
                strict=True,
            )
        ),
        **TIGHT,
    )
    logits = torch.randn(6, 5, 23, dtype=torch.float64)
    torch.testing.assert_close(
        torch.func.vmap(torch.func.grad(cross_entropy))(logits, labels),
        torch.func.vmap(torch.func.grad(reference.cross_entropy))(logits, labels),
        **TIGHT,
    )


def test_functional_call():
    module = torch.nn.Linear(4, 23, dtype=torch.float64)
    loss = nn.LinearCrossEntropy()
    hidden, labels = torch.randn(11, 4, dtype=torch.float64), torch.randint(0, 23, (11,))

    def objective(parameters):
        weight, bias = parameters["weight"], parameters["bias"]
        return torch.func.functional_call(loss, {}, (hidden, weight, labels), {"bias": bias})

    gradients = torch.func.grad(objective)(dict(module.named_parameters()))
    torch.nn.functional.cross_entropy(module(hidden), labels).backward()
    torch.testing.assert_close(gradients["weight"], module.weight.grad, **TIGHT)
    torch.testing.assert_close(gradients["bias"], module.bias.grad, **TIGHT)


@pytest.mark.parametrize("strategy", WAYS)
def test_create_graph_is_an_error(strategy):
    inputs = inputs_of()
    with pytest.raises(RuntimeError, match=r"create_graph: .*torch\.func"):
        torch.autograd.grad(cases.linear(CHUNKINGS[strategy])(*inputs), inputs.hidden, create_graph=True)


@pytest.mark.parametrize("strategy", EAGER_FIRST)
def test_autocast_around_backward_alone_changes_nothing(strategy):
    inputs = head_inputs(64, 16, 50)
    loss = cases.linear(CHUNKINGS[strategy])(*inputs)
    expected = torch.autograd.grad(loss, inputs.weight, retain_graph=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        actual = torch.autograd.grad(loss, inputs.weight)
    assert actual[0].equal(expected[0])


@pytest.mark.parametrize("dtype", [torch.bfloat16, pytest.param(torch.float16, marks=pytest.mark.slow)], ids=str)
@pytest.mark.parametrize("strategy", WAYS)
def test_autocast(dtype, strategy):
    inputs = head_inputs(64, 16, 50, ignored=0.1)
    exact = inputs.to(torch.float64)
    with torch.autocast("cpu", dtype=dtype):
        loss = cases.linear(CHUNKINGS[strategy])(*inputs)
    assert loss.dtype == torch.float32
    truth = cases.truth()(*exact)
    for mine, theirs in zip(cases.gradients(loss, inputs), cases.gradients(truth, exact), strict=True):
        assert mine.dtype == torch.float32
        assert (mine - theirs).norm() < 4 * torch.finfo(dtype).eps * theirs.norm()
    with torch.autocast("cpu", dtype=dtype):  # different dtypes are what autocast is for
        cases.linear(CHUNKINGS[strategy])(inputs.hidden.bfloat16(), *inputs[1:])
