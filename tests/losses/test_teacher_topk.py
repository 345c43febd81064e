"""teacher_topk: distillation from a teacher of whom the top k of each distribution was kept."""

from functools import partial

import pytest
import torch
from comparing import TIGHT, assert_accurate, assert_matches, in_fp64
from divergence_cases import CHUNKS, DIVERGENCES, EACH, KEYWORDS, SHAPES, cached, heads

from compiled_loss import Chunking, distillation, linear_distillation, reference
from compiled_loss.testing import count_graphs


@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("name", ["plain", "everything", "count", "none"])
@pytest.mark.parametrize("shape", SHAPES[:3], ids=str)
@pytest.mark.parametrize("k", [1, 4, 29])
def test_teacher_topk_matches_reference(divergence, name, shape, k):
    """On heads and on logits, as the reference in fp64; 29 is at least V."""
    keywords = {"divergence": divergence, **KEYWORDS.get(name, EACH)}
    ignore_index = keywords.get("ignore_index", -100)
    tensors, labels = heads(*shape, ignore_index=ignore_index, scale=0.5)  # tails 1 - sum can tell
    keywords["teacher_topk"] = cached(*tensors[2:], k, keywords.get("temperature", 1.0))
    loss = partial(linear_distillation, chunking=CHUNKS, **keywords)
    truth = partial(reference.linear_distillation, **keywords)
    assert_matches(loss, truth, (*tensors[:2], None, None, labels))
    logits = (tensors[0] @ tensors[1].t()).detach().requires_grad_()
    loss, truth = (partial(fn, **keywords) for fn in (distillation, reference.distillation))
    assert_matches(loss, truth, (logits, None, labels))


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_topk_of_all_classes_is_distillation(divergence):
    tensors, labels = heads((9,), 4, 6, 13)
    keywords = {"divergence": divergence, "temperature": 1.7, "hard_label_weight": 0.3}
    top = cached(*tensors[2:], 13, 1.7)

    def loss(*inputs):
        return linear_distillation(*inputs, None, None, labels, teacher_topk=top, **keywords)

    def truth(*inputs):
        return reference.linear_distillation(*inputs, *tensors[2:], labels, **keywords)

    assert_matches(loss, truth, tensors[:2])


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_tail_is_a_lower_bound_that_rises_with_k(divergence):
    """NOTE [Tail]: a lower bound that rises with k, and a gradient that keeps the proportions in the tail."""
    student, teacher = torch.randn(6, 11, dtype=torch.float64), torch.randn(6, 11, dtype=torch.float64)
    labels = torch.zeros(6, dtype=torch.int64)
    whole = reference.distillation(student, teacher, labels, divergence=divergence)
    found = []
    for k in (1, 3, 7, 11):
        values, indices = teacher.log_softmax(-1).topk(k)
        z = student.clone().requires_grad_()
        found.append(distillation(z, None, labels, teacher_topk=(values, indices), divergence=divergence))
        (d,) = torch.autograd.grad(found[-1], z)
        share = (d / student.softmax(-1)).scatter(-1, indices, float("nan"))
        if k < 11:
            assert (share.nanmean(-1, keepdim=True) - share).nan_to_num(0).abs().max() < 1e-12
    found = torch.stack(found).detach()
    assert (found.diff() > 0).all() and (found[:-1] < whole).all()
    torch.testing.assert_close(found[-1], whole, **TIGHT)


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_tail_close_to_zero(divergence):
    """1 - sum would lose the student's; the teacher's below fp32's resolution counts as that."""
    student = torch.tensor([[20.0, 3.0, 1.0, -1.0, 0.5]]).requires_grad_()
    labels, indices = torch.zeros(1, dtype=torch.int64), torch.tensor([[1, 0]])
    for teacher in ([2.0, 1.5, 0.0, 0.0, 0.0], [30.0, 29.0, 0.0, 0.0, 0.0]):
        values = torch.tensor([teacher]).log_softmax(-1).gather(-1, indices)
        keywords = {"divergence": divergence, "teacher_topk": (values, indices)}
        loss = distillation(student, None, labels, **keywords)
        exact = student.detach().double().requires_grad_()
        left = (1 - values.double().exp().sum(-1, keepdim=True)).clamp_min(torch.finfo(torch.float32).eps).log()
        rest = exact.log_softmax(-1)[:, 2:].logsumexp(-1, keepdim=True)
        coarse = torch.cat([exact.log_softmax(-1).gather(-1, indices), rest], -1)
        target = torch.cat([values.double(), left], -1)
        truth = reference.distillation(coarse, target, labels, divergence=divergence)
        torch.testing.assert_close(loss.double(), truth, rtol=1e-5, atol=1e-6)
        (mine,), (theirs,) = torch.autograd.grad(loss, student), torch.autograd.grad(truth, exact)
        torch.testing.assert_close(mine.double(), theirs, rtol=1e-5, atol=1e-6)


def test_minus_inf_in_the_topk_and_in_the_tail():
    """-inf in the top and in the tail, of which nothing is left."""
    student = torch.randn(3, 9)
    student[:, :4] = float("-inf")
    values, indices = student.add(torch.randn(3, 9)).log_softmax(-1).topk(6)
    for divergence in DIVERGENCES:
        z = student.clone().requires_grad_()
        keywords = {"divergence": divergence, "hard_label_weight": 0.2}
        loss = distillation(z, None, torch.full((3,), 5), teacher_topk=(values, indices), **keywords)
        teacher = torch.full((3, 9), float("-inf")).scatter(-1, indices, values)
        torch.testing.assert_close(loss, distillation(z, teacher, torch.full((3,), 5), **keywords))
        (d,) = torch.autograd.grad(loss, z)
        assert d.isfinite().all() and (d[:, :4] == 0).all()


def call(name):
    """(function, inputs) of each form, with everything on."""
    tensors, labels = heads((3, 5), 4, 6, 13, dtype=torch.float32, scale=0.5)  # tails that fp32 can tell
    values, indices = cached(*tensors[2:], 5, 0.6)
    options = KEYWORDS["everything"] | {"ignore_index": -100, "divergence": name.split()[-1]}
    if name.startswith("logits"):
        logits = (tensors[0] @ tensors[1].t()).detach().requires_grad_()
        inputs = (logits, values, indices, labels)
        return lambda z, v, i, y: distillation(z, None, y, teacher_topk=(v, i), **options), inputs
    if name.startswith("none"):
        options["reduction"] = "none"

    def linear(h, w, v, i, y):
        return linear_distillation(h, w, None, None, y, teacher_topk=(v, i), chunking=CHUNKS, **options)

    return linear, (*tensors[:2], values, indices, labels)


FORMS = ["head jsd", "none reverse_kl", "logits forward_kl"]

FIRST = [FORMS[0], *(pytest.param(name, marks=pytest.mark.slow) for name in FORMS[1:])]


@pytest.mark.parametrize("name", FIRST)
def test_compiled_matches_eager_in_one_graph(name):
    function, inputs = call(name)
    assert_matches(torch.compile(function, fullgraph=True), function, inputs, rtol=1e-5, atol=1e-6)
    assert count_graphs(function, [inputs, (*inputs[:-1], torch.zeros_like(inputs[-1]))]) == 1


@pytest.mark.parametrize("name", FORMS)
def test_gradcheck_functorch_backward_twice(name):
    """gradcheck, functorch, backward twice, no gradient of the teacher's, no second derivative."""
    function, inputs = call(name)
    assert torch.autograd.gradcheck(function, [in_fp64(v) for v in inputs])
    inputs = [v.detach().requires_grad_() if v.is_floating_point() else v for v in inputs]
    wanted = inputs[: len(inputs) - 3]
    loss = function(*inputs)
    upstream = torch.rand_like(loss)
    first = torch.autograd.grad(loss, wanted, upstream, retain_graph=True)
    twice = torch.autograd.grad(loss, wanted, 2 * upstream, retain_graph=True)
    torch.testing.assert_close(twice, tuple(2 * g for g in first))
    assert torch.autograd.grad(loss, inputs[-3], upstream, retain_graph=True, allow_unused=True) == (None,)
    with pytest.raises(RuntimeError, match=r"^create_graph: expected False"):
        torch.autograd.grad(loss, wanted, upstream, create_graph=True)
    plain = [v.detach() for v in inputs]
    found = torch.func.grad(lambda *i: (function(*i) * upstream).sum(), tuple(range(len(wanted))))(*plain)
    torch.testing.assert_close(found, first)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("form", ["top", "top, none", "none"])
def test_error_budget(dtype, divergence, form):
    """Contract 4: within twice the error of the unchunked computation in the same dtypes."""
    tensors, labels = heads((224,), 32, 24, 448, dtype=dtype, scale=0.5)
    keywords = {"divergence": divergence, "temperature": 1.5, "hard_label_weight": 0.2}
    inputs = (*tensors, labels)
    if form.startswith("top"):
        keywords["teacher_topk"] = cached(*tensors[2:], 20, 1.5, dtype)
        inputs = (*tensors[:2], None, None, labels)
    if form.endswith("none"):
        keywords["reduction"] = "none"
    upstream = torch.rand(224, dtype=torch.float64) / 224 if form.endswith("none") else None
    loss = partial(linear_distillation, chunking=Chunking(chunk_size=32), **keywords)
    truth = partial(reference.linear_distillation, **keywords)
    assert_accurate(loss, truth, truth, inputs, upstream)
