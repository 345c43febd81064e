"""The inspector on functions whose figures are known by hand."""

import re
import sys
from functools import partial

import inspected_functions as user
import pytest
import torch
import torch.nn.functional as F
from inspecting import HIDDEN, WEIGHT, H, N, V, alike, inspect, kinds, line, names
from torch import nn

import compiled_loss
from compiled_loss.inspection import InspectionError
from compiled_loss.inspection.call import TensorSpec

pytestmark = [
    pytest.mark.xdist_group("inspection"),  # one worker holds the children
    pytest.mark.skipif(not sys.platform.startswith("linux"), reason="GPU CODE IS NOT TESTED: it is generated on Linux"),
]


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


def test_a_long_constant():
    """Inductor puts it on the device while it compiles."""
    (launch,) = inspect(user.long_constant, "f32[64,100]", backward=False).forward.launches
    assert launch.read_bytes == (64 * 100 + 100) * 4


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


def test_attention_is_fused():
    found = inspect(user.attention, "bf16[2,4,128,64]:grad")
    assert found.saved_bytes < 2 * 4 * 128 * 128 * 4
    (forward,), (backward,) = found.forward.attention, found.backward.attention
    assert forward.operations == 2 * 2 * 2 * 4 * 128 * 128 * 64 / 2  # two products, half of which is masked
    assert backward.operations == 2.5 * forward.operations
    assert backward.scratch_bytes == 2 * 4 * 128 * (64 + 1) * 4  # of flash attention: dQ in fp32, and a sum a row
    assert found.highest_bytes > found.peak_bytes
    assert not found.forward.gemms


@pytest.mark.parametrize(
    ("dtype", "options", "kernel"),
    [
        ("bf16", {"is_causal": True}, "flash"),
        ("bf16", {}, "flash"),
        ("f32", {}, "efficient"),
        ("bf16", {"attn_mask": True}, "efficient"),
        ("f64", {}, ""),
    ],
)
def test_attention_is_a_kernel_that_a_gpu_would_choose(dtype, options, kernel):
    """Of sm_80, which never takes cuDNN's: by the conditions of torch's CUDA library."""
    inputs = [f"{dtype}[2,4,128,64]"] * (3 + ("attn_mask" in options))
    if "attn_mask" in options:
        inputs[3] = f"{dtype}[128,128]"
        options = {}
    fn = partial(F.scaled_dot_product_attention, **options)
    found = inspect(fn, *inputs, device="cuda:sm_80", backward=False)
    assert [kernel in launch.kernel for launch in found.forward.attention] == [True] * bool(kernel)


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
