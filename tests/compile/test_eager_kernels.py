"""Whether eager calls of losses on logits run as compiled kernels is the caller's to say, and changes no number."""

import re

import pytest
import torch
from comparing import TIGHT
from torch._inductor.utils import fresh_cache, run_and_get_code

import compiled_loss
from compiled_loss import Chunking
from compiled_loss.engine import execution, kernels


def logits(seed=0):
    """No parts of one tensor lie one after another."""
    torch.manual_seed(seed)
    return torch.randn(3, 6, 29, dtype=torch.float64)[:, :-1]


LABELS = torch.randint(0, 29, (3, 5), generator=torch.Generator().manual_seed(0)).masked_fill(
    torch.arange(5) == 2, -100
)
TEACHER, TOP = logits(1), logits(2).log_softmax(-1).topk(4)
LOSSES = {
    "cross_entropy": lambda z, how: compiled_loss.cross_entropy(z, LABELS, label_smoothing=0.1, z_loss=1e-3, **how),
    "class_dim": lambda z, how: compiled_loss.cross_entropy(z.movedim(-1, 1), LABELS, class_dim=1, **how),
    "probabilities": lambda z, how: compiled_loss.cross_entropy(z, TEACHER.softmax(-1), **how),
    "masked_cross_entropy": lambda z, how: compiled_loss.masked_cross_entropy(z, LABELS, **how),
    "token_statistics": lambda z, how: compiled_loss.token_statistics(z, LABELS, **how).entropy.sum(),
    "Module": lambda z, how: compiled_loss.nn.CrossEntropy()(z, LABELS, **how),
    "Module of distillation": lambda z, how: compiled_loss.nn.Distillation()(z, TEACHER, LABELS, **how),
    "distillation": lambda z, how: compiled_loss.distillation(z, TEACHER, LABELS, hard_label_weight=0.3, **how),
    "cached teacher": lambda z, how: compiled_loss.distillation(z, None, LABELS, teacher_topk=tuple(TOP), **how),
    "soft": lambda z, how: compiled_loss.masked_soft_cross_entropy(z, TEACHER.softmax(-1), LABELS != -100, **how),
}


@pytest.fixture
def compilations(monkeypatch):
    """How many bodies would have been compiled."""
    found = []

    def uncompiled(one, rows, _):
        found.append(rows)
        return lambda given: one._function(*given)

    monkeypatch.setattr(kernels.Compiled, "_compile", uncompiled)
    return found


@pytest.mark.parametrize("name", LOSSES)
def test_eager_calls_compile_where_asked(compilations, name):
    def step(**how):
        z = logits().requires_grad_()
        loss = LOSSES[name](z, how)
        return loss, *torch.autograd.grad(loss, z)

    expected = step(compile=False)
    assert all(map(torch.equal, step(), expected))  # on a CPU
    assert not compilations
    torch.testing.assert_close(step(compile=True), expected, **TIGHT)
    assert len(compilations) == 2  # forward's and backward's


@pytest.mark.parametrize("name", ["cross_entropy", "cached teacher"])
def test_compiled_kernels_match_plain(name):
    for how in ({"compile": True}, {"compile": False}):
        z = logits().requires_grad_()
        loss = LOSSES[name](z, how)
        found = loss, *torch.autograd.grad(loss, z)
        if how["compile"]:
            mine = found
    torch.testing.assert_close(mine, found, **TIGHT)


@pytest.mark.parametrize("name", LOSSES)
def test_compile_option_errors(name):
    with pytest.raises(ValueError, match="compile: expected True, False or 'auto'"):
        LOSSES[name](logits(), {"compile": 1.5})


EVERYTHING = {"softcap": 30.0, "label_smoothing": 0.1, "z_loss": 1e-3}
TOKENS, COLUMNS = (Chunking(strategy=strategy, compile=True) for strategy in ("tokens", "vocab"))
HEADS = {"softcap": 30.0, "teacher_softcap": 20.0, "hard_label_weight": 0.3, "temperature": 2.0}


def policy(hidden, weight, labels):
    options = {"entropy_coefficient": 0.01, "softcap": 30.0, "chunking": TOKENS}
    return compiled_loss.linear_policy_loss(hidden, weight, labels, torch.zeros(32), torch.ones(32), **options).loss


def distillation(hidden, weight, labels):
    teacher = hidden.detach() + 1, weight.detach() + 1
    return compiled_loss.linear_distillation(
        hidden, weight, *teacher, labels, divergence="lk", chunking=TOKENS, **HEADS
    )


ON_HEADS = {  # functions of hidden states, weight and labels, with the number of loops over rows in the first body
    "tokens": (lambda *head: compiled_loss.linear_cross_entropy(*head, chunking=TOKENS), 1),
    "tokens, all options": (lambda *head: compiled_loss.linear_cross_entropy(*head, chunking=TOKENS, **EVERYTHING), 1),
    "vocab, all options": (lambda *head: compiled_loss.linear_cross_entropy(*head, chunking=COLUMNS, **EVERYTHING), 1),
    "policy": (policy, 1),
    "distillation": (distillation, 3),
}


@pytest.mark.skipif(
    "AVX" not in torch.backends.cpu.get_cpu_capability(), reason="VECTORISED CODE IS NOT TESTED: no AVX"
)
@pytest.mark.parametrize("name", ON_HEADS)
def test_loops_of_a_body(name):
    """NOTE [One loop], NOTE [Computed again]; a loop that takes one column at a time takes four times as long."""
    hidden, weight = torch.randn(32, 8, requires_grad=True), torch.randn(512, 8, requires_grad=True)
    labels, (loss, expected) = torch.randint(0, 512, (32,)), ON_HEADS[name]
    with fresh_cache():
        execution.forget()
        _, codes = run_and_get_code(lambda: loss(hidden, weight, labels).backward())
    columns = re.findall(r"static_cast<int64_t>\(512L?\); x\d\+=static_cast<int64_t>\((\d+)L?\)", "".join(codes))
    assert len(columns) >= 3 and min(map(int, columns)) > 1
    assert not re.search(r"empty_strided_cpu\(\([^)]*\b512\b", "".join(codes))  # a second chunk
    if torch.__version__.startswith("2.13."):
        assert len(re.findall(r"int64_t x0=.*x0<static_cast<int64_t>\(ks0\)", codes[0])) == expected
