"""Contract 5: one graph, and the right numbers, under torch.compile."""

from functools import partial

import cases
import pytest
import torch
from comparing import TIGHT, assert_accurate, assert_matches
from torch._dynamo.utils import counters
from torch._inductor.utils import fresh_cache

import compiled_loss
from compiled_loss import Chunking, cross_entropy, linear_cross_entropy, linear_token_statistics, reference
from compiled_loss.engine import operators
from compiled_loss.testing import head_inputs

EVERY_KEYWORD = [
    pytest.param(strategy, name, marks=() if name in ("everything", "everything, none") else pytest.mark.slow)
    for strategy in ("tokens", "vocab")
    for name in cases.KEYWORDS
    if (strategy, cases.KEYWORDS[name](1, 1).get("reduction")) != ("tokens", "none")
]


@pytest.mark.parametrize(("strategy", "name"), EVERY_KEYWORD)
def test_linear_cross_entropy_matches_reference(strategy, name):
    keywords = cases.KEYWORDS[name](13, 29)
    loss = torch.compile(cases.linear(cases.CHUNKINGS[strategy], **keywords), fullgraph=True)
    assert_matches(loss, cases.truth(**keywords), cases.inputs_for(keywords, 13, 7, 29))


def test_cross_entropy_matches_reference():
    keywords = cases.everything(5, 29)
    logits = torch.randn(3, 6, 29, dtype=torch.float64)[:, :-1].requires_grad_()
    labels = torch.randint(0, 29, (3, 5))
    loss, truth = (partial(f, **keywords) for f in (cross_entropy, reference.cross_entropy))
    assert_matches(torch.compile(loss, fullgraph=True), truth, (logits, labels))


def test_linear_token_statistics_match_reference():
    inputs = head_inputs(13, 7, 29, dtype=torch.float64, ignored=0.2)

    def statistics(fn, hidden, weight, labels, bias):
        return fn(hidden, weight, labels, bias=bias)

    ours = partial(statistics, partial(linear_token_statistics, chunking=cases.CHUNKINGS["vocab"]))
    assert_matches(torch.compile(ours, fullgraph=True), partial(statistics, reference.linear_token_statistics), inputs)


@pytest.mark.parametrize("strategy", ["tokens", pytest.param("vocab", marks=pytest.mark.slow)])
def test_loss_with_statistics_and_without_gradients(strategy):
    inputs = head_inputs(13, 7, 29, dtype=torch.float64, ignored=0.2)
    fn = torch.compile(
        lambda h, w, y: compiled_loss.linear_cross_entropy_with_statistics(h, w, y, chunking=cases.CHUNKINGS[strategy]),
        fullgraph=True,
    )
    expected = reference.linear_token_statistics(*inputs[:3])
    loss, statistics = fn(*inputs[:3])
    assert loss.requires_grad
    with torch.no_grad():
        again, detached = fn(*inputs[:3])
    torch.testing.assert_close(again, loss.detach(), **TIGHT)
    torch.testing.assert_close(statistics, expected, **TIGHT)
    torch.testing.assert_close(detached, expected, **TIGHT)


@pytest.mark.parametrize("dtype", [pytest.param(torch.bfloat16, marks=pytest.mark.slow), torch.float16], ids=str)
@pytest.mark.parametrize("strategy", ["tokens", pytest.param("vocab", marks=pytest.mark.slow)])
def test_narrow_dtypes(dtype, strategy):
    """Against fp64, with as many roundings as dtype has: a lost write is off by O(1)."""
    inputs = head_inputs(48, 16, 96, dtype=dtype)
    exact = inputs.to(torch.float64)
    chunking = Chunking(strategy=strategy, chunk_size=10)  # more than 8 chunks: fp32 accumulators
    loss = torch.compile(cases.linear(chunking), fullgraph=True)(*inputs)
    truth = cases.truth()(*exact)
    assert abs(loss.item() - truth.item()) < 4 * torch.finfo(dtype).eps
    for mine, theirs in zip(cases.gradients(loss, inputs), cases.gradients(truth, exact), strict=True):
        assert (mine - theirs).norm() < 4 * torch.finfo(dtype).eps * theirs.norm()


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["tokens", "vocab"])
def test_max_autotune_error_budget(strategy):
    fast = torch.compile(cases.linear(Chunking(strategy=strategy, chunk_size=10)), fullgraph=True, mode="max-autotune")
    assert_accurate(fast, cases.truth(), cases.truth(), head_inputs(48, 32, 96))


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["tokens", "vocab"])
def test_autocast_inside_and_outside(strategy):
    inputs = head_inputs(48, 16, 96)
    truth = cases.truth()(*inputs.to(torch.float64))
    fn = cases.linear(cases.CHUNKINGS[strategy])

    def inside(*arguments):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return fn(*arguments)

    with torch.autocast("cpu", dtype=torch.bfloat16):
        outside = torch.compile(fn, fullgraph=True)(*inputs)
    for loss in (outside, torch.compile(inside, fullgraph=True)(*inputs)):
        assert abs(loss.item() - truth.item()) < 4 * torch.finfo(torch.bfloat16).eps
        assert all(g.dtype == torch.float32 for g in cases.gradients(loss, inputs))


@pytest.mark.parametrize("strategy", ["tokens", pytest.param("vocab", marks=pytest.mark.slow)])
def test_retain_graph(strategy):
    with fresh_cache():  # another test's backward was not compiled to be run twice
        backward_twice(strategy)


def backward_twice(strategy):
    inputs = head_inputs(13, 7, 29, dtype=torch.float64)
    loss = torch.compile(cases.linear(cases.CHUNKINGS[strategy]), fullgraph=True)(*inputs)
    first = torch.autograd.grad(loss, inputs[:2], retain_graph=True)
    second = torch.autograd.grad(loss, inputs[:2], torch.tensor(3.0, dtype=torch.float64))
    torch.testing.assert_close(second, tuple(3 * g for g in first), **TIGHT)


def _logits_loss(hidden, weight, labels, _bias):
    return compiled_loss.cross_entropy(hidden @ weight.t(), labels)


def _classes_first(hidden, weight, labels, _bias):
    return compiled_loss.cross_entropy((weight @ hidden.t()).unsqueeze(0), labels.unsqueeze(0), class_dim=1)


def _compacted(hidden, weight, labels, _bias):
    return compiled_loss.linear_cross_entropy(hidden, weight, labels, chunking=Chunking(max_label_tokens=13))


def _distilled(hidden, weight, labels, _bias):
    teacher = weight.detach() / 2
    return compiled_loss.linear_distillation(hidden, weight, hidden.detach(), teacher, labels)


@pytest.mark.parametrize(
    "loss",
    [
        pytest.param(cases.linear(cases.CHUNKINGS["tokens"]), id="tokens"),
        pytest.param(cases.linear(cases.CHUNKINGS["vocab"]), id="vocab"),
        _classes_first,
        pytest.param(_logits_loss, marks=pytest.mark.slow),
        pytest.param(_compacted, marks=pytest.mark.slow),
        pytest.param(_distilled, marks=pytest.mark.slow),
    ],
)
def test_a_cached_backward_runs_once(loss):
    """It overwrites what it was given; torch notices, because no autograd Function is in the graph that it caches."""
    inputs = head_inputs(13, 7, 29, dtype=torch.float64)
    with fresh_cache():
        once = torch.compile(loss, fullgraph=True)(*inputs)
        torch.autograd.grad(once, inputs[:2])
        torch.compiler.reset()
        counters.clear()
        again = torch.compile(loss, fullgraph=True)(*inputs)
        assert counters["aot_autograd"]["autograd_cache_hit"] == 1
        with pytest.raises(RuntimeError, match="donated"):
            torch.autograd.grad(again, inputs[:2], retain_graph=True)


def test_another_version_takes_no_graph_from_the_cache(monkeypatch):
    """The cache knows a composite by its operands, one of which is a digest of the package's source."""
    inputs = head_inputs(13, 7, 29, dtype=torch.float64)

    def hits():
        torch.compiler.reset()
        counters.clear()
        loss = torch.compile(cases.linear(), fullgraph=True)(*inputs)
        torch.autograd.grad(loss, inputs[:2])  # a graph is cached once its backward is compiled
        return counters["aot_autograd"]["autograd_cache_hit"]

    with fresh_cache():
        assert [hits(), hits()] == [0, 1]
        monkeypatch.setattr(operators, "_SOURCE", "another")
        assert hits() == 0


@pytest.mark.parametrize("strategy", ["tokens", pytest.param("vocab", marks=pytest.mark.slow)])
def test_no_autocast_context_where_autocast_is_off(strategy):
    """Torch caches no graph that holds one."""
    targets = []

    def backend(graph, inputs):
        modules = [m for m in graph.modules() if isinstance(m, torch.fx.GraphModule)]
        targets.extend(getattr(n.target, "__name__", "") for m in modules for n in m.graph.nodes)
        return graph

    inputs = head_inputs(13, 7, 29)
    torch.compile(cases.linear(cases.CHUNKINGS[strategy]), fullgraph=True, backend=backend)(*inputs)
    assert "_enter_autocast" not in targets
    with torch.autocast("cpu", dtype=torch.bfloat16):
        torch.compile(cases.linear(cases.CHUNKINGS[strategy]), fullgraph=True, backend=backend)(*inputs)
    assert "_enter_autocast" in targets


def test_torch_func_grad_inside_compile():
    hidden, weight, labels, _ = (v.detach() for v in head_inputs(13, 7, 29, dtype=torch.float64))
    mine = torch.compile(torch.func.grad(linear_cross_entropy, argnums=(0, 1)), fullgraph=True)(hidden, weight, labels)
    theirs = torch.func.grad(reference.linear_cross_entropy, argnums=(0, 1))(hidden, weight, labels)
    torch.testing.assert_close(mine, theirs, **TIGHT)
