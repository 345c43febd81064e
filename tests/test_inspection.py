"""The inspector on functions whose figures are known by hand, in the state that users' processes are in."""

import importlib
import inspect as source_of
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
import uuid
from dataclasses import FrozenInstanceError, replace
from functools import partial
from pathlib import Path

import inspected_functions as user
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import compiled_loss
from compiled_loss.inspection import TARGETS, Inspection, InspectionError, inspector, process
from compiled_loss.inspection.call import TensorSpec, find_function, parse_inputs
from compiled_loss.nn import LinearCrossEntropy

pytestmark = [
    pytest.mark.slow,  # minutes, with a child for each device
    pytest.mark.xdist_group("inspection"),  # one worker holds the children
    pytest.mark.skipif(not sys.platform.startswith("linux"), reason="GPU CODE IS NOT TESTED: it is generated on Linux"),
]

MIB = 2**20
H100 = TARGETS["cuda:sm_90"]
N, H, V = 64, 32, 1000
HIDDEN, WEIGHT = f"f32[{N},{H}]", f"f32[{V},{H}]"


def inspect(fn, *inputs, device="cuda:sm_90", assemble=False, measure=False, **options):
    """Without what takes long, and with what must be true of every inspection."""
    found = inspector.inspect(fn, *inputs, device=device, assemble=assemble, measure=measure, **options)
    for p in found.passes:
        assert all(launch.live_bytes >= 0 and launch.written_bytes >= 0 for launch in p.launches)
        assert max((launch.live_bytes for launch in p.launches), default=0) == p.peak_bytes
        assert sum(p.kernels.values()) == len(p.launches)
    assert {k.name for k in found.kernels} == {launch.kernel for p in found.passes for launch in p.launches}
    assert (found.device, found.torch) == (device, torch.__version__)
    assert Inspection.from_json(found.to_json()) == found
    return found


def alike(one, other):
    """But for the time and for how many graphs the process has seen."""
    graphs = [[re.sub(r"(?<=AOT ID: \[').*(?='\])", "", g.wrapper) for g in i.graphs] for i in (one, other)]
    return graphs[0] == graphs[1] and replace(one, graphs=other.graphs, seconds=other.seconds) == other


def kinds(p):
    return [launch.kind for launch in p.launches]


def names(p):
    return [re.sub("^aten::", "", launch.kernel) for launch in p.launches]


def line(mark):
    """Where a function is marked."""
    lines = source_of.getsource(user).splitlines()
    (number,) = [i for i, text in enumerate(lines, 1) if text.endswith(f"# MARK {mark}")]
    return f"inspected_functions.py:{number}"


# Descriptions of inputs ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("f64[2]", TensorSpec(shape=(2,), dtype=torch.float64)),
        ("f32[8,4]", TensorSpec(shape=(8, 4), dtype=torch.float32)),
        ("fp32[8,4]", TensorSpec(shape=(8, 4), dtype=torch.float32)),
        ("float32[8,4]", TensorSpec(shape=(8, 4), dtype=torch.float32)),
        ("f16[1]", TensorSpec(shape=(1,), dtype=torch.float16)),
        ("fp16[1]", TensorSpec(shape=(1,), dtype=torch.float16)),
        ("half[1]", TensorSpec(shape=(1,), dtype=torch.float16)),
        ("bf16[8, 4 ]:grad", TensorSpec(shape=(8, 4), dtype=torch.bfloat16, grad=True)),
        ("bfloat16[8,4,]", TensorSpec(shape=(8, 4), dtype=torch.bfloat16)),
        ("i64[3]:0..131071", TensorSpec(shape=(3,), dtype=torch.int64, high=131071)),
        ("int64[3]:-100..-1", TensorSpec(shape=(3,), dtype=torch.int64, low=-100, high=-1)),
        ("i32[3]", TensorSpec(shape=(3,), dtype=torch.int32)),
        ("uint8[3]", TensorSpec(shape=(3,), dtype=torch.uint8)),
        ("bool[3]", TensorSpec(shape=(3,), dtype=torch.bool)),
        ("f32[]", TensorSpec(shape=(), dtype=torch.float32)),
        ("f32[ ]:grad", TensorSpec(shape=(), dtype=torch.float32, grad=True)),
        ("f32[0,4]", TensorSpec(shape=(0, 4), dtype=torch.float32)),
        ("float8_e4m3fn[2]", TensorSpec(shape=(2,), dtype=torch.float8_e4m3fn)),
    ],
)
def test_a_spec_is_read_and_written(text, expected):
    spec = TensorSpec.parse(text)
    assert spec == expected
    assert TensorSpec.parse(str(spec)) == spec


@pytest.mark.parametrize(("text", "written"), [("fp32[2,3]:grad", "f32[2,3]:grad"), ("i64[4]:1..5", "int64[4]:1..5")])
def test_a_spec_is_written_one_way(text, written):
    assert str(TensorSpec.parse(text)) == written


@pytest.mark.parametrize(
    "text",
    ["", "f32", "[2]", "f32[2", "f32[a]", "f32[-1]", "f32(2)", "f32[2]grad", "f32[2]:", "f32[2] :grad", "f33[2]"],
)
def test_a_spec_that_is_not_read(text):
    with pytest.raises(ValueError, match=rf"^inputs: expected .*, got {re.escape(repr(text))}$"):
        TensorSpec.parse(text)


@pytest.mark.parametrize(
    "text",
    ["tensor[2]", "nn[2]", "f32[2]:0..5", "f32[2]:gard", "i64[2]:grad", "bool[2]:grad", "i64[2]:1..", "i64[2]:1...5"],
)
def test_a_spec_that_is_none(text):
    with pytest.raises(ValueError, match=rf"^inputs: expected .*, got {re.escape(repr(text))}$"):
        TensorSpec.parse(text)


@pytest.mark.parametrize("text", ["f32[2,,3]", "f32[2 3]", "f32[,]", "i64[2]:5..3"])
def test_a_spec_that_is_almost_one(text):
    with pytest.raises(ValueError, match=rf"^inputs: expected .*, got {re.escape(repr(text))}$"):
        TensorSpec.parse(text)


@pytest.mark.parametrize(
    ("tensor", "spec"),
    [
        (torch.zeros(2, 3, requires_grad=True), TensorSpec(shape=(2, 3), dtype=torch.float32, grad=True)),
        (torch.zeros(3, 2).t(), TensorSpec(shape=(2, 3), dtype=torch.float32, stride=(1, 2))),
        (torch.zeros(2, 6)[:, ::2], TensorSpec(shape=(2, 3), dtype=torch.float32, stride=(6, 2))),
        (torch.zeros(2, 1).expand(2, 3), TensorSpec(shape=(2, 3), dtype=torch.float32, stride=(1, 0))),
        (torch.tensor([4, -100, 3]), TensorSpec(shape=(3,), dtype=torch.int64, high=4)),  # ignored is no label
        (torch.tensor([4, 2, 3]), TensorSpec(shape=(3,), dtype=torch.int64, low=2, high=4)),
        (torch.tensor([True, True]), TensorSpec(shape=(2,), dtype=torch.bool, low=1, high=1)),
        (torch.tensor([], dtype=torch.int32), TensorSpec(shape=(0,), dtype=torch.int32)),
        (torch.zeros(2, device="meta", dtype=torch.int64), TensorSpec(shape=(2,), dtype=torch.int64)),
        (torch.tensor(1j), TensorSpec(shape=(), dtype=torch.complex64)),
    ],
    ids=str,
)
def test_the_spec_of_a_tensor(tensor, spec):
    assert TensorSpec.of(tensor) == spec
    made = spec.make(torch.device("meta"), data=False)
    assert (made.shape, made.stride(), made.dtype) == (tensor.shape, tensor.stride(), tensor.dtype)
    assert made.requires_grad == tensor.requires_grad


def test_data_are_as_described():
    make = partial(TensorSpec.make, device=torch.device("cpu"), data=True)
    labels = make(TensorSpec.parse("i64[1000]:-3..4"))
    assert set(labels.tolist()) == set(range(-3, 5))
    assert set(make(TensorSpec.parse("bool[100]")).tolist()) == {False, True}
    floats = make(TensorSpec.parse("bf16[100,100]:grad"))
    assert floats.requires_grad and floats.isfinite().all() and 0 < floats.std() < 1
    assert make(TensorSpec(shape=(50, 4), dtype=torch.float32, stride=(1, 50))).stride() == (1, 50)
    assert make(TensorSpec.parse("f32[0,4]")).shape == (0, 4)


def test_inputs_of_the_command_line():
    text = "bf16[8, 4]:grad int64[8]:0..3 0.5 -1 True None 'mean' [1,2] f32[]"
    assert parse_inputs(text) == (
        TensorSpec(shape=(8, 4), dtype=torch.bfloat16, grad=True),
        TensorSpec(shape=(8,), dtype=torch.int64, high=3),
        *(0.5, -1, True, None, "mean", [1, 2]),
        TensorSpec(shape=(), dtype=torch.float32),
    )
    assert parse_inputs("") == parse_inputs(" \n") == ()


@pytest.mark.parametrize(("text", "word"), [("f32[2] mean", "mean"), ("f32[2]:0..1", "f32[2]:0..1"), ("(1,", "(1,")])
def test_inputs_that_are_none(text, word):
    with pytest.raises(ValueError, match=rf"^inputs: expected .*, got {re.escape(repr(word))}$"):
        parse_inputs(text)


def test_functions_have_names():
    assert find_function("linear_cross_entropy") is compiled_loss.linear_cross_entropy
    assert find_function("torch.nn.functional:cross_entropy") is F.cross_entropy
    assert find_function("torch:nn.functional.cross_entropy") is F.cross_entropy
    assert find_function("compiled_loss.nn:LinearCrossEntropy") is LinearCrossEntropy


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("nonsense", "has no attribute 'nonsense'"),
        ("", "''"),
        ("no_such_module:f", "No module named 'no_such_module'"),
        ("torch.no_such:f", "No module named 'torch.no_such'"),
        ("torch:nn.no_such", "no_such"),
        ("compiled_loss:__version__", "str is not callable"),
        ("torch.nn.functional.cross_entropy", "has no attribute"),
    ],
)
def test_functions_that_are_none(name, reason):
    with pytest.raises(InspectionError, match=rf"^function: expected .*, got '{name}': .*{reason}"):
        find_function(name)


# Known truth --------------------------------------------------------------------------------------------------------


def test_a_pointwise_kernel():
    size = 64 * 1024 * 4
    found = inspect(user.same_shape, "f32[64,1024]:grad")
    (forward,), (backward,) = (p.launches for p in found.passes)
    assert (forward.kind, forward.read_bytes, forward.written_bytes) == ("pointwise", size, size)
    assert forward.kernel.startswith("triton_poi") and forward.operations == 0
    assert (backward.kind, backward.read_bytes, backward.written_bytes) == ("pointwise", 2 * size, size)
    assert found.saved == ()  # the result serves
    assert [p.peak_bytes for p in found.passes] == [size, 2 * size]  # backward: the result, which lives on, and dx
    assert (found.launches, found.forward.moved_bytes, found.backward.moved_bytes) == (2, 2 * size, 3 * size)
    seconds = (2 + 3) * size / 3.35e12
    assert found.roofline_seconds() == found.roofline_seconds("H100") == pytest.approx(seconds)
    assert found.roofline_seconds("H200") == pytest.approx(seconds * 3.35 / 4.8)


def test_a_reduction():
    found = inspect(torch.logsumexp, f"f32[{N},{V}]:grad", 1)
    assert [kinds(p) for p in found.passes] == [["reduction"], ["pointwise"]]
    assert found.saved == () and found.operations == 0  # the input and the result serve
    assert [p.peak_bytes for p in found.passes] == [N * 4, N * 4 + N * V * 4]
    assert found.forward.launches[0].written_bytes == N * 4
    assert found.backward.launches[0].read_bytes == (N * V + 2 * N) * 4


def test_a_reduction_reads_its_input_only():
    found = inspect(torch.logsumexp, f"f32[{N},{V}]", 1, backward=False)
    assert found.forward.launches[0].read_bytes == N * V * 4


def test_gemms_and_what_they_keep():
    found = inspect(user.linear_logsumexp, f"{HIDDEN}:grad", f"{WEIGHT}:grad")
    assert kinds(found.forward) == ["gemm", "reduction"]
    assert kinds(found.backward) == ["pointwise", "gemm", "gemm"]
    assert [g.operations for p in found.passes for g in p.gemms] == [2 * N * H * V] * 3
    assert found.operations == 6 * N * H * V
    assert [g.shapes for g in found.forward.gemms] == [f"[{N}, {H}] @ [{H}, {V}]"]
    assert {g.shapes for g in found.backward.gemms} == {f"[{V}, {N}] @ [{N}, {H}]", f"[{N}, {V}] @ [{V}, {H}]"}
    assert {g.dtype for p in found.passes for g in p.gemms} == {"float32"}
    (logits,) = found.saved
    assert (logits.shape, logits.dtype, logits.size) == ((N, V), "float32", N * V * 4)
    assert "mm" in logits.origin and "inspected_functions.py" in logits.location
    assert found.saved_bytes == N * V * 4
    gemm = found.forward.gemms[0]
    assert (gemm.read_bytes, gemm.written_bytes) == ((N * H + V * H) * 4, N * V * 4)
    assert found.forward.peak_bytes == (N * V + N) * 4
    # The logits are donated: their gradient is written over them.
    assert found.backward.peak_bytes == (N * V + N + V * H + N * H) * 4
    softmax = found.backward.launches[0]
    assert softmax.live_bytes == found.forward.peak_bytes and softmax.written_bytes == N * V * 4


@pytest.mark.parametrize("dtype", ["bf16", "f16"])
def test_gemms_of_a_half_precision(dtype):
    found = inspect(user.product, f"{dtype}[{N},{H}]:grad", f"{dtype}[{H},{V}]")
    assert [kinds(p) for p in found.passes] == [["gemm"], ["gemm"]]  # one side only
    name = {"bf16": "bfloat16", "f16": "float16"}[dtype]
    assert {g.dtype for p in found.passes for g in p.gemms} == {name}
    assert found.forward.peak_bytes == N * V * 2
    seconds = max(2 * N * H * V / 989.5e12, (N * H + H * V + N * V) * 2 / 3.35e12)
    assert found.forward.launches[0].seconds(compiled_loss.inspection.GPUS["H100"]) == pytest.approx(seconds)


def test_batched_gemms_convolutions_and_attention_count():
    found = inspect(torch.bmm, "f32[4,8,16]", "f32[4,16,32]", backward=False)
    assert found.operations == 2 * 4 * 8 * 16 * 32
    found = inspect(torch.addmm, "f32[8,32]", "f32[8,16]", "f32[16,32]", backward=False)
    assert found.operations == 2 * 8 * 16 * 32
    found = inspect(F.conv1d, "f32[2,3,10]", "f32[5,3,3]", backward=False)
    assert found.operations == 2 * 2 * 8 * 5 * 3 * 3


def test_a_dead_buffer_is_used_again_and_counts_once():
    size = 64 * 64 * 4
    square = ["f32[64,64]"] * 3
    found = inspect(user.layers, *square, backward=False)
    assert kinds(found.forward) == ["gemm", "pointwise"] * 3 + ["gemm"]
    assert found.forward.peak_bytes == 2 * size  # a layer's input and output; relu in place
    assert found.forward.kernels == {"mm": 4, found.forward.launches[1].kernel: 3}
    assert all(relu.read_bytes == relu.written_bytes == size for relu in found.forward.launches[1::2])


def test_saved_tensors_are_donated_to_backward():
    size = 64 * 64 * 4
    found = inspect(user.layers, "f32[64,64]:grad", "f32[64,64]", "f32[64,64]:grad")
    assert [s.size for s in found.saved] == [size] * 3
    assert found.forward.peak_bytes == 4 * size  # three layers and the result
    last = found.backward.launches[-1]
    assert last.kind == "gemm" and last.live_bytes == 4 * size  # the result, dc, da and one to make it of
    assert found.operations == 2 * 64**3 * (4 + 3 + 4)


def test_a_checkpoint_computes_again_and_keeps_nothing():
    found = inspect(user.checkpointed, f"{HIDDEN}:grad", f"{WEIGHT}:grad")
    assert found.saved == ()
    assert found.operations == 8 * N * H * V
    assert found.forward.peak_bytes == (N * V + N) * 4


@pytest.mark.parametrize("device", ["cuda:sm_90", "cpu"])
def test_what_the_compiler_leaves_behind_is_no_memory(device):
    found = inspect(user.litters, "f32[64,1024]", backward=False, device=device)
    assert 64 * 1024 * 4 <= found.forward.peak_bytes < 64 * 1024 * 4 + 1024


def test_in_place_takes_nothing():
    found = inspect(user.in_place, "f32[64,1024]", backward=False)
    (launch,) = found.forward.launches
    assert launch.read_bytes == launch.written_bytes == 64 * 1024 * 4
    assert found.peak_bytes == 0


def test_views_take_nothing():
    found = inspect(torch.t, "f32[64,32]:grad")
    assert (found.launches, found.peak_bytes, found.saved) == (0, 0, ())


def test_a_tensor_given_twice_stays_one():
    """As the weight of an embedding that is tied to a head: its gradients are added."""
    weight = torch.empty(V, H, device="meta", requires_grad=True)

    def tied(hidden, first, second):
        return hidden @ first.t() + hidden @ second.t()

    assert inspect(tied, HIDDEN, f"{WEIGHT}:grad", f"{WEIGHT}:grad").backward.kernels == {"mm": 2}
    assert inspect(tied, HIDDEN, weight, weight).backward.kernels == {"mm": 1, "addmm": 1}


def test_an_inspection_repeats():
    """Whatever the child was asked before."""
    first = inspect(user.linear_logsumexp, f"{HIDDEN}:grad", f"{WEIGHT}:grad")
    inspect(user.linear_logsumexp, "f32[16,32]:grad", "f32[100,32]:grad")
    inspect(user.broken, "f32[5,7]:grad")
    again = inspect(user.linear_logsumexp, f"{HIDDEN}:grad", f"{WEIGHT}:grad")
    assert alike(again, first)


def test_the_cpu_has_launches_too():
    found = inspect(user.linear_logsumexp, f"{HIDDEN}:grad", f"{WEIGHT}:grad", device="cpu")
    assert kinds(found.forward) == ["gemm", "reduction"]
    assert kinds(found.backward) == ["pointwise", "gemm", "gemm"]
    assert found.operations == 6 * N * H * V
    assert found.saved_bytes == N * V * 4
    assert found.backward.peak_bytes == (N * V + N + V * H + N * H) * 4
    assert found.roofline_seconds() is None and found.measured is None


# Any function -------------------------------------------------------------------------------------------------------


def test_lambdas_closures_and_partials():
    factor = 3.0

    def closure(x):
        return (x * factor).exp()

    size = 64 * 64 * 4
    for fn in (lambda x: x.exp(), closure, partial(user.scaled, power=2, negative=True, factor=0.5)):
        found = inspect(fn, "f32[64,64]", backward=False)
        assert (kinds(found.forward), found.peak_bytes, found.breaks) == (["pointwise"], size, ())
    assert found.name == "partial"
    assert inspect(closure, "f32[4]", backward=False).name == "closure"


def test_a_module_and_its_parameters():
    size = 16 * 64 * 4
    found = inspect(user.Mlp(), "f32[16,32]")
    assert (found.name, found.inputs) == ("Mlp", ("f32[16,32]",))
    assert found.operations == 2 * 16 * 32 * 64 * 2 + 2 * 16 * 64 * 8 * 3  # x needs no gradient
    assert [s.shape for s in found.saved] == [(16, 64)]  # after relu
    assert found.backward.peak_bytes >= (32 * 64 + 64 + 64 * 8 + 16 * 8) * 4  # the gradients and the result
    assert found.forward.peak_bytes < 2 * size + 2 * 16 * 8 * 4
    frozen = inspect(user.Mlp().requires_grad_(False), "f32[16,32]:grad")
    assert frozen.operations == 2 * found.forward.operations
    alone = inspect(torch.no_grad()(user.Mlp()), "f32[16,32]", backward=False)
    assert alone.saved == () and alone.backward is None and alone.operations == found.forward.operations


def test_a_module_behind_its_method_or_a_partial():
    backward = 2 * 16 * 32 * 64 + 4 * 16 * 64 * 8
    mlp = user.Mlp()
    assert inspect(mlp.forward, "f32[16,32]").backward.operations == backward
    assert inspect(partial(mlp), "f32[16,32]").backward.operations == backward
    assert inspect(partial(F.linear, weight=mlp.up.weight), "f32[16,32]").backward.operations == 2 * 16 * 32 * 64


def test_a_module_in_a_closure():
    mlp = user.Mlp()
    assert inspect(lambda x: mlp(x).sum(), "f32[16,32]").backward.operations


def test_results_of_any_structure():
    size = 64 * 64 * 4
    found = inspect(user.two, "f32[64,64]:grad")
    assert found.forward.peak_bytes == size + 4
    assert len(found.backward.launches) == 1
    found = inspect(user.several, "f32[64,64]:grad")
    assert found.forward.peak_bytes == size + 4
    assert found.backward.launches[-1].written_bytes == size


@pytest.mark.parametrize("name", ["exp", "nothing"])
def test_inference(name):
    found = inspect({"exp": torch.exp, "nothing": lambda x: None}[name], "f32[8]", backward=False)
    assert found.backward is None and found.saved == () and found.passes == (found.forward,)


def test_a_tensor_stands_for_its_shape():
    text = inspect(user.two, "f32[64,64]:grad")
    for tensor in (torch.ones(64, 64, requires_grad=True), torch.ones(64, 64, device="meta", requires_grad=True)):
        assert alike(inspect(user.two, tensor), text)
    assert alike(inspect(user.two, TensorSpec.parse("f32[64,64]:grad")), text)


def test_strides_are_kept():
    plain = inspect(torch.clone, "f32[64,32]", backward=False)
    strided = inspect(torch.clone, torch.empty(64, 128)[:, ::4], backward=False)
    assert plain.forward.launches[0].read_bytes == 64 * 32 * 4
    assert strided.forward.launches[0].read_bytes == (64 * 128 - 3) * 4  # from the first to the last element
    turned = inspect(torch.exp, torch.empty(32, 64).t(), backward=False)
    assert "(1, 64)" in turned.graphs[0].wrapper and "(1, 64)" not in plain.graphs[0].wrapper


def test_lists_of_tensors_and_numbers_are_inputs():
    def fn(parts, factor, *, name):
        return torch.cat(parts) * factor if name == "cat" else None

    tensors = [torch.ones(8, 4, requires_grad=True), torch.ones(2, 4, requires_grad=True)]
    found = inspect(partial(fn, name="cat"), tensors, 2.5)
    assert found.inputs[1] == "2.5"
    assert found.forward.peak_bytes == 10 * 4 * 4
    assert sum(launch.written_bytes for launch in found.backward.launches) == 10 * 4 * 4


@pytest.mark.slow
@pytest.mark.parametrize(
    ("fn", "inputs"),
    [
        (nn.TransformerEncoderLayer(32, 4, 64, batch_first=True), ["f32[2,16,32]:grad"]),
        (nn.Embedding(100, 16), ["i64[8,4]:0..99"]),
        (nn.Conv2d(3, 8, 3), ["f32[2,3,16,16]:grad"]),
        (partial(F.dropout, p=0.5), ["f32[8,4]:grad"]),
        (partial(torch.topk, k=3), ["f32[64,100]:grad"]),
        (torch.sort, ["f32[64,100]:grad"]),
        (torch.linalg.norm, ["f32[64,100]:grad"]),
        (nn.LSTM(8, 8), ["f32[4,2,8]:grad"]),
    ],
    ids=lambda v: type(v).__name__,
)
def test_functions_of_torch(fn, inputs):
    found = inspect(fn, *inputs)
    assert found.launches and found.backward.peak_bytes


# Breaks, synchronisation, transfers, guards -------------------------------------------------------------------------


def test_a_break_has_a_reason_and_a_line():
    found = inspect(user.broken, "f32[64,1024]:grad")
    (broken,) = found.breaks
    assert "graph_break()" in broken.reason and broken.location.endswith(line("broken"))
    assert [g.direction for g in found.graphs] == ["forward"] * 2 + ["backward"] * 2
    assert kinds(found.forward) == kinds(found.backward) == ["pointwise"] * 2
    assert inspect(user.same_shape, "f32[64,1024]:grad").breaks == ()


def test_item_is_a_sync():
    found = inspect(user.asks, "f32[64,1024]:grad")
    (broken,) = found.breaks
    assert "item" in broken.reason and broken.location.endswith(line("asks"))
    (sync,) = [launch for launch in found.forward.launches if launch.kind == "sync"]
    assert (sync.kernel, sync.read_bytes) == ("_local_scalar_dense", 4)
    assert "sync" not in kinds(found.backward)


def test_a_choice_by_a_mask_is_a_sync():
    found = inspect(user.chosen, "f32[64,32]", "bool[64]", backward=False)
    assert found.breaks[0].location.endswith(line("chosen"))
    assert "sync" in kinds(found.forward)
    assert found.forward.peak_bytes >= 64 * 32 * 4  # at most all of them


def test_a_constant_from_the_cpu_is_a_transfer():
    found = inspect(user.brings_constant, "f32[64,1000]:grad")
    (transfer,) = [launch for launch in found.forward.launches if launch.kind == "transfer"]
    assert transfer.read_bytes == transfer.written_bytes == 4000
    assert "transfer" not in kinds(found.backward)
    assert [s.shape for s in found.saved] == [(1000,)]
    small = inspect(user.small_constant, "f32[64,3]", backward=False)  # Inductor writes it into the kernel
    assert set(kinds(small.forward)) == {"pointwise"}


@pytest.mark.xfail(strict=True, reason="fake_device.py: Inductor puts a constant of more than 8 elements on the device")
def test_a_long_constant():
    assert inspect(user.long_constant, "f32[64,100]", backward=False).launches


def test_operators_outside_of_any_graph():
    found = inspect(user.in_python, "f32[64,32]", "i64[64]:0..63", backward=False)
    assert names(found.forward)[:4] == ["index", "cumsum", "embedding", "_log_softmax"]
    assert found.forward.launches[-1].kernel.startswith("triton_poi")
    assert found.forward.launches[0].written_bytes == 64 * 32 * 4


def test_kinds_of_operators():
    found = inspect(user.in_python, "f32[64,32]", "i64[64]:0..63", backward=False)
    kind = dict(zip(names(found.forward), kinds(found.forward), strict=True))
    assert (kind["_log_softmax"], kind["logsumexp"]) == ("reduction", "reduction")
    assert (kind["minimum"], kind["argmax"]) == ("pointwise", "reduction")


def guards(*arguments, **keywords):
    return {g.code for g in inspect(*arguments, **keywords).guards}


def test_guards_on_sizes():
    static = guards(user.linear_logsumexp, f"{HIDDEN}:grad", WEIGHT)
    assert f"L['hidden'] is float32[{N}, {H}], requires_grad=True" in static
    assert f"L['weight'] is float32[{V}, {H}], requires_grad=False" in static
    assert not any(re.search(r"\bs\d+\b", code) for code in static)
    dynamic = guards(user.linear_logsumexp, f"{HIDDEN}:grad", WEIGHT, dynamic=True)
    assert any(re.fullmatch(r"L\['hidden'\] is float32\[s\d+, s\d+\], requires_grad=True", c) for c in dynamic)
    assert any("L['hidden'].size()[1] == L['weight'].size()[1]" in c or "size()" in c for c in dynamic)


def test_guards_on_numbers():
    found = inspect(user.scaled, "f32[8]", 2.5, 3, backward=False)
    codes = {g.code: g for g in found.guards}
    assert {"L['factor'] == 2.5", "L['power'] == 3", "L['negative'] == False"} <= set(codes)
    assert all("inspected_functions.py:" in g.location for g in found.guards)


def test_a_number_that_may_change_is_read_without_a_sync():
    found = inspect(user.scaled, "f32[8]:grad", 2.5, 3.5, dynamic=True)
    assert "L['factor'] == 2.5" not in {g.code for g in found.guards}
    assert "sync" not in kinds(found.forward) + kinds(found.backward)


@pytest.mark.xfail(strict=True, reason="compiler.py: a kernel and a saved number of the CPU count as the device's")
def test_a_number_that_may_change_stays_on_the_cpu():
    found = inspect(user.scaled, "f32[8]:grad", 2.5, 3.5, dynamic=True)
    assert all(name.startswith("triton") for name in names(found.forward))
    assert all(len(t.shape) == 1 for t in found.saved)


# Operators written in Python ----------------------------------------------------------------------------------------


def test_a_custom_operator_is_looked_into():
    found = inspect(user.uses_chunked, f"{HIDDEN}:grad", WEIGHT)
    chunks, rows = N // user.CHUNK, user.CHUNK
    assert [g.operations for g in found.forward.gemms] == [2 * rows * H * V] * chunks
    assert [g.operations for g in found.backward.gemms] == [2 * N * H * V] * 2
    assert found.forward.kernels["amax"] == chunks
    # The doubled input, the result, a chunk of logits and its maximum.
    assert found.forward.peak_bytes == (N * H + N + rows * V + rows) * 4
    assert found.backward.peak_bytes > N * V * 4
    assert [s.shape for s in found.saved] == [(N, H)]
    assert found.breaks == ()


def test_a_custom_operator_of_composite_ones():
    found = inspect(user.uses_composite, HIDDEN, WEIGHT, backward=False)
    assert found.operations == 2 * N * H * V
    assert "gemm" in kinds(found.forward)


def test_a_custom_operator_that_compiles():
    for _ in range(2):  # the function compiled inside outlives an inspection
        found = inspect(user.uses_compiled_inside, HIDDEN, WEIGHT, backward=False)
        assert [g.operations for g in found.forward.gemms] == [2 * user.CHUNK * H * V] * (N // user.CHUNK)
        assert kinds(found.forward).count("reduction") == N // user.CHUNK
        assert user.CHUNK * V * 4 < found.forward.peak_bytes < 2 * user.CHUNK * V * 4
        assert {g.operator for g in found.graphs} == {"", "inspected_functions::compiled_inside"}


def test_a_custom_operator_that_writes_its_argument():
    found = inspect(user.uses_accumulate, "f32[64,32]", backward=False)
    assert [g.operations for g in found.forward.gemms] == [2 * 64 * 32 * 64] * 2
    assert found.forward.peak_bytes == 2 * 64 * 64 * 4  # the sum and one product


# What a real device would do ----------------------------------------------------------------------------------------


def test_autocast():
    found = inspect(user.autocast_product, "f32[64,32]", "f32[32,100]", backward=False)
    assert {g.dtype for g in found.forward.gemms} == {"bfloat16"}


@pytest.mark.xfail(strict=True, reason="the fake device has no fused attention, a real one has")
def test_attention_is_fused():
    found = inspect(user.attention, "bf16[2,4,128,64]:grad")
    assert found.saved_bytes < 2 * 4 * 128 * 128 * 4


def test_options_reach_the_compiler():
    narrow = inspect(torch.logsumexp, f"f32[{N},{V}]", 1, backward=False, options={"max_fusion_size": 1})
    plain = inspect(torch.logsumexp, f"f32[{N},{V}]", 1, backward=False)
    assert len(narrow.forward.launches) > len(plain.forward.launches)
    with pytest.raises(InspectionError, match="nonsense"):
        inspect(torch.exp, "f32[8]", backward=False, options={"nonsense": 1})


@pytest.mark.parametrize("name", ["max_autotune", "max_autotune_gemm"])
def test_autotuning_is_refused(name):
    with pytest.raises(InspectionError, match=rf"^options: expected none by which .*, got {name}: "):
        inspect(user.product, "f32[64,32]", "f32[32,100]", backward=False, options={name: True})
    assert inspect(user.product, "f32[64,32]", "f32[32,100]", backward=False, options={name: False}).launches == 1


# Machine code -------------------------------------------------------------------------------------------------------


def check_configurations(found, targets):
    made = [k for k in found.kernels if k.source]
    assert len(made) == 2
    for kernel in made:
        assert kernel.source.count("@triton.jit") == 1
        assert [t for t in targets if not any(c.target == t for c in kernel.configurations)] == []
        assert {c.target for c in kernel.configurations} == set(targets)
        assert all(0 < c.registers <= 512 and c.spills == 0 and c.shared >= 0 for c in kernel.configurations)
        assert all("warps=" in c.options for c in kernel.configurations)
    assert all(k.configurations == () for k in found.kernels if not k.source)
    assert any(c.shared for k in made for c in k.configurations)  # the reduction


def test_nvidia():
    targets = ("cuda:sm_80", "cuda:sm_90", "cuda:sm_100")
    lines = []
    found = inspect(user.linear_logsumexp, f"{HIDDEN}:grad", f"{WEIGHT}:grad", assemble=targets, progress=lines.append)
    check_configurations(found, targets)
    assert found.kernel("mm").source == "" and found.triton
    assert any("assembling" in text for text in lines) and any("graph" in text for text in lines)
    with pytest.raises(FrozenInstanceError):
        found.name = ""
    default = inspect(user.linear_logsumexp, f"{HIDDEN}:grad", f"{WEIGHT}:grad", assemble=True)
    check_configurations(default, targets[1:2])
    first = inspect(user.linear_logsumexp, f"{HIDDEN}:grad", f"{WEIGHT}:grad", assemble=targets, first_only=True)
    for k, every in zip(first.kernels, found.kernels, strict=True):
        firsts = [next(c for c in every.configurations if c.target == t) for t in targets] if k.source else []
        assert list(k.configurations) == firsts


@pytest.mark.slow
def test_amd():
    found = inspect(
        user.linear_logsumexp, f"{HIDDEN}:grad", f"{WEIGHT}:grad", device="hip:gfx942", assemble=["hip:gfx942"]
    )
    check_configurations(found, ["hip:gfx942"])
    assert found.roofline_seconds() == found.roofline_seconds("MI300X") > 0
    assert "warp_size=64" in found.kernels[1].source
    assert found.backward.peak_bytes == (N * V + N + V * H + N * H) * 4


@pytest.mark.parametrize(("device", "targets"), [("cuda:sm_90", ["cuda:sm_80", "hip:gfx942"]), ("cpu", ["cuda:sm_80"])])
def test_targets_of_another_vendor(device, targets):
    with pytest.raises(InspectionError, match=rf"^assemble: .* device='{device}'.*{targets[-1]}"):
        inspect(user.twice, "f32[8]", device=device, assemble=targets)
    with pytest.raises(InspectionError, match=r"^device: expected one of .*cuda:sm_90.*, got 'sm_90'"):
        inspect(user.twice, "f32[8]", assemble=["sm_90"])


def test_dump(tmp_path):
    folder = tmp_path / "new" / "dump"
    found = inspect(user.same_shape, "f32[64,1024]:grad", assemble=["cuda:sm_80", "cuda:sm_90"], dump=folder)
    suffixes = [path.suffix for path in folder.rglob("*") if path.is_file()]
    count = sum(len(k.configurations) for k in found.kernels)
    assert suffixes.count(".ptx") == suffixes.count(".cubin") == count > 2
    texts = [path.read_text() for path in folder.rglob("*.py")]
    assert all(k.source in texts for k in found.kernels)
    assert all(g.nodes in texts and g.wrapper in texts for g in found.graphs)
    assert any(".target sm_80" in path.read_text() for path in folder.rglob("*.ptx"))
    assert Inspection.from_json((folder / "report.json").read_text()) == found
    page = (folder / "index.html").read_text()
    assert found.kernels[0].name in page


# A real run ---------------------------------------------------------------------------------------------------------


def check_measured(fn, *inputs, **options):
    found = inspect(fn, *inputs, device="cpu", measure=True, **options)
    assert found.peak_bytes >= 500 * MIB
    assert found.measured.peak_bytes == pytest.approx(found.peak_bytes, rel=0.05)
    assert found.measured.seconds > 0


def test_the_predicted_peak_is_the_measured_one():
    labels = torch.randint(0, 65536, (2048,))
    check_measured(user.linear_cross_entropy, "f32[2048,32]:grad", "f32[65536,32]:grad", labels)


@pytest.mark.slow
def test_the_predicted_peak_with_a_large_result():
    check_measured(user.same_shape, "f32[1024,131072]:grad")


@pytest.mark.slow
@pytest.mark.parametrize("backward", [True, False])
def test_the_predicted_peak_of_layers(backward):
    check_measured(
        lambda a, b, c: user.layers(a, b, c).sum(),
        *["f32[32768,1024]:grad" if backward else "f32[131072,512]"],
        *["f32[1024,1024]:grad" if backward else "f32[512,512]"] * 2,
        backward=backward,
    )


LINEAR = ("f32[512,512]:grad", "f32[262144,512]:grad", "i64[512]:0..262143")
LOGITS = ("f32[2048,65536]:grad", "i64[2048]:0..65535")


@pytest.mark.slow
@pytest.mark.parametrize(
    "fn",
    [
        compiled_loss.cross_entropy,
        partial(compiled_loss.cross_entropy, label_smoothing=0.1),
        partial(compiled_loss.cross_entropy, softcap=30.0, z_loss=1e-4),
        partial(compiled_loss.cross_entropy, reduction="none"),
    ],
    ids=["plain", "smoothing", "softcap", "none"],
)
def test_the_predicted_peak_of_losses_on_logits(fn):
    check_measured(fn, *LOGITS)


@pytest.mark.slow
@pytest.mark.parametrize(
    "options", [{}, {"label_smoothing": 0.1, "softcap": 30.0}], ids=["plain", "smoothing, softcap"]
)
@pytest.mark.parametrize("strategy", ["tokens", "vocab"])
def test_the_predicted_peak_of_linear_losses(strategy, options):
    chunking = compiled_loss.Chunking(strategy=strategy, chunk_size={"tokens": 128, "vocab": 65536}[strategy])
    check_measured(partial(compiled_loss.linear_cross_entropy, chunking=chunking, **options), *LINEAR)


@pytest.mark.slow
def test_a_run_with_ignored_labels():
    logits, labels = "f32[8,5]:grad", torch.tensor([-100, 1, 2, 3, 4, 4, 4, -100])
    assert inspect(F.cross_entropy, logits, labels, device="cpu", measure=True).measured.seconds > 0


# The caller's process -----------------------------------------------------------------------------------------------

MARK = "COMPILED_LOSS_TEST_MARK"

CALLER = """
import json, os, signal, sys, threading
import torch
from compiled_loss.inspection import inspect, process
from compiled_loss.inspection.targets import TARGETS

def state():
    native = {n: id(getattr(torch._C, n)) for n in dir(torch._C) if "cuda" in n.lower()}
    cuda = {n: id(v) for n, v in vars(torch.cuda).items() if callable(v)}
    return {"native": native, "cuda": cuda, "versions": [torch.version.hip, torch.version.cuda],
            "available": [torch.cuda.is_available(), torch.cuda.device_count(), torch.cuda.is_initialized()],
            "threads": [len(os.listdir("/proc/self/task")), threading.active_count(), torch.get_num_threads()],
            "modes": [torch.get_default_dtype(), torch.is_grad_enabled(), torch.random.get_rng_state().tolist()],
            "path": [list(sys.path), os.getcwd(), dict(os.environ)],
            "signals": [signal.getsignal(s) for s in (signal.SIGINT, signal.SIGCHLD, signal.SIGPIPE)],
            "compiler": [m for m in ("torch._inductor.async_compile", "torch._inductor.graph") if m in sys.modules]}

def local(x):  # of __main__: it travels by value
    return x.exp()

def ask():
    return inspect(local, "f32[64,64]:grad", assemble=False).launches

def say(**values):
    print(json.dumps(values), flush=True)
"""

CLEAN = """
before = state()
launches = ask()
after = state()
say(launches=launches, changed={k: [str(v)[:999], str(after[k])[:999]] for k, v in before.items() if v != after[k]})
os.kill(os.getpid(), signal.SIGKILL)
"""

FORK = """
first = ask()
gpu = process.child_for(TARGETS["cuda:sm_90"])
reading, writing = os.pipe()
pid = os.fork()
if pid == 0:
    forked = ask()
    own = process.child_for(TARGETS["cuda:sm_90"])._process.pid
    os.write(writing, json.dumps([forked, own, own != gpu._process.pid]).encode())
    sys.exit(0)  # with what atexit calls
status = os.waitpid(pid, 0)[1]
forked, grandchild, own = json.loads(os.read(reading, 1000))
say(launches=[first, forked, ask()], own=own, status=status, grandchild=os.path.exists(f"/proc/{grandchild}"),
    same=gpu is process.child_for(TARGETS["cuda:sm_90"]) and gpu.alive)
"""


def alive(mark):
    """Processes with the mark in their environment."""
    found = []
    for environment in Path("/proc").glob("[0-9]*/environ"):
        try:
            if f"{MARK}={mark}".encode() in environment.read_bytes():
                found.append(int(environment.parent.name))
        except OSError:  # gone, or another user's
            continue
    return found


def gone(mark, seconds=15):
    for _ in range(10 * seconds):
        if not alive(mark):
            return True
        time.sleep(0.1)
    return False


def run_script(folder, text):
    """What a user's script says, its exit status, and whether nothing of it is left."""
    mark = uuid.uuid4().hex
    script = folder / "script.py"
    script.write_text(CALLER + text)
    path = os.pathsep.join([str(Path(compiled_loss.__file__).parents[1]), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        [sys.executable, "-W", "ignore", str(script)],
        env={**os.environ, MARK: mark, "PYTHONPATH": path},
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )
    assert done.stdout, done.stderr
    return json.loads(done.stdout.splitlines()[-1]), done.returncode, gone(mark)


def test_the_caller_stays_as_it_was(tmp_path):
    """And when it is killed its child ends."""
    said, status, nothing_left = run_script(tmp_path, CLEAN)
    assert said == {"launches": 2, "changed": {}}
    assert status == -signal.SIGKILL and nothing_left


@pytest.mark.slow
def test_a_fork_has_a_child_of_its_own(tmp_path):
    said, status, nothing_left = run_script(tmp_path, FORK)
    assert said == {"launches": [2] * 3, "own": True, "status": 0, "grandchild": False, "same": True}
    assert status == 0 and nothing_left


def test_one_child_serves_functions_of_any_module():
    pids = set()
    for fn in (user.twice, torch.exp, lambda x: x + 1, F.relu, user.same_shape):
        inspect(fn, "f32[8]", backward=False)
        pids.add(process.child_for(H100)._process.pid)
    assert len(pids) == 1


def test_two_threads_share_a_child():
    inspect(user.twice, "f32[8]", backward=False)
    pid = process.child_for(H100)._process.pid
    found = {}

    def work(columns):
        found[columns] = inspect(user.same_shape, f"f32[8,{columns}]:grad")

    threads = [threading.Thread(target=work, args=(columns,)) for columns in (100, 200, 300)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert {columns: i.forward.peak_bytes for columns, i in found.items()} == {n: 8 * n * 4 for n in (100, 200, 300)}
    assert process.child_for(H100)._process.pid == pid


def test_two_threads_start_one_child(monkeypatch):
    started = []

    class Slow:
        alive = True

        def __init__(self, target):
            started.append(target)
            time.sleep(0.2)

    monkeypatch.setattr(process, "_children", {})
    monkeypatch.setattr(process, "Child", Slow)
    threads = [threading.Thread(target=process.child_for, args=(H100,)) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert started == [H100]


def test_a_child_that_is_killed():
    call_ = partial(inspect, torch.mm, "f32[4,4]", "f32[4,4]", device="cpu", backward=False)
    call_()
    first = process.child_for(None)

    def kill(text):
        os.kill(process.child_for(None)._process.pid, signal.SIGKILL)
        first._process.wait()

    with pytest.raises(InspectionError, match="ended with status -9"):
        call_(progress=kill)
    assert not first.alive
    assert call_().operations == 2 * 4**3
    assert process.child_for(None) is not first


@pytest.mark.slow
def test_a_child_that_is_killed_while_it_waits(monkeypatch):
    monkeypatch.setattr(process, "_children", {})
    first = process.child_for(None)
    first._process.kill()
    first._process.wait()
    second = process.child_for(None)
    assert second is not first and second.alive
    second.close()
    assert not second.alive


def test_a_child_that_is_closed_leaves_no_file(monkeypatch):
    before = os.listdir("/proc/self/fd")
    child = process.Child(None)
    child.close()
    assert os.listdir("/proc/self/fd") == before


def test_a_child_that_just_ended(monkeypatch):
    child = process.Child(None)
    child._process.kill()
    child._process.wait()
    with pytest.raises(InspectionError, match="ended with status -9"):
        child.ask("properties", None, "f")


@pytest.mark.slow
def test_an_exception_of_progress_is_the_callers():
    class StopError(Exception): ...

    def stop(text):
        raise StopError

    with pytest.raises(StopError):
        inspect(torch.mm, "f32[4,4]", "f32[4,4]", device="cpu", backward=False, progress=stop)
    assert inspect(torch.mm, "f32[4,4]", "f32[4,8]", device="cpu", backward=False).operations == 2 * 4 * 4 * 8


@pytest.fixture
def module(tmp_path, monkeypatch):
    """Writes a module of the user's that appears on sys.path now, and imports it, again where it was imported."""
    name = f"user_module_{uuid.uuid4().hex[:8]}"
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(sys, "dont_write_bytecode", True)

    def write(text):
        (tmp_path / f"{name}.py").write_text(text)
        importlib.invalidate_caches()
        return importlib.reload(sys.modules[name]) if name in sys.modules else importlib.import_module(name)

    yield write
    sys.modules.pop(name, None)


def test_a_module_that_came_on_the_path_later(module):
    inspect(user.twice, "f32[8]", backward=False)  # the child is there
    later = module("def fn(x):\n    return x.exp()\n")
    assert inspect(later.fn, "f32[8]", backward=False).launches == 1


@pytest.mark.slow
def test_a_module_that_was_edited(module, monkeypatch):
    monkeypatch.setattr(process, "_children", {})  # a child that knows the path
    try:
        edited = module("def fn(x):\n    return x @ x\n")
        assert inspect(edited.fn, "f32[8,8]", backward=False, device="cpu").operations == 2 * 8**3
        edited = module("def fn(x):\n    return x @ x @ x\n")
        assert inspect(edited.fn, "f32[8,8]", backward=False, device="cpu").operations == 2 * 2 * 8**3
    finally:
        process.child_for(None).close()


# One clear error each -----------------------------------------------------------------------------------------------


def clear(text, *, lines=20):
    """Neither compiler's frames nor a wall of text."""
    frames = re.findall(r'File "(.+?)"', text)
    assert not [f for f in frames if "/torch/" in f or "compiled_loss" in Path(f).parts], text
    assert len(text.splitlines()) <= lines, text


@pytest.mark.parametrize(
    ("name", "inputs", "says"),
    [("raises", ["f32[8,4]:grad"], "mine, 2"), ("does_not_fit", ["f32[8,4]:grad", "f32[5,4]"], "8, 4.*5, 4")],
)
def test_a_function_that_raises(name, inputs, says):
    with pytest.raises(InspectionError, match=rf"(?s)^{name} raised while it was inspected:\n.*{says}") as caught:
        inspect(getattr(user, name), *inputs)
    text = str(caught.value)
    assert re.search(rf'inspected_functions\.py", line {line(name).split(":")[1]}\b', text)
    clear(text)
    assert inspect(user.twice, "f32[8]", backward=False).launches == 1  # the child serves on


def test_a_function_that_ends_the_process():
    with pytest.raises(InspectionError, match=r"(?s)ended with status 7 .*last words"):
        inspect(user.ends, "f32[8]", backward=False, device="cpu")


@pytest.mark.slow
def test_a_function_that_exits():
    with pytest.raises(InspectionError, match=r"(?s)^exits raised .*SystemExit: 3"):
        inspect(user.exits, "f32[8]", backward=False, device="cpu")


@pytest.mark.parametrize("fn", [user.same_shape, lambda x: None])
def test_nothing_to_differentiate(fn):
    with pytest.raises(InspectionError, match=rf"^{fn.__name__}: expected a result that requires grad") as caught:
        inspect(fn, "f32[8]")
    clear(str(caught.value), lines=1)


def test_a_function_that_cannot_travel():
    lock = threading.Lock()
    expected = r"^<lambda>: expected a function that can be sent to another process, got .*lock.*: define it at the top"
    with pytest.raises(InspectionError, match=expected) as caught:
        inspect(lambda x: x * 2 if lock else x, "f32[8]")
    clear(str(caught.value), lines=1)


def test_an_input_that_is_more_than_its_shape():
    class Mine(torch.Tensor): ...

    with pytest.raises(InspectionError, match=r"^inputs: expected plain tensors and parameters, got a Mine"):
        inspect(user.twice, torch.ones(3).as_subclass(Mine))


def test_a_function_that_is_compiled_already():
    compiled = torch.compile(lambda x: x.exp())
    assert inspect(compiled, "f32[8]", backward=False).launches == 1


@pytest.mark.parametrize("device", ["cuda:sm_42", "gpu", "", "hip", "cuda:0"])
def test_an_unknown_device(device):
    with pytest.raises(InspectionError, match=r"^device: expected one of cpu, cuda, cuda:sm_80, .*, got ") as caught:
        inspect(user.twice, "f32[8]", device=device)
    assert repr(device) in str(caught.value)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_the_real_gpu_where_there_is_none():
    with pytest.raises(InspectionError, match=r"^device: expected a GPU .*'cuda:sm_90'") as caught:
        inspect(user.twice, "f32[8]", device="cuda")
    clear(str(caught.value), lines=1)


def test_an_input_that_is_no_spec():
    with pytest.raises(ValueError, match=r"^inputs: expected dtype\[size,size\].*, got 'mean'"):
        inspect(user.twice, "mean")


@pytest.fixture
def afresh(monkeypatch, tmp_path):
    """No children, and nothing compiled before."""
    monkeypatch.setattr(process, "_children", {})
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.delenv("CXX", raising=False)
    yield
    process._close_all()  # of this test


def refused(pattern, device="cuda:sm_90", **options):
    with pytest.raises(InspectionError, match=pattern) as caught:
        inspect(user.twice, "f32[8]", backward=False, device=device, **options)
    clear(str(caught.value))


def test_without_a_compiler(afresh, monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    refused(r"^a C\+\+ compiler: expected g\+\+ or clang\+\+ on PATH, found none: install g\+\+, or set CXX$")
    monkeypatch.setenv("CXX", "no-such-compiler")
    refused(r"^a C\+\+ compiler: expected CXX=no-such-compiler, g\+\+ or clang\+\+ on PATH")


def test_with_a_compiler_that_fails(afresh, monkeypatch, tmp_path):
    compiler = tmp_path / "broken-compiler"
    compiler.write_text("#!/bin/sh\necho my own trouble >&2\nexit 1\n")
    compiler.chmod(0o755)
    monkeypatch.setenv("CXX", str(compiler))
    refused(rf"(?s)^the fake device does not compile with {compiler} against torch .*:\nmy own trouble")
    assert not list((tmp_path / "cache").rglob("*.so"))


@pytest.mark.slow
def test_the_shim_is_compiled_once(afresh, monkeypatch, tmp_path):
    from compiled_loss.inspection import fake_device

    library = fake_device.build()
    monkeypatch.setenv("PATH", str(tmp_path))  # no compiler from here on
    assert fake_device.build() == library
    assert [path.name for path in library.parent.iterdir()] == [library.name]


@pytest.mark.slow
def test_the_cpu_without_a_compiler(afresh, monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    refused(r"(?s)C\+\+ compiler", device="cpu")


def test_on_another_platform(afresh, monkeypatch):
    for platform in ("darwin", "win32"):
        monkeypatch.setattr(sys, "platform", platform)
        refused(rf"{platform}.*")


def test_without_cloudpickle(monkeypatch):
    monkeypatch.setitem(sys.modules, "cloudpickle", None)
    refused(r"^inspection needs cloudpickle: pip install 'compiled-loss\[inspect\]'$")


def test_without_triton(afresh, monkeypatch, tmp_path):
    monkeypatch.delenv("TORCHINDUCTOR_CACHE_DIR")
    (tmp_path / "triton").mkdir()
    (tmp_path / "triton" / "__init__.py").write_text("raise ImportError('no triton here')\n")
    monkeypatch.syspath_prepend(tmp_path)
    refused(r"^inspection needs triton: pip install 'compiled-loss\[inspect\]'$")


def test_without_an_interpreter(afresh, monkeypatch):
    monkeypatch.delenv("TORCHINDUCTOR_CACHE_DIR")
    monkeypatch.setattr(sys, "executable", "/nowhere/python")
    refused(r"/nowhere/python")


def test_with_a_cache_that_cannot_be_written(afresh, monkeypatch, tmp_path):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "file"))
    refused(r"cache")
