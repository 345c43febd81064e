"""What a compiled loss leaves to the caller's compiler: one operator a pass, and no kernel where labels alone count."""

import subprocess
import sys

import pytest
import torch
from torch._inductor.utils import run_and_get_code

import compiled_loss
from compiled_loss import Chunking
from compiled_loss.testing import head_inputs


@pytest.mark.parametrize("strategy", ["tokens", "vocab"])
@pytest.mark.parametrize("keywords", [{}, {"reduction": "sum"}, {"reduction": "sum", "num_label_tokens": 7}], ids=str)
def test_the_loss_has_no_kernel_of_its_own(strategy, keywords):
    hidden, weight, labels, _ = head_inputs(33, 8, 50)
    labels = labels.masked_fill(labels % 3 == 0, -100)
    chunking = Chunking(strategy=strategy)
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


def test_import_brings_neither_sympy_nor_dtensor():
    """They take longer than all else; nobody has a DTensor who has not imported them."""
    text = (
        "import sys, torch; before = set(sys.modules); import compiled_loss;"
        "print([name for name in sys.modules if name not in before and"
        " name.startswith(('sympy', 'torch.distributed.tensor', 'torch._inductor', 'torch._dynamo'))])"
    )
    run = subprocess.run([sys.executable, "-c", text], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "[]"
