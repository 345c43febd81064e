"""teacher_probabilities: distillation from distributions that exist."""

from functools import partial

import pytest
import torch
from comparing import TIGHT, assert_accurate, assert_matches
from divergence_cases import CHUNKS, DIVERGENCES, EACH, KEYWORDS, SHAPES, heads
from torch.nn import functional as F

from compiled_loss import Chunking, distillation, linear_distillation, reference


@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("name", ["plain", "everything", "none"])
@pytest.mark.parametrize("shape", SHAPES[:3], ids=str)
def test_probabilities_match_the_reference_and_the_logits_they_are_of(divergence, name, shape):
    """On heads and on logits; the temperature is the student's."""
    keywords = {"divergence": divergence, **KEYWORDS.get(name, EACH)}
    tensors, labels = heads(*shape, ignore_index=keywords.get("ignore_index", -100))
    teacher = tensors[2] @ tensors[3].t() / keywords.get("temperature", 1.0)
    stored = {"teacher_probabilities": teacher.softmax(-1)}
    loss = partial(linear_distillation, chunking=CHUNKS, **keywords, **stored)
    inputs = (*tensors[:2], None, None, labels)
    assert_matches(loss, partial(reference.linear_distillation, **keywords, **stored), inputs)
    assert_matches(loss, lambda h, w, *_: reference.linear_distillation(h, w, *tensors[2:], labels, **keywords), inputs)
    logits = (tensors[0] @ tensors[1].t()).detach().requires_grad_()
    loss, truth = (partial(fn, **keywords, **stored) for fn in (distillation, reference.distillation))
    assert_matches(loss, truth, (logits, None, labels))


@pytest.mark.parametrize("divergence", [d for d in DIVERGENCES if d != "reverse_kl"])
def test_zeros_are_right(divergence):
    """Classes without probability, as those of a top p; their gradient is what pulls the student off them."""
    student = torch.randn(4, 9, dtype=torch.float64, requires_grad=True)
    kept = torch.randn(4, 9, dtype=torch.float64)
    kept[:, 3:] = float("-inf")
    labels, p = torch.zeros(4, dtype=torch.int64), kept.softmax(-1)
    loss = partial(distillation, divergence=divergence, teacher_probabilities=p)
    of_logits = partial(distillation, divergence=divergence)
    expected = torch.autograd.grad(of_logits(student, kept, labels), student)
    torch.testing.assert_close(loss(student, None, labels), of_logits(student, kept, labels), **TIGHT)
    torch.testing.assert_close(torch.autograd.grad(loss(student, None, labels), student), expected, **TIGHT)
    traced = torch.func.grad(lambda z: loss(z, None, labels))(student.detach())
    torch.testing.assert_close(traced, expected[0], **TIGHT)


def test_reverse_kl_of_a_class_without_probability_is_infinite():
    p = torch.tensor([[1.0, 0.0]])
    found = distillation(torch.zeros(1, 2), None, torch.zeros(1, dtype=torch.int64), teacher_probabilities=p)
    assert found.isfinite()
    keywords = {"teacher_probabilities": p, "divergence": "reverse_kl"}
    assert distillation(torch.zeros(1, 2), None, torch.zeros(1, dtype=torch.int64), **keywords).isposinf()


def test_one_class_is_cross_entropy():
    student, labels = torch.randn(5, 7, requires_grad=True), torch.randint(0, 7, (5,))
    one = F.one_hot(labels, 7).to(torch.bfloat16)
    loss = partial(distillation, teacher_probabilities=one)
    assert_matches(lambda z: loss(z, None, labels), lambda z: F.cross_entropy(z, labels), (student,))


def test_no_gradient_and_no_write():
    student, p = torch.randn(3, 5, requires_grad=True), torch.rand(3, 5, requires_grad=True)
    labels, before = torch.zeros(3, dtype=torch.int64), p.detach().clone()
    distillation(student, None, labels, teacher_probabilities=p).backward()
    assert p.grad is None and torch.equal(p.detach(), before)


@pytest.mark.parametrize("fill", [float("nan"), float("inf")])
def test_ignored_tokens_hold_anything(fill):
    tensors, labels = heads((9,), 4, 6, 13)
    p = (tensors[2] @ tensors[3].t()).softmax(-1)
    truth = linear_distillation(*tensors[:2], None, None, labels, teacher_probabilities=p, chunking=CHUNKS)
    p[labels == -100] = fill
    found = linear_distillation(*tensors[:2], None, None, labels, teacher_probabilities=p, chunking=CHUNKS)
    torch.testing.assert_close(found, truth, **TIGHT)
    assert all(g.isfinite().all() for g in torch.autograd.grad(found, tensors[:2]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_error_budget(dtype, divergence):
    tensors, labels = heads((224,), 32, 24, 448, dtype=dtype, scale=0.5)
    p = (tensors[2].double() @ tensors[3].double().t()).softmax(-1).float()
    keywords = {"divergence": divergence, "temperature": 1.5, "teacher_probabilities": p}
    loss = partial(linear_distillation, chunking=Chunking(chunk_size=32), **keywords)
    truth = partial(reference.linear_distillation, **keywords)
    inputs = (*tensors[:2], None, None, labels)
    assert_accurate(loss, truth, truth, inputs)


@pytest.mark.parametrize("head", [False, True])
def test_compiled(head):
    tensors, labels = heads((9,), 4, 6, 13, dtype=torch.float32)
    p = (tensors[2] @ tensors[3].t()).softmax(-1)

    def loss(first, second):
        if head:
            given = (first, second, None, None, labels)
            return linear_distillation(*given, teacher_probabilities=p, divergence="jsd", chunking=CHUNKS)
        return distillation(first @ second.t(), None, labels, teacher_probabilities=p, divergence="jsd")

    assert_matches(torch.compile(loss, fullgraph=True), loss, tuple(tensors[:2]))
