"""Time, memory and compile time of linear_cross_entropy beside what a user would write instead.

    make bench                       # every measurement, written to benches/results
    make bench ARGS="--only time"

Each measurement runs in a child process of its own. Times are interleaved round by round and given as ratios to three
bare GEMMs of the same run, into buffers that exist already: the floor of loss and gradients, 6 N H V operations.
Memory is over the inputs: resident set on a CPU, the allocator's count on an accelerator. Compile times start from an
empty cache. Results are one JSON object a line: what was measured, all samples, versions, machine, date.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import statistics
import sys
import time
from pathlib import Path

import torch
from torch.nn import functional as F

from compiled_loss import Chunking, linear_cross_entropy
from compiled_loss.measure import PeakMemory, run_in_child

RESULTS = Path(__file__).parent / "results"
CPU = {
    "memory": {"tokens": 4096, "width": 256, "vocab": 65536, "dtypes": ["float32"]},
    "time": {"tokens": 2048, "width": 1024, "vocab": 32768, "dtypes": ["float32", "bfloat16"]},
}
GPU = {
    "memory": {"tokens": 8192, "width": 4096, "vocab": 131072, "dtypes": ["bfloat16"]},
    "time": {"tokens": 8192, "width": 4096, "vocab": 131072, "dtypes": ["bfloat16"]},
}


def ordinary(h, w, y):
    return F.cross_entropy((h @ w.t()).float(), y)


def losses(tokens, width, vocab):
    """Every provider, as a function of (hidden, weight, labels)."""
    chunk = min(width, 1024)
    columns = max(1, chunk * vocab // tokens)

    def ours(strategy, size):
        return lambda h, w, y: linear_cross_entropy(h, w, y, chunking=Chunking(strategy=strategy, chunk_size=size))

    providers = {
        "F.cross_entropy, eager": ordinary,
        "F.cross_entropy, compiled": torch.compile(ordinary, fullgraph=True),
        f"tokens, {chunk} rows": torch.compile(ours("tokens", chunk), fullgraph=True),
        f"tokens, {chunk} rows, eager": ours("tokens", chunk),
        f"vocab, {columns} columns": torch.compile(ours("vocab", columns), fullgraph=True),
        "defaults": torch.compile(linear_cross_entropy, fullgraph=True),
    }
    if hasattr(F, "linear_cross_entropy"):  # torch >= 2.13
        options = torch.nn.LinearCrossEntropyOptions(allow_retain_graph=True)  # without it fullgraph fails

        def torchs(h, w, y):
            return F.linear_cross_entropy(h, w, y, options=options)

        providers["F.linear_cross_entropy(options=...)"] = torch.compile(torchs, fullgraph=True)
    return providers


def inputs(tokens, width, vocab, dtype, device):
    torch.manual_seed(0)
    torch.set_num_threads(os.cpu_count() or 1)
    dtype = getattr(torch, dtype)
    hidden = torch.randn(tokens, width, device=device).to(dtype).requires_grad_()
    weight = (torch.randn(vocab, width, device=device) * width**-0.5).to(dtype).requires_grad_()
    return hidden, weight, torch.randint(0, vocab, (tokens,), device=device)


def step(loss, h, w, y):
    return torch.autograd.grad(loss(h, w, y), (h, w))


def synchronize(device):
    if device != "cpu":
        torch.accelerator.synchronize()


def measure_memory(provider, device, tokens, width, vocab, dtype):
    arguments = inputs(tokens, width, vocab, dtype, device)
    loss = losses(tokens, width, vocab)[provider]
    step(loss, *arguments)
    with PeakMemory(torch.device(device)) as memory:
        step(loss, *arguments)
    return memory.peak / 2**20


def measure_time(device, tokens, width, vocab, dtype, rounds):
    h, w, y = inputs(tokens, width, vocab, dtype, device)
    x, dh, dw = (torch.empty(s, dtype=h.dtype, device=device) for s in ((tokens, vocab), h.shape, w.shape))

    def gemms():
        torch.mm(h.detach(), w.detach().t(), out=x)
        torch.mm(x, w.detach(), out=dh)
        torch.mm(x.t(), h.detach(), out=dw)

    runs = {"three bare GEMMs": gemms}
    for name, loss in losses(tokens, width, vocab).items():
        runs[name] = lambda loss=loss: step(loss, h, w, y)
    samples = {name: [] for name in runs}
    for run in runs.values():
        run()
    x.normal_().mul_(1e-3)  # denormal or zero logits would flatter the floor
    for _ in range(rounds):
        for name, run in runs.items():
            synchronize(device)
            start = time.perf_counter()
            run()
            synchronize(device)
            samples[name].append(time.perf_counter() - start)
    return samples


def measure_compile(strategy, chunks, device, tokens, width, vocab, dtype):
    arguments = inputs(tokens, width, vocab, dtype, device)
    warm = torch.compile(lambda v: (v.exp() * 2).sum(), fullgraph=True)  # the compiler's own start is not ours
    torch.autograd.grad(warm(arguments[0]), arguments[0])
    if strategy == "unchunked":
        loss = torch.compile(ordinary, fullgraph=True)
    else:
        size = (tokens if strategy == "tokens" else vocab) // chunks
        chunking = Chunking(strategy=strategy, chunk_size=size)
        loss = torch.compile(lambda h, w, y: linear_cross_entropy(h, w, y, chunking=chunking), fullgraph=True)
    start = time.perf_counter()
    step(loss, *arguments)
    first = time.perf_counter() - start
    start = time.perf_counter()
    step(loss, *arguments)
    return first - (time.perf_counter() - start)


def machine(device):
    name = torch.get_device_module(device).get_device_name() if device != "cpu" else f"{os.cpu_count()} CPU cores"
    return {
        "date": datetime.date.today().isoformat(),
        "device": name,
        "processor": platform.processor() or platform.machine(),
        "torch": torch.__version__,
        "python": platform.python_version(),
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--only", choices=["memory", "time", "compile"], help="one kind of measurement")
    parser.add_argument("--rounds", type=int, default=5, help="samples of each time (default: 5)")
    parser.add_argument("--output", type=Path, help="a .jsonl file (default: one named after torch and device)")
    options = parser.parse_args()
    shapes = CPU if options.device == "cpu" else GPU
    output = (
        options.output or RESULTS / f"linear_cross_entropy-{torch.__version__.split('+')[0]}-{options.device}.jsonl"
    )
    output.parent.mkdir(parents=True, exist_ok=True)
    about = machine(options.device)
    child = {"TORCHINDUCTOR_FORCE_DISABLE_CACHES": "1", "PYTHONWARNINGS": "ignore"}

    with output.open("a") as lines:

        def record(kind, result, **what):
            lines.write(json.dumps({"kind": kind, **what, **result, **about}) + "\n")
            lines.flush()

        if options.only in (None, "memory"):
            shape = dict(shapes["memory"])
            for dtype in shape.pop("dtypes"):
                print(f"peak over the inputs, MiB: {shape} {dtype}", file=sys.stderr)
                for provider in losses(**shape):
                    peak = run_in_child(
                        "benches.linear_cross_entropy:measure_memory",
                        provider=provider,
                        device=options.device,
                        dtype=dtype,
                        **shape,
                    )
                    print(f"  {peak:8.0f}  {provider}", file=sys.stderr)
                    record("memory", {"peak_mib": round(peak, 1)}, provider=provider, dtype=dtype, **shape)
        if options.only in (None, "time"):
            shape = dict(shapes["time"])
            for dtype in shape.pop("dtypes"):
                print(f"forward and backward over three bare GEMMs: {shape} {dtype}", file=sys.stderr)
                samples = run_in_child(
                    "benches.linear_cross_entropy:measure_time",
                    device=options.device,
                    dtype=dtype,
                    rounds=options.rounds,
                    **shape,
                )
                floor = statistics.median(samples["three bare GEMMs"])
                for provider, seconds in samples.items():
                    ratio = statistics.median(seconds) / floor
                    print(f"  {ratio:8.3f}  {provider}", file=sys.stderr)
                    what = {"provider": provider, "dtype": dtype, **shape}
                    record("time", {"ratio": round(ratio, 4), "seconds": seconds}, **what)
        if options.only in (None, "compile"):
            shape = {"tokens": 4096, "width": 256, "vocab": 16384, "dtype": "float32"}
            print(f"compile seconds, cold: {shape}", file=sys.stderr)
            for strategy, counts in {"unchunked": (1,), "tokens": (2, 8, 32, 64), "vocab": (2, 8, 32, 64)}.items():
                for chunks in counts:
                    seconds = run_in_child(
                        "benches.linear_cross_entropy:measure_compile",
                        environment=child,
                        strategy=strategy,
                        chunks=chunks,
                        device=options.device,
                        **shape,
                    )
                    print(f"  {seconds:8.1f}  {strategy}, {chunks} chunks", file=sys.stderr)
                    record("compile", {"seconds": round(seconds, 2)}, strategy=strategy, chunks=chunks, **shape)
    print(f"written to {output}", file=sys.stderr)


if __name__ == "__main__":
    main()
