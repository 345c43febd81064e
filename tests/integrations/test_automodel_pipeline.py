"""Losses of a model's outputs: the protocol of fused losses, multi-token prediction, and a pipeline's last stage."""

import re
from types import SimpleNamespace

import pytest
import torch
from comparing import TIGHT, assert_same
from torch import nn

from compiled_loss import (
    FusedLinearCrossEntropy,
    MaskedCrossEntropy,
    PipelineCausalLMLoss,
    calculate_loss,
    calculate_mtp_loss,
    calculate_mtp_losses,
    linear_cross_entropy,
    multi_token_prediction,
)
from compiled_loss.testing import inputs_unchanged

B, S, H, V = 2, 6, 4, 11


class Model(nn.Module):
    """A head, and what trainers ask of a model."""

    def __init__(self, factor=0.3):
        super().__init__()
        self.lm_head = nn.Linear(H, V, bias=False, dtype=torch.float64)
        self.factor = factor

    def get_output_embeddings(self):
        return self.lm_head

    def get_mtp_loss_scaling_factor(self):
        return self.factor


def stage(depths=2):
    """Hidden states of the last stage, those of each depth, labels, and packing."""
    hidden = torch.randn(B, S, H, dtype=torch.float64, requires_grad=True)
    per_depth = [torch.randn(B, S, H, dtype=torch.float64, requires_grad=True) for _ in range(depths)]
    labels = torch.where(torch.rand(B, S) < 0.2, -100, torch.randint(0, V, (B, S)))
    seq_idx = torch.tensor([[0, 0, 0, 1, 1, 1], [0, 1, 1, 1, 1, 2]], dtype=torch.int32)
    return hidden, per_depth, labels, seq_idx


@pytest.mark.parametrize("reduction", ["sum", "mean"])
def test_calculate_loss(reduction):
    model = Model()
    hidden, _, labels, _ = stage()
    fused, plain = FusedLinearCrossEntropy(reduction=reduction), MaskedCrossEntropy(reduction=reduction)
    expected = linear_cross_entropy(hidden, model.lm_head.weight, labels, reduction=reduction)
    shared = {"labels": labels, "model": model, "grad_reduce_group": None}
    torch.testing.assert_close(calculate_loss(fused, hidden_states=hidden, **shared), expected, **TIGHT)
    given = calculate_loss(fused, hidden_states=hidden, labels=labels, lm_weight=model.lm_head.weight)
    torch.testing.assert_close(given, expected, **TIGHT)
    logits = model.lm_head(hidden)
    torch.testing.assert_close(calculate_loss(plain, logits=logits, hidden_states=hidden, **shared), expected, **TIGHT)


def test_custom_fused_loss():
    """utils.py:90: isinstance dispatch."""

    class Mine(nn.Module):
        takes_hidden_states = True

        def forward(self, hidden_states, labels, lm_weight, num_label_tokens=None, grad_reduce_group=None):
            return (hidden_states @ lm_weight.t()).sum() + num_label_tokens

    model = Model()
    hidden, _, labels, _ = stage()
    found = calculate_loss(Mine(), hidden_states=hidden, labels=labels, model=model, num_label_tokens=3)
    torch.testing.assert_close(found, model.lm_head(hidden).sum() + 3, **TIGHT)


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("packing", ["none", "seq_idx", "cu_seqlens"])
def test_calculate_mtp_losses(fused, packing):
    """The seed's text omits the 1 / D; the paper and the reference have it."""
    model = Model()
    _, per_depth, labels, seq_idx = stage(3)
    options = {"none": {}, "seq_idx": {"seq_idx": seq_idx}, "cu_seqlens": {"cu_seqlens": torch.tensor([0, 2, 6])}}[
        packing
    ]
    loss_fn = FusedLinearCrossEntropy(reduction="mean") if fused else MaskedCrossEntropy(reduction="mean")
    found = calculate_mtp_losses(
        loss_fn, mtp_per_depth_h=per_depth, labels=labels, model=model, scaling_factor=0.5, **options
    )
    expected = multi_token_prediction(per_depth, model.lm_head.weight, labels, scaling_factor=0.5, **options)
    torch.testing.assert_close(found.loss, 0.5 / 3 * sum(found.per_depth), **TIGHT)
    assert_same(found.loss, expected, [*per_depth, model.lm_head.weight])


def test_mtp_of_logits_and_of_a_packed_stream():
    model = Model()
    _, per_depth, labels, _ = stage()
    loss_fn = MaskedCrossEntropy()
    expected = calculate_mtp_loss(loss_fn, mtp_per_depth_h=per_depth, labels=labels, model=model)
    logits = [model.lm_head(h) for h in per_depth]
    torch.testing.assert_close(
        calculate_mtp_loss(loss_fn, mtp_per_depth_logits=logits, labels=labels), expected, **TIGHT
    )
    stream, flat = [h[:1] for h in per_depth], labels[0]
    for fn in (loss_fn, FusedLinearCrossEntropy()):
        one = calculate_mtp_loss(fn, mtp_per_depth_h=stream, labels=flat, model=model)
        two = calculate_mtp_loss(fn, mtp_per_depth_h=stream, labels=labels[:1], model=model)
        torch.testing.assert_close(one, two, **TIGHT)


@pytest.mark.parametrize("form", ["tensor", "tuple", "tuple, seq_idx", "object", "dict"])
@pytest.mark.parametrize("fused", [True, False])
def test_pipeline_loss(form, fused):
    """mtp.py:370: the fused loss with a tuple was refused."""
    model = Model()
    hidden, per_depth, labels, seq_idx = stage()
    reduction = "mean"
    loss_fn = FusedLinearCrossEntropy(reduction=reduction) if fused else MaskedCrossEntropy(reduction=reduction)
    first = hidden if fused else model.lm_head(hidden)
    fields = {"logits": model.lm_head(hidden), "hidden_states": (hidden * 2, hidden), "mtp_per_depth_h": per_depth}
    output, with_mtp, packing, factor = {
        "tensor": (first, False, {}, None),
        "tuple": ((first, *per_depth), True, {}, 0.3),
        "tuple, seq_idx": ((first, *per_depth, seq_idx), True, {"seq_idx": seq_idx}, 0.3),
        "object": (SimpleNamespace(**fields, mtp_loss_scaling_factor=0.7), True, {}, 0.7),
        "dict": (fields, True, {}, 0.3),
    }[form]
    loss = PipelineCausalLMLoss(loss_fn, model)
    expected = linear_cross_entropy(hidden, model.lm_head.weight, labels)
    model.eval()
    torch.testing.assert_close(loss(output, labels), expected, **TIGHT)
    model.train()
    if with_mtp:
        weight = model.lm_head.weight
        expected = expected + multi_token_prediction(per_depth, weight, labels, scaling_factor=factor, **packing)
    torch.testing.assert_close(loss(output, labels), expected, **TIGHT)
    if with_mtp:
        zero = PipelineCausalLMLoss(loss_fn, model, scaling_factor=0.0)
        torch.testing.assert_close(zero(output, labels), linear_cross_entropy(hidden, weight, labels), **TIGHT)


@pytest.mark.parametrize("fused", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_module_compile(fused):
    """One graph with multi-token prediction, whose losses are several of one kind; a tensor's count changes freely."""
    model = Model()
    hidden, per_depth, labels, seq_idx = stage()
    first = hidden if fused else torch.randn(B, S, V, dtype=torch.float64, requires_grad=True)
    loss = PipelineCausalLMLoss(FusedLinearCrossEntropy() if fused else MaskedCrossEntropy(), model)
    compiled = PipelineCausalLMLoss(loss.loss_fn, model)
    compiled.compile(fullgraph=True)
    wanted = [first, *per_depth, model.lm_head.weight]
    for count in range(3):
        stance = "default" if count == 0 else "fail_on_recompile"
        call = ((first, *per_depth, seq_idx), labels, torch.tensor(7 + count))
        expected = loss(*call)
        with inputs_unchanged(*wanted, labels), torch.compiler.set_stance(stance):
            assert_same(compiled(*call), expected, wanted)


def test_seq_idx_before_cu_seqlens():
    model = Model()
    hidden, per_depth, labels, seq_idx = stage()
    loss = PipelineCausalLMLoss(FusedLinearCrossEntropy(reduction="mean"), model)
    assert loss.cu_seqlens is None
    with_idx = loss((hidden, *per_depth, seq_idx), labels)
    loss.cu_seqlens = torch.tensor([0, 1, 6])
    torch.testing.assert_close(loss((hidden, *per_depth, seq_idx), labels), with_idx, **TIGHT)
    weight = model.lm_head.weight
    expected = linear_cross_entropy(hidden, weight, labels) + multi_token_prediction(
        per_depth, weight, labels, scaling_factor=0.3, cu_seqlens=loss.cu_seqlens
    )
    torch.testing.assert_close(loss((hidden, *per_depth), labels), expected, **TIGHT)


def test_model_is_not_a_submodule():
    """mtp.py:331: the whole model became a child of the loss."""
    model = Model()
    loss = PipelineCausalLMLoss(FusedLinearCrossEntropy(), model)
    assert loss.model is model
    assert not list(loss.parameters()) and not loss.state_dict() and len(list(loss.children())) == 1


def test_seq_idx_at_the_end_of_the_output():
    extract = PipelineCausalLMLoss._extract_seq_idx_tail
    hidden, _, _, seq_idx = stage()
    assert extract((hidden, seq_idx)) == (seq_idx, (hidden,))
    assert extract((hidden, hidden))[0] is None
    assert extract(hidden) == (None, hidden)
    with pytest.raises(ValueError, match=r"^output: expected seq_idx \[B, S\], the int32 tensor at its end, got \[6\]"):
        extract((hidden, seq_idx[0]))


HIDDEN, LABELS = torch.zeros(B, S, H), torch.zeros(B, S, dtype=torch.int64)


@pytest.mark.parametrize(
    ("call", "text"),
    [
        (lambda: calculate_loss(MaskedCrossEntropy(), labels=LABELS), "logits: expected, for MaskedCrossEntropy takes"),
        (lambda: calculate_loss(FusedLinearCrossEntropy(), labels=LABELS), "hidden_states: expected, for FusedLinear"),
        (lambda: calculate_loss(MaskedCrossEntropy(), logits=HIDDEN), "labels: expected"),
        (lambda: calculate_loss(MaskedCrossEntropy(), typo=1), "calculate_loss: expected only logits, .*, got typo"),
        (
            lambda: calculate_loss(FusedLinearCrossEntropy(), labels=LABELS, hidden_states=HIDDEN, model=nn.Identity()),
            r"model: expected get_output_embeddings\(\) or a Module called lm_head, got Identity: give lm_weight",
        ),
        (
            lambda: calculate_mtp_loss(MaskedCrossEntropy(), labels=LABELS),
            "mtp_per_depth_h: expected it or .*, got",
        ),
        (
            lambda: calculate_mtp_loss(FusedLinearCrossEntropy(), labels=LABELS, mtp_per_depth_logits=[HIDDEN]),
            "mtp_per_depth_logits: expected mtp_per_depth_h, which FusedLinearCrossEntropy takes",
        ),
        (
            lambda: calculate_mtp_loss(MaskedCrossEntropy(), labels=LABELS, mtp_per_depth_h=[HIDDEN], ignore_index=-1),
            "ignore_index: expected -100 like MaskedCrossEntropy, got -1",
        ),
        (
            lambda: calculate_mtp_loss(
                MaskedCrossEntropy(), labels=LABELS, mtp_per_depth_logits=[HIDDEN], seq_idx=LABELS[:, :2]
            ),
            re.escape("seq_idx: expected the labels' shape [2, 6] or [6], got [2, 2]: under pipelining"),
        ),
        (
            lambda: PipelineCausalLMLoss(MaskedCrossEntropy(), Model(), scaling_factor=-1.0),
            "scaling_factor: expected a",
        ),
    ],
)
def test_pipeline_errors(call, text):
    with pytest.raises((TypeError, ValueError), match="^" + text):
        call()
