"""What torch's own counter says of our operations: each GEMM once, wherever it hides."""

import subprocess
import sys

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from compiled_loss import (
    Chunking,
    cross_entropy,
    linear_cross_entropy,
    linear_distillation,
    linear_soft_cross_entropy,
    linear_token_statistics,
    multi_token_prediction,
)

N, H, W, V = 24, 8, 5, 40  # W: the teacher's width
GEMM = 2 * N * H * V
TEACHERS = 2 * N * W * V


def counted(loss, *, hidden=True, weight=True):
    """Operations of the loss of a head, and of its gradients."""
    states, rows = torch.randn(N, H, requires_grad=hidden), torch.randn(V, H, requires_grad=weight)
    with FlopCounterMode(display=False) as counter:
        value = loss(states, rows, torch.randint(0, V, (N,)))
        if value.requires_grad:
            value.sum().backward()
    return counter.get_total_flops()


@pytest.mark.parametrize("bodies", [False, pytest.param(True, marks=pytest.mark.slow)], ids=["plain", "operators"])
@pytest.mark.parametrize("chunk", [7, 1000])
@pytest.mark.parametrize(("strategy", "gemms"), [("tokens", 3), ("vocab", 4)])
def test_cross_entropy(strategy, gemms, chunk, bodies):
    chunking = Chunking(strategy=strategy, chunk_size=chunk, compile=bodies)

    def loss(hidden, weight, labels):
        return linear_cross_entropy(hidden, weight, labels, chunking=chunking)

    assert counted(loss) == gemms * GEMM
    assert counted(loss, hidden=False) == counted(loss, weight=False) == (gemms - 1) * GEMM
    assert counted(loss, hidden=False, weight=False) == GEMM


@pytest.mark.parametrize("bodies", [False, pytest.param(True, marks=pytest.mark.slow)], ids=["plain", "operators"])
def test_distillation(bodies):
    chunking = Chunking(chunk_size=7, compile=bodies)
    teacher = torch.randn(N, W), torch.randn(V, W)

    def loss(hidden, weight, labels, **keywords):
        return linear_distillation(hidden, weight, *teacher, labels, chunking=chunking, **keywords)

    assert counted(loss) == 3 * GEMM + TEACHERS
    assert counted(loss, weight=False) == 2 * GEMM + TEACHERS
    assert counted(lambda *args: loss(*args, reduction="none")) == 4 * GEMM + 2 * TEACHERS


@pytest.mark.parametrize("bodies", [False, pytest.param(True, marks=pytest.mark.slow)], ids=["plain", "operators"])
def test_soft_targets(bodies):
    chunking, everywhere = Chunking(chunk_size=7, compile=bodies), torch.ones(N)
    probs, states = torch.rand(N, V).softmax(-1), torch.randn(N, H)

    def given(hidden, weight, labels):
        return linear_soft_cross_entropy(hidden, weight, everywhere, target_probs=probs, chunking=chunking)

    def shared(hidden, weight, labels):
        keywords = {"teacher_hidden": states, "teacher_weight": weight, "chunking": chunking}
        return linear_soft_cross_entropy(hidden, weight, everywhere, **keywords)

    assert counted(given) == 3 * GEMM
    assert counted(shared) == 4 * GEMM


def test_other_losses():
    assert counted(lambda h, w, y: linear_token_statistics(h, w, y).entropy) == 4 * GEMM
    assert counted(lambda h, w, y: multi_token_prediction([h[None]] * 2, w, y[None])) == 6 * GEMM
    assert counted(lambda h, w, y: cross_entropy(h @ w.t(), y)) == 3 * GEMM  # the GEMMs are the caller's


def test_fp16_and_wide_accumulators():
    """Other products, as many operations."""
    for dtype in (torch.float16, torch.bfloat16):
        hidden, weight = torch.randn(N, H).to(dtype).requires_grad_(), torch.randn(V, H).to(dtype).requires_grad_()
        for strategy, gemms in (("tokens", 3), ("vocab", 4)):
            with FlopCounterMode(display=False) as counter:
                chunking = Chunking(strategy=strategy, chunk_size=2, accumulate_dtype=torch.float32)
                linear_cross_entropy(hidden, weight, torch.randint(0, V, (N,)), chunking=chunking).backward()
            assert counter.get_total_flops() == gemms * GEMM


@pytest.mark.parametrize("first", ["compiled_loss", "torch.utils.flop_counter"])
def test_flop_counter_imported_before_or_after(first):
    """The counter is not imported for its formulas, which are there wherever it is."""
    code = f"""
import sys
import {first}
assert ("torch.utils.flop_counter" in sys.modules) == ({first!r} != "compiled_loss")
import compiled_loss, importlib, torch.utils.flop_counter as counter
names = [str(key) for key in counter.flop_registry]
assert {{"compiled_loss.form_token_chunks", "compiled_loss.fold_vocab_chunks"}} <= set(names), names
assert counter.__spec__.name == "torch.utils.flop_counter"
"""
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
