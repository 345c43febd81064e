"""What a compiled loss leaves to the caller's compiler: one operator a pass, and no kernel where labels alone count."""

import re
import subprocess
import sys

import pytest
import torch
from torch._inductor.utils import run_and_get_code

import compiled_loss
from compiled_loss import Chunking
from compiled_loss.testing import head_inputs
from tests.support.cases import everything, linear, truth
from tests.support.comparing import assert_accurate

LOOP = re.compile(r"torch\.ops\.compiled_loss\.\w*_chunks")


@pytest.mark.parametrize("strategy", ["tokens", "vocab"])
@pytest.mark.parametrize("keywords", [{}, {"reduction": "sum"}, {"reduction": "sum", "num_label_tokens": 7}], ids=str)
def test_the_loss_has_no_kernel_of_its_own(strategy, keywords):
    hidden, weight, labels, _ = head_inputs(33, 8, 50)
    labels = labels.masked_fill(labels % 3 == 0, -100)
    chunking = Chunking(strategy=strategy, chunk_size=20)
    loss = torch.compile(
        lambda: compiled_loss.linear_cross_entropy(hidden, weight, labels, chunking=chunking, **keywords),
        fullgraph=True,
    )
    value, (forward, *_) = run_and_get_code(loss)
    operator = {"tokens": "form_token_chunks", "vocab": "sum_vocab_chunks"}[strategy]
    assert forward.count(f"torch.ops.compiled_loss.{operator}.default(") == 1
    assert "cpp_fused" not in forward
    plain = torch.nn.functional.cross_entropy(hidden @ weight.t(), labels, reduction=keywords.get("reduction", "mean"))
    torch.testing.assert_close(value, plain / keywords.get("num_label_tokens", 1))


def code_of(loss, inputs):
    """What Inductor writes for the loss and its backward."""
    compiled = torch.compile(loss, fullgraph=True)
    _, codes = run_and_get_code(lambda: compiled(*inputs).sum().backward())
    return "\n".join(codes)


@pytest.mark.parametrize("strategy", ["tokens", "vocab"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_small_call_is_a_part_of_the_callers_graph(strategy, dtype):
    keywords = everything(33, 50, dtype)
    inputs = head_inputs(33, 8, 50, dtype=dtype, ignored=0.2, ignore_index=keywords["ignore_index"])
    loss = linear(Chunking(strategy=strategy), **keywords)
    assert not LOOP.search(code_of(loss, inputs))
    assert_accurate(torch.compile(loss, fullgraph=True), truth(**keywords), truth(**keywords), inputs)


@pytest.mark.parametrize("strategy", ["tokens", "vocab"])
@pytest.mark.parametrize(
    ("tokens", "size", "there"),
    [(40, 33, True), (40, 64, False), (5000, 5000, True)],
    ids=["two chunks", "one", "many logits"],
)
def test_a_loop_is_never_a_part_of_it(strategy, tokens, size, there):
    inputs = head_inputs(tokens, 8, 64)
    code = code_of(linear(Chunking(strategy=strategy, chunk_size=size)), inputs)
    assert bool(LOOP.search(code)) == there


@pytest.mark.parametrize("strategy", ["tokens", "vocab"])
def test_unknown_sizes_are_never_a_part_of_it(strategy):
    inputs = head_inputs(40, 8, 64)
    torch._dynamo.mark_dynamic(inputs.hidden, 0)
    torch._dynamo.mark_dynamic(inputs.labels, 0)
    assert LOOP.search(code_of(linear(Chunking(strategy=strategy)), inputs))


def test_import_brings_neither_sympy_nor_dtensor():
    """They take longer than all else; nobody has a DTensor who has not imported them."""
    text = (
        "import sys, torch; before = set(sys.modules); import compiled_loss;"
        "print([name for name in sys.modules if name not in before and"
        " name.startswith(('sympy', 'torch.distributed.tensor', 'torch._inductor', 'torch._dynamo'))])"
    )
    run = subprocess.run([sys.executable, "-c", text], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "[]"
