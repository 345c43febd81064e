"""Walks in loops of our own beside walks in nested regions, and the unchunked loss: compile time, step, peak, overhead.

    python -m benches.loops

Compile times are of cold starts, each in a child process of its own. Steps are medians of interleaved rounds in one
process, as ratios to the compiled unchunked loss. Peaks are what compiled steps hold over the inputs. Results are
appended to benches/results, one JSON object a line.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from benches.run import RESULTS, machine
from compiled_loss import Chunking, linear_cross_entropy
from compiled_loss.engine import execution
from compiled_loss.measure import PeakMemory, run_in_child

BUILDS = ("unchunked", "regions", "loops")
Shape = tuple[int, int, int]  # tokens, width, vocab
CASES: list[tuple[Shape, str, int]] = [
    ((1024, 256, 16384), "tokens", 1),
    ((1024, 256, 16384), "tokens", 8),
    ((1024, 256, 16384), "tokens", 64),
    ((1024, 256, 16384), "vocab", 8),
    ((1024, 320, 50257), "tokens", 4),
    ((1024, 320, 50257), "vocab", 4),
    ((1024, 896, 16384), "tokens", 4),
    ((4096, 256, 65536), "tokens", 16),
]
SMALL: Shape = (8, 8, 64)


def inputs(shape: Shape) -> tuple[Tensor, Tensor, Tensor]:
    tokens, width, vocab = shape
    torch.set_num_threads(os.cpu_count() or 1)
    torch.manual_seed(0)
    hidden, weight = (torch.randn(rows, width, requires_grad=True) for rows in (tokens, vocab))
    return hidden, weight, torch.randint(0, vocab, (tokens,))


def compiled(build: str, shape: Shape, strategy: str, chunks: int) -> Callable[..., Tensor]:
    """The step's loss, to be called while `execution.LOOPS` says the build."""
    if build == "unchunked":
        return torch.compile(lambda h, w, y: F.cross_entropy(h @ w.t(), y), fullgraph=True)
    size = -(-(shape[0] if strategy == "tokens" else shape[2]) // chunks)
    chunking = Chunking(strategy=strategy, chunk_size=size)  # type: ignore[arg-type]
    return torch.compile(lambda h, w, y: linear_cross_entropy(h, w, y, chunking=chunking), fullgraph=True)


def step(loss: Callable[..., Tensor], operands: tuple[Tensor, Tensor, Tensor], build: str) -> float:
    execution.LOOPS = build == "loops"
    start = time.perf_counter()
    torch.autograd.grad(loss(*operands), operands[:2])
    return time.perf_counter() - start


def compile_seconds(build: str, shape: Shape, strategy: str, chunks: int) -> float:
    operands = inputs(shape)
    other = torch.compile(lambda v: (v.exp() * 2).sum(), fullgraph=True)  # the compiler's own start is nobody's
    torch.autograd.grad(other(operands[0]), operands[0])
    loss = compiled(build, shape, strategy, chunks)
    first, second = step(loss, operands, build), step(loss, operands, build)
    return first - second


def step_seconds(shape: Shape, strategy: str, chunks: int, rounds: int) -> dict[str, list[float]]:
    operands = inputs(shape)
    losses = {build: compiled(build, shape, strategy, chunks) for build in BUILDS}
    for _ in range(2):
        for build, loss in losses.items():
            step(loss, operands, build)
    found: dict[str, list[float]] = {build: [] for build in BUILDS}
    for _ in range(rounds):
        for build, loss in losses.items():
            found[build].append(step(loss, operands, build))
    return found


def peak_bytes(build: str, shape: Shape, strategy: str, chunks: int) -> int:
    operands = inputs(shape)
    loss = compiled(build, shape, strategy, chunks)
    for _ in range(2):
        step(loss, operands, build)
    with PeakMemory(torch.device("cpu")) as memory:
        step(loss, operands, build)
    return memory.peak


def in_child(function: str, folder: str, **keywords: Any) -> Any:
    environment = {"TORCHINDUCTOR_CACHE_DIR": folder, "PYTHONWARNINGS": "ignore"}
    return run_in_child(f"benches.loops:{function}", environment=environment, **keywords)


def cold(case: dict[str, Any], build: str) -> float:
    """Seconds to compile where nothing was compiled before."""
    with tempfile.TemporaryDirectory() as folder:
        return float(in_child("compile_seconds", folder, build=build, **case))


def over_unchunked(samples: dict[str, list[float]]) -> dict[str, float]:
    """Medians as ratios."""
    base = statistics.median(samples["unchunked"])
    return {build: round(statistics.median(values) / base, 3) for build, values in samples.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=9, help="samples of each step (default: 9)")
    parser.add_argument("--compiles", type=int, default=3, help="samples of each compile time (default: 3)")
    options = parser.parse_args()
    output = RESULTS / f"loops-{torch.__version__.split('+')[0]}-cpu.jsonl"
    about = machine("cpu")
    cases = [*CASES, (SMALL, "tokens", 1), (SMALL, "vocab", 1)]
    with tempfile.TemporaryDirectory() as folder:
        for number, (shape, strategy, chunks) in enumerate(cases, 1):
            case: dict[str, Any] = {"shape": shape, "strategy": strategy, "chunks": chunks}
            steps = in_child("step_seconds", folder, rounds=options.rounds if shape != SMALL else 500, **case)
            row: dict[str, Any] = {"step": over_unchunked(steps)}
            row["seconds"] = {build: [float(f"{s:.3g}") for s in samples[:99]] for build, samples in steps.items()}
            if shape != SMALL:
                row["peak_bytes"] = {build: in_child("peak_bytes", folder, build=build, **case) for build in BUILDS}
                took = {build: [cold(case, build) for _ in range(options.compiles)] for build in BUILDS}
                if options.compiles:
                    row["compile"] = over_unchunked(took)
                    row["compile_seconds"] = {build: [round(s, 2) for s in samples] for build, samples in took.items()}
            with output.open("a") as lines:
                lines.write(json.dumps(case | row | about) + "\n")
            shown = {key: row[key] for key in ("step", "compile", "peak_bytes") if key in row}
            print(f"[{number}/{len(cases)}] {shape} {strategy} {chunks}: {shown}", flush=True)
    print(f"written to {output}", file=sys.stderr)


if __name__ == "__main__":
    main()
