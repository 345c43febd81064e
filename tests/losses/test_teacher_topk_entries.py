"""teacher_topk: padding, classes that are listed twice, and entries that are refused."""

import pytest
import torch
from comparing import TIGHT, assert_matches, assert_same
from divergence_cases import CHUNKS, DIVERGENCES

from compiled_loss import distillation, linear_distillation, reference


def test_indices_out_of_range():
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
def test_class_listed_twice_takes_the_larger_value(divergence):
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
    "nothing": (dict(), r"^teacher_logits: expected a Tensor, or teacher_topk or teacher_probabilities, got none"),
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
def test_teacher_topk_errors(name):
    change, message = BAD[name]
    logits, labels = torch.zeros(2, 5), torch.zeros(2, dtype=torch.int64)
    topk = (change.get("values", torch.full((2, 3), -2.0)), change.get("indices", torch.tensor([[0, 1, 2]] * 2)))
    topk = None if name == "nothing" else change.get("topk", topk)
    with pytest.raises((ValueError, TypeError), match=message):
        distillation(logits, logits if "teacher" in change else None, labels, teacher_topk=topk)
