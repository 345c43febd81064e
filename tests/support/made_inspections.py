"""Inspections that are made up, for reports, pictures and dumps."""

from dataclasses import replace

from compiled_loss.inspection.network import Collective
from compiled_loss.inspection.record import (
    Break,
    Configuration,
    Graph,
    Guard,
    Inspection,
    Kernel,
    Launch,
    Measured,
    Pass,
    Saved,
)

MIB = 2**20
LONG = "triton_red_fused_" + "add_mul_" * 12 + "sum_7"


def made(**changes):
    """A chunked loss with nothing to complain about."""
    chunk = (
        Launch(
            kernel="mm",
            kind="gemm",
            read_bytes=40 * MIB,
            written_bytes=8 * MIB,
            live_bytes=24 * MIB,
            operations=4 * 10**12,
            dtype="bfloat16",
            shapes="[512, 4096] @ [4096, 8192]",
        ),
        Launch(kernel=LONG, kind="reduction", read_bytes=8 * MIB, written_bytes=8 * MIB, live_bytes=25 * MIB),
    )
    end = Launch(kernel="triton_poi_fused_mul_0", kind="pointwise", read_bytes=4, written_bytes=4, live_bytes=16 * MIB)
    way = Configuration(target="cuda:sm_90", options="XBLOCK=1 warps=8", registers=41, spills=0, shared=2048)
    base = Inspection(
        name="chunked",
        device="cuda:sm_90",
        torch="2.13.0",
        triton="3.7.0",
        inputs=("bf16[2048,4096]:grad", "bf16[8192,4096]:grad", "int64[2048]:0..8191", "7"),
        forward=Pass(launches=chunk * 4, peak_bytes=25 * MIB),
        backward=Pass(launches=(end,), peak_bytes=17 * MIB),
        saved=(Saved(shape=(2048, 4096), dtype="bfloat16", size=16 * MIB, origin="mm_1 = aten.mm", location="a.py:3"),),
        kernels=(
            Kernel(name="mm", kind="gemm", source=""),
            Kernel(name=LONG, kind="reduction", source="import triton\n", configurations=(way, way)),
            Kernel(name="triton_poi_fused_mul_0", kind="pointwise", source="import triton\n# 0\n"),
        ),
        graphs=(
            Graph(direction="forward", operator="", nodes="class Forward: ...", wrapper="def call(args): ..."),
            Graph(direction="backward", operator="", nodes="class Backward: ...", wrapper="def call(args): ..."),
        ),
        breaks=(),
        guards=tuple(Guard(kind="CONSTANT_MATCH", code=f"L['x{i}'] == {i}", location="a.py:3") for i in range(20)),
        seconds=6.25,
    )
    return replace(base, **changes)


def bare():
    """Of a function that does nothing."""
    nothing = Pass(launches=(), peak_bytes=0)
    empty = {name: () for name in ("inputs", "saved", "kernels", "graphs", "breaks", "guards")}
    return made(forward=nothing, backward=None, device="cpu", triton="", **empty)


def noisy():
    """With everything that a report must be loud about; names hold what terminals and pages take for markup."""
    plain = made()
    item = Launch(kernel="_local_scalar_dense", kind="sync", read_bytes=4, written_bytes=0, live_bytes=0)
    copy = replace(item, kernel="copy_", kind="transfer")
    way = plain.kernels[1].configurations[0]
    ways = (way, replace(way, spills=48), replace(way, target="hip:gfx942", spills=16))
    logits = Saved(shape=(2048, 65536), dtype="float32", size=512 * MIB, origin="logits", location="loss.py:77")
    return replace(
        plain,
        name="noisy[red]<b>",
        forward=replace(plain.forward, launches=(*plain.forward.launches, item, item, copy)),
        saved=(*plain.saved, logits),
        breaks=(Break(reason="call to\n print [/bold]", location="user.py:12"),),
        guards=(Guard(kind="TENSOR_MATCH", code="L['x'] is [red]&[/red]", location="user.py:1"),) * 3,
        kernels=(replace(plain.kernels[1], configurations=ways), *plain.kernels[2:]),  # operators may be missing
        measured=Measured(peak_bytes=50 * MIB, seconds=0.25),
    )


def sharded(ranks=8, **changes):
    """Of a rank of many: an all-reduce of 2 MiB after each chunk, one of 64 MiB back."""
    plain = made(**changes)
    small, large = (Collective(kind="all-reduce", size=mib * MIB, ranks=ranks) for mib in (2, 64))
    send = Launch(
        kernel="all_reduce_", kind="collective", read_bytes=1, written_bytes=1, live_bytes=0, collective=small
    )
    back = (*plain.backward.launches, replace(send, collective=large))
    forward = (*plain.forward.launches[:2], send) * 4
    return replace(
        plain,
        forward=replace(plain.forward, launches=forward),
        backward=replace(plain.backward, launches=back),
    )


def whole():
    """Of a model: its loss has the second half of the launches, with attention before, and something is not known."""
    plain = made()
    attend = Launch(
        kernel="_flash",
        kind="attention",
        read_bytes=8 * MIB,
        written_bytes=2 * MIB,
        live_bytes=8 * MIB,
        scratch_bytes=MIB,
    )
    attend = replace(attend, operations=10**12, dtype="bfloat16", shapes="[2, 4, 128, 64] @ [2, 4, 128, 64]")
    own = tuple(replace(v, of_loss=True, loss_bytes=10 * MIB) for v in plain.forward.launches[4:])
    last = tuple(replace(v, scratch_bytes=32 * MIB) for v in plain.backward.launches)
    return replace(
        plain,
        forward=replace(plain.forward, launches=(attend, *plain.forward.launches[:3], *own)),
        backward=replace(plain.backward, launches=last),
        saved=(replace(plain.saved[0], of_loss=True), replace(plain.saved[0], size=48 * MIB)),
        loss=("cross_entropy", "lm_head"),
        notes=("what nobody knows",),
    )


EVERY = {"made": made(), "bare": bare(), "noisy": noisy(), "forward only": made(backward=None), "sharded": sharded()}
EVERY["whole"] = whole()
