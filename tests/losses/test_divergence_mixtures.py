"""Several divergences at once, total variation and acceptance by their digits, and the square of the temperature."""

from functools import partial

import pytest
import torch
from comparing import TIGHT, assert_accurate, assert_matches
from divergence_cases import CHUNKS, DIVERGENCES, cached, heads
from torch.nn import functional as F

from compiled_loss import (
    Chunking,
    distillation,
    distillation_with_statistics,
    linear_distillation,
    linear_distillation_with_statistics,
    reference,
)
from compiled_loss.engine import execution
from compiled_loss.testing import count_graphs

MIXTURES = {
    "two": {"forward_kl": 0.5, "total_variation": 0.5},
    "one": {"reverse_kl": 0.7},
    "both of alpha": {"acceptance": 0.3, "lk": 2.0},
    "with what lk is made of": {"lk": 1.0, "forward_kl": 0.25, "total_variation": 0.5},
    "all": {name: 0.1 * (i + 1) for i, name in enumerate(DIVERGENCES)},
    "some are 0": {"jsd": 0.0, "acceptance": 1.0},
}
KEYWORDS = {"temperature": 1.5, "hard_label_weight": 0.3, "jsd_weight": 0.2, "lk_decay": 1.7}


def given(form, k=4):
    """A function of a loss's name and a mixture, on hidden states and a weight or on logits; and those tensors."""
    tensors, labels = heads((3, 5), 4, 6, 13)
    teacher = (tensors[2] @ tensors[3].t()).detach()
    top = {"teacher_topk": cached(*tensors[2:], k, KEYWORDS["temperature"])}
    probabilities = {"teacher_probabilities": (teacher / KEYWORDS["temperature"]).softmax(-1)}
    stored = {"top": top, "probabilities": probabilities}.get(form.split()[-1], {})
    if form.startswith("heads"):
        of_teacher = (None, None) if stored else tuple(tensors[2:])

        def call(lib, divergence, hidden, weight, **keywords):
            keywords |= {} if lib is reference else {"chunking": CHUNKS}
            function = lib.linear_distillation
            return function(hidden, weight, *of_teacher, labels, divergence=divergence, **stored, **keywords)

        return call, tuple(tensors[:2])

    def call(lib, divergence, logits, **keywords):
        target = None if stored else teacher
        return lib.distillation(logits, target, labels, divergence=divergence, **stored, **keywords)

    return call, ((tensors[0] @ tensors[1].t()).detach().requires_grad_(),)


class lib:
    """The functions under test, by the names of the reference."""

    distillation, linear_distillation = distillation, linear_distillation


FORMS = [f"{a} {b}" for a in ("heads", "logits") for b in ("whole", "top", "probabilities")]


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("mixture", MIXTURES)
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_mixture_is_the_sum_of_single_ones(form, mixture, reduction):
    """Of the single ones here, and as the reference says; with weights that are numbers and with tensors."""
    call, tensors = given(form)
    weights, keywords = MIXTURES[mixture], {**KEYWORDS, "hard_label_weight": 0.0, "reduction": reduction}

    def summed(*tensors):
        return sum(w * call(lib, name, *tensors, **keywords) for name, w in weights.items())

    assert_matches(partial(call, lib, weights, **keywords), summed, tensors)
    keywords["hard_label_weight"] = 0.3
    as_tensors = {name: torch.tensor([w], dtype=torch.float64) for name, w in reversed(weights.items())}
    assert_matches(partial(call, lib, as_tensors, **keywords), partial(call, reference, weights, **keywords), tensors)


@pytest.mark.parametrize("form", FORMS)
def test_torch_func_grad(form):
    """By ordinary autograd, in fp64 and with rows of a vmap."""
    call, tensors = given(form)
    fn = partial(call, lib, MIXTURES["all"], **KEYWORDS)
    expected = torch.autograd.grad(fn(*tensors), tensors)
    plain = [v.detach() for v in tensors]
    torch.testing.assert_close(torch.func.grad(fn, tuple(range(len(plain))))(*plain), expected, **TIGHT)


def test_vmap_over_tokens():
    student, teacher, labels = torch.randn(6, 1, 9), torch.randn(6, 1, 9), torch.zeros(6, 1, dtype=torch.int64)
    fn = partial(distillation, divergence=MIXTURES["all"], reduction="sum")
    torch.testing.assert_close(torch.vmap(fn)(student, teacher, labels).sum(), fn(student, teacher, labels))


def plain(name, student, teacher):
    """In the words of the papers, with nothing of ours."""
    p, q = teacher.softmax(-1), student.softmax(-1)
    if name == "total_variation":
        return 0.5 * (p - q).abs().sum(-1).mean()
    if name == "acceptance":
        return -torch.minimum(p, q).sum(-1).log().mean()
    share = torch.exp(-3.0 * torch.minimum(p, q).sum(-1)).detach()
    kl = F.kl_div(student.log_softmax(-1), p, reduction="none").sum(-1)
    return (share * kl + (1 - share) * 0.5 * (p - q).abs().sum(-1)).mean()


@pytest.mark.parametrize("name", ["total_variation", "acceptance", "lk"])
@pytest.mark.parametrize("compile", [False, True])
def test_plain_torch(name, compile):
    student, teacher = torch.randn(7, 31, requires_grad=True), torch.randn(7, 31)
    labels = torch.zeros(7, dtype=torch.int64)

    def loss(student):
        return distillation(student, teacher, labels, divergence=name, compile=compile)

    assert_matches(loss, lambda z: plain(name, z, teacher), (student,))


@pytest.mark.parametrize("form", FORMS)
def test_cross_entropy_and_total_variation_in_one_pass(form):
    call, tensors = given(form)
    both = partial(call, lib, "total_variation", hard_label_weight=0.25)

    def apart(*tensors):
        return 0.75 * call(lib, "total_variation", *tensors) + call(lib, "jsd", *tensors, hard_label_weight=1.0) / 4

    assert_matches(both, apart, tensors)


@pytest.mark.parametrize("form", FORMS)
def test_without_the_square_of_the_temperature(form):
    call, tensors = given(form)
    keywords = {**KEYWORDS, "temperature_squared": False}
    assert_matches(partial(call, lib, "jsd", **keywords), partial(call, reference, "jsd", **keywords), tensors)
    keywords["hard_label_weight"] = 0.0
    without = call(lib, "jsd", *tensors, **keywords)
    torch.testing.assert_close(without * 1.5**2, call(lib, "jsd", *tensors, **keywords | {"temperature_squared": True}))


# Digits -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("traced", [False, True])
@pytest.mark.parametrize("gap", [1e-3, 0.1, 1.0, 5.0, 20.0, 40.0])
def test_acceptance_keeps_its_digits(gap, traced):
    """Alpha from 1 - 1e-4 to 1e-34, one token at a time: a sum has the digits of its largest.

    p and q have an eps or two of error each, and |p - q| that of the larger: near alpha = 1 it is absolute.
    """
    student, teacher = torch.tensor([[gap, -gap, 0.0]]), torch.tensor([[-gap, gap, 0.0]])
    student[0, 2] = teacher[0, 2] = -gap - 1
    labels = torch.zeros(1, dtype=torch.int64)

    def loss(z, teacher=teacher):
        return distillation(z, teacher, labels, divergence="acceptance")

    exact = student.double().requires_grad_()
    truth = reference.distillation(exact, teacher.double(), labels, divergence="acceptance")
    (d_truth,) = torch.autograd.grad(truth, exact)
    if traced:
        d, value = torch.func.grad_and_value(loss)(student)
    else:
        z = student.clone().requires_grad_()
        value = loss(z)
        (d,) = torch.autograd.grad(value, z)
    eps = torch.finfo(torch.float32).eps
    # An exponent has an error of eps times its size, which is that of the gap.
    torch.testing.assert_close(value.detach().double(), truth.detach(), rtol=4 * eps * (1 + gap), atol=2 * eps)
    torch.testing.assert_close(d.double(), d_truth, rtol=8 * eps * (1 + gap), atol=2 * eps)


@pytest.mark.parametrize("compile", [False, True])
def test_acceptance_of_equal_distributions_is_zero(compile):
    """And not the rounding of a sum of 1009 probabilities, which may be more than 1."""
    logits, labels = 3 * torch.randn(32, 1009), torch.zeros(32, dtype=torch.int64)
    keywords = {"divergence": "acceptance", "reduction": "none", "compile": compile}
    assert (distillation(logits, logits.clone(), labels, **keywords) == 0).all()


@pytest.mark.parametrize("far", [95.0, 300.0, float("inf")])
@pytest.mark.parametrize("compile", [False, True])
def test_an_alpha_below_the_least_number_is_finite(far, compile):
    """87.3, and a gradient that is no NaN; of a batch, no other token is touched."""
    student, teacher = torch.randn(3, 4), torch.randn(3, 4)
    student[1], teacher[1] = torch.tensor([0.0, 0.0, -far, -far]), torch.tensor([-far, -far, 0.0, 0.0])
    labels = torch.zeros(3, dtype=torch.int64)
    keywords = {"divergence": "acceptance", "reduction": "none"}
    z = student.clone().requires_grad_()
    loss = distillation(z, teacher, labels, compile=compile, **keywords)
    assert abs(loss[1].item() - 87.3365) < 1e-3
    (d,) = torch.autograd.grad(loss.sum(), z)
    assert d.isfinite().all() and d[1].abs().max() < 1
    others = distillation(student[::2], teacher[::2], labels[::2], **keywords)
    torch.testing.assert_close(loss[::2], others)
    traced = torch.func.grad(lambda z: distillation(z, teacher, labels, **keywords).sum())(student)
    assert traced.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("chunks", [1, 7])
def test_error_budget_of_a_mixture(dtype, chunks):
    tensors, labels = heads((224,), 32, 24, 448, dtype=dtype, scale=0.5)
    keywords = {"divergence": MIXTURES["all"], "temperature": 1.5, "hard_label_weight": 0.2}
    loss = partial(linear_distillation, chunking=Chunking(chunk_size=224 // chunks), **keywords)
    truth = partial(reference.linear_distillation, **keywords)
    assert_accurate(loss, truth, truth, (*tensors, labels), name=f"{chunks} chunks")


# Weights that change ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("of", [float, torch.tensor], ids=["numbers", "tensors"])
@pytest.mark.parametrize("head", [False, True])
def test_other_weights_compile_nothing(of, head):
    tensors, labels = heads((9,), 4, 6, 13, dtype=torch.float32)

    def loss(first, second):
        keywords = {"divergence": {"lk": first, "jsd": second}, "lk_decay": first}
        if head:
            return linear_distillation(*tensors, labels, chunking=CHUNKS, **keywords)
        return distillation(tensors[0] @ tensors[1].t(), tensors[2] @ tensors[3].t(), labels, **keywords)

    calls = [(of(0.2), of(0.4)), (of(0.3), of(0.5)), (of(0.7), of(0.1)), (of(0.6), of(0.9))]
    assert count_graphs(loss, calls) <= (1 if of is torch.tensor else 2)  # a number is a constant until it changes


@pytest.mark.parametrize("head", [False, True])
def test_other_numbers_of_tokens_compile_once_more(head):
    """The first is static, all others dynamic; statistics come along."""

    def loss(hidden, weight, teacher, teacher_weight, labels):
        keywords = {"divergence": MIXTURES["all"], **KEYWORDS}
        if head:
            given = (hidden, weight, teacher, teacher_weight, labels)
            return linear_distillation_with_statistics(*given, chunking=CHUNKS, **keywords).statistics.acceptance
        given = (hidden @ weight.t(), teacher @ teacher_weight.t(), labels)
        return distillation_with_statistics(*given, **keywords).statistics.acceptance

    calls = []
    for tokens in (9, 7, 12, 5):
        tensors, labels = heads((tokens,), 4, 6, 13, dtype=torch.float32)
        calls.append((*tensors, labels))
    assert count_graphs(loss, calls) == 2


def test_other_weights_write_no_kernel():
    tensors, labels = heads((9,), 4, 6, 13, dtype=torch.float32)
    chunking = Chunking(chunk_size=9, compile=True)
    for weight in (0.2, 0.7):
        mixture = {"forward_kl": weight, "total_variation": 1 - weight}
        found = linear_distillation(*tensors, labels, divergence=mixture, chunking=chunking)
        torch.testing.assert_close(found, reference.linear_distillation(*tensors, labels, divergence=mixture))
        assert len(execution._KERNELS) == 1


@pytest.mark.parametrize(
    "form", [form if form == "heads whole" else pytest.param(form, marks=pytest.mark.slow) for form in FORMS]
)
def test_compiled(form):
    call, tensors = given(form)
    fn = partial(call, lib, MIXTURES["all"], **KEYWORDS)
    assert_matches(torch.compile(fn, fullgraph=True), fn, tensors)
