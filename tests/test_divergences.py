"""Distillation and soft cross-entropy: numbers, gradients, graphs and errors, on logits and on heads."""

import pytest
import torch
from torch.nn import functional as F

import compiled_loss
from compiled_loss import (
    Chunking,
    distillation,
    linear_distillation,
    linear_soft_cross_entropy,
    masked_soft_cross_entropy,
    reference,
)
from compiled_loss.testing import assert_within_error_budget, count_graphs, inputs_unchanged

TIGHT = {"rtol": 1e-11, "atol": 1e-12}  # fp64, a few hundred roundings
DIVERGENCES = ("forward_kl", "reverse_kl", "jsd")
KEYWORDS = {
    "plain": {},
    "temperature": {"temperature": 2.5},
    "hard labels": {"hard_label_weight": 0.3},
    "hard labels alone": {"hard_label_weight": 1.0},
    "everything": {"temperature": 0.6, "hard_label_weight": 0.3, "jsd_weight": 0.2, "ignore_index": 1},
    "sum": {"reduction": "sum"},
    "count": {"reduction": "sum", "num_label_tokens": 7, "hard_label_weight": 0.5},
    "no count": {"reduction": "sum", "num_label_tokens": torch.tensor(0)},
}
EACH = {"reduction": "none", "hard_label_weight": 0.4}
SHAPES = [((3, 5), 4, 6, 13), ((11,), 7, 3, 29), ((1, 1), 3, 2, 1), ((2, 1, 3), 1, 1, 2)]


def heads(shape, width, teacher_width, vocab, dtype=torch.float64, ignore_index=-100, scale=2.0):
    """Student's and teacher's hidden states and weights, labels of which some are ignored."""
    hidden = scale * torch.randn(*shape, width, dtype=torch.float64)
    weight = torch.randn(vocab, width, dtype=torch.float64)
    teacher = scale * torch.randn(*shape, teacher_width, dtype=torch.float64)
    teacher_weight = torch.randn(vocab, teacher_width, dtype=torch.float64)
    labels = torch.randint(0, vocab, shape)
    labels = torch.where(torch.rand(shape) < 0.3, ignore_index, labels)
    tensors = [v.to(dtype) for v in (hidden, weight, teacher, teacher_weight)]
    return [v.requires_grad_(i < 2) for i, v in enumerate(tensors)], labels


def check(function, truth, inputs, wanted, **tolerance):
    """Value and gradients, with an upstream gradient, and the inputs as they were."""
    expected = truth(*inputs)
    upstream = torch.rand_like(expected)
    with inputs_unchanged(*inputs):
        actual = function(*inputs)
        torch.testing.assert_close(actual, expected, **tolerance)
        for mine, theirs in zip(
            torch.autograd.grad(actual, wanted, upstream), torch.autograd.grad(expected, wanted, upstream), strict=True
        ):
            torch.testing.assert_close(mine, theirs, **tolerance)


# Distillation -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("name", [*KEYWORDS, "none"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_linear_distillation(divergence, name, shape):
    keywords = {"divergence": divergence, **KEYWORDS.get(name, EACH)}
    tensors, labels = heads(*shape, ignore_index=keywords.get("ignore_index", -100))

    def loss(*inputs):
        return linear_distillation(*inputs, chunking=Chunking(chunk_size=4), **keywords)

    def truth(*inputs):
        return reference.linear_distillation(*inputs, **keywords)

    check(loss, truth, (*tensors, labels), tensors[:2], **TIGHT)
    with torch.no_grad():
        torch.testing.assert_close(loss(*tensors, labels), truth(*tensors, labels), **TIGHT)


@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("name", [*KEYWORDS, "none"])
@pytest.mark.parametrize("layout", ["contiguous", "transposed", "sliced"])
def test_distillation(divergence, name, layout):
    keywords = {"divergence": divergence, **KEYWORDS.get(name, EACH)}

    def logits():
        return {
            "contiguous": lambda: torch.randn(3, 5, 29, dtype=torch.float64),
            "transposed": lambda: torch.randn(5, 3, 29, dtype=torch.float64).transpose(0, 1),
            "sliced": lambda: torch.randn(3, 6, 31, dtype=torch.float64)[:, :-1, 1:-1],
        }[layout]()

    student, teacher = logits().requires_grad_(), logits()
    labels = torch.where(torch.rand(5, 3) < 0.3, keywords.get("ignore_index", -100), torch.randint(0, 29, (5, 3))).t()
    inputs = (student, teacher, labels)

    def loss(*inputs):
        return distillation(*inputs, **keywords)

    def truth(*inputs):
        return reference.distillation(*inputs, **keywords)

    check(loss, truth, inputs, [student], **TIGHT)


def test_forward_kl_is_torchs():
    student, teacher = torch.randn(7, 11), torch.randn(7, 11)
    expected = 4 * F.kl_div(
        F.log_softmax(student / 2, -1), F.log_softmax(teacher / 2, -1), reduction="batchmean", log_target=True
    )
    loss = distillation(student, teacher, torch.zeros(7, dtype=torch.int64), temperature=2.0)
    torch.testing.assert_close(loss, expected)


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_the_teacher_of_itself_teaches_nothing(divergence):
    logits = torch.randn(5, 17, requires_grad=True)
    loss = distillation(logits, logits, torch.zeros(5, dtype=torch.int64), divergence=divergence)
    assert loss.abs() < 1e-6
    assert torch.autograd.grad(loss, logits)[0].abs().max() < 1e-6


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_the_teacher_gets_no_gradient(divergence):
    """kd_loss.py: it got one where it required it."""
    tensors, labels = heads((5,), 3, 4, 7)
    tensors = [v.detach().requires_grad_() for v in tensors]
    linear_distillation(*tensors, labels, divergence=divergence, hard_label_weight=0.5).backward()
    assert [v.grad is not None for v in tensors] == [True, True, False, False]
    student, teacher = (torch.randn(5, 7, requires_grad=True) for _ in range(2))
    distillation(student, teacher, labels, divergence=divergence).backward()
    assert student.grad is not None and teacher.grad is None


@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_all_ignored_is_zero_and_attached(divergence, reduction):
    """kd_loss.py: a detached zero, on which backward() raises."""
    tensors, labels = heads((5,), 3, 4, 7)
    labels = torch.full_like(labels, -100)
    keywords = {"divergence": divergence, "reduction": reduction, "hard_label_weight": 0.5}
    student = torch.randn(5, 7, requires_grad=True)
    broken = torch.full((5, 7), float("nan"))
    assert distillation(broken, broken, labels, **keywords) == 0
    for loss, wanted in (
        (linear_distillation(*tensors, labels, **keywords), tensors[:2]),
        (distillation(student, student, labels, **keywords), [student]),
    ):
        assert loss == 0
        grads = torch.autograd.grad(loss, wanted)
        assert all(g.abs().max() == 0 for g in grads)


def test_tokens_that_both_forbid():
    """-inf in both: 0 (-inf - -inf) is 0 here."""
    student, teacher = torch.randn(3, 9), torch.randn(3, 9)
    student[:, :4] = teacher[:, :4] = float("-inf")
    labels = torch.full((3,), 5)
    for divergence in DIVERGENCES:
        keywords = {"divergence": divergence, "hard_label_weight": 0.2}
        z = student.clone().requires_grad_()
        loss = distillation(z, teacher, labels, **keywords)
        expected = distillation(student[:, 4:], teacher[:, 4:], labels - 4, **keywords)
        torch.testing.assert_close(loss, expected)
        (d,) = torch.autograd.grad(loss, z)
        assert d.isfinite().all() and (d[:, :4] == 0).all()
        traced = torch.func.grad(lambda z, keywords=keywords: distillation(z, teacher, labels, **keywords))(student)
        torch.testing.assert_close(traced, d)


def test_distributions_far_apart():
    """exp(95) is past fp32's range while exp(-95) is not yet 0."""
    student, teacher = torch.tensor([[95.0, 0.0]]), torch.tensor([[0.0, 95.0]])
    for divergence in DIVERGENCES:
        z = student.clone().requires_grad_()
        loss = distillation(z, teacher, torch.zeros(1, dtype=torch.int64), divergence=divergence)
        exact = student.double().requires_grad_()
        truth = reference.distillation(
            exact, teacher.double(), torch.zeros(1, dtype=torch.int64), divergence=divergence
        )
        torch.testing.assert_close(loss.double(), truth, rtol=1e-6, atol=1e-6)
        (mine,), (theirs,) = torch.autograd.grad(loss, z), torch.autograd.grad(truth, exact)
        torch.testing.assert_close(mine.double(), theirs, rtol=1e-6, atol=1e-6)


# Soft cross-entropy -------------------------------------------------------------------------------------------------


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
    check(masked_soft_cross_entropy, reference.masked_soft_cross_entropy, inputs, [logits, target], **TIGHT)


def test_soft_cross_entropy_of_labels_is_cross_entropy():
    logits, labels = torch.randn(4, 6, 11), torch.randint(0, 11, (4, 6))
    soft = masked_soft_cross_entropy(logits, F.one_hot(labels, 11).float(), torch.ones(4, 6, 1))
    torch.testing.assert_close(soft, compiled_loss.cross_entropy(logits, labels))


TARGETS = ["target_probs", "teacher", "draft vocabulary"]


def soft_targets(name, shape, vocab, width, dtype=torch.float64):
    if name == "target_probs":
        return {"target_probs": torch.randn(*shape, vocab, dtype=torch.float64).softmax(-1).to(dtype)}
    rows = 3 * vocab if name == "draft vocabulary" else vocab
    found = {
        "teacher_hidden": 2 * torch.randn(*shape, width, dtype=torch.float64).to(dtype),
        "teacher_weight": torch.randn(rows, width, dtype=torch.float64).to(dtype),
    }
    if name == "draft vocabulary":
        found["draft_to_target"] = torch.randperm(rows)[:vocab]
    return found


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("keywords", [{}, {"temperature": 1.7}, {"reduction": "sum", "num_label_tokens": 9}], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_linear_soft_cross_entropy(target, keywords, shape):
    rows, _, teacher_width, vocab = shape
    (hidden, weight, *_), _ = heads(*shape)
    mask = torch.rand(*rows, 1) * (torch.rand(*rows, 1) < 0.7)
    options = {**soft_targets(target, rows, vocab, teacher_width), **keywords}

    def loss(*inputs):
        return linear_soft_cross_entropy(*inputs, chunking=Chunking(chunk_size=4), **options)

    def truth(*inputs):
        return reference.linear_soft_cross_entropy(*inputs, **options)

    check(loss, truth, (hidden, weight, mask), [hidden, weight], **TIGHT)


def test_an_empty_position_mask_is_zero_and_attached():
    logits = torch.randn(2, 3, 5, requires_grad=True)
    loss = masked_soft_cross_entropy(logits, torch.rand(2, 3, 5), torch.zeros(2, 3, 1))
    assert loss == 0 and torch.autograd.grad(loss, logits)[0].abs().max() == 0


# Contracts ----------------------------------------------------------------------------------------------------------


def everything(name):
    """(function, tensors that need gradients, the rest) of each, small, with everything on."""
    tensors, labels = heads((3, 5), 4, 6, 13)
    mask = torch.rand(3, 5, 1)
    options = KEYWORDS["everything"] | {"ignore_index": -100}
    if name in DIVERGENCES:
        return (
            lambda *i: linear_distillation(*i, divergence=name, chunking=Chunking(chunk_size=4), **options),
            (*tensors, labels),
        )
    if name.startswith("logits"):
        divergence = name.removeprefix("logits ")
        student, teacher = torch.randn(3, 5, 13, requires_grad=True), torch.randn(3, 5, 13)
        return lambda *i: distillation(*i, divergence=divergence, **options), (student, teacher, labels)
    if name == "soft logits":
        logits, target = torch.randn(3, 5, 13, requires_grad=True), torch.rand(3, 5, 13, requires_grad=True)
        return masked_soft_cross_entropy, (logits, target, mask)
    found = soft_targets(name, (3, 5), 13, 6)
    return lambda h, w, m: linear_soft_cross_entropy(h, w, m, chunking=Chunking(chunk_size=4), **found), (
        *tensors[:2],
        mask,
    )


ALL = [*DIVERGENCES, *(f"logits {d}" for d in DIVERGENCES), "soft logits", *TARGETS]


CI = ("jsd", "logits forward_kl", "target_probs")  # with Inductor, whose C++ takes its time


@pytest.mark.parametrize("name", [n if n in CI else pytest.param(n, marks=pytest.mark.slow) for n in ALL])
def test_compiled(name):
    """One graph, the eager numbers, and another mask compiles nothing."""
    function, inputs = everything(name)
    wanted = [v for v in inputs if v.requires_grad]
    check(torch.compile(function, fullgraph=True), function, inputs, wanted, rtol=1e-5, atol=1e-6)
    assert count_graphs(function, [inputs, (*inputs[:-1], torch.zeros_like(inputs[-1]))]) == 1


@pytest.mark.parametrize("name", ALL)
def test_gradcheck(name):
    function, inputs = everything(name)
    inputs = [v.double().detach().requires_grad_(v.requires_grad) if v.is_floating_point() else v for v in inputs]
    assert torch.autograd.gradcheck(function, inputs)


@pytest.mark.parametrize("name", ALL)
def test_backward_twice_and_no_second_derivative(name):
    function, inputs = everything(name)
    wanted = [v for v in inputs if v.requires_grad]
    loss = function(*inputs)
    first = torch.autograd.grad(loss, wanted, retain_graph=True)
    twice = torch.autograd.grad(loss, wanted, torch.full_like(loss, 2.0), retain_graph=True)
    for a, b in zip(first, twice, strict=True):
        torch.testing.assert_close(2 * a, b)
    with pytest.raises(RuntimeError, match=r"^create_graph: expected False"):
        torch.autograd.grad(loss, wanted, create_graph=True)


@pytest.mark.parametrize("name", ALL)
def test_functorch(name):
    function, inputs = everything(name)
    which = tuple(i for i, v in enumerate(inputs) if v.requires_grad)
    expected = torch.autograd.grad(function(*inputs), [inputs[i] for i in which])
    plain = [v.detach() for v in inputs]
    for mine, theirs in zip(torch.func.grad(function, which)(*plain), expected, strict=True):
        torch.testing.assert_close(mine, theirs)


@pytest.mark.parametrize("frozen", [0, 1])
def test_frozen(frozen):
    (*tensors,), labels = heads((9,), 4, 6, 13)
    tensors[frozen].requires_grad_(False)
    check(
        lambda *i: linear_distillation(*i, chunking=Chunking(chunk_size=4)),
        reference.linear_distillation,
        (*tensors, labels),
        [tensors[1 - frozen]],
        **TIGHT,
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("chunks", [1, 7])
def test_error_budget(dtype, divergence, chunks):
    """Contract 4: within twice the error of the unchunked computation in the same dtypes."""
    tensors, labels = heads((224,), 32, 24, 448, dtype=dtype, scale=0.5)
    keywords = {"divergence": divergence, "temperature": 1.5, "hard_label_weight": 0.2}
    exact = [v.detach().double().requires_grad_(v.requires_grad) for v in tensors]
    results = []
    for fn, inputs in (
        (lambda *i: linear_distillation(*i, labels, chunking=Chunking(chunk_size=224 // chunks), **keywords), tensors),
        (lambda *i: reference.linear_distillation(*i, labels, **keywords), tensors),
        (lambda *i: reference.linear_distillation(*i, labels, **keywords), exact),
    ):
        loss = fn(*inputs)
        results.append((loss, *torch.autograd.grad(loss, inputs[:2])))
    for name, *values in zip(("loss", "dH", "dW"), *results, strict=True):
        assert_within_error_budget(*values, name=f"{name} at {chunks} chunks")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_autocast(dtype):
    tensors, labels = heads((9,), 4, 6, 13, dtype=torch.float32)
    with torch.autocast("cpu", dtype=dtype, enabled=dtype != torch.float32):
        loss = linear_distillation(*tensors, labels)
    assert loss.dtype == torch.float32
    assert [g.dtype for g in torch.autograd.grad(loss, tensors[:2])] == [torch.float32] * 2
