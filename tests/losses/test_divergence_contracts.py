"""Losses of two distributions under torch.compile, autograd and torch.func."""

from functools import partial

import pytest
import torch
from comparing import assert_matches, in_fp64
from divergence_cases import CHUNKS, DIVERGENCES, KEYWORDS, TARGETS, heads, soft_targets

from compiled_loss import distillation, linear_distillation, linear_soft_cross_entropy, masked_soft_cross_entropy
from compiled_loss.testing import count_graphs


def everything(name):
    """(function, tensors that need gradients, the rest) of each, small, with everything on."""
    tensors, labels = heads((3, 5), 4, 6, 13)
    mask = torch.rand(3, 5, 1)
    options = KEYWORDS["everything"] | {"ignore_index": -100}
    if name in DIVERGENCES:
        return partial(linear_distillation, divergence=name, chunking=CHUNKS, **options), (*tensors, labels)
    if name.startswith("logits"):
        divergence = name.removeprefix("logits ")
        student, teacher = torch.randn(3, 5, 13, requires_grad=True), torch.randn(3, 5, 13)
        return partial(distillation, divergence=divergence, **options), (student, teacher, labels)
    if name == "soft logits":
        logits, target = torch.randn(3, 5, 13, requires_grad=True), torch.rand(3, 5, 13, requires_grad=True)
        return masked_soft_cross_entropy, (logits, target, mask)
    found = soft_targets(name, (3, 5), 13, 6)
    return partial(linear_soft_cross_entropy, chunking=CHUNKS, **found), (*tensors[:2], mask)


ALL = [*DIVERGENCES, *(f"logits {d}" for d in DIVERGENCES), "soft logits", *TARGETS]

CI = ("jsd", "target_probs")  # with Inductor, whose C++ takes its time


@pytest.mark.parametrize("name", [n if n in CI else pytest.param(n, marks=pytest.mark.slow) for n in ALL])
def test_compiled_matches_eager_in_one_graph(name):
    """One graph, the eager numbers, and another mask compiles nothing."""
    function, inputs = everything(name)
    assert_matches(torch.compile(function, fullgraph=True), function, inputs, rtol=1e-5, atol=1e-6)
    assert count_graphs(function, [inputs, (*inputs[:-1], torch.zeros_like(inputs[-1]))]) == 1


@pytest.mark.parametrize("name", [name for name in ALL if not name.endswith("lk")])  # whose mixture has no gradient
def test_gradcheck(name):
    function, inputs = everything(name)
    assert torch.autograd.gradcheck(function, [in_fp64(v) for v in inputs])


@pytest.mark.parametrize("name", ALL)
def test_backward_twice_and_no_second_derivative(name):
    function, inputs = everything(name)
    wanted = [v for v in inputs if v.requires_grad]
    loss = function(*inputs)
    first = torch.autograd.grad(loss, wanted, retain_graph=True)
    twice = torch.autograd.grad(loss, wanted, torch.full_like(loss, 2.0), retain_graph=True)
    torch.testing.assert_close(twice, tuple(2 * g for g in first))
    with pytest.raises(RuntimeError, match=r"^create_graph: expected False"):
        torch.autograd.grad(loss, wanted, create_graph=True)


@pytest.mark.parametrize("name", ALL)
def test_torch_func_grad(name):
    function, inputs = everything(name)
    which = tuple(i for i, v in enumerate(inputs) if v.requires_grad)
    expected = torch.autograd.grad(function(*inputs), [inputs[i] for i in which])
    plain = [v.detach() for v in inputs]
    torch.testing.assert_close(torch.func.grad(function, which)(*plain), expected)
