"""Defects of Automodel's losses that must not be repeated: autograd, compilation, copies. Each test says where."""

import pytest
import torch
from automodel_cases import ALL, ON_LOGITS, V, batch, losses
from comparing import TIGHT, assert_matches, assert_same
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional as F

from compiled_loss import (
    Chunking,
    MaskedCrossEntropy,
    TEParallelCrossEntropy,
    linear_soft_cross_entropy,
    masked_soft_cross_entropy,
)
from compiled_loss.testing import count_graphs, inputs_unchanged


@pytest.mark.parametrize("name", ALL)
def test_inputs_are_not_written(name):
    """masked_ce.py:72, te_parallel_ce.py:174, soft_cross_entropy.py:142; te_cross_entropy.py:215 even under no_grad."""
    loss, inputs = losses()[name]
    with inputs_unchanged(*inputs):
        loss(*inputs).backward()
        with torch.no_grad():
            loss(*inputs)


@pytest.mark.parametrize("name", ON_LOGITS)
def test_non_contiguous_inputs(name):
    """masked_ce.py:66, kd_loss.py:213, soft_cross_entropy.py:168; te_cross_entropy.py:317 read them out of bounds."""
    loss, inputs = losses()[name]
    plain = [v.detach() for v in inputs]
    expected = loss(*plain)
    strided = [v.transpose(0, 1).contiguous().transpose(0, 1) for v in plain]
    strided[0].requires_grad_()
    found = loss(*strided)
    torch.testing.assert_close(found, expected)
    inputs[0].grad = None
    loss(*inputs).backward()
    torch.testing.assert_close(torch.autograd.grad(found, strided[0])[0], inputs[0].grad)


@pytest.mark.parametrize("name", ON_LOGITS)
def test_no_saved_fp32_logits(name):
    """masked_ce.py:74; kd_loss.py:112: 2.25 times the logits in fp32 for backward, whatever chunk_size said."""
    loss, inputs = losses()[name]
    inputs = [v.detach().bfloat16() if v.dim() == 3 and v.shape[-1] == V else v for v in inputs]
    inputs[0].requires_grad_()
    given, kept = {v.data_ptr() for v in inputs}, []
    with torch.autograd.graph.saved_tensors_hooks(lambda v: kept.append(v) or v, lambda v: v):
        loss(*inputs)
    assert kept
    assert all(v.numel() <= inputs[0].numel() / V for v in kept if v.data_ptr() not in given)


@pytest.mark.parametrize("name", ALL)
def test_torch_func_grad(name):
    """chunked_ce.py:33: without setup_context functorch raised."""
    loss, inputs = losses()[name]
    (expected,) = torch.autograd.grad(loss(*inputs), inputs[0])
    torch.testing.assert_close(torch.func.grad(loss)(*(v.detach() for v in inputs)), expected)


@pytest.mark.parametrize("name", ALL)
def test_no_graph_break(name):
    """kd_loss.py:208; chunked_ce.py:206, whose compile=True did nothing: one graph, for other labels too."""
    loss, inputs = losses()[name]
    changed = [v.roll(1, 0) if v.dtype in (torch.int64, torch.bool) else v for v in inputs]
    assert count_graphs(loss, [inputs, tuple(changed)]) == 1


@pytest.mark.parametrize("name", ALL)
def test_no_synchronisation_with_fake_tensors(name):
    """kd_loss.py:239, te_cross_entropy.py:345 and 379, masked_ce.py:86."""
    mode = FakeTensorMode()
    loss, inputs = losses()[name]
    inputs = [mode.from_tensor(v.detach()).requires_grad_(v.requires_grad) for v in inputs]
    with mode:  # raises where data would be read
        loss(*inputs).backward()
    assert inputs[0].grad.shape == inputs[0].shape


@pytest.mark.parametrize("module", [TEParallelCrossEntropy, MaskedCrossEntropy])
def test_upstream_gradient_per_token(module):
    """te_cross_entropy.py:282: all rows took the first one's."""
    logits, labels = batch()
    rows = F.cross_entropy(logits.reshape(-1, V), labels.reshape(-1), reduction="none")
    assert_same(module(reduction="none")(logits, labels), rows.reshape(2, 5), [logits])


@pytest.mark.parametrize("name", ALL)
def test_retain_graph(name):
    """te_cross_entropy.py:387 scaled the gradient in place, and the second was half; soft_cross_entropy.py:142."""
    loss, inputs = losses()[name]
    value = loss(*inputs)
    first = torch.autograd.grad(value, inputs[0], torch.tensor(0.5), retain_graph=True)
    again = torch.autograd.grad(value, inputs[0], torch.tensor(0.5))
    torch.testing.assert_close(again, first, rtol=0, atol=0)


@pytest.mark.parametrize("order", [1, -1])
def test_two_losses_on_the_same_logits(order):
    """soft_ce.py:142: backward wrote over the logits: a loss after it got an error of 5.4."""
    logits = torch.randn(2, 3, V, dtype=torch.float64, requires_grad=True)
    target, labels = torch.rand(2, 3, V, dtype=torch.float64).softmax(-1), torch.randint(0, V, (2, 3))
    ours = masked_soft_cross_entropy(logits, target, torch.ones(2, 3, 1))
    for loss in [ours, MaskedCrossEntropy()(logits, labels)][::order]:
        loss.backward()
    exact = logits.detach().clone().requires_grad_()
    soft = -(target * exact.log_softmax(-1)).sum(-1).mean()
    (soft + F.cross_entropy(exact.reshape(-1, V), labels.reshape(-1), reduction="sum")).backward()
    torch.testing.assert_close(logits.grad, exact.grad, **TIGHT)


@pytest.mark.parametrize(
    "name",
    [pytest.param(n, marks=() if n in ("soft_ce", "linear_ce") else pytest.mark.slow) for n in (*ALL, "target_probs")],
)
def test_two_losses_in_one_compiled_graph(name):
    """soft_ce.py:142; ours was wrong once: on torch 2.13 a region that is called twice writes over its input."""
    loss, (first, *rest) = losses()[name if name in ALL else "linear_ce"]
    if name == "target_probs":
        mask, weight = torch.ones(2, 5), rest[1]
        rest = [mask, torch.rand(2, 5, V)]

        def loss(hidden, mask, target):
            chunking = Chunking(chunk_size=5)
            return linear_soft_cross_entropy(hidden, weight, mask, target_probs=target, chunking=chunking)

    def total(a, b, *rest):
        return loss(a, *rest) + loss(b, *rest) + loss(2 * a, *rest)

    second = first.detach().roll(1, 0).requires_grad_()
    assert_matches(torch.compile(total, fullgraph=True), total, (first, second, *rest))


@pytest.mark.parametrize("name", ["masked_ce", pytest.param("kd_loss", marks=pytest.mark.slow)])
def test_two_losses_compiled_as_shapes_vary(name):
    """soft_ce.py:142."""
    loss, inputs = losses()[name]

    def twice(logits, *rest):
        return loss(logits, *rest) + loss(2 * logits, *rest)

    compiled = torch.compile(twice, fullgraph=True, backend="aot_eager")
    for length in (5, 4, 3):
        cut = [v[:, :length].detach() for v in inputs]
        torch.testing.assert_close(compiled(*cut), twice(*cut))
