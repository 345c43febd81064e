"""Graph breaks, synchronisation, transfers and guards, and operators outside of graphs or written in Python."""

import re
import sys

import inspected_functions as user
import pytest
from inspecting import HIDDEN, WEIGHT, H, N, V, inspect, kinds, line, names

pytestmark = [
    pytest.mark.xdist_group("inspection"),  # one worker holds the children
    pytest.mark.skipif(not sys.platform.startswith("linux"), reason="GPU CODE IS NOT TESTED: it is generated on Linux"),
]


def test_graph_break():
    found = inspect(user.broken, "f32[64,1024]:grad")
    (broken,) = found.breaks
    assert "graph_break()" in broken.reason and broken.location.endswith(line("broken"))
    assert [g.direction for g in found.graphs] == ["forward"] * 2 + ["backward"] * 2
    assert kinds(found.forward) == kinds(found.backward) == ["pointwise"] * 2
    assert inspect(user.same_shape, "f32[64,1024]:grad").breaks == ()


def test_item_is_a_synchronisation():
    found = inspect(user.asks, "f32[64,1024]:grad")
    (broken,) = found.breaks
    assert "item" in broken.reason and broken.location.endswith(line("asks"))
    (sync,) = [launch for launch in found.forward.launches if launch.kind == "sync"]
    assert (sync.kernel, sync.read_bytes) == ("_local_scalar_dense", 4)
    assert "sync" not in kinds(found.backward)


def test_boolean_indexing_is_a_synchronisation():
    found = inspect(user.chosen, "f32[64,32]", "bool[64]", backward=False)
    assert found.breaks[0].location.endswith(line("chosen"))
    assert "sync" in kinds(found.forward)
    assert found.forward.peak_bytes >= 64 * 32 * 4  # at most all of them


def test_cpu_constant_is_a_transfer():
    found = inspect(user.brings_constant, "f32[64,1000]:grad")
    (transfer,) = [launch for launch in found.forward.launches if launch.kind == "transfer"]
    assert transfer.read_bytes == transfer.written_bytes == 4000
    assert "transfer" not in kinds(found.backward)
    assert [s.shape for s in found.saved] == [(1000,)]
    small = inspect(user.small_constant, "f32[64,3]", backward=False)  # Inductor writes it into the kernel
    assert set(kinds(small.forward)) == {"pointwise"}


def test_long_constant():
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


def test_dynamic_numbers_without_synchronisation():
    found = inspect(user.scaled, "f32[8]:grad", 2.5, 3.5, dynamic=True)
    assert "L['factor'] == 2.5" not in {g.code for g in found.guards}
    assert "sync" not in kinds(found.forward) + kinds(found.backward)


def test_dynamic_numbers_stay_on_the_cpu():
    found = inspect(user.scaled, "f32[8]:grad", 2.5, 3.5, dynamic=True)
    assert all(name.startswith("triton") for name in names(found.forward))
    assert all(len(t.shape) == 1 for t in found.saved)


def test_custom_op():
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


def test_custom_op_of_composite_ones():
    found = inspect(user.uses_composite, HIDDEN, WEIGHT, backward=False)
    assert found.operations == 2 * N * H * V
    assert "gemm" in kinds(found.forward)


def test_custom_op_that_compiles():
    for _ in range(2):  # the function compiled inside outlives an inspection
        found = inspect(user.uses_compiled_inside, HIDDEN, WEIGHT, backward=False)
        assert [g.operations for g in found.forward.gemms] == [2 * user.CHUNK * H * V] * (N // user.CHUNK)
        assert kinds(found.forward).count("reduction") == N // user.CHUNK
        assert user.CHUNK * V * 4 < found.forward.peak_bytes < 2 * user.CHUNK * V * 4
        assert {g.operator for g in found.graphs} == {"", "inspected_functions::compiled_inside"}


def test_custom_op_that_mutates_its_argument():
    found = inspect(user.uses_accumulate, "f32[64,32]", backward=False)
    assert [g.operations for g in found.forward.gemms] == [2 * 64 * 32 * 64] * 2
    assert found.forward.peak_bytes == 2 * 64 * 64 * 4  # the sum and one product
