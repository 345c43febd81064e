"""The parts of `gpu_check`: each takes JSON, returns a row for each thing it looked at, and may fail."""

from __future__ import annotations

import functools
import gc
import importlib.util
import os
import re
import statistics
import subprocess
import sys
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from torch._dynamo.utils import counters
from torch.autograd import DeviceType

import compiled_loss
from benches.cases import HEADS, Case, inputs
from benches.meter import Step, Truth, measure, peak, reference, stepping, synchronize
from benches.providers import OURS, PLAIN, find
from compiled_loss import Chunking
from compiled_loss.engine import execution
from compiled_loss.inspection import Inspection, inspect

ROOT = Path(__file__).resolve().parent.parent
COMPILED = next(iter(PLAIN))
WAYS = [COMPILED, *(name + way for name in OURS for way in (", eager", "", ", reduce-overhead"))]
STRATEGIES = {"defaults": "tokens", "vocab": "vocab"}
GEMMS = {"aten::mm", "aten::addmm", "aten::bmm", "aten::baddbmm"}
MIB = 2**20
Row = dict[str, Any]


def tests(seconds: float, workers: int) -> list[Row]:
    """tests/compile/test_cuda.py, in its own process."""
    if importlib.util.find_spec("pytest") is None:
        return [{"provider": "pytest", "missing": "not installed; the part values checks modes and synchronisation"}]
    command = [sys.executable, "-m", "pytest", "tests/compile/test_cuda.py", "-v", "--color=no", "--tb=short"]
    command += ["-p", "no:cacheprovider"]
    if workers and importlib.util.find_spec("xdist") is not None:
        command += ["-p", "xdist", "-n", str(workers)]
    environment = {**os.environ, "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}  # others may warn, and a warning is an error
    with tempfile.TemporaryFile() as log:  # a pipe would stay open as long as a process that hangs
        process = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=log, stderr=subprocess.STDOUT)
        try:
            status = str(process.wait(seconds))
        except subprocess.TimeoutExpired:
            process.kill()
            status = f"none after {seconds:.0f} s"
        log.seek(0)
        output = log.read().decode(errors="replace")
    if status == "0":
        return [{"provider": "pytest", "noted": {"result": output.splitlines()[-1].strip("= ")}}]
    known = "; ".join(dict.fromkeys(re.findall(r"(?:FAILED|ERROR) tests/\S+", output)))
    why = f"exit status {status}, {output.count('PASSED')} passed; {known}"
    return [{"provider": "pytest", "failed": why, "output": output[-8000:]}]


def values(case: dict[str, Any], names: list[str], device: str) -> list[Row]:
    """Errors against fp64, peaks and synchronisation of each provider.

    The budget of a gradient is twice the error of the first provider's and one rounding. The loss has none: it is one
    number, whose error may be small by luck.
    """
    one = Case(**case)
    given = inputs(one, device)
    for v in given[:3]:
        torch._dynamo.mark_static_address(v)  # as a parameter's; CUDA graphs copy any other input
    truth = reference(given, HEADS[one.head].softcap)
    rows: list[Row] = []
    for name in names:
        try:
            forget(device)
            row = checked(stepping(one, find(name)(one), given), truth, device)
        except Exception as error:
            row = {"failed": f"{type(error).__name__}: {error}"}
        rows.append({"provider": name, **row})
        print(f"    {rows[-1]}", file=sys.stderr, flush=True)
    rounding = torch.finfo(getattr(torch, one.dtype)).eps / 2
    for row in rows[1:]:
        if "error" in row and "error" in rows[0]:
            fits = [row["error"][k] <= 2 * rows[0]["error"][k] + rounding for k in ("hidden", "weight")]
            row["noted"]["within budget"] = all(fits)
    return rows


def checked(step: Step, truth: Truth, device: str) -> Row:
    """With CUDA graphs the second step is recorded, and alone allocates; later ones are replays."""
    before = reserved(device)
    step()
    row: Row = {"peak_mib": round(peak(step, device) / MIB, 1)}
    value, *gradients = step()
    row["error"] = truth.errors(value, *gradients)
    row["noted"] = {"reserved MiB": (reserved(device) - before) // MIB}
    row["noted"]["graphs refused"] = counters["inductor"]["cudagraph_skips"]
    if device != "cpu":
        del value, gradients
        row["noted"]["synchronises"] = synchronises(step)
    return row


def synchronises(step: Step) -> bool:
    """Whether the host waits for the GPU."""
    torch.cuda.set_sync_debug_mode("error")
    try:
        step()
    except RuntimeError as error:
        if "synchroniz" not in str(error):
            raise
        return True
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return False


def predictions(case: dict[str, Any], name: str, device: str, target: str) -> list[Row]:
    """Peaks and launches as the inspector and the planner foretell them, beside those of a compiled step."""
    forget(device)
    one = Case(**case)
    given = inputs(one, device)
    step = stepping(one, find(name)(one), given)
    step()
    step()
    real, (kernels, gemms) = round(peak(step, device) / MIB, 1), launched(step, device)
    width, vocab, _ = HEADS[one.head]
    chunking = Chunking(strategy=STRATEGIES[name])
    planned = compiled_loss.plan(one.tokens, width, vocab, dtype=given.hidden.dtype, chunking=chunking)
    rows = [noted("peak MiB, planner", planned.chosen.peak_bytes / MIB, real)]
    if importlib.util.find_spec("cloudpickle") is None:
        return [*rows, {"provider": "inspector", "missing": "needs cloudpickle"}]
    try:
        found = inspected(one, chunking, target)
    except Exception as error:
        return [*rows, {"provider": "inspector", "failed": f"{type(error).__name__}: {error}"}]
    names = sum((Counter(p.kernels) for p in found.passes), Counter())
    ours = {k.name for k in found.kernels if k.source}
    rows.append(noted("peak MiB, inspector", found.peak_bytes / MIB, real))
    rows.append(noted("GEMMs", sum(len(p.gemms) for p in found.passes), gemms))
    rows[-1]["launches"] = {"predicted": dict(names), "measured": dict(kernels)}
    if device != "cpu":  # whose generated kernels a profiler does not see
        triton = sum(count for kernel, count in kernels.items() if kernel.startswith("triton_"))
        rows.append(noted("generated kernels", sum(names[k] for k in ours), triton))
        rows.append(noted("all launches", found.launches, sum(kernels.values())))
    return rows


def noted(what: str, predicted: float, measured: float) -> Row:
    """A row of two numbers."""
    return {"provider": what, "noted": {"predicted": round(predicted, 1), "measured": measured}}


def inspected(case: Case, chunking: Chunking, target: str) -> Inspection:
    width, vocab, softcap = HEADS[case.head]
    loss = functools.partial(compiled_loss.linear_cross_entropy, softcap=softcap, chunking=chunking)
    dtype, labels = case.dtype, f"int64[{case.tokens}]:0..{vocab - 1}"
    hidden, weight = (f"{dtype}[{rows},{width}]:grad" for rows in (case.tokens, vocab))
    return inspect(loss, hidden, weight, labels, device=target, assemble=False, measure=False)


def launched(step: Step, device: str) -> tuple[Counter[str], int]:
    """Kernels and copies on the GPU by name, and how many GEMMs the host asked for."""
    kinds = [torch.profiler.ProfilerActivity.CPU]
    if device != "cpu":
        kinds.append(torch.profiler.ProfilerActivity.CUDA)
    with torch.profiler.profile(activities=kinds) as profiler:
        step()
        synchronize(device)
    events = [event for event in profiler.events() if not event.is_user_annotation]
    kernels = Counter(event.name for event in events if event.device_type == DeviceType.CUDA)
    return kernels, sum(event.name in GEMMS for event in events if event.device_type == DeviceType.CPU)


def times(case: dict[str, Any], names: list[str], device: str, rounds: int) -> list[Row]:
    """Those that fit into memory, in interleaved rounds, with peaks and errors."""
    forget(device)
    one = Case(**case)
    fitting, others = fit(one, names, float("inf") if device == "cpu" else torch.cuda.mem_get_info()[0])
    rows = measure(case, fitting, device, rounds, seed=0, forgiving=True)
    for row in rows:
        if "seconds" in row:
            row["median"] = statistics.median(row["seconds"])
    return rows + others


def fit(case: Case, names: list[str], free: float) -> tuple[list[str], list[Row]]:
    """Who fits into so many bytes, and rows of the others."""
    needed = unchunked_bytes(case)
    large = [name for name in names if name in PLAIN and needed > free]
    why = f"takes {needed / 2**30:.0f} GiB of {free / 2**30:.0f} that are free"
    return [name for name in names if name not in large], [{"provider": name, "missing": why} for name in large]


def unchunked_bytes(case: Case) -> int:
    """Logits, their gradient and one form of them in fp32, all that is as large as the inputs, the floor's buffers."""
    width, vocab, _ = HEADS[case.head]
    itemsize = getattr(torch, case.dtype).itemsize
    return case.tokens * vocab * (3 * itemsize + 4) + 3 * (case.tokens + vocab) * width * itemsize


def reserved(device: str) -> int:
    """Bytes that the allocator holds, graphs' pools among them."""
    return 0 if device == "cpu" else torch.cuda.memory_reserved()


def forget(device: str) -> None:
    """Start as a fresh process, in which the first shape is compiled as a static one; on a CPU compile nothing."""
    torch.compiler.reset()
    torch.compiler.set_stance("force_eager" if device == "cpu" else "default")
    execution.forget()
    counters.clear()
    if device != "cpu":
        gc.collect()  # memory that cycles hold would be counted
        torch.cuda.empty_cache()
