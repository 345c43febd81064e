"""Heads with a bias, a softcap or a logit scale, masks and weights: losses of two distributions against the reference.

Each keyword alone and all at once, in fp64, in ragged chunks; gradients of the student, its bias and the weights.
"""

from functools import partial

import pytest
import torch
from comparing import TIGHT, assert_matches
from divergence_cases import CHUNKS, DIVERGENCES, SHAPES, STUDENT, TARGETS, TEACHER, biases, cached, heads, soft_targets

import compiled_loss
from compiled_loss import distillation, linear_distillation, linear_soft_cross_entropy, reference
from compiled_loss import masked_soft_cross_entropy as masked_soft
from compiled_loss.testing import inputs_unchanged


def everything(shape):
    return {
        **STUDENT,
        **TEACHER,
        "temperature": 0.6,
        "hard_label_weight": 0.3,
        "jsd_weight": 0.2,
        "ignore_index": 1,
        "mask": torch.randint(0, 3, shape),
        "token_weights": torch.rand(shape, dtype=torch.float64).requires_grad_(),
        "shift": 1,
    }


KEYWORDS = {  # name: of the shape of the tokens
    "softcap": lambda shape: {"softcap": 1.5},
    "logit_scale": lambda shape: {"logit_scale": 0.3},
    "both": lambda shape: {**STUDENT},
    "teacher_softcap": lambda shape: {"teacher_softcap": 1.5},
    "teacher_logit_scale": lambda shape: {"teacher_logit_scale": 0.3},
    "the teacher's both": lambda shape: {**TEACHER},
    "mask": lambda shape: {"mask": torch.rand(shape) < 0.6},
    "fractions": lambda shape: {"mask": torch.rand(shape[-1:]).round(decimals=1)},
    "token_weights": lambda shape: {"token_weights": torch.rand(shape, dtype=torch.float64).requires_grad_()},
    "shift": lambda shape: {"shift": 2},
    "shift past the end": lambda shape: {"shift": 99},
    "all masked": lambda shape: {"mask": torch.zeros(1)},
    "no weight": lambda shape: {"token_weights": torch.zeros(shape, dtype=torch.float64).requires_grad_()},
    "everything": everything,
    "everything, sum": lambda shape: everything(shape) | {"reduction": "sum"},
    "everything, count": lambda shape: everything(shape) | {"reduction": "sum", "num_label_tokens": 7},
    "everything, none": lambda shape: everything(shape) | {"reduction": "none"},
    "everything but labels": lambda shape: everything(shape) | {"hard_label_weight": 0.0},
    "everything, none, but labels": lambda shape: everything(shape) | {"reduction": "none", "hard_label_weight": 0.0},
}


def compare(function, truth, tensors, keywords):
    """Values and all gradients, with and without a graph, and all tensors as they were."""
    given = [v for v in keywords.values() if isinstance(v, torch.Tensor)]
    wanted = [v for v in (*tensors, *given) if v.requires_grad]
    with inputs_unchanged(*given):
        assert_matches(partial(function, **keywords), partial(truth, **keywords), tensors, wanted, **TIGHT)
    with torch.no_grad():
        torch.testing.assert_close(function(*tensors, **keywords), truth(*tensors, **keywords), **TIGHT)


@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("name", [*KEYWORDS, "bias", "teacher_bias"])
@pytest.mark.parametrize("shape", SHAPES[:3], ids=str)
def test_heads(divergence, name, shape):
    keywords = KEYWORDS[name](shape[0]) if name in KEYWORDS else {name: biases(shape[-1])[name]}
    if name.startswith("everything"):
        keywords |= biases(shape[-1])
    tensors, labels = heads(*shape, ignore_index=keywords.get("ignore_index", -100))
    keywords |= {"divergence": divergence}
    loss = partial(linear_distillation, chunking=CHUNKS)
    compare(loss, reference.linear_distillation, (*tensors, labels), keywords)


@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("name", KEYWORDS)
@pytest.mark.parametrize("layout", ["contiguous", "transposed"])
def test_logits(divergence, name, layout):
    keywords = KEYWORDS[name]((3, 5)) | {"divergence": divergence}
    student, teacher = (torch.randn(3, 5, 29, dtype=torch.float64) for _ in range(2))
    if layout == "transposed":
        student = student.transpose(0, 1).contiguous().transpose(0, 1)
    labels = torch.where(torch.rand(3, 5) < 0.3, keywords.get("ignore_index", -100), torch.randint(0, 29, (3, 5)))
    compare(distillation, reference.distillation, (student.requires_grad_(), teacher, labels), keywords)


CACHED = ["softcap", "logit_scale", "both", "mask", "token_weights", "shift"]
CACHED += [name for name in KEYWORDS if name.startswith("everything")]


@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("name", [*CACHED, "bias"])
@pytest.mark.parametrize("shape", [SHAPES[0], SHAPES[2]], ids=str)
@pytest.mark.parametrize("k", [1, 4, 29])
def test_a_cached_teacher(divergence, name, shape, k):
    """On heads and on logits; 29 is at least V, with nothing left for the tail."""
    keywords = KEYWORDS[name](shape[0]) if name in KEYWORDS else {}
    tensors, labels = heads(*shape, ignore_index=keywords.get("ignore_index", -100), scale=0.5)
    keywords = {key: v for key, v in keywords.items() if not key.startswith("teacher")} | {"divergence": divergence}
    keywords["teacher_topk"] = cached(*tensors[2:], k, keywords.get("temperature", 1.0))
    bias = {"bias": biases(shape[-1])["bias"]} if name == "bias" or name.startswith("everything") else {}

    def linear(lib):
        how = {"chunking": CHUNKS} if lib is compiled_loss else {}
        return lambda h, w, y, **options: lib.linear_distillation(h, w, None, None, y, **options, **how)

    compare(linear(compiled_loss), linear(reference), (*tensors[:2], labels), keywords | bias)
    if name != "bias":
        logits = (tensors[0] @ tensors[1].t()).detach().requires_grad_()
        ours, theirs = (
            lambda z, y, lib=lib, **options: lib.distillation(z, None, y, **options)
            for lib in (compiled_loss, reference)
        )
        compare(ours, theirs, (logits, labels), keywords)


def soft_everything(shape):
    weights = torch.rand(shape, dtype=torch.float64).requires_grad_()
    return {**STUDENT, "temperature": 0.6, "token_weights": weights}


SOFT = {
    "softcap": lambda shape: {"softcap": 1.5},
    "logit_scale": lambda shape: {"logit_scale": 0.3},
    "temperature": lambda shape: {"temperature": 1.7},
    "token_weights": lambda shape: {"token_weights": torch.rand(shape, dtype=torch.float64).requires_grad_()},
    "sum": lambda shape: {"reduction": "sum"},
    "count": lambda shape: {"reduction": "sum", "num_label_tokens": torch.tensor(7)},
    "none": lambda shape: {"reduction": "none"},
    "everything": soft_everything,
    "everything, count": lambda shape: soft_everything(shape) | {"reduction": "sum", "num_label_tokens": 9},
    "everything, none": lambda shape: soft_everything(shape) | {"reduction": "none"},
}


def positions(shape):
    return torch.rand(*shape, 1) * (torch.rand(*shape, 1) < 0.7)


@pytest.mark.parametrize("name", SOFT)
def test_soft_logits(name):
    shape = (3, 5)
    logits = torch.randn(*shape, 29, dtype=torch.float64, requires_grad=True)
    target = torch.randn(*shape, 29, dtype=torch.float64).softmax(-1).requires_grad_()
    inputs = (logits, target, positions(shape))
    compare(masked_soft, reference.masked_soft_cross_entropy, inputs, SOFT[name](shape))


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("name", [*SOFT, "bias", "teacher_bias", "the teacher's both"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_soft_heads(target, name, shape):
    rows, _, teacher_width, vocab = shape
    keywords = soft_targets(target, rows, vocab, teacher_width) | (SOFT[name](rows) if name in SOFT else {})
    every = name.startswith("everything")
    if target != "target_probs":
        if every or name == "teacher_bias":
            keywords["teacher_bias"] = biases(len(keywords["teacher_weight"]))["teacher_bias"]
        if every or name == "the teacher's both":
            keywords |= TEACHER
    if every or name == "bias":
        keywords["bias"] = biases(vocab)["bias"]
    (hidden, weight, *_), _ = heads(*shape)
    loss = partial(linear_soft_cross_entropy, chunking=CHUNKS)
    compare(loss, reference.linear_soft_cross_entropy, (hidden, weight, positions(rows)), keywords)


# What the keywords mean ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_a_bias_is_a_column_of_ones(divergence):
    """What docs/migration.md told callers to do."""
    tensors, labels = heads((9,), 4, 6, 13)
    own = biases(13)
    ones = torch.ones(9, 1, dtype=torch.float64)
    wide = [torch.cat([tensors[0], ones], 1), torch.cat([tensors[1], own["bias"].unsqueeze(1)], 1)]
    wide += [torch.cat([tensors[2], ones], 1), torch.cat([tensors[3], own["teacher_bias"].unsqueeze(1)], 1)]
    keywords = {"divergence": divergence, "hard_label_weight": 0.3, "temperature": 2.0}
    expected = linear_distillation(*wide, labels, **keywords)
    found = linear_distillation(*tensors, labels, **own, **keywords)
    torch.testing.assert_close(found, expected, **TIGHT)
    wanted = (*tensors[:2], own["bias"])
    for mine, theirs in zip(*(torch.autograd.grad(v, wanted) for v in (found, expected)), strict=True):
        torch.testing.assert_close(mine, theirs, **TIGHT)


def test_hard_labels_alone_are_cross_entropy():
    """Of the student's own softcapped and scaled logits, at temperature 1, with the same weights."""
    tensors, labels = heads((9,), 4, 6, 13)
    keywords = everything((9,)) | {"hard_label_weight": 1.0, "ignore_index": -100, "logit_scale": 1.0}
    bias = biases(13)["bias"]
    found = linear_distillation(*tensors, labels, bias=bias, **keywords)
    shared = {k: keywords[k] for k in ("mask", "token_weights", "softcap", "shift", "ignore_index")}
    expected = compiled_loss.linear_cross_entropy(*tensors[:2], labels, bias=bias, **shared)
    torch.testing.assert_close(found, expected, **TIGHT)


def test_logits_that_are_minus_infinity_beside_a_softcap():
    """The softcap makes them finite: a class counts that a cached teacher's other classes would have been without."""
    student = torch.randn(4, 9, dtype=torch.float64)
    student[:, 2] = student[0, 5] = float("-inf")
    values, indices = torch.randn(4, 9, dtype=torch.float64).log_softmax(-1).topk(3)
    indices[0] = torch.tensor([5, 1, 0])
    labels = torch.tensor([5, 2, 0, 3])
    for divergence in DIVERGENCES:
        keywords = {"divergence": divergence, "softcap": 1.5, "hard_label_weight": 0.3}
        keywords["teacher_topk"] = (values, indices)
        z, exact = student.clone().requires_grad_(), student.clone().requires_grad_()
        found = distillation(z, None, labels, **keywords)
        expected = reference.distillation(exact, None, labels, **keywords)
        torch.testing.assert_close(found, expected, **TIGHT)
        mine, theirs = torch.autograd.grad(found, z)[0], torch.autograd.grad(expected, exact)[0]
        torch.testing.assert_close(mine, theirs, **TIGHT)
        weight = torch.eye(9, dtype=torch.float64)
        bias = torch.zeros(9, dtype=torch.float64)
        least = student.clamp(min=torch.finfo(torch.float64).min)
        found = linear_distillation(least, weight, None, None, labels, bias=bias, **keywords)
        torch.testing.assert_close(found, expected, **TIGHT)


def test_a_bias_that_forbids():
    """-inf, as padded vocabularies have: on both sides it is 0 probability, in the top and in the tail."""
    tensors, labels = heads((9,), 4, 6, 13)
    labels = torch.where(labels > 9, 0, labels)
    bias = torch.zeros(13, dtype=torch.float64)
    bias[10:] = float("-inf")
    top = cached(tensors[2], tensors[3][:10], 4)
    keywords = {"hard_label_weight": 0.3, "temperature": 2.0}
    for divergence in DIVERGENCES:
        for given in ({"teacher_topk": top}, {}):
            teacher = [None, None] if given else tensors[2:]
            teacher_bias = {} if given else {"teacher_bias": bias}
            found = linear_distillation(
                *tensors[:2], *teacher, labels, bias=bias, divergence=divergence, **teacher_bias, **given, **keywords
            )
            few = [None, None] if given else [tensors[2], tensors[3][:10]]
            expected = reference.linear_distillation(
                tensors[0], tensors[1][:10], *few, labels, divergence=divergence, **given, **keywords
            )
            torch.testing.assert_close(found, expected, **TIGHT)
            grads = [torch.autograd.grad(v, tensors[:2]) for v in (found, expected)]
            for mine, theirs in zip(*grads, strict=True):
                torch.testing.assert_close(mine, theirs, **TIGHT)
