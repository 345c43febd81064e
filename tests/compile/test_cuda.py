"""What only a GPU can show; skipped where there is none."""

import cases
import pytest
import torch
from torch._dynamo.utils import counters

from compiled_loss import Chunking
from compiled_loss.testing import head_inputs

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")


@pytest.mark.parametrize("mode", ["reduce-overhead", "max-autotune"])
@pytest.mark.parametrize("strategy", ["tokens", "vocab"])
def test_cuda_graphs(strategy, mode):
    """Recorded in the second call, replayed from the third on; what is refused is counted."""
    inputs = head_inputs(528, 64, 1056, device="cuda", ignored=0.1)
    exact = inputs.to(torch.float64)
    truth = cases.truth()(*exact)
    expected = cases.gradients(truth, exact)
    loss = torch.compile(cases.linear(Chunking(strategy=strategy, chunk_size=48)), fullgraph=True, mode=mode)
    counters["inductor"].clear()
    for _ in range(4):
        torch.compiler.cudagraph_mark_step_begin()
        value = loss(*inputs)
        gradients = cases.gradients(value, inputs)
        assert abs(value.item() - truth.item()) < 2**-8
        for mine, theirs in zip(gradients, expected, strict=True):
            assert (mine - theirs).norm() < 2**-8 * theirs.norm()
    assert counters["inductor"]["cudagraph_skips"] == 0


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("strategy", ["tokens", "vocab"])
def test_no_synchronisation(strategy, dtype, compiled):
    inputs = head_inputs(528, 64, 1056, dtype=dtype, device="cuda", ignored=0.1)
    exact = inputs.to(torch.float64)
    loss = cases.linear(Chunking(strategy=strategy, chunk_size=48))  # more than 8 chunks: fp32 accumulators
    loss = torch.compile(loss, fullgraph=True) if compiled else loss
    cases.gradients(loss(*inputs), inputs)
    torch.cuda.set_sync_debug_mode("error")
    try:
        value = loss(*inputs)
        gradients = cases.gradients(value, inputs)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    truth = cases.truth()(*exact)
    eps = 4 * max(torch.finfo(dtype).eps, 2**-10)  # TF32 and reduced-precision reductions are the user's to choose
    assert abs(value.item() - truth.item()) < eps
    for mine, theirs in zip(gradients, cases.gradients(truth, exact), strict=True):
        assert (mine - theirs).norm() < eps * theirs.norm()
