"""Loops of our own, NOTE [Execution]: as one operator they stand beside and inside whatever else is compiled."""

import functools

import cases
import pytest
import torch
import torch.nn.functional as F
from comparing import TIGHT, assert_accurate, assert_matches
from torch.autograd import forward_ad
from torch.utils.checkpoint import checkpoint

from compiled_loss import (
    Chunking,
    cross_entropy,
    distillation,
    linear_cross_entropy,
    linear_distillation,
    linear_token_statistics,
    reference,
)
from compiled_loss.engine import kernels
from compiled_loss.testing import count_graphs, head_inputs

WALKS = pytest.mark.parametrize("walk", ["tokens", "vocab"])


def check_keywords(name, walk, tokens, *, compiled):
    keywords = cases.KEYWORDS[name](tokens, 29)
    ours = cases.linear(cases.walk_of(walk, keywords), **keywords)
    fn = torch.compile(ours, fullgraph=True) if compiled else ours
    assert_matches(fn, cases.truth(**keywords), cases.inputs_for(keywords, tokens, 7, 29))


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
    assert not any(gradient.any() for gradient in cases.gradients(loss, inputs))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@WALKS
def test_narrow_dtypes_stay_within_the_error_budget(walk, dtype):
    inputs = head_inputs(64, 16, 96, dtype=dtype, ignored=0.2)
    for size in (9, 64):
        loss = cases.linear(Chunking(strategy=walk, chunk_size=size))
        assert_accurate(loss, cases.truth(), cases.truth(), inputs)


def test_a_second_backward_has_the_bits_of_the_first():
    """The first one writes over what forward kept; gradients are formed again from the inputs."""
    inputs = head_inputs(13, 7, 29, dtype=torch.float16, ignored=0.2)
    leaves = [v for v in inputs if v.requires_grad]
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
    theirs = cases.gradients(cases.truth()(*inputs), inputs)
    checkpoint(cases.linear(cases.WALKS[walk]), *inputs, use_reentrant=reentrant).backward()
    found = tuple(v.grad for v in inputs if v.requires_grad)
    torch.testing.assert_close(found, theirs, **TIGHT)


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
def compilations(monkeypatch):
    """The numbers of rows for which bodies were compiled."""
    found, compile_ = [], kernels.Compiled._compile
    monkeypatch.setattr(kernels.Compiled, "_compile", lambda one, rows, v: found.append(rows) or compile_(one, rows, v))
    return found


@WALKS
@pytest.mark.parametrize("chunks", [1, 8, 64])
def test_a_body_is_compiled_once_for_all_chunks(compilations, walk, chunks):
    inputs = head_inputs(128, 8, 192)
    size = (192 if walk == "vocab" else 128) // chunks
    loss = cases.linear(Chunking(strategy=walk, chunk_size=size, compile=True))(*inputs)
    cases.gradients(loss, inputs)
    assert len(compilations) == (2 if walk == "vocab" else 1)  # forward's and backward's


@WALKS
def test_bodies_compiled_as_the_number_of_tokens_varies(compilations, walk):
    """Each for few rows and for many."""
    for tokens in (512, 1, 333, 2, 1025, 10000):
        inputs = head_inputs(tokens, 2, 7)
        cases.gradients(cases.linear(Chunking(strategy=walk, compile=True))(*inputs), inputs)
    assert len(compilations) == (4 if walk == "vocab" else 2)


@WALKS
def test_operands_that_share_a_storage(walk):
    """Weight and bias in one flat buffer, as ZeRO lays them; class weights that are the bias."""
    inputs = head_inputs(13, 7, 29, dtype=torch.float64)
    flat = torch.cat([inputs.weight.detach().flatten(), inputs.bias.detach().abs()])
    weight, bias = flat[: 29 * 7].view(29, 7).requires_grad_(), flat[29 * 7 :].requires_grad_()
    keywords = {"label_smoothing": 0.1, "class_weights": bias.detach()}
    loss = torch.compile(cases.linear(cases.WALKS[walk], **keywords), fullgraph=True)
    assert_matches(loss, cases.truth(**keywords), (inputs.hidden, weight, inputs.labels, bias))


REGIONS = pytest.mark.skipif(
    tuple(map(int, torch.__version__.split(".")[:2])) < (2, 13), reason="a user's regions are not differentiated"
)


@REGIONS
@WALKS
@pytest.mark.usefixtures("plain_bodies")
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
    assert_matches(
        torch.compile(lambda: model(region, ours), fullgraph=True),
        lambda: model(block, lambda h, w, y: F.cross_entropy(h @ w.t(), y)),
        (),
        wanted=[inputs.hidden, inputs.weight, *blocks],
        rtol=1e-5,
        atol=1e-6,
    )


@WALKS
def test_statistics_without_gradients(walk):
    inputs = head_inputs(13, 7, 29, dtype=torch.float64, ignored=0.2)
    expected = reference.linear_token_statistics(*inputs[:3])
    with torch.no_grad():
        found = linear_token_statistics(*inputs[:3], chunking=cases.WALKS[walk])
    torch.testing.assert_close(found, expected, **TIGHT)


@WALKS
def test_a_second_step_compiles_nothing(walk):
    inputs = head_inputs(13, 7, 29)
    loss = torch.compile(cases.linear(cases.WALKS[walk]), fullgraph=True)
    for stance in ("default", "fail_on_recompile", "fail_on_recompile"):
        with torch.compiler.set_stance(stance):
            torch.autograd.grad(loss(*inputs), [inputs.hidden, inputs.weight])


@pytest.fixture
def plain_bodies(monkeypatch):
    """Bodies run eagerly inside operators, where the graph around them is what is tested."""
    monkeypatch.setattr(kernels.Compiled, "_compile", lambda kernel, _rows, _operands: kernel._function)


@WALKS
@pytest.mark.usefixtures("plain_bodies")
def test_a_budget_of_many_chunks(walk):
    """A budget that means 256 chunks and more costs no graph and no kernel more than one chunk."""
    inputs = head_inputs(512, 8, 512, dtype=torch.float64)
    loss = torch.compile(cases.linear(Chunking(strategy=walk, memory_budget=2 * 512 * 8)), fullgraph=True)
    assert_matches(loss, cases.truth(), inputs)


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
def test_tensors_of_which_no_size_is_known(name):
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


@WALKS
@pytest.mark.usefixtures("plain_bodies")
def test_bounded_dynamic_sizes(walk):
    inputs = head_inputs(60, 16, 50)
    for v in (inputs.hidden, inputs.labels):
        torch._dynamo.mark_dynamic(v, 0, min=2, max=8192)
    loss = functools.partial(linear_cross_entropy, chunking=Chunking(strategy=walk))
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")(*inputs[:3])
    torch.testing.assert_close(compiled, loss(*inputs[:3]))


class Head(torch.nn.Module):
    def __init__(self, inputs, walk):
        super().__init__()
        self.weight = torch.nn.Parameter(inputs.weight.detach())
        self.loss = functools.partial(linear_cross_entropy, chunking=cases.WALKS[walk])

    def forward(self, hidden, labels):
        return self.loss(hidden, self.weight, labels)


@WALKS
@pytest.mark.usefixtures("plain_bodies")
def test_exported(walk):
    inputs = head_inputs(13, 7, 29)
    head = Head(inputs, walk)
    exported = torch.export.export(head, (inputs.hidden.detach(), inputs.labels)).module()
    again = head_inputs(13, 7, 29, seed=1)
    torch.testing.assert_close(exported(again.hidden, again.labels), head(again.hidden, again.labels))


@WALKS
@pytest.mark.filterwarnings("ignore:.*LeafSpec:FutureWarning")
@pytest.mark.usefixtures("plain_bodies")
def test_compiled_ahead_of_time(walk, tmp_path):
    """Into a library, from which Python's operators are called."""
    inputs = head_inputs(13, 7, 29)
    head, given = Head(inputs, walk), (inputs.hidden.detach(), inputs.labels)
    with torch.no_grad():
        package = torch._inductor.aoti_compile_and_package(
            torch.export.export(head, given), package_path=str(tmp_path / "head.pt2")
        )
        torch.testing.assert_close(torch._inductor.aoti_load_package(package)(*given), head(*given))


@WALKS
@pytest.mark.usefixtures("plain_bodies")
def test_inside_a_condition(walk):
    inputs = head_inputs(13, 7, 29, dtype=torch.float64)
    loss = functools.partial(linear_cross_entropy, chunking=cases.WALKS[walk])

    def either(hidden, weight, labels):
        return torch.cond(hidden.sum() > -1e9, loss, lambda h, w, y: 0 * loss(h, w, y), (hidden, weight, labels))

    compiled = torch.compile(either, fullgraph=True, backend="aot_eager")
    assert_matches(compiled, reference.linear_cross_entropy, inputs[:3])


@WALKS
@pytest.mark.usefixtures("plain_bodies")
def test_a_whole_step_under_compiled_autograd(walk):
    inputs = head_inputs(13, 7, 29, dtype=torch.float64)
    loss = functools.partial(linear_cross_entropy, chunking=cases.WALKS[walk])
    theirs = torch.autograd.grad(reference.linear_cross_entropy(*inputs[:3]), inputs[:2])
    with torch._dynamo.compiled_autograd._enable(torch.compile(backend="aot_eager", fullgraph=True)):
        torch.compile(loss, fullgraph=True, backend="aot_eager")(*inputs[:3]).backward()
    torch.testing.assert_close((inputs.hidden.grad, inputs.weight.grad), theirs, **TIGHT)


@REGIONS
@WALKS
@pytest.mark.usefixtures("plain_bodies")
def test_inside_a_region_of_the_user(walk):
    inputs = head_inputs(26, 7, 29, dtype=torch.float64)

    def half(hidden, weight, labels):
        return linear_cross_entropy(hidden, weight, labels, reduction="sum", chunking=cases.WALKS[walk])

    region = torch.compiler.nested_compile_region(half)

    def loss(hidden, weight, labels):
        return region(hidden[:13], weight, labels[:13]) + region(hidden[13:], weight, labels[13:])

    truth = functools.partial(reference.linear_cross_entropy, reduction="sum")
    assert_matches(torch.compile(loss, fullgraph=True), truth, inputs[:3])


@WALKS
def test_no_tangent_is_lost_in_compiled_code(walk):
    """An operator has none, and would give zero in silence; also where the loss was compiled without one before."""
    hidden, weight, labels, _ = (v.detach() for v in head_inputs(13, 7, 29))
    loss = functools.partial(linear_cross_entropy, chunking=cases.WALKS[walk])
    compiled = torch.compile(loss, fullgraph=True, backend="eager")
    compiled(hidden, weight, labels)
    with forward_ad.dual_level(), pytest.raises(Exception, match="expected a Tensor without a tangent"):
        compiled(forward_ad.make_dual(hidden, torch.ones_like(hidden)), weight, labels)
