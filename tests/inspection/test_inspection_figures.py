"""The inspector on functions whose launches, bytes and operations are known by hand."""

import sys
from functools import partial

import inspected_functions as user
import pytest
import torch
import torch.nn.functional as F
from inspecting import HIDDEN, WEIGHT, H, N, V, alike, inspect, kinds

import compiled_loss

pytestmark = [
    pytest.mark.xdist_group("inspection"),  # one worker holds the children
    pytest.mark.skipif(not sys.platform.startswith("linux"), reason="GPU CODE IS NOT TESTED: it is generated on Linux"),
]


def test_pointwise_kernel():
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


def test_reduction():
    found = inspect(torch.logsumexp, f"f32[{N},{V}]:grad", 1)
    assert [kinds(p) for p in found.passes] == [["reduction"], ["pointwise"]]
    assert found.saved == () and found.operations == 0  # the input and the result serve
    assert [p.peak_bytes for p in found.passes] == [N * 4, N * 4 + N * V * 4]
    assert found.forward.launches[0].written_bytes == N * 4
    assert found.backward.launches[0].read_bytes == (N * V + 2 * N) * 4


def test_reduction_reads_its_input_only():
    found = inspect(torch.logsumexp, f"f32[{N},{V}]", 1, backward=False)
    assert found.forward.launches[0].read_bytes == N * V * 4


def test_gemms_and_saved_tensors():
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
def test_gemms_in_bf16_and_fp16(dtype):
    found = inspect(user.product, f"{dtype}[{N},{H}]:grad", f"{dtype}[{H},{V}]")
    assert [kinds(p) for p in found.passes] == [["gemm"], ["gemm"]]  # one side only
    name = {"bf16": "bfloat16", "f16": "float16"}[dtype]
    assert {g.dtype for p in found.passes for g in p.gemms} == {name}
    assert found.forward.peak_bytes == N * V * 2
    seconds = max(2 * N * H * V / 989.5e12, (N * H + H * V + N * V) * 2 / 3.35e12)
    assert found.forward.launches[0].seconds(compiled_loss.inspection.GPUS["H100"]) == pytest.approx(seconds)


def test_bmm_addmm_and_convolution():
    found = inspect(torch.bmm, "f32[4,8,16]", "f32[4,16,32]", backward=False)
    assert found.operations == 2 * 4 * 8 * 16 * 32
    found = inspect(torch.addmm, "f32[8,32]", "f32[8,16]", "f32[16,32]", backward=False)
    assert found.operations == 2 * 8 * 16 * 32
    found = inspect(F.conv1d, "f32[2,3,10]", "f32[5,3,3]", backward=False)
    assert found.operations == 2 * 2 * 8 * 5 * 3 * 3


def test_reused_buffer_counts_once():
    size = 64 * 64 * 4
    square = ["f32[64,64]"] * 3
    found = inspect(user.layers, *square, backward=False)
    assert kinds(found.forward) == ["gemm", "pointwise"] * 3 + ["gemm"]
    assert found.forward.peak_bytes == 2 * size  # a layer's input and output; relu in place
    assert found.forward.kernels == {"mm": 4, found.forward.launches[1].kernel: 3}
    assert all(relu.read_bytes == relu.written_bytes == size for relu in found.forward.launches[1::2])


def test_donated_buffers():
    size = 64 * 64 * 4
    found = inspect(user.layers, "f32[64,64]:grad", "f32[64,64]", "f32[64,64]:grad")
    assert [s.size for s in found.saved] == [size] * 3
    assert found.forward.peak_bytes == 4 * size  # three layers and the result
    last = found.backward.launches[-1]
    assert last.kind == "gemm" and last.live_bytes == 4 * size  # the result, dc, da and one to make it of
    assert found.operations == 2 * 64**3 * (4 + 3 + 4)


def test_activation_checkpointing():
    found = inspect(user.checkpointed, f"{HIDDEN}:grad", f"{WEIGHT}:grad")
    assert found.saved == ()
    assert found.operations == 8 * N * H * V
    assert found.forward.peak_bytes == (N * V + N) * 4


@pytest.mark.parametrize("device", ["cuda:sm_90", pytest.param("cpu", marks=pytest.mark.slow)])
def test_garbage_of_the_compiler_is_no_memory(device):
    found = inspect(user.litters, "f32[64,1024]", backward=False, device=device)
    assert 64 * 1024 * 4 <= found.forward.peak_bytes < 64 * 1024 * 4 + 1024


def test_in_place_operators():
    found = inspect(user.in_place, "f32[64,1024]", backward=False)
    (launch,) = found.forward.launches
    assert launch.read_bytes == launch.written_bytes == 64 * 1024 * 4
    assert found.peak_bytes == 0


def test_views():
    found = inspect(torch.t, "f32[64,32]:grad")
    assert (found.launches, found.peak_bytes, found.saved) == (0, 0, ())


def test_same_inspection_twice():
    """Whatever the child was asked before."""
    first = inspect(user.linear_logsumexp, f"{HIDDEN}:grad", f"{WEIGHT}:grad")
    inspect(user.linear_logsumexp, "f32[16,32]:grad", "f32[100,32]:grad")
    inspect(user.broken, "f32[5,7]:grad")
    again = inspect(user.linear_logsumexp, f"{HIDDEN}:grad", f"{WEIGHT}:grad")
    assert alike(again, first)


def test_launches_on_the_cpu():
    found = inspect(user.linear_logsumexp, f"{HIDDEN}:grad", f"{WEIGHT}:grad", device="cpu")
    assert kinds(found.forward) == ["gemm", "reduction"]
    assert kinds(found.backward) == ["pointwise", "gemm", "gemm"]
    assert found.operations == 6 * N * H * V
    assert found.saved_bytes == N * V * 4
    assert found.backward.peak_bytes == (N * V + N + V * H + N * H) * 4
    assert found.roofline_seconds() is None and found.measured is None


def test_flash_attention():
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
def test_attention_kernel_by_dtype_and_mask(dtype, options, kernel):
    """Of sm_80, which never takes cuDNN's: by the conditions of torch's CUDA library."""
    inputs = [f"{dtype}[2,4,128,64]"] * (3 + ("attn_mask" in options))
    if "attn_mask" in options:
        inputs[3] = f"{dtype}[128,128]"
        options = {}
    fn = partial(F.scaled_dot_product_attention, **options)
    found = inspect(fn, *inputs, device="cuda:sm_80", backward=False)
    assert [kernel in launch.kernel for launch in found.forward.attention] == [True] * bool(kernel)
