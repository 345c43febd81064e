"""What NeMo Automodel's losses take: flat streams, losses without an ignore_index, counts that do not divide.

Expectations are plain torch, most of them in fp64.
"""

import re
from types import SimpleNamespace
from unittest import mock

import numpy as np
import pytest
import torch
from comparing import TIGHT
from torch import nn
from torch.nn import functional as F

from compiled_loss import (
    FusedLinearCrossEntropy,
    KDLoss,
    MaskedCrossEntropy,
    MTPLossConfig,
    PipelineCausalLMLoss,
    TEParallelCrossEntropy,
    calculate_loss,
    calculate_mtp_loss,
    calculate_mtp_losses,
)
from compiled_loss.testing import assert_within_error_budget

T, H, V = 7, 4, 11


def stream():
    """Of one packed row."""
    labels = torch.randint(0, V, (T,))
    labels[3] = -100
    return torch.randn(T, V, dtype=torch.float64), torch.randn(T, H, dtype=torch.float64), labels


LAYOUTS = {
    "[1, T, X] and [T]": ((1, T), (T,)),
    "[T, X] and [1, T]": ((T,), (1, T)),
    "[T, 1, X] and [1, T]": ((T, 1), (1, T)),
    "[1, T, X] and [T, 1]": ((1, T), (T, 1)),
    "[1, T, X] and [1, T]": ((1, T), (1, T)),
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("reduction", ["sum", "mean", "none"])
def test_packed_stream_layouts(layout, reduction):
    theirs, shape = LAYOUTS[layout]
    logits, hidden, flat = stream()
    labels = flat.reshape(shape)
    mask = torch.tensor([1, 0, 1, 1, 1, 1, 0])
    weight = torch.randn(V, H, dtype=torch.float64)
    masked = torch.where(mask == 0, -100, flat)

    def check(found, logits, targets):
        expected = F.cross_entropy(logits, targets, reduction=reduction)
        torch.testing.assert_close(found, expected.reshape(shape) if reduction == "none" else expected, **TIGHT)

    for kind in (MaskedCrossEntropy, TEParallelCrossEntropy):
        loss = kind(reduction=reduction)
        check(loss(logits.reshape(*theirs, V), labels), logits, flat)
        check(loss(logits.reshape(*theirs, V), labels, mask.reshape(theirs)), logits, masked)
        check(calculate_loss(loss, logits=logits.reshape(*theirs, V), labels=labels), logits, flat)
    fused = FusedLinearCrossEntropy(reduction=reduction)
    check(fused(hidden.reshape(*theirs, H), labels, weight), hidden @ weight.t(), flat)
    call = {"hidden_states": hidden.reshape(*theirs, H), "labels": labels, "lm_weight": weight}
    check(calculate_loss(fused, **call), hidden @ weight.t(), flat)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_packed_stream_layouts_of_kd_loss(layout):
    theirs, shape = LAYOUTS[layout]
    student, _, flat = stream()
    teacher = torch.randn(T, V, dtype=torch.float64)
    valid = flat != -100
    log_q, log_p = (F.log_softmax(z[valid], -1) for z in (student, teacher))
    expected = F.kl_div(log_q, log_p, reduction="sum", log_target=True) / valid.sum()
    for other in (theirs, shape):
        found = KDLoss()(student.reshape(*theirs, V), teacher.reshape(*other, V), flat.reshape(shape))
        torch.testing.assert_close(found, expected, **TIGHT)


def test_packed_stream_of_one_token_and_of_none():
    weight = torch.randn(V, H, dtype=torch.float64, requires_grad=True)
    fused = FusedLinearCrossEntropy()
    for size in (1, 0):
        hidden = torch.randn(1, size, H, dtype=torch.float64, requires_grad=True)
        found = fused(hidden, torch.full((size,), 2), weight)
        expected = F.cross_entropy(hidden[0] @ weight.t(), torch.full((size,), 2), reduction="sum")
        torch.testing.assert_close(found, expected, **TIGHT)


def test_other_shapes_are_errors():
    """As many tokens in another order are others."""
    labels = torch.zeros(3, 2, dtype=torch.int64)
    for call in (
        lambda: MaskedCrossEntropy()(torch.zeros(2, 3, V), labels),
        lambda: TEParallelCrossEntropy()(torch.zeros(2, 3, V), labels),
        lambda: KDLoss()(torch.zeros(2, 3, V), torch.zeros(2, 3, V), labels),
        lambda: FusedLinearCrossEntropy()(torch.zeros(2, 3, H), labels, torch.zeros(V, H)),
        lambda: MaskedCrossEntropy()(torch.zeros(1, 5, V), labels),
    ):
        with pytest.raises(ValueError, match="labels: expected the shape of "):
            call()


@pytest.mark.parametrize("count", [9, torch.tensor(9), 0])
def test_num_label_tokens_with_mean_or_none(count):
    """Automodel's class does not look at it, and calculate_loss always passes it."""
    logits, _, labels = stream()
    logits.requires_grad_()
    for reduction in ("mean", "none"):
        loss = TEParallelCrossEntropy(reduction=reduction)
        expected = F.cross_entropy(logits, labels, reduction=reduction)
        torch.testing.assert_close(loss(logits, labels, num_label_tokens=count), expected, **TIGHT)
        found = calculate_loss(loss, logits=logits, labels=labels, num_label_tokens=count)
        torch.testing.assert_close(found, expected, **TIGHT)
    found = TEParallelCrossEntropy()(logits, labels, num_label_tokens=count)
    expected = F.cross_entropy(logits, labels, reduction="sum") / count if count != 0 else torch.zeros_like(found)
    torch.testing.assert_close(found, expected, **TIGHT)
    with pytest.raises(ValueError, match="num_label_tokens: expected None unless reduction='sum'"):
        MaskedCrossEntropy(reduction="mean")(logits, labels, num_label_tokens=count)  # which Automodel refuses, too


class Capture:
    """A loss that keeps the labels it gets."""

    def __init__(self, **attributes):
        vars(self).update(attributes)
        self.labels = []

    def __call__(self, *, logits, labels, num_label_tokens=None):
        self.labels.append(labels)
        return torch.zeros(())


@pytest.mark.parametrize(
    ("own", "given", "put"),
    [
        ({"ignore_index": None}, None, -100),
        ({"ignore_index": None}, -100, -100),
        ({"ignore_index": "none"}, None, -100),
        ({"ignore_index": mock.Mock()}, -100, -100),
        ({"ignore_index": 0.5}, None, -100),
        ({"ignore_index": True}, None, -100),
        ({"ignore_index": np.int64(-1)}, None, -1),
        ({"ignore_index": -7}, None, -7),
        ({"ignore_index": -7}, -7, -7),
        ({}, None, -100),
        ({}, -3, -3),
    ],
)
def test_ignore_index_of_the_loss(own, given, put):
    labels = torch.randint(0, V, (2, 5))
    loss = Capture(**own)
    logits = [torch.zeros(2, 5, V), torch.zeros(2, 5, V)]
    calculate_mtp_loss(loss, mtp_per_depth_logits=logits, labels=labels, ignore_index=given)
    for k, found in enumerate(loss.labels):
        assert found[:, -k - 1 :].eq(put).all() and found[:, : -k - 1].equal(labels[:, k + 1 :])
        assert type(found[0, -1].item()) is int
    assert PipelineCausalLMLoss(loss, nn.Identity(), ignore_index=given).ignore_index == put
    assert MTPLossConfig(ignore_index=given).build(loss, nn.Identity()).ignore_index == put


def test_conflicting_ignore_index_error():
    text = "ignore_index: expected -7 like Capture, got -100: None takes the loss's"
    for call in (
        lambda: calculate_mtp_loss(
            Capture(ignore_index=-7),
            mtp_per_depth_logits=[torch.zeros(1, 2, V)],
            labels=torch.ones(1, 2).long(),
            ignore_index=-100,
        ),
        lambda: PipelineCausalLMLoss(Capture(ignore_index=-7), nn.Identity(), ignore_index=-100),
    ):
        with pytest.raises(ValueError, match="^" + re.escape(text)):
            call()


@pytest.mark.parametrize("kind", [list, tuple])
@pytest.mark.parametrize("form", [dict, SimpleNamespace])
def test_hidden_states_tuple_with_none(kind, form):
    model = nn.ModuleDict({"lm_head": nn.Linear(H, V, dtype=torch.float64)})
    _, hidden, labels = stream()
    loss = PipelineCausalLMLoss(FusedLinearCrossEntropy(reduction="mean"), model)
    expected = F.cross_entropy(model["lm_head"](hidden), labels)
    for states in ([hidden * 2, hidden, None], [None, hidden, None, None], [hidden]):
        found = loss(form(hidden_states=kind(s if s is None else s[None] for s in states)), labels[None])
        torch.testing.assert_close(found, expected, **TIGHT)
    for states in ([None], []):
        with pytest.raises(
            ValueError, match="hidden_states: expected, for FusedLinearCrossEntropy takes them, got None"
        ):
            loss(form(hidden_states=kind(states)), labels[None])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_fp32_weight_with_narrow_hidden_states(dtype):
    """As FSDP holds it under a mixed-precision policy: its GEMMs are in the policy's dtype, its gradient in its own."""
    hidden = torch.randn(1, T, H).to(dtype).requires_grad_()
    weight, bias = torch.randn(V, H, requires_grad=True), torch.randn(V, requires_grad=True)
    labels = torch.randint(0, V, (1, T))
    model = nn.ModuleDict({"lm_head": nn.Linear(H, V)})
    model["lm_head"].weight, model["lm_head"].bias = (nn.Parameter(v.detach().clone()) for v in (weight, bias))
    fused = FusedLinearCrossEntropy(reduction="mean")
    head = model["lm_head"]
    for found, theirs in (
        (fused(hidden, labels, weight, lm_bias=bias), (weight, bias)),
        (calculate_loss(fused, hidden_states=hidden, labels=labels, model=model), (head.weight, head.bias)),
        (PipelineCausalLMLoss(fused, model)(hidden, labels), (head.weight, head.bias)),
    ):
        values = [hidden.detach(), weight.detach().to(dtype), bias.detach()]
        runs = []
        for kind in (None, torch.float64):
            low = [v.to(kind).requires_grad_() for v in values]
            logits = F.linear(low[0], low[1], low[2].to(low[0].dtype))
            loss = F.cross_entropy(logits[0].to(low[2].dtype), labels[0])
            runs.append((loss, torch.autograd.grad(loss, low)))
        (_, baseline), (truth, gradients) = runs
        assert (found - truth).abs() <= torch.finfo(dtype).eps * logits.abs().max()  # the logits' own rounding
        mine = torch.autograd.grad(found, [hidden, *theirs])
        assert [g.dtype for g in mine] == [dtype, torch.float32, torch.float32]
        for g, b, t in zip(mine, baseline, gradients, strict=True):
            assert_within_error_budget(g, b, t)
    with pytest.raises(TypeError, match=r"^lm_weight: expected the dtype of hidden_states, torch.float32, got torch.b"):
        fused(hidden.float(), labels, weight.bfloat16())


@pytest.mark.parametrize("fused", [True, False])
def test_mtp_mask(fused):
    """Through any loss: a label counts where its mask is not 0, wherever it is predicted from."""
    model = nn.ModuleDict({"lm_head": nn.Linear(H, V, dtype=torch.float64)})
    labels = torch.randint(0, V, (2, T))
    further = [torch.randn(2, T, H, dtype=torch.float64, requires_grad=True) for _ in range(2)]
    mask = torch.tensor([[0.5, 1, 0, 2, 1, 0, 1]])
    loss = FusedLinearCrossEntropy(reduction="mean") if fused else MaskedCrossEntropy(reduction="mean")
    found = calculate_mtp_losses(loss, mtp_per_depth_h=further, labels=labels, model=model, mask=mask)
    for k, mine in enumerate(found.per_depth):
        targets = torch.full((2, T), -100)
        for row in range(2):
            for t in range(T - k - 1):
                if mask[0, t + k + 1] != 0:
                    targets[row, t] = labels[row, t + k + 1]
        expected = F.cross_entropy(model["lm_head"](further[k]).flatten(0, 1), targets.flatten())
        torch.testing.assert_close(mine, expected, **TIGHT)
        theirs = torch.autograd.grad(expected, further[k])
        torch.testing.assert_close(torch.autograd.grad(mine, further[k], retain_graph=True), theirs, **TIGHT)
    row = {"mtp_per_depth_h": [h[:1] for h in further], "model": model, "mask": mask}
    stream = calculate_mtp_loss(loss, labels=labels[0], **row)  # [1, T, H] and a mask [1, T] with labels [T]
    torch.testing.assert_close(stream, calculate_mtp_loss(loss, labels=labels[:1], **row), **TIGHT)
    alone = calculate_mtp_loss(loss, mtp_per_depth_h=further, labels=labels, model=model, mask=mask)
    torch.testing.assert_close(alone, found.loss, **TIGHT)
    with pytest.raises(ValueError, match="targets: expected None beside mask"):
        calculate_mtp_loss(
            loss, mtp_per_depth_h=further, labels=labels, model=model, mask=mask, mtp_per_depth_targets=[labels] * 2
        )
    with pytest.raises(ValueError, match=r"mask: expected to broadcast to the labels' \[2, 7\], got \[2\]"):
        calculate_mtp_loss(loss, mtp_per_depth_h=further, labels=labels, model=model, mask=torch.ones(2))
