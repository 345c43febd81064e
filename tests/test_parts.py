"""NOTE [Parts] of engine/parts.py: a chunk's parts cost no memory, and a region no time for each chunk."""

import functools

import pytest
import torch
from torch._inductor.utils import fresh_cache, run_and_get_code
from torch._subclasses import FakeTensorMode

from compiled_loss import Chunking, linear_cross_entropy, linear_distillation, linear_soft_cross_entropy, reference
from compiled_loss.engine import hosts

N, H, V = 48, 11, 96
TIGHT = {"rtol": 1e-11, "atol": 1e-12}

pytestmark = pytest.mark.skipif(not hosts.REGIONS_WORK, reason="this torch has no regions")


def chunked(name, chunks):
    strategy = "vocab" if name == "vocab" else "tokens"
    return Chunking(strategy=strategy, chunk_size=(V if strategy == "vocab" else N) // chunks)


def inputs(lies):
    """Hidden states, weight, labels and a teacher's probabilities; as they come, or columns of wider tensors."""
    wide = [torch.randn(rows, columns + 3, dtype=torch.float64) for rows, columns in ((N, H), (V, H), (N, V))]
    hidden, weight, teacher = (t[:, :-3] if lies == "apart" else t[:, :-3].contiguous() for t in wide)
    return hidden.requires_grad_(), weight.requires_grad_(), torch.randint(0, V, (N,)), teacher.softmax(-1)


LOSSES = {
    "tokens": lambda lib, h, w, y, t, **k: lib.linear_cross_entropy(h, w, y, **k),
    "vocab": lambda lib, h, w, y, t, **k: lib.linear_cross_entropy(h, w, y, **k),
    "soft": lambda lib, h, w, y, t, **k: lib.linear_soft_cross_entropy(h, w, torch.ones(N), target_probs=t, **k),
    "divergence": lambda lib, h, w, y, t, **k: lib.linear_distillation(
        h, w, 1 - h.detach(), 1 - w.detach(), y, reduction="none", **k
    ).sum(),
}


class Ours:
    linear_cross_entropy = staticmethod(linear_cross_entropy)
    linear_soft_cross_entropy = staticmethod(linear_soft_cross_entropy)
    linear_distillation = staticmethod(linear_distillation)


@pytest.mark.parametrize("name", LOSSES)
def test_more_chunks_run_a_region_no_oftener_without_data(monkeypatch, name):
    """As far as Inductor, which runs it once more for each chunk after it has dropped the copies."""
    tensors = inputs("whole")
    exponentials = {4: 0, 8: 0}
    dispatch = FakeTensorMode.dispatch

    def counted(mode, func, *args, **kwargs):
        exponentials[chunks] += func is torch.ops.aten.exp.default
        return dispatch(mode, func, *args, **kwargs)

    monkeypatch.setattr(FakeTensorMode, "dispatch", counted)
    for chunks in exponentials:
        torch._dynamo.reset()
        FakeTensorMode.cache_clear()
        loss = functools.partial(LOSSES[name], Ours, *tensors, chunking=chunked(name, chunks))
        torch.autograd.grad(torch.compile(loss, fullgraph=True, backend="aot_eager_decomp_partition")(), tensors[:2])
    assert exponentials[4] == exponentials[8] > 0


@pytest.mark.parametrize("lies", ["whole", "apart"])
@pytest.mark.parametrize("name", LOSSES)
def test_no_part_is_copied(name, lies):
    tensors = inputs(lies)
    step = torch.compile(lambda: LOSSES[name](Ours, *tensors, chunking=chunked(name, 4)), fullgraph=True)

    def stepped():
        loss = step()
        return loss, *torch.autograd.grad(loss, tensors[:2])

    with fresh_cache():
        actual, code = run_and_get_code(stepped)
    loss = LOSSES[name](reference, *tensors)
    for mine, theirs in zip(actual, (loss, *torch.autograd.grad(loss, tensors[:2])), strict=True):
        torch.testing.assert_close(mine, theirs, **TIGHT)
    rows = (V if name == "vocab" else N) // 4
    assert not [line for part in code for line in part.splitlines() if f"empty_strided_cpu(({rows}, {H})" in line]
    logits = f"empty_strided_cpu(({N}, {rows})" if name == "vocab" else f"empty_strided_cpu(({rows}, {V})"
    assert code[0].count(logits) == (2 if name == "divergence" else 1)
