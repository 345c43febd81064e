"""Automodel's Modules: its signatures and defaults, our numbers, and none of its defects."""

import inspect

import pytest
import torch
from comparing import assert_matches
from torch import nn
from torch.nn import functional as F

from compiled_loss import (
    ChunkedCrossEntropy,
    FusedLinearCrossEntropy,
    KDLoss,
    MaskedCrossEntropy,
    TEParallelCrossEntropy,
    distillation,
    linear_cross_entropy,
    masked_cross_entropy,
)
from compiled_loss.testing import inputs_unchanged

V = 11
SIGNATURES = {
    MaskedCrossEntropy: "(fp32_upcast=True, ignore_index=-100, reduction='sum')",
    FusedLinearCrossEntropy: "(ignore_index=-100, logit_softcapping=0.0, reduction='sum', impl='cce', *, chunking=...)",
    ChunkedCrossEntropy: "(chunk_len=512, compile=True, ignore_index=-100, reduction='sum')",
    TEParallelCrossEntropy: "(ignore_index=-100, reduction='sum', tp_group=None)",
    KDLoss: "(ignore_index=-100, temperature=1.0, fp32_upcast=True, tp_group=None, chunk_size=0, *, "
    "temperature_squared=True)",
    MaskedCrossEntropy.forward: "(self, logits, labels, mask=None, num_label_tokens=None, loss_weights=None)",
    FusedLinearCrossEntropy.forward: "(self, hidden_states, labels, lm_weight, num_label_tokens=None, "
    "grad_reduce_group=None, loss_weights=None, lm_bias=None, *, mask=None, logits_dtype=None)",
    FusedLinearCrossEntropy.prepare_lm_weight: "(self, lm_head, *, model_config=None, grad_reduce_group=None)",
    FusedLinearCrossEntropy.validate_lm_head: "(self, lm_head, *, model_config=None)",
    FusedLinearCrossEntropy.materialize_lm_weight: "(lm_weight, *, grad_reduce_group=None, dtype=None)",
    TEParallelCrossEntropy.forward: "(self, logits, labels, mask=None, num_label_tokens=None)",
    KDLoss.forward: "(self, student_logits, teacher_logits, labels, num_batch_labels=None)",
}


@pytest.mark.parametrize("which", SIGNATURES, ids=lambda f: f.__qualname__)
def test_signatures(which):
    signature = inspect.signature(which)
    bare = [p.replace(annotation=p.empty) for p in signature.parameters.values()]
    text = str(signature.replace(parameters=bare, return_annotation=signature.empty))
    assert text.split("chunking=", maxsplit=1)[0] == SIGNATURES[which].split("chunking=")[0]


def batch(dtype=torch.float32):
    logits = torch.randn(2, 5, V, dtype=dtype, requires_grad=True)
    labels = torch.where(torch.rand(2, 5) < 0.3, -100, torch.randint(0, V, (2, 5)))
    return logits, labels


@pytest.mark.parametrize("module", [MaskedCrossEntropy, TEParallelCrossEntropy])
@pytest.mark.parametrize("reduction", ["sum", "mean", "none"])
def test_masked_and_te_parallel_cross_entropy(module, reduction):
    logits, labels = batch()
    mask = torch.tensor([0.5, 1.0, 0.0, 2.0, 1.0])
    with inputs_unchanged(logits, labels, mask):
        loss = module(reduction=reduction)(logits, labels, mask)
    target = torch.where(mask != 0, labels, -100)  # fractions do not weigh
    expected = F.cross_entropy(logits.reshape(-1, V), target.reshape(-1), reduction=reduction)
    torch.testing.assert_close(loss, expected.reshape(loss.shape))
    assert module().forward(logits, labels, num_label_tokens=7) == masked_cross_entropy(
        logits, labels, num_label_tokens=7
    )


def test_fused_linear_cross_entropy():
    hidden, weight = torch.randn(2, 5, 4, requires_grad=True), torch.randn(V, 4, requires_grad=True)
    labels = batch()[1]
    module = FusedLinearCrossEntropy(logit_softcapping=3.0)
    before = dict(vars(module))
    loss = module(hidden, labels, weight, num_label_tokens=7)
    assert vars(module) == before  # linear_ce.py:247: forward mutated self
    expected = linear_cross_entropy(hidden, weight, labels, softcap=3.0, reduction="sum", num_label_tokens=7)
    torch.testing.assert_close(loss, expected)
    plain = FusedLinearCrossEntropy()(hidden, labels, weight)  # 0 is none
    torch.testing.assert_close(plain, linear_cross_entropy(hidden, weight, labels, reduction="sum"))
    assert module.materialize_lm_weight(weight, grad_reduce_group=None) is weight


def test_kd_loss():
    student, labels = batch()
    teacher = torch.randn(2, 5, V)
    valid = labels != -100
    log_q, log_p = (F.log_softmax(z[valid] / 2, -1) for z in (student, teacher))
    total = 4 * F.kl_div(log_q, log_p, reduction="sum", log_target=True)
    module = KDLoss(temperature=2.0, chunk_size=3)
    torch.testing.assert_close(module(student, teacher, labels), total / valid.sum())
    torch.testing.assert_close(module(student, teacher, labels, num_batch_labels=9), total / 9)
    torch.testing.assert_close(
        module(student, teacher, labels), distillation(student, teacher, labels, temperature=2.0)
    )


def test_kd_loss_without_the_square_of_the_temperature():
    logits, labels = batch()
    given = (logits, logits.detach().roll(1), labels)
    with_square, without = (KDLoss(temperature=3.0, temperature_squared=which)(*given) for which in (True, False))
    torch.testing.assert_close(with_square, 9 * without)


@pytest.mark.parametrize("module", [MaskedCrossEntropy, TEParallelCrossEntropy, KDLoss, FusedLinearCrossEntropy])
def test_module_compile(module):
    module = module()
    logits, labels = batch()
    arguments = {KDLoss: (logits, logits.detach().roll(1), labels)}.get(type(module), (logits, labels))
    if isinstance(module, FusedLinearCrossEntropy):
        arguments = (logits, labels % 7, torch.randn(7, V))
    plain = type(module)()
    module.compile(fullgraph=True)
    assert_matches(module, plain, arguments, wanted=[logits])
    assert not list(module.parameters()) and isinstance(module, nn.Module)


class Group:
    def __init__(self, ranks):
        self.ranks = ranks

    def size(self):
        return self.ranks


def test_group_of_one_rank():
    logits, labels = batch()
    for make, tensors in ((TEParallelCrossEntropy, (logits, labels)), (KDLoss, (logits, logits.detach() * 2, labels))):
        assert torch.equal(make(tp_group=Group(1))(*tensors), make()(*tensors))
        with pytest.raises(TypeError, match=r"^tp_group: expected a process group or None, got str"):
            make(tp_group="tp")


@pytest.mark.parametrize(
    ("make", "text"),
    [
        (lambda: MaskedCrossEntropy(reduction="avg"), "reduction: expected one of 'none', 'sum', 'mean', got 'avg'"),
        (lambda: MaskedCrossEntropy(ignore_index=None), "ignore_index: expected an int, got NoneType"),
        (lambda: MaskedCrossEntropy(fp32_upcast="yes"), "fp32_upcast: expected True or False, got str"),
        (
            lambda: FusedLinearCrossEntropy(logit_softcapping=-1.0),
            "logit_softcapping: expected a number >= 0",
        ),
        (lambda: FusedLinearCrossEntropy(reduction=1), "reduction: expected one of"),
        (lambda: TEParallelCrossEntropy(reduction="avg"), "reduction: expected one of"),
        (lambda: KDLoss(temperature=-1.0), "temperature: expected a number > 0, got -1.0"),
        (lambda: KDLoss(chunk_size=-1), "chunk_size: expected an int >= 0, got -1"),
    ],
)
def test_constructor_errors(make, text):
    with pytest.raises((TypeError, ValueError), match="^" + text):
        make()
