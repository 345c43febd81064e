"""Walks in loops of our own, NOTE [Execution]: what falls with the walls that hold the compiler's loop."""

import functools

import cases
import pytest
import torch
import torch.nn.functional as F
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils.checkpoint import checkpoint

from compiled_loss import Chunking, linear_cross_entropy, linear_token_statistics, reference
from compiled_loss.engine import execution
from compiled_loss.testing import assert_within_error_budget, count_graphs, head_inputs, inputs_unchanged

TIGHT = {"rtol": 1e-11, "atol": 1e-12}
WALKS = pytest.mark.parametrize("walk", ["tokens", "vocab"])


def check(fn, truth, leaves, **tolerance):
    """Loss and gradients are those of plain torch."""
    expected, actual = truth(), fn()
    torch.testing.assert_close(actual, expected, **tolerance)
    upstream = torch.rand_like(expected)
    theirs = torch.autograd.grad(expected, leaves, upstream)
    for mine, other in zip(torch.autograd.grad(actual, leaves, upstream), theirs, strict=True):
        torch.testing.assert_close(mine, other, **tolerance)


def check_keywords(name, walk, tokens, *, compiled):
    keywords = cases.KEYWORDS[name](tokens, 29)
    inputs = head_inputs(
        tokens, 7, 29, dtype=torch.float64, ignored=0.2, ignore_index=keywords.get("ignore_index", -100)
    )
    ours = cases.linear(cases.walk_of(walk, keywords), **keywords)
    fn = torch.compile(ours, fullgraph=True) if compiled else ours
    with inputs_unchanged(*inputs):
        check(
            lambda: fn(*inputs),
            lambda: reference.linear_cross_entropy(*inputs[:3], bias=inputs.bias, **keywords),
            [v for v in inputs if v.requires_grad],
            **TIGHT,
        )


@pytest.mark.parametrize("name", cases.KEYWORDS)
@pytest.mark.parametrize("tokens", [1, 5, 13, 16])  # of chunks of 5: one row, one chunk, ragged, a last one of one row
@WALKS
def test_values(name, walk, tokens):
    check_keywords(name, walk, tokens, compiled=False)


@pytest.mark.parametrize("name", ["everything", *(pytest.param(n, marks=pytest.mark.slow) for n in cases.KEYWORDS)])
@WALKS
def test_compiled_values(name, walk):
    check_keywords(name, walk, 13, compiled=True)


@WALKS
def test_no_token(walk):
    inputs = head_inputs(0, 7, 29, dtype=torch.float64)
    loss = cases.linear(cases.WALKS[walk])(*inputs)
    assert loss == 0
    for gradient in torch.autograd.grad(loss, [inputs.hidden, inputs.weight, inputs.bias]):
        assert not gradient.any()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@WALKS
def test_narrow_dtypes_stay_within_the_error_budget(walk, dtype):
    inputs = head_inputs(64, 16, 96, dtype=dtype, ignored=0.2)
    leaves = [inputs.hidden, inputs.weight, inputs.bias]
    wide = [v.detach().double().requires_grad_() for v in leaves]
    labels = inputs.labels
    truth = torch.autograd.grad(reference.linear_cross_entropy(wide[0], wide[1], labels, bias=wide[2]), wide)
    unchunked = torch.autograd.grad(reference.linear_cross_entropy(*inputs[:3], bias=inputs.bias), leaves)
    for size in (9, 64):
        loss = cases.linear(Chunking(strategy=walk, chunk_size=size))(*inputs)
        for mine, other, exact in zip(torch.autograd.grad(loss, leaves), unchunked, truth, strict=True):
            assert_within_error_budget(mine, other, exact)


def test_a_second_backward_has_the_bits_of_the_first():
    """The first one writes over what forward kept; gradients are formed again from the inputs."""
    inputs = head_inputs(13, 7, 29, dtype=torch.float16, ignored=0.2)
    leaves = [inputs.hidden, inputs.weight, inputs.bias]
    loss = cases.linear(cases.WALKS["tokens"])(*inputs)
    first = torch.autograd.grad(loss * 3, leaves, retain_graph=True)
    kept = [g.clone() for g in first]
    torch._foreach_zero_(list(first))  # they are the caller's
    for again in (torch.autograd.grad(loss * 3, leaves, retain_graph=True), torch.autograd.grad(loss * 3, leaves)):
        assert all(map(torch.equal, again, kept))


def test_backward_allocates_no_second_gradient():
    inputs = head_inputs(13, 7, 29, ignored=0.2)
    loss = cases.linear(cases.WALKS["tokens"])(*inputs)
    formed = [v.data_ptr() for v in loss.grad_fn.saved_tensors if v is not None][:2]
    assert [g.data_ptr() for g in torch.autograd.grad(loss, [inputs.hidden, inputs.weight])] == formed


@pytest.mark.parametrize("reentrant", [False, True])
@WALKS
def test_checkpointed(walk, reentrant):
    inputs = head_inputs(13, 7, 29, dtype=torch.float64, ignored=0.2)
    loss = cases.linear(cases.WALKS[walk])
    leaves = [inputs.hidden, inputs.weight, inputs.bias]
    theirs = torch.autograd.grad(reference.linear_cross_entropy(*inputs[:3], bias=inputs.bias), leaves)
    checkpoint(loss, *inputs, use_reentrant=reentrant).backward()
    for leaf, other in zip(leaves, theirs, strict=True):
        torch.testing.assert_close(leaf.grad, other, **TIGHT)


@WALKS
@pytest.mark.parametrize("size", [None, 1024])
def test_graphs_as_the_number_of_tokens_varies(walk, size):
    """Static, then dynamic: as many as of any function."""
    random = torch.Generator().manual_seed(0)
    counts = [int(100 * 1310.72 ** float(torch.rand((), generator=random))) for _ in range(40)]
    calls = [(torch.zeros(n, 2, requires_grad=True), torch.zeros(3, 2), torch.zeros(n).long()) for n in counts]
    loss = functools.partial(linear_cross_entropy, chunking=Chunking(strategy=walk, chunk_size=size))
    assert count_graphs(loss, calls) == 2


@pytest.fixture
def kernels(monkeypatch):
    """Counts what is compiled of bodies, without compiling it."""
    counter = CompileCounterWithBackend("eager")
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend=counter))
    return counter


@WALKS
@pytest.mark.parametrize("chunks", [1, 8, 64])
def test_a_body_is_compiled_once_for_all_chunks(kernels, walk, chunks):
    inputs = head_inputs(128, 8, 192)
    size = (192 if walk == "vocab" else 128) // chunks
    loss = cases.linear(Chunking(strategy=walk, chunk_size=size, compile=True))(*inputs)
    torch.autograd.grad(loss, [inputs.hidden, inputs.weight, inputs.bias])
    assert kernels.frame_count == (2 if walk == "vocab" else 1)  # forward's and backward's


@WALKS
def test_bodies_compiled_as_the_number_of_tokens_varies(kernels, walk):
    for tokens in (512, 1, 333, 2, 1025, 10000):
        inputs = head_inputs(tokens, 2, 7)
        loss = cases.linear(Chunking(strategy=walk, compile=True))(*inputs)
        torch.autograd.grad(loss, [inputs.hidden, inputs.weight, inputs.bias])
    assert kernels.frame_count == (2 if walk == "vocab" else 1)


@WALKS
def test_operands_that_share_a_storage(walk):
    """Weight and bias in one flat buffer, as ZeRO lays them; class weights that are the bias."""
    inputs = head_inputs(13, 7, 29, dtype=torch.float64)
    flat = torch.cat([inputs.weight.detach().flatten(), inputs.bias.detach().abs()])
    weight, bias = flat[: 29 * 7].view(29, 7).requires_grad_(), flat[29 * 7 :].requires_grad_()
    keywords = {"label_smoothing": 0.1, "class_weights": bias.detach()}
    loss = torch.compile(cases.linear(cases.WALKS[walk], **keywords), fullgraph=True)
    check(
        lambda: loss(inputs.hidden, weight, inputs.labels, bias),
        lambda: reference.linear_cross_entropy(inputs.hidden, weight, inputs.labels, bias=bias, **keywords),
        [inputs.hidden, weight, bias],
        **TIGHT,
    )


REGIONS = pytest.mark.skipif(
    tuple(map(int, torch.__version__.split(".")[:2])) < (2, 13), reason="a user's regions are not differentiated"
)


@REGIONS
@WALKS
def test_beside_regions_of_the_user(walk):
    """Of regions of ours beside them the last block's gradient is wrong, and the loss right."""
    inputs = head_inputs(13, 7, 29)
    blocks = [torch.randn(7, 7, requires_grad=True) for _ in range(2)]

    def model(block, loss):
        states = inputs.hidden
        for weight in blocks:
            states = block(states, weight)
        return loss(states, inputs.weight, inputs.labels)

    def block(states, weight):
        return torch.tanh(states @ weight) + states

    region = torch.compiler.nested_compile_region(block)
    ours = functools.partial(linear_cross_entropy, chunking=cases.WALKS[walk])
    check(
        torch.compile(lambda: model(region, ours), fullgraph=True),
        lambda: model(block, lambda h, w, y: F.cross_entropy(h @ w.t(), y)),
        [inputs.hidden, inputs.weight, *blocks],
        rtol=1e-5,
        atol=1e-6,
    )


@WALKS
def test_statistics_without_gradients(walk):
    inputs = head_inputs(13, 7, 29, dtype=torch.float64, ignored=0.2)
    expected = reference.linear_token_statistics(*inputs[:3])
    with torch.no_grad():
        found = linear_token_statistics(*inputs[:3], chunking=cases.WALKS[walk])
    for mine, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(mine, theirs.detach() if theirs.requires_grad else theirs, **TIGHT)


@WALKS
def test_a_second_step_compiles_nothing(walk):
    inputs = head_inputs(13, 7, 29)
    loss = torch.compile(cases.linear(cases.WALKS[walk]), fullgraph=True)
    for stance in ("default", "fail_on_recompile", "fail_on_recompile"):
        with torch.compiler.set_stance(stance):
            torch.autograd.grad(loss(*inputs), [inputs.hidden, inputs.weight])
