"""NOTE [Parts] of engine/parts.py: a chunk's parts cost no memory, and in forward a region no time for each chunk."""

import dataclasses
import functools
import re

import pytest
import torch
from torch._inductor.utils import fresh_cache, run_and_get_code
from torch._subclasses import FakeTensorMode

from compiled_loss import Chunking, linear_cross_entropy, linear_distillation, linear_soft_cross_entropy, reference
from compiled_loss.engine import hosts
from compiled_loss.engine.parts import parts
from compiled_loss.engine.plan import Plan
from compiled_loss.inspection import inspect

N, H, V = 48, 11, 96
TIGHT = {"rtol": 1e-11, "atol": 1e-12}
REGIONS = pytest.mark.skipif(not hosts.REGIONS_WORK, reason="this torch has no regions")

LOSSES = {
    "tokens": lambda lib, h, w, b, y, t, **k: lib.linear_cross_entropy(h, w, y, bias=b, label_smoothing=0.1, **k),
    "vocab": lambda lib, h, w, b, y, t, **k: lib.linear_cross_entropy(h, w, y, bias=b, label_smoothing=0.1, **k),
    "probabilities": lambda lib, h, w, b, y, t, **k: lib.linear_soft_cross_entropy(
        h, w, torch.ones(N), target_probs=t, **k
    ),
    "teacher": lambda lib, h, w, b, y, t, **k: lib.linear_distillation(h, w, 1 - h.detach(), 1 - w.detach(), y, **k),
    "divergence": lambda lib, h, w, b, y, t, **k: lib.linear_distillation(
        h, w, 1 - h.detach(), 1 - w.detach(), y, reduction="none", **k
    ).sum(),
}


class Ours:
    linear_cross_entropy = staticmethod(linear_cross_entropy)
    linear_soft_cross_entropy = staticmethod(linear_soft_cross_entropy)
    linear_distillation = staticmethod(linear_distillation)


def chunked(name, size):
    return Chunking(strategy="vocab" if name == "vocab" else "tokens", chunk_size=size)


def inputs(apart=None):
    """Hidden states, weight, bias, labels and a target's probabilities; one of them columns of a wider tensor."""
    shapes = {"hidden": (N, H), "weight": (V, H), "target": (N, V)}
    wide = {name: torch.randn(rows, columns + 3, dtype=torch.float64) for name, (rows, columns) in shapes.items()}
    wide["target"] = wide["target"].softmax(-1)
    hidden, weight, target = (t[:, :-3] if name == apart else t[:, :-3].contiguous() for name, t in wide.items())
    bias = torch.randn(V, dtype=torch.float64, requires_grad=True)
    return hidden.requires_grad_(), weight.requires_grad_(), bias, torch.randint(0, V, (N,)), target


@REGIONS
@pytest.mark.parametrize("name", ["tokens", "vocab", "teacher", "divergence"])
def test_more_chunks_run_a_region_no_oftener_without_data(monkeypatch, name):
    """As far as Inductor, which runs it once more for each chunk after it has dropped the copies."""
    tensors = inputs()
    if name in ("vocab", "divergence"):  # no copies in their backward
        tensors = [t.detach() for t in tensors]
    exponentials = {4: 0, 8: 0}
    dispatch = FakeTensorMode.dispatch

    def counted(mode, func, *args, **kwargs):
        exponentials[chunks] += func is torch.ops.aten.exp.default
        return dispatch(mode, func, *args, **kwargs)

    monkeypatch.setattr(FakeTensorMode, "dispatch", counted)
    for chunks in exponentials:
        torch._dynamo.reset()
        FakeTensorMode.cache_clear()
        chunking = chunked(name, (V if name == "vocab" else N) // chunks)
        loss = functools.partial(LOSSES[name], Ours, *tensors, chunking=chunking)
        value = torch.compile(loss, fullgraph=True, backend="aot_eager_decomp_partition")()
        if value.requires_grad:
            torch.autograd.grad(value, tensors[:2])
    assert exponentials[4] == exponentials[8] > 0


@REGIONS
@pytest.mark.parametrize(
    ("name", "apart"),
    [
        ("tokens", None),
        ("vocab", "weight"),
        ("probabilities", "target"),
        ("teacher", "hidden"),
        ("divergence", None),
        *(
            pytest.param(*case, marks=pytest.mark.slow)
            for case in [
                *((name, None) for name in ("vocab", "probabilities", "teacher")),
                *((name, "hidden") for name in ("tokens", "vocab", "divergence")),
                *((name, "weight") for name in ("tokens", "teacher", "divergence")),
            ]
        ),
    ],
)
def test_no_part_is_copied(name, apart):
    tensors = inputs(apart)
    size = (V if name == "vocab" else N) // 4 + 1  # the last chunk is smaller
    step = torch.compile(lambda: LOSSES[name](Ours, *tensors, chunking=chunked(name, size)), fullgraph=True)

    def stepped():
        loss = step()
        return loss, *torch.autograd.grad(loss, tensors[:2])

    with fresh_cache():
        actual, code = run_and_get_code(stepped)
    loss = LOSSES[name](reference, *tensors)
    for mine, theirs in zip(actual, (loss, *torch.autograd.grad(loss, tensors[:2])), strict=True):
        torch.testing.assert_close(mine, theirs, **TIGHT)
    rows = (size, size * 3, size - 4)
    assert not [n for n in rows for part in code if f"empty_strided_cpu(({n}, {H})" in part]
    logits = f"empty_strided_cpu(({N}, {size})" if name == "vocab" else f"empty_strided_cpu(({size}, {V})"
    assert code[0].count(logits) == (2 if name in ("teacher", "divergence") else 1)


@REGIONS
@pytest.mark.parametrize("name", ["teacher", "probabilities"])
def test_rows_of_all_columns_are_copied_for_no_backend(name):
    """One that drops no copies would hold a second [N, V]."""
    code = []

    def backend(graph, inputs):
        code.extend(m.code for m in graph.modules() if isinstance(m, torch.fx.GraphModule))
        return graph.forward

    loss = functools.partial(LOSSES[name], Ours, *inputs(), chunking=chunked(name, N // 4))
    torch.compile(loss, fullgraph=True, backend=backend)()
    assert any("split_with_sizes_copy" in part for part in code) == (name == "teacher")


@REGIONS
@pytest.mark.parametrize("strategy", ["tokens", pytest.param("vocab", marks=pytest.mark.slow)])
def test_a_last_chunk_at_an_odd_offset_is_not_taken_to_be_aligned(strategy):
    """Triton would load several of its elements at once, from where a GPU cannot."""

    def step(hidden, weight, bias, labels):
        chunking = Chunking(strategy=strategy, chunk_size=1001)
        return linear_cross_entropy(hidden, weight, labels, bias=bias, chunking=chunking)

    rows, columns = (1513, 4096) if strategy == "tokens" else (512, 1513)
    shapes = ((rows, 256), (columns, 256), (columns,))
    tensors = [torch.empty(shape, dtype=torch.bfloat16, device="meta", requires_grad=True) for shape in shapes]
    labels = torch.empty(rows, dtype=torch.int64, device="meta")
    found = inspect(step, *tensors, labels, device="cuda:sm_90", first_only=True, assemble=False)
    pointer = "*i64" if strategy == "tokens" else "*bf16"  # the labels, the bias: read by the kernels that write logits
    aligned = []
    for kernel in found.kernels:
        types = re.findall(
            r"'\w+': '([^']+)'", re.search(r"'signature': {(.*?)}", kernel.source or "{}'signature': {}")[1]
        )
        if types[:1] == ["*bf16"] and pointer in types[1:]:
            place = types.index(pointer, 1)
            aligned.append(f"({place},): [['tt.divisibility', 16]]" in kernel.source)
    assert sorted(aligned) == [False, True]


@pytest.mark.parametrize("alone", [False, True])
def test_a_region_of_its_own_gets_no_copy(alone):
    """Compiled for the copy it would read the slice as aligned, which at odd chunk sizes it is not."""
    x = torch.arange(7)
    plan = Plan(strategy="tokens", chunk=3, count=3, accumulate_dtype=torch.float32, compile=False)
    given = [part for part, _ in parts(dataclasses.replace(plan, copied=True), x, alone=alone)]
    assert torch.equal(torch.cat(given), x)
    assert [part._base is None for part in given] == [True, True, not alone]
    assert all(part._base is x for part, _ in parts(plan, x, alone=alone))
