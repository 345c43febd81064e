"""NOTE [Execution]: a loss is one operator, beside and inside whatever else is compiled."""

import functools

import cases
import pytest
import torch
import torch.nn.functional as F
from comparing import TIGHT, assert_matches
from torch.autograd import forward_ad

from compiled_loss import (
    Chunking,
    cross_entropy,
    distillation,
    linear_cross_entropy,
    linear_distillation,
    linear_token_statistics,
    reference,
)
from compiled_loss.testing import head_inputs

REGIONS = pytest.mark.skipif(
    tuple(map(int, torch.__version__.split(".")[:2])) < (2, 13), reason="a user's regions are not differentiated"
)


@REGIONS
@pytest.mark.parametrize("strategy", ["tokens", "vocab"])
@pytest.mark.usefixtures("plain_bodies")
def test_beside_nested_compile_regions(strategy):
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
    ours = functools.partial(linear_cross_entropy, chunking=cases.CHUNKINGS[strategy])
    assert_matches(
        torch.compile(lambda: model(region, ours), fullgraph=True),
        lambda: model(block, lambda h, w, y: F.cross_entropy(h @ w.t(), y)),
        (),
        wanted=[inputs.hidden, inputs.weight, *blocks],
        rtol=1e-5,
        atol=1e-6,
    )


CALLS = {
    "tokens": lambda h, w, y, t: linear_cross_entropy(h, w, y),
    "vocab": lambda h, w, y, t: linear_cross_entropy(h, w, y, reduction="none").sum(),
    "chunk_size": lambda h, w, y, t: linear_cross_entropy(h, w, y, chunking=Chunking(chunk_size=7)),
    "memory_budget": lambda h, w, y, t: linear_cross_entropy(h, w, y, chunking=Chunking(memory_budget=2048)),
    "max_label_tokens": lambda h, w, y, t: linear_cross_entropy(h, w, y, chunking=Chunking(max_label_tokens=0.9)),
    "statistics": lambda h, w, y, t: linear_token_statistics(h, w, y).entropy.sum(),
    "distillation": lambda h, w, y, t: linear_distillation(h, w, t, w.detach(), y),
    "logits": lambda h, w, y, t: cross_entropy(h @ w.t(), y),
    "two logits": lambda h, w, y, t: distillation(h @ w.t(), t @ w.detach().t(), y),
}


@pytest.mark.parametrize("name", CALLS)
@pytest.mark.usefixtures("plain_bodies")
def test_unbacked_sizes(name):
    """As torchtitan marks them: of hidden states and labels each, nothing is known while tracing."""
    inputs = head_inputs(60, 16, 50, dtype=torch.float64, ignored=0.2)
    tensors = (inputs.hidden, inputs.weight, inputs.labels, torch.randn(60, 16, dtype=torch.float64))
    marked = [v.detach().clone().requires_grad_(v.requires_grad) for v in tensors]
    for i in (0, 2, 3):
        torch._dynamo.decorators.mark_unbacked(marked[i], 0)
    loss = torch.compile(CALLS[name], fullgraph=True)(*marked)
    expected = CALLS[name](*tensors)
    torch.testing.assert_close(loss, expected, **TIGHT)
    theirs = torch.autograd.grad(expected, tensors[:2])
    torch.testing.assert_close(torch.autograd.grad(loss, marked[:2]), theirs, **TIGHT)


@pytest.mark.parametrize("strategy", ["tokens", "vocab"])
@pytest.mark.usefixtures("plain_bodies")
def test_mark_dynamic_with_bounds(strategy):
    inputs = head_inputs(60, 16, 50)
    for v in (inputs.hidden, inputs.labels):
        torch._dynamo.mark_dynamic(v, 0, min=2, max=8192)
    loss = functools.partial(linear_cross_entropy, chunking=Chunking(strategy=strategy))
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")(*inputs[:3])
    torch.testing.assert_close(compiled, loss(*inputs[:3]))


class Head(torch.nn.Module):
    def __init__(self, inputs, strategy):
        super().__init__()
        self.weight = torch.nn.Parameter(inputs.weight.detach())
        self.loss = functools.partial(linear_cross_entropy, chunking=cases.CHUNKINGS[strategy])

    def forward(self, hidden, labels):
        return self.loss(hidden, self.weight, labels)


@pytest.mark.parametrize("strategy", ["tokens", "vocab"])
@pytest.mark.usefixtures("plain_bodies")
def test_torch_export(strategy):
    inputs = head_inputs(13, 7, 29)
    head = Head(inputs, strategy)
    exported = torch.export.export(head, (inputs.hidden.detach(), inputs.labels)).module()
    again = head_inputs(13, 7, 29, seed=1)
    torch.testing.assert_close(exported(again.hidden, again.labels), head(again.hidden, again.labels))


@pytest.mark.parametrize("strategy", ["tokens", "vocab"])
def test_torch_export_by_dynamo_has_gradients(strategy):
    inputs = head_inputs(13, 7, 29, dtype=torch.float64)
    head = Head(inputs, strategy)
    exported = torch.export.export(head, (inputs.hidden, inputs.labels), strict=True).module()
    found, expected = (
        torch.autograd.grad(run(inputs.hidden, inputs.labels), (inputs.hidden, *run.parameters()))
        for run in (exported, head)
    )
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("strategy", ["tokens", pytest.param("vocab", marks=pytest.mark.slow)])
@pytest.mark.filterwarnings("ignore:.*LeafSpec:FutureWarning")
@pytest.mark.usefixtures("plain_bodies")
def test_aot_inductor(strategy, tmp_path):
    """Into a library, from which Python's operators are called."""
    inputs = head_inputs(13, 7, 29)
    head, given = Head(inputs, strategy), (inputs.hidden.detach(), inputs.labels)
    with torch.no_grad():
        package = torch._inductor.aoti_compile_and_package(
            torch.export.export(head, given), package_path=str(tmp_path / "head.pt2")
        )
        torch.testing.assert_close(torch._inductor.aoti_load_package(package)(*given), head(*given))


@pytest.mark.parametrize("strategy", ["tokens", "vocab"])
@pytest.mark.usefixtures("plain_bodies")
def test_torch_cond(strategy):
    inputs = head_inputs(13, 7, 29, dtype=torch.float64)
    loss = functools.partial(linear_cross_entropy, chunking=cases.CHUNKINGS[strategy])

    def either(hidden, weight, labels):
        return torch.cond(hidden.sum() > -1e9, loss, lambda h, w, y: 0 * loss(h, w, y), (hidden, weight, labels))

    compiled = torch.compile(either, fullgraph=True, backend="aot_eager")
    assert_matches(compiled, reference.linear_cross_entropy, inputs[:3])


@pytest.mark.parametrize("strategy", ["tokens", "vocab"])
@pytest.mark.usefixtures("plain_bodies")
def test_compiled_autograd(strategy):
    inputs = head_inputs(13, 7, 29, dtype=torch.float64)
    loss = functools.partial(linear_cross_entropy, chunking=cases.CHUNKINGS[strategy])
    theirs = torch.autograd.grad(reference.linear_cross_entropy(*inputs[:3]), inputs[:2])
    with torch._dynamo.compiled_autograd._enable(torch.compile(backend="aot_eager", fullgraph=True)):
        torch.compile(loss, fullgraph=True, backend="aot_eager")(*inputs[:3]).backward()
    torch.testing.assert_close((inputs.hidden.grad, inputs.weight.grad), theirs, **TIGHT)


@REGIONS
@pytest.mark.parametrize("strategy", ["tokens", "vocab"])
@pytest.mark.usefixtures("plain_bodies")
def test_inside_nested_compile_region(strategy):
    inputs = head_inputs(26, 7, 29, dtype=torch.float64)

    def half(hidden, weight, labels):
        return linear_cross_entropy(hidden, weight, labels, reduction="sum", chunking=cases.CHUNKINGS[strategy])

    region = torch.compiler.nested_compile_region(half)

    def loss(hidden, weight, labels):
        return region(hidden[:13], weight, labels[:13]) + region(hidden[13:], weight, labels[13:])

    truth = functools.partial(reference.linear_cross_entropy, reduction="sum")
    assert_matches(torch.compile(loss, fullgraph=True), truth, inputs[:3])


@pytest.mark.parametrize("strategy", ["tokens", "vocab"])
def test_forward_ad_dual_tensor_is_an_error_compiled(strategy):
    """An operator has none, and would give zero in silence; also where the loss was compiled without one before.

    torch 2.15 refuses dual tensors itself.
    """
    hidden, weight, labels, _ = (v.detach() for v in head_inputs(13, 7, 29))
    loss = functools.partial(linear_cross_entropy, chunking=cases.CHUNKINGS[strategy])
    compiled = torch.compile(loss, fullgraph=True, backend="eager")
    compiled(hidden, weight, labels)
    with forward_ad.dual_level(), pytest.raises(Exception, match=r"expected a Tensor without a tangent|dual tensor"):
        compiled(forward_ad.make_dual(hidden, torch.ones_like(hidden)), weight, labels)
