"""Logits whose classes are any dimension: torch's numbers, the caller's layout, and no copy."""

from functools import partial

import pytest
import torch
from comparing import TIGHT, assert_matches, assert_same
from torch.nn import functional as F

import compiled_loss
from compiled_loss import cross_entropy, distillation, masked_cross_entropy, reference, token_statistics

SHAPES = [(5, 7), (2, 7, 3), (2, 7, 3, 4), (1, 7, 2, 1, 3), (2, 7, 0)]


def logits_like(shape, layout):
    """Of the shape, however it lies."""
    logits = {
        "contiguous": lambda: torch.randn(shape, dtype=torch.float64),
        "channels last": lambda: torch.randn(*shape[:1], *shape[2:], shape[1], dtype=torch.float64).movedim(-1, 1),
        "sliced": lambda: torch.randn(*shape[:-1], 2 * shape[-1] + 1, dtype=torch.float64)[..., 1 : 1 + shape[-1]],
    }[layout]()
    return logits.requires_grad_()


def strides(value):
    """Where they matter."""
    return [stride for stride, size in zip(value.stride(), value.shape, strict=True) if size > 1]


@pytest.mark.parametrize("layout", ["contiguous", "channels last", "sliced"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_class_dim_matches_torch_cross_entropy(shape, layout):
    logits = logits_like(shape, layout)
    labels = torch.randint(0, 7, (shape[0], *shape[2:]))
    labels = torch.where(torch.rand(labels.shape) < 0.2, -100, labels)
    weights = torch.rand(7, dtype=torch.float64)
    for reduction in ("mean", "sum", "none") if labels.numel() else ("sum", "none"):
        keywords = {"label_smoothing": 0.2, "reduction": reduction}
        for dim in (1, 1 - len(shape)):
            loss = partial(cross_entropy, class_weights=weights, class_dim=dim, **keywords)
            truth = partial(F.cross_entropy, weight=weights, **keywords)
            (gradient,) = assert_matches(loss, truth, (logits, labels))
            if layout != "sliced" and logits.numel():
                assert strides(gradient) == strides(logits)


def test_default_class_dim_is_the_last():
    """Of [2, 9, 9] both would fit; the default stays the last."""
    logits, labels = torch.randn(2, 9, 9, dtype=torch.float64), torch.randint(0, 9, (2, 9))
    last, second = cross_entropy(logits, labels), cross_entropy(logits, labels, class_dim=1)
    torch.testing.assert_close(last, F.cross_entropy(logits.reshape(18, 9), labels.reshape(18)), **TIGHT)
    torch.testing.assert_close(second, F.cross_entropy(logits, labels), **TIGHT)
    assert (last - second).abs() > 1e-3
    with pytest.raises(
        ValueError,
        match=r"^labels: expected the shape of logits without its last dimension, \[2, 8\], "
        r"got \[2, 9\]: use class_dim=1$",
    ):
        cross_entropy(torch.randn(2, 8, 9), labels)


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_masks_weights_and_shift(reduction):
    """Masks, weights and the shift are those of labels [N, d1, ...]."""
    logits = torch.randn(2, 7, 3, 5, dtype=torch.float64, requires_grad=True)
    labels = torch.randint(0, 7, (2, 3, 5))
    keywords = {"mask": torch.randint(0, 3, (3, 5)), "token_weights": torch.rand(2, 1, 5), "shift": 2}
    keywords |= {"z_loss": 0.1, "softcap": 3.0, "temperature": 0.7, "ignore_index": 1, "reduction": reduction}
    loss = cross_entropy(logits, labels, class_dim=1, **keywords)
    expected = reference.cross_entropy(logits.permute(0, 2, 3, 1), labels, **keywords)
    assert_same(loss, expected, [logits])


def test_class_dim_of_other_losses():
    logits, labels = torch.randn(2, 7, 3, 5, dtype=torch.float64), torch.randint(0, 7, (2, 3, 5))
    mask = torch.rand(2, 3, 5) < 0.7
    target = torch.where(mask, labels, -100)
    expected = F.cross_entropy(logits, target, reduction="sum")
    torch.testing.assert_close(masked_cross_entropy(logits, labels, mask, class_dim=1), expected, **TIGHT)
    module = compiled_loss.nn.CrossEntropy(class_dim=1, reduction="sum")
    torch.testing.assert_close(module(logits, target), expected, **TIGHT)
    statistics = token_statistics(logits, target, class_dim=1)
    expected = reference.token_statistics(logits.permute(0, 2, 3, 1), target)
    torch.testing.assert_close(statistics, expected, **TIGHT)


@pytest.mark.parametrize("top", [False, True])
@pytest.mark.parametrize("shape", [(2, 7, 3), (2, 7, 3, 4)], ids=str)
def test_distillation(shape, top):
    """Teachers and their tops have their classes where the student has."""
    student, teacher = (torch.randn(shape, dtype=torch.float64) for _ in range(2))
    student.requires_grad_()
    labels = torch.where(torch.rand(shape[0], *shape[2:]) < 0.3, -100, torch.randint(0, 7, (shape[0], *shape[2:])))
    keywords = {"temperature": 1.5, "hard_label_weight": 0.3, "reduction": "none"}
    kept = tuple((teacher / 1.5).log_softmax(1).topk(3, dim=1)) if top else None
    theirs = None if kept is None else tuple(v.movedim(1, -1) for v in kept)
    teacher = None if top else teacher
    loss = distillation(student, teacher, labels, teacher_topk=kept, class_dim=1, **keywords)
    last = None if teacher is None else teacher.movedim(1, -1)
    expected = reference.distillation(student.movedim(1, -1), last, labels, teacher_topk=theirs, **keywords)
    (gradient,) = assert_same(loss, expected, [student])
    assert strides(gradient) == strides(student)
    with pytest.raises(ValueError, match=r"^labels: expected the shape of student_logits .*: use class_dim=1$"):
        distillation(student, teacher, labels, teacher_topk=kept, **keywords)


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_compiled(backend):
    logits = torch.randn(2, 7, 3, 5, dtype=torch.float64, requires_grad=True)
    labels = torch.randint(0, 7, (2, 3, 5))
    run = torch.compile(partial(cross_entropy, class_dim=1), fullgraph=True, backend=backend)
    (gradient,) = assert_matches(run, F.cross_entropy, (logits, labels))
    assert gradient.stride() == logits.stride()


def test_torch_func_transforms():
    logits, labels = torch.randn(2, 7, 3, dtype=torch.float64), torch.randint(0, 7, (2, 3))
    for transform in (torch.func.grad, torch.func.hessian):
        mine = transform(lambda z: cross_entropy(z, labels, class_dim=1))(logits)
        torch.testing.assert_close(mine, transform(lambda z: F.cross_entropy(z, labels))(logits), **TIGHT)


def test_leading_dimensions_are_merged(monkeypatch):
    """Pixels of an image are as many rows as they can be, for eager code goes through the leading dimensions."""
    from compiled_loss.dispatch.layout import merged

    image = torch.randn(2, 7, 30, 40)
    (rows,) = merged(image.movedim(1, -1))
    assert rows.shape == (2, 1200, 7) and rows.data_ptr() == image.data_ptr()
    (rows,) = merged(image.movedim(1, -1).contiguous())
    assert rows.shape == (2400, 7)
    (rows,) = merged(image[..., :39].movedim(1, -1))
    assert rows.shape == (2, 30, 39, 7)
    both = merged(image.movedim(1, -1), image.transpose(2, 3).contiguous().transpose(2, 3).movedim(1, -1))
    assert {v.shape for v in both} == {(2, 30, 40, 7)}
