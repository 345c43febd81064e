"""Distillation from a teacher of whom the top of each distribution was kept."""

from functools import partial

import pytest
import torch
from comparing import TIGHT, assert_accurate, assert_matches, assert_same, in_fp64
from test_divergences import CHUNKS, DIVERGENCES, EACH, KEYWORDS, SHAPES, heads

from compiled_loss import Chunking, distillation, linear_distillation, reference
from compiled_loss.testing import count_graphs


def cached(teacher, teacher_weight, k, temperature=1.0, dtype=None):
    """The top of the teacher's distribution, in no order."""
    log_p = (teacher.double() @ teacher_weight.double().t() / temperature).log_softmax(-1)
    k = min(k, log_p.shape[-1])
    values, indices = log_p.topk(k)
    order = torch.randperm(k)
    return values[..., order].to(dtype or teacher.dtype), indices[..., order]


@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("name", ["plain", "everything", "count", "none"])
@pytest.mark.parametrize("shape", SHAPES[:3], ids=str)
@pytest.mark.parametrize("k", [1, 4, 29])
def test_values_and_gradients(divergence, name, shape, k):
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
def test_the_whole_teacher_is_the_teacher(divergence):
    tensors, labels = heads((9,), 4, 6, 13)
    keywords = {"divergence": divergence, "temperature": 1.7, "hard_label_weight": 0.3}
    top = cached(*tensors[2:], 13, 1.7)

    def loss(*inputs):
        return linear_distillation(*inputs, None, None, labels, teacher_topk=top, **keywords)

    def truth(*inputs):
        return reference.linear_distillation(*inputs, *tensors[2:], labels, **keywords)

    assert_matches(loss, truth, tensors[:2])


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_what_is_not_known_is_not_lost(divergence):
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
def test_a_tail_of_almost_nothing(divergence):
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


def test_classes_that_both_forbid():
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
def test_compiled(name):
    function, inputs = call(name)
    assert_matches(torch.compile(function, fullgraph=True), function, inputs, rtol=1e-5, atol=1e-6)
    assert count_graphs(function, [inputs, (*inputs[:-1], torch.zeros_like(inputs[-1]))]) == 1


@pytest.mark.parametrize("name", FORMS)
def test_autograd(name):
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


def test_indices_that_are_no_class():
    """Of an ignored token: anything. Of another: an error, or under compile its NaN and nobody else's."""
    logits, labels = torch.randn(4, 7), torch.tensor([0, -100, 0, 0])
    values, indices = logits.log_softmax(-1).topk(3)
    indices = indices.clone()
    indices[1] = -1
    keywords = {"reduction": "none", "teacher_topk": (values, indices)}
    assert distillation(logits, None, labels, **keywords).isfinite().all()
    indices[2, 1] = 7
    with pytest.raises(ValueError, match=r"^teacher_topk\[1\]: expected 0 <= index < V = 7, got 7"):
        distillation(logits, None, labels, **keywords)
    compiled = torch.compile(lambda z, v, i: distillation(z, None, labels, reduction="none", teacher_topk=(v, i)))
    assert compiled(logits, values, indices).isnan().tolist() == [False, False, True, False]


KEPT = (5, 3, 1, 5, 0, 4)  # of five entries a row
PADDING = {"0": 0, "-1": -1, "past V": 10**6, "the last again": None}


def padded(value, index):
    """Rows of five entries of which some are padding, and the loss of what is kept alone, in fp64."""
    student, teacher = torch.randn(6, 13, dtype=torch.float64), torch.randn(6, 13, dtype=torch.float64)
    values, indices = teacher.log_softmax(-1).topk(5)
    indices[0, 4], values[0, 4] = 12, -9.0  # class 0 is in some tops and not in others
    kept = [(values[r, :k].clone(), indices[r, :k].clone()) for r, k in enumerate(KEPT)]
    for r, k in enumerate(KEPT):
        values[r, k:] = value
        indices[r, k:] = indices[r, max(0, k - 1)].item() if PADDING[index] is None else PADDING[index]

    def truth(z, divergence):
        rows = []
        for r, (v, i) in enumerate(kept):
            log_q = z[r].log_softmax(-1)
            rest = torch.ones(13, dtype=torch.bool).index_fill(0, i, False)
            coarse = torch.cat([log_q[i], log_q[rest].logsumexp(-1, keepdim=True)])
            target = torch.cat([v, (1 - v.exp().sum(-1, keepdim=True)).clamp_min(2**-52).log()])
            label = torch.zeros(1, dtype=torch.int64)
            rows.append(reference.distillation(coarse[None], target[None], label, divergence=divergence))
        return torch.stack(rows)

    return student.requires_grad_(), values, indices, truth


@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("value", [float("-inf"), -1e9])
@pytest.mark.parametrize("index", PADDING)
def test_padding(index, value, divergence):
    """Class 0 counted twice where it was the padding's index: 2.57 for 2.02, compiled and on GPUs."""
    student, values, indices, truth = padded(value, index)
    labels, order = torch.zeros(6, dtype=torch.int64), torch.randperm(5)
    expected = truth(student, divergence)
    weight = torch.randn(13, 4, dtype=torch.float64)
    hidden = torch.linalg.lstsq(weight.t() @ weight, weight.t() @ student.detach().t()).solution.t()
    heads = (hidden @ weight.t()).requires_grad_()
    for top in ((values, indices), (values[:, order], indices[:, order])):
        keywords = {"teacher_topk": top, "divergence": divergence, "reduction": "none"}
        upstream = torch.rand(6, dtype=torch.float64)
        found = distillation(student, None, labels, **keywords)
        (gradient,) = assert_same(found, expected, [student], upstream)

        def total(z, upstream=upstream, keywords=keywords):
            return (distillation(z, None, labels, **keywords) * upstream).sum()

        found = torch.func.grad(total)(student.detach())
        torch.testing.assert_close(found, gradient, **TIGHT)
        found = linear_distillation(hidden, weight, None, None, labels, chunking=CHUNKS, **keywords)
        torch.testing.assert_close(found, truth(heads, divergence).detach(), **TIGHT)


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_a_sampled_token_that_was_appended(divergence):
    """Of a class that is listed twice the larger value counts."""
    student, teacher = torch.randn(4, 9).double(), torch.randn(4, 9).double()
    labels = torch.zeros(4, dtype=torch.int64)
    values, indices = teacher.log_softmax(-1).topk(3)
    expected = reference.distillation(student, None, labels, teacher_topk=(values, indices), divergence=divergence)
    for twice in (values[:, 1:2], values[:, 1:2] - 3):
        top = (torch.cat([twice, values], -1), torch.cat([indices[:, 1:2], indices], -1))
        found = distillation(student, None, labels, teacher_topk=top, divergence=divergence)
        torch.testing.assert_close(found, expected, **TIGHT)


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_padding_compiled(backend):
    """Compiled code looked at no index: the number was wrong in silence."""
    student, values, indices, truth = padded(float("-inf"), "0")
    labels = torch.zeros(6, dtype=torch.int64)

    def loss(z, v, i):
        return distillation(z, None, labels, teacher_topk=(v, i), reduction="none")

    compiled = torch.compile(loss, fullgraph=True, backend=backend)
    assert_matches(compiled, lambda z, v, i: truth(z, "forward_kl"), (student, values, indices))


BAD = {
    "nothing": (dict(), r"^teacher_logits: expected a Tensor, or teacher_topk, got neither"),
    "both": (dict(teacher=True), r"^teacher_logits: expected None beside teacher_topk, got a Tensor"),
    "no pair": (dict(topk=torch.zeros(2, 3)), r"^teacher_topk: expected \(values, indices\) or None, got Tensor"),
    "values": (dict(values=[0.0]), r"^teacher_topk\[0\]: expected a Tensor, got list"),
    "integers": (dict(values=torch.zeros(2, 3).long()), r"^teacher_topk\[0\]: expected float32, .*, got torch.int64"),
    "shape": (dict(values=torch.zeros(3)), r"^teacher_topk\[0\]: expected \[2, k\] with k from 1 to V = 5, got \[3\]"),
    "tokens": (dict(indices=torch.zeros(3, 3).long()), r"^teacher_topk\[1\]: expected \[2, k\] .*, got \[3, 3\]"),
    "too many": (dict(values=torch.zeros(2, 6)), r"^teacher_topk\[0\]: expected \[2, k\] with k from 1 to V = 5"),
    "k": (
        dict(indices=torch.zeros(2, 2).long()),
        r"^teacher_topk\[1\]: expected \[2, 3\] like its values",
    ),
    "dtype": (dict(indices=torch.zeros(2, 3).int()), r"^teacher_topk\[1\]: expected int64, got torch.int32"),
    "logits": (
        dict(values=torch.tensor([[3.0, 1.0, 0.0]] * 2)),
        r"^teacher_topk\[0\]: expected log-prob",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_errors(name):
    change, message = BAD[name]
    logits, labels = torch.zeros(2, 5), torch.zeros(2, dtype=torch.int64)
    topk = (change.get("values", torch.full((2, 3), -2.0)), change.get("indices", torch.tensor([[0, 1, 2]] * 2)))
    topk = None if name == "nothing" else change.get("topk", topk)
    with pytest.raises((ValueError, TypeError), match=message):
        distillation(logits, logits if "teacher" in change else None, labels, teacher_topk=topk)
