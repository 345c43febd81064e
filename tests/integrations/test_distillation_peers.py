"""Distillation beside TRL's and Liger's own functions, where they are installed: their numbers, in our words."""

import pytest
import torch
from divergence_cases import CHUNKS, heads

from compiled_loss import distillation, linear_distillation, linear_distillation_with_statistics

T = 1.7
BOTH_ROUND = {"rtol": 5e-5, "atol": 2e-6}  # fp32 logits of 10 to 20: p has 20 eps, a sum of 13 differences some more
NAMES = {0.0: {"divergence": "forward_kl"}, 1.0: {"divergence": "reverse_kl"}}
pytestmark = pytest.mark.filterwarnings("ignore")  # theirs


def options(beta):
    """Their beta in our words, without T squared."""
    named = NAMES.get(beta, {"divergence": "jsd", "jsd_weight": beta})
    return {**named, "temperature": T, "temperature_squared": False}


def close(loss, theirs, wanted):
    torch.testing.assert_close(loss, theirs, **BOTH_ROUND)
    expected = torch.autograd.grad(theirs, wanted)
    torch.testing.assert_close(torch.autograd.grad(loss, wanted), expected, **BOTH_ROUND)


@pytest.mark.parametrize("beta", [0.0, 0.3, 1.0])
def test_gkd_of_trl(beta):
    trl = pytest.importorskip("trl.experimental.gkd.gkd_trainer")
    student, teacher = torch.randn(2, 7, 31, requires_grad=True), torch.randn(2, 7, 31)
    labels = torch.where(torch.rand(2, 7) < 0.3, -100, 0)
    theirs = trl.GKDTrainer.generalized_jsd_loss(student, teacher, labels, beta, T)
    close(distillation(student, teacher, labels, **options(beta)), theirs, [student])


@pytest.mark.parametrize("beta", [0.0, 0.3, 1.0])
def test_chunked_divergence_of_trl(beta):
    """With softcaps, scales and biases, and the student's entropy."""
    trl = pytest.importorskip("trl.kernels.chunked_divergence")
    (hidden, weight, teacher, teacher_weight), labels = heads((9,), 4, 6, 13, dtype=torch.float32, ignore_index=0)
    bias, teacher_bias = torch.randn(13, requires_grad=True), torch.randn(13)
    maps = (0.7, 3.0, 1.3, 2.0)
    given = (hidden, weight, bias, teacher, teacher_weight, teacher_bias, beta, T)
    rows, entropy = trl.ChunkedDivergenceFunction.apply(*given, *maps)
    keywords = {**options(beta), "bias": bias, "teacher_bias": teacher_bias, "reduction": "none"}
    keywords |= dict(zip(("logit_scale", "softcap", "teacher_logit_scale", "teacher_softcap"), maps, strict=True))
    found = linear_distillation_with_statistics(
        hidden, weight, teacher, teacher_weight, labels, ignore_index=-1, chunking=CHUNKS, **keywords
    )
    torch.testing.assert_close(found.statistics.student_entropy, entropy, **BOTH_ROUND)
    torch.testing.assert_close(found.loss, rows, **BOTH_ROUND)
    close(found.loss.sum(), rows.sum(), [hidden, weight, bias])


@pytest.mark.parametrize("beta", [0.0, 0.3, 1.0])
def test_chunked_jsd_of_liger(beta):
    """With hard labels, in which Liger has a weight of each."""
    liger = pytest.importorskip("liger_kernel.chunked_loss")
    (hidden, weight, teacher, teacher_weight), labels = heads((9,), 4, 6, 13, dtype=torch.float32)
    own = {"weight_hard_loss": 0.3, "weight_soft_loss": 0.7, "beta": beta, "temperature": T}
    loss = liger.LigerFusedLinearJSDLoss(**own, compiled=False, chunk_size=4)
    theirs = loss(hidden, weight, teacher, teacher_weight, labels)
    given = (hidden, weight, teacher, teacher_weight, labels)
    mine = linear_distillation(*given, hard_label_weight=0.3, chunking=CHUNKS, **options(beta))
    close(mine, theirs, [hidden, weight])
