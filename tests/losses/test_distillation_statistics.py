"""What distillation tells of each token beside its loss."""

from functools import partial

import pytest
import torch
from comparing import TIGHT, assert_same
from divergence_cases import CHUNKS, DIVERGENCES, cached, heads
from torch.utils.flop_counter import FlopCounterMode

from compiled_loss import (
    Chunking,
    DistillationStatistics,
    distillation,
    distillation_with_statistics,
    linear_distillation,
    linear_distillation_with_statistics,
    reference,
)
from compiled_loss.engine import execution
from compiled_loss.testing import count_graphs

T = 1.5
TEACHERS = ["whole", "top", "probabilities"]
HEADS = {"chunking": CHUNKS}


def problem(teacher, dtype=torch.float64, k=4):
    """Both heads and their logits, what is stored of the teacher, and labels."""
    tensors, labels = heads((3, 5), 4, 6, 13, dtype=dtype)
    logits = [(h @ w.t()).detach() for h, w in (tensors[:2], tensors[2:])]
    stored = {
        "whole": {},
        "top": {"teacher_topk": cached(*tensors[2:], k, T)},
        "probabilities": {"teacher_probabilities": (logits[1] / T).softmax(-1)},
    }[teacher]
    return tensors, logits, stored, labels


def expected(logits, stored, labels, divergence):
    """By the reference, 0 where a token is ignored."""
    teacher = None if stored else logits[1]
    each = {"divergence": divergence, "temperature": T, "temperature_squared": False, "reduction": "none"}
    found = {"divergence": reference.distillation(logits[0], teacher, labels, **stored, **each)}
    found |= reference.distillation_statistics(logits[0], teacher, **stored, temperature=T)
    found = {name: torch.where(labels == -100, 0.0, value) for name, value in found.items()}
    return [found.get(name) for name in DistillationStatistics._fields]


@pytest.mark.parametrize("teacher", TEACHERS)
@pytest.mark.parametrize("divergence", [*DIVERGENCES, {"jsd": 0.5, "acceptance": 2.0}], ids=str)
@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("hard", [0.0, 0.3])
def test_statistics(teacher, divergence, reduction, hard):
    """The reference's, on heads in ragged chunks and on logits; the loss and its gradients are those without them."""
    tensors, logits, stored, labels = problem(teacher)
    keywords = {"divergence": divergence, "temperature": T, "hard_label_weight": hard, "reduction": reduction, **stored}
    truth = expected(logits, stored, labels, divergence)
    of_teacher = tensors[2:] if not stored else (None, None)
    found = linear_distillation_with_statistics(*tensors[:2], *of_teacher, labels, **HEADS, **keywords)
    without = linear_distillation(*tensors[:2], *of_teacher, labels, **HEADS, **keywords)
    assert_same(found.loss, without, tensors[:2])
    check(found.statistics, truth)

    student = logits[0].requires_grad_()
    of_teacher = logits[1] if not stored else None
    found = distillation_with_statistics(student, of_teacher, labels, **keywords)
    assert_same(found.loss, distillation(student, of_teacher, labels, **keywords), [student])
    check(found.statistics, truth)
    with torch.no_grad():
        check(distillation_with_statistics(student, of_teacher, labels, **keywords).statistics, truth)


def check(statistics, truth):
    for name, mine, theirs in zip(statistics._fields, statistics, truth, strict=True):
        assert (mine is None) == (theirs is None), name
        if mine is not None:
            assert not mine.requires_grad
            torch.testing.assert_close(mine, theirs.detach(), **TIGHT, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.parametrize("teacher", TEACHERS)
@pytest.mark.parametrize("compact", [None, 12])
@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
def test_ignored_tokens_are_zero_whatever_they_hold(teacher, compact, poison):
    tensors, logits, stored, labels = problem(teacher)
    labels.reshape(-1)[::4] = -100
    truth = expected(logits, stored, labels, "acceptance")
    hidden = torch.where((labels == -100).unsqueeze(-1), poison, tensors[0].detach()).requires_grad_()
    stored = {
        name: (torch.where((labels == -100).unsqueeze(-1), float("nan"), v[0]), v[1])
        if isinstance(v, tuple)
        else torch.where((labels == -100).unsqueeze(-1), poison, v)
        for name, v in stored.items()
    }
    of_teacher = tensors[2:] if not stored else (None, None)
    keywords = {"divergence": "acceptance", "temperature": T, **stored}
    chunking = Chunking(chunk_size=4, max_label_tokens=compact)
    inputs = (hidden, tensors[1], *of_teacher, labels)
    found = linear_distillation_with_statistics(*inputs, chunking=chunking, **keywords)
    check(found.statistics, truth)
    d_hidden, d_weight = torch.autograd.grad(found.loss, (hidden, tensors[1]))
    assert d_hidden.isfinite().all() and d_weight.isfinite().all() and (d_hidden[labels == -100] == 0).all()


@pytest.mark.parametrize("name", DistillationStatistics._fields)
def test_what_is_not_wanted_is_none(name):
    _, logits, stored, labels = problem("top")
    every = distillation_with_statistics(logits[0], None, labels, temperature=T, **stored).statistics
    found = distillation_with_statistics(logits[0], None, labels, temperature=T, wanted=(name,), **stored).statistics
    assert [field for field, value in found._asdict().items() if value is not None] == [name]
    torch.testing.assert_close(getattr(found, name), getattr(every, name))
    none = distillation_with_statistics(logits[0], None, labels, temperature=T, wanted=(), **stored)
    assert set(none.statistics) == {None}
    torch.testing.assert_close(none.loss, distillation(logits[0], None, labels, temperature=T, **stored))


def test_wanted_errors():
    _, logits, _, labels = problem("whole")
    with pytest.raises(ValueError, match=r"^wanted: expected some of 'divergence', .*, got 'entropy'"):
        distillation_with_statistics(*logits, labels, wanted=("entropy",))
    with pytest.raises(TypeError, match=r"^wanted: expected some of .* in a tuple, got 'acceptance'"):
        distillation_with_statistics(*logits, labels, wanted="acceptance")


def test_no_further_gemm_and_no_further_kernel():
    tensors, _, _, labels = problem("whole", torch.float32)
    counts, kernels = [], []
    for function in (linear_distillation, linear_distillation_with_statistics):
        execution.forget()
        with FlopCounterMode(display=False) as counter:
            found = function(*tensors, labels, chunking=Chunking(chunk_size=5, compile=True))
            (found if isinstance(found, torch.Tensor) else found.loss).backward()
        counts.append(counter.get_total_flops())
        kernels.append(len(execution._KERNELS))
    assert counts[0] == counts[1] > 0
    assert kernels == [1, 1]


@pytest.mark.parametrize("teacher", TEACHERS)
@pytest.mark.parametrize("head", [False, True])
def test_compiled_matches_eager_in_one_graph(teacher, head):
    tensors, logits, stored, labels = problem(teacher, torch.float32)
    keywords = {"divergence": {"forward_kl": 0.5, "acceptance": 1.0}, "temperature": T, **stored}
    if head:
        of_teacher = tensors[2:] if not stored else (None, None)
        fn, wanted = partial(linear_distillation_with_statistics, **HEADS, **keywords), tensors[:2]
        inputs = (*tensors[:2], *of_teacher, labels)
    else:
        wanted = [logits[0].requires_grad_()]
        fn, inputs = (
            partial(distillation_with_statistics, **keywords),
            (logits[0], logits[1] if not stored else None, labels),
        )

    def flat(*inputs):
        loss, statistics = fn(*inputs)
        return loss, *[v for v in statistics if v is not None]

    backend = "inductor" if (teacher, head) == ("whole", True) else "aot_eager"
    compiled = torch.compile(flat, fullgraph=True, backend=backend)
    assert_same(compiled(*inputs), flat(*inputs), wanted)
    assert count_graphs(flat, [inputs, (*inputs[:-1], torch.zeros_like(labels))]) == 1


@pytest.mark.parametrize("teacher", TEACHERS)
def test_torch_func(teacher):
    """The plain path, of which the statistics are an auxiliary output."""
    _, logits, stored, labels = problem(teacher)
    of_teacher = logits[1] if not stored else None

    def loss(z):
        return distillation_with_statistics(z, of_teacher, labels, divergence="lk", temperature=T, **stored)

    def with_present(z):
        found = loss(z)
        return found.loss, {name: v for name, v in found.statistics._asdict().items() if v is not None}

    d, statistics = torch.func.grad(with_present, has_aux=True)(logits[0])
    statistics = DistillationStatistics(*map(statistics.get, DistillationStatistics._fields))
    check(statistics, expected(logits, stored, labels, "lk"))
    z = logits[0].clone().requires_grad_()
    torch.testing.assert_close(d, torch.autograd.grad(loss(z).loss, z)[0], **TIGHT)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_narrow_dtypes(dtype):
    """Statistics are fp32, of the logits as they are."""
    _, logits, _, labels = problem("whole", dtype)
    found = distillation_with_statistics(*logits, labels, temperature=T).statistics
    truth = expected([z.double() for z in logits], {}, labels, "forward_kl")
    for mine, theirs in zip(found, truth, strict=True):
        assert mine is None or mine.dtype == torch.float32
        assert mine is None or torch.allclose(mine.double(), theirs, rtol=1e-5, atol=1e-6)


def test_identical_distributions_and_distributions_apart():
    logits, labels = torch.randn(2, 5), torch.zeros(2, dtype=torch.int64)
    other = logits.clone()
    logits[1, :3], other[1, 3:] = float("-inf"), float("-inf")
    found = distillation_with_statistics(logits, other, labels, divergence="total_variation", reduction="none")
    torch.testing.assert_close(found.statistics.acceptance, torch.tensor([1.0, 0.0]))
    torch.testing.assert_close(found.loss, torch.tensor([0.0, 1.0]))
    assert all(v.isfinite().all() for v in found.statistics if v is not None)
