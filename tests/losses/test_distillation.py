"""Distillation on logits and on heads, by its values and gradients."""

from functools import partial

import pytest
import torch
from comparing import TIGHT, assert_accurate, assert_matches
from divergence_cases import CHUNKS, DIVERGENCES, EACH, KEYWORDS, SHAPES, heads
from torch.nn import functional as F

from compiled_loss import Chunking, distillation, linear_distillation, reference


@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("name", [*KEYWORDS, "none"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_linear_distillation(divergence, name, shape):
    keywords = {"divergence": divergence, **KEYWORDS.get(name, EACH)}
    tensors, labels = heads(*shape, ignore_index=keywords.get("ignore_index", -100))
    inputs = (*tensors, labels)
    loss = partial(linear_distillation, chunking=CHUNKS, **keywords)
    truth = partial(reference.linear_distillation, **keywords)
    assert_matches(loss, truth, inputs)
    with torch.no_grad():
        torch.testing.assert_close(loss(*inputs), truth(*inputs), **TIGHT)


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
    loss, truth = (partial(fn, **keywords) for fn in (distillation, reference.distillation))
    assert_matches(loss, truth, (student, teacher, labels))


def test_forward_kl_is_torch_kl_div():
    student, teacher = torch.randn(7, 11), torch.randn(7, 11)
    expected = 4 * F.kl_div(
        F.log_softmax(student / 2, -1), F.log_softmax(teacher / 2, -1), reduction="batchmean", log_target=True
    )
    loss = distillation(student, teacher, torch.zeros(7, dtype=torch.int64), temperature=2.0)
    torch.testing.assert_close(loss, expected)


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_self_distillation_is_zero(divergence):
    logits = torch.randn(5, 17, requires_grad=True)
    loss = distillation(logits, logits, torch.zeros(5, dtype=torch.int64), divergence=divergence)
    assert loss.abs() < 1e-6
    assert torch.autograd.grad(loss, logits)[0].abs().max() < 1e-6


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_teacher_gets_no_gradient(divergence):
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


def test_minus_inf_logits_of_student_and_teacher():
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


def test_no_overflow_of_distributions_far_apart():
    """exp(95) is past fp32's range while exp(-95) is not yet 0. "acceptance" has a floor."""
    student, teacher = torch.tensor([[95.0, 0.0]]), torch.tensor([[0.0, 95.0]])
    for divergence in set(DIVERGENCES) - {"acceptance"}:
        z = student.clone().requires_grad_()
        loss = distillation(z, teacher, torch.zeros(1, dtype=torch.int64), divergence=divergence)
        exact = student.double().requires_grad_()
        truth = reference.distillation(
            exact, teacher.double(), torch.zeros(1, dtype=torch.int64), divergence=divergence
        )
        torch.testing.assert_close(loss.double(), truth, rtol=1e-6, atol=1e-6)
        (mine,), (theirs,) = torch.autograd.grad(loss, z), torch.autograd.grad(truth, exact)
        torch.testing.assert_close(mine.double(), theirs, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("frozen", [0, 1])
def test_frozen_hidden_or_weight(frozen):
    (*tensors,), labels = heads((9,), 4, 6, 13)
    tensors[frozen].requires_grad_(False)
    loss = partial(linear_distillation, chunking=CHUNKS)
    assert_matches(loss, reference.linear_distillation, (*tensors, labels))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("chunks", [1, 7])
def test_error_budget(dtype, divergence, chunks):
    """Contract 4: within twice the error of the unchunked computation in the same dtypes."""
    tensors, labels = heads((224,), 32, 24, 448, dtype=dtype, scale=0.5)
    keywords = {"divergence": divergence, "temperature": 1.5, "hard_label_weight": 0.2}
    loss = partial(linear_distillation, chunking=Chunking(chunk_size=224 // chunks), **keywords)
    truth = partial(reference.linear_distillation, **keywords)
    assert_accurate(loss, truth, truth, (*tensors, labels), name=f"{chunks} chunks")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_autocast_gradients_are_fp32(dtype):
    tensors, labels = heads((9,), 4, 6, 13, dtype=torch.float32)
    with torch.autocast("cpu", dtype=dtype, enabled=dtype != torch.float32):
        loss = linear_distillation(*tensors, labels)
    assert loss.dtype == torch.float32
    assert [g.dtype for g in torch.autograd.grad(loss, tensors[:2])] == [torch.float32] * 2
