"""Targets that are a probability of each class: torch's numbers, every keyword, and nothing of [N, V] kept."""

from functools import partial

import pytest
import torch
from comparing import TIGHT, assert_accurate, assert_matches, assert_same
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.autograd.graph import saved_tensors_hooks
from torch.nn import functional as F

import compiled_loss
from compiled_loss import cross_entropy, reference

V = 7
SHAPES = [((V,), 0), ((5, V), -1), ((1, V), 1), ((2, V, 3), 1), ((2, V, 3, 4), 1)]


def pair(*shape, dtype=torch.float64):
    """Logits and what is no distribution, which torch takes as well."""
    return torch.randn(shape, dtype=dtype, requires_grad=True), torch.rand(shape, dtype=dtype, requires_grad=True)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("smoothing", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("weighted", [False, True])
def test_probabilities_match_torch_cross_entropy(weighted, smoothing, reduction):
    """Its mean is over the positions, whatever the classes weigh."""
    weights = torch.linspace(0, 1, V, dtype=torch.float64) if weighted else None
    for shape, dim in SHAPES:
        inputs = pair(*shape)
        keywords = {"label_smoothing": smoothing, "reduction": reduction}
        for loss in (cross_entropy, reference.cross_entropy):
            loss = partial(loss, class_weights=weights, class_dim=dim, **keywords)
            assert_matches(loss, partial(F.cross_entropy, weight=weights, **keywords), inputs)


@settings(max_examples=25, deadline=None)
@given(
    rows=st.sampled_from([(1,), (4,), (2, 5), (3, 1)]),
    vocab=st.integers(1, 9),
    masked=st.sampled_from(["", "zeros", "fractions", "all"]),
    weighs=st.booleans(),
    smoothing=st.sampled_from([0.0, 0.2]),
    z_loss=st.sampled_from([0.0, 0.1]),
    softcap=st.sampled_from([None, 2.0]),
    temperature=st.sampled_from([1.0, 0.6]),
    shift=st.sampled_from([0, 1, 9]),
    reduction=st.sampled_from(["mean", "sum", "none", 3]),
    seed=st.integers(0, 1000),
)
def test_all_keywords_match_reference(rows, vocab, masked, weighs, shift, reduction, seed, **keywords):
    keywords["label_smoothing"] = keywords.pop("smoothing")
    torch.manual_seed(seed)
    inputs = [*pair(*rows, vocab), torch.rand(rows, dtype=torch.float64, requires_grad=True)]
    masks = {"zeros": torch.rand(rows) < 0.6, "fractions": torch.rand(rows[-1]), "all": torch.zeros(rows)}
    keywords |= {"token_weights": inputs[2], "mask": masks.get(masked), "shift": shift}
    keywords["class_weights"] = torch.rand(vocab) if weighs else None
    count = {"reduction": "sum", "num_label_tokens": reduction} if reduction == 3 else {"reduction": reduction}
    mine, theirs = (lib.cross_entropy(*inputs[:2], **keywords, **count) for lib in (compiled_loss, reference))
    assert_same(mine, theirs, inputs)


def test_one_hot_is_the_label():
    logits, labels = pair(6, V)[0], torch.tensor([0, 3, 6, 1, 1, 2])
    one_hot = F.one_hot(labels, V).double()
    keywords = {"label_smoothing": 0.1, "z_loss": 0.1, "softcap": 3.0, "class_weights": torch.linspace(0.1, 1, V)}
    for reduction in ("sum", "none"):  # a mean of labels is over their classes' weights
        mine = cross_entropy(logits, one_hot, reduction=reduction, **keywords)
        torch.testing.assert_close(mine, cross_entropy(logits, labels, reduction=reduction, **keywords), **TIGHT)


@pytest.mark.parametrize("layout", ["transposed", "sliced", "expanded"])
def test_non_contiguous_logits_and_targets(layout):
    change = {
        "transposed": lambda v: v.transpose(0, 1).contiguous().transpose(0, 1),
        "sliced": lambda v: torch.cat([v, v], -1)[..., :V],
        "expanded": lambda v: v[:1].expand(3, 5, V),
    }[layout]
    logits, target = pair(3, 5, V)
    for inputs in ((change(logits), target), (logits, change(target)), (change(logits), change(target))):
        keywords = {"class_weights": torch.linspace(0, 1, V), "z_loss": 0.1}
        assert_same(cross_entropy(*inputs, **keywords), reference.cross_entropy(*inputs, **keywords), (logits, target))


@pytest.mark.parametrize("poison", [float("nan"), float("inf"), float("-inf")], ids=str)
def test_nan_and_inf_in_masked_tokens(poison):
    """Not its logits, not its target: loss and gradients are those without it, and 0 there."""
    logits, target = (v.detach() for v in pair(4, V))
    mask = torch.tensor([1, 0, 1, 0])
    weights = torch.rand(4, dtype=torch.float64)
    keywords = {"class_weights": torch.linspace(0, 1, V), "label_smoothing": 0.1, "z_loss": 0.1, "reduction": "sum"}
    clean = [v[::2].clone().requires_grad_() for v in (logits, target, weights)]
    expected = reference.cross_entropy(*clean[:2], token_weights=clean[2], **keywords)
    for broken in ([0], [1], [0, 1]):
        inputs = [v.clone() for v in (logits, target, weights)]
        for i in broken:
            inputs[i][1::2] = poison
        inputs = [v.requires_grad_() for v in inputs]
        loss = cross_entropy(*inputs[:2], token_weights=inputs[2], mask=mask, **keywords)
        torch.testing.assert_close(loss, expected, **TIGHT)
        for mine, theirs in zip(
            torch.autograd.grad(loss, inputs), torch.autograd.grad(expected, clean, retain_graph=True), strict=True
        ):
            torch.testing.assert_close(mine[::2], theirs, **TIGHT)
            assert (mine[1::2] == 0).all()


def test_minus_inf_logits_of_probability_zero():
    """A logit of -inf whose probability is 0 costs nothing; torch's own loss is NaN."""
    logits, target = pair(4, V)
    inputs = torch.cat([logits, torch.full((4, 2), float("-inf"))], -1), F.pad(target, (0, 2))
    assert_same(cross_entropy(*inputs), F.cross_entropy(logits, target), [logits])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_error_budget(dtype):
    inputs = [v.detach().to(dtype).requires_grad_() for v in pair(31, 57)]
    keywords = {"class_weights": torch.linspace(0, 1, 57), "label_smoothing": 0.1}
    loss, truth = (partial(f, **keywords) for f in (cross_entropy, reference.cross_entropy))
    assert loss(*inputs).dtype == torch.float32
    assert_accurate(loss, truth, truth, inputs)


def test_target_of_another_dtype():
    logits, target = pair(5, V)
    expected = F.cross_entropy(logits, target.detach().bfloat16().double())
    torch.testing.assert_close(cross_entropy(logits, target.detach().bfloat16()), expected, **TIGHT)


KEYWORDS = {
    "plain": {},
    "everything": {
        "class_weights": torch.linspace(0.1, 1, 11),
        "label_smoothing": 0.1,
        "z_loss": 0.1,
        "softcap": 3.0,
        "temperature": 0.7,
        "shift": 1,
        "mask": torch.tensor([1.0, 0.5, 0, 2, 1]),
    },
}


@pytest.mark.parametrize(
    ("backend", "name"), [("aot_eager", "plain"), ("aot_eager", "everything"), ("inductor", "everything")]
)
def test_compiled(backend, name):
    loss, truth = (partial(f, reduction="none", **KEYWORDS[name]) for f in (cross_entropy, reference.cross_entropy))
    assert_matches(torch.compile(loss, fullgraph=True, backend=backend), truth, pair(3, 5, 11))


@pytest.mark.parametrize("shape", [(24, 50), (3, 50, 8)], ids=str)
@pytest.mark.parametrize("backend", [None, "aot_eager_decomp_partition"])
def test_saved_tensors_are_the_inputs(backend, shape):
    """Of [N, V] backward reads what it was given, and nothing else."""
    keywords = {name: v for name, v in KEYWORDS["everything"].items() if name not in ("mask", "shift", "class_weights")}
    keywords["class_weights"] = torch.linspace(0.1, 1, 50)

    def loss(logits, target):
        return cross_entropy(logits, target, class_dim=1, **keywords)

    logits, target = pair(*shape, dtype=torch.float32)
    run = loss if backend is None else torch.compile(loss, fullgraph=True, backend=backend)
    kept = []
    with saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        value = run(logits, target)
    ours = {v.untyped_storage().data_ptr() for v in (logits, target)}
    large = [t.shape for t in kept if t.numel() >= logits.numel() and t.untyped_storage().data_ptr() not in ours]
    assert large == []
    assert any(t.untyped_storage().data_ptr() in ours for t in kept)
    value.backward()


def test_torch_func_transforms():
    logits, target = (v.detach() for v in pair(3, 5))
    weights = torch.rand(5, dtype=torch.float64)
    mine = partial(cross_entropy, class_weights=weights, label_smoothing=0.2)
    theirs = partial(F.cross_entropy, weight=weights, label_smoothing=0.2)
    for transform in (torch.func.grad, torch.func.hessian):
        for argument in (0, 1):
            found = [transform(f, argument)(logits, target) for f in (mine, theirs)]
            torch.testing.assert_close(*found, **TIGHT)
    tangents = torch.randn_like(logits), torch.randn_like(target)
    torch.testing.assert_close(*(torch.func.jvp(f, (logits, target), tangents) for f in (mine, theirs)), **TIGHT)
    torch.testing.assert_close(*(torch.vmap(f)(logits, target) for f in (mine, theirs)), **TIGHT)


def test_create_graph_is_an_error():
    logits, target = pair(3, V)
    with pytest.raises(RuntimeError, match=r"^create_graph: expected False, got True"):
        torch.autograd.grad(cross_entropy(logits, target), logits, create_graph=True)


def test_masked_cross_entropy_and_module():
    logits, target = pair(2, 3, V)
    mask = torch.tensor([1, 0, 1])
    expected = reference.cross_entropy(logits, target, mask=mask, reduction="sum")
    torch.testing.assert_close(compiled_loss.masked_cross_entropy(logits, target, mask), expected, **TIGHT)
    module = compiled_loss.nn.CrossEntropy(reduction="sum")
    torch.testing.assert_close(module(logits, target, mask=mask), expected, **TIGHT)


@pytest.mark.parametrize(
    ("target", "keywords", "error", "text"),
    [
        (torch.zeros(3, 4), {}, ValueError, r"labels: expected the shape of logits, \[3, 5\], got \[3, 4\]"),
        (
            torch.zeros(3, 5).long(),
            {},
            ValueError,
            r"labels: expected the shape of logits without its last dimension, "
            r"\[3\], got \[3, 5\]: use labels.to\(logits.dtype\) where they are probabilities",
        ),
        (torch.zeros(3), {}, TypeError, r"labels: expected int64, got torch.float32: use labels.long\(\)"),
        (
            torch.zeros(3, 5),
            {"ignore_index": 0},
            ValueError,
            "ignore_index: expected a number < 0 beside labels that are probabilities, got 0: use mask",
        ),
        (
            torch.zeros(3, 5),
            {"mask": torch.ones(3, 5)},
            ValueError,
            r"mask: expected to broadcast to the labels' \[3\], got \[3, 5\]",
        ),
        (torch.zeros(3, 5), {"num_label_tokens": 3}, ValueError, "num_label_tokens: expected None unless"),
        (torch.zeros(3, 5, device="meta"), {}, ValueError, "labels: expected on cpu like the first argument, got meta"),
        (
            torch.zeros(3, 5),
            {"label_smoothing": 2},
            ValueError,
            "label_smoothing: expected a number from 0 to 1, got 2",
        ),
        (torch.zeros(3, 5), {"reduction": "avg"}, ValueError, "reduction: expected one of 'none', 'sum', 'mean', got"),
        (torch.zeros(3, 5), {"class_dim": 2}, ValueError, "class_dim: expected from -2 to 1, got 2"),
        (torch.zeros(3, 5), {"class_dim": True}, TypeError, "class_dim: expected an int, got bool"),
    ],
)
def test_probabilities_errors(target, keywords, error, text):
    with pytest.raises(error, match="^" + text):
        cross_entropy(torch.zeros(3, 5), target, **keywords)


@pytest.mark.parametrize(
    "name",
    [
        "linear_cross_entropy",
        "linear_cross_entropy_with_statistics",
        "linear_token_statistics",
        "linear_distillation",
        "token_statistics",
        "distillation",
    ],
)
def test_error_of_losses_without_probabilities(name):
    head, logits, probabilities = (torch.zeros(3, 4), torch.zeros(5, 4)), torch.zeros(3, 5), torch.zeros(3, 5)
    tensors = {"linear_distillation": (*head, *head), "token_statistics": (logits,), "distillation": (logits, logits)}
    with pytest.raises(
        TypeError,
        match=(
            r"^labels: expected int64 \[3\], got torch.float32 \[3, 5\]: probabilities are labels of "
            r"cross_entropy\(\) on logits, and target_probs of linear_soft_cross_entropy\(\) on a head$"
        ),
    ):
        getattr(compiled_loss, name)(*tensors.get(name, head), probabilities)
