"""Seconds to compile a loss and its gradients, cold, as its chunks get more; each in a process of its own.

    python -m benches.compile_time

Ratios are to the unchunked loss of the same run. Results are appended to benches/results, one JSON object a line.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from benches.run import RESULTS, machine
from compiled_loss import Chunking, linear_cross_entropy
from compiled_loss.measure import run_in_child

SHAPE = {"tokens": 4096, "width": 256, "vocab": 16384}
CHUNKS = (1, 2, 8, 32, 64)
UNCHUNKED = ("unchunked", 1)
CASES = [UNCHUNKED, *((strategy, chunks) for strategy in ("tokens", "vocab") for chunks in CHUNKS)]


def seconds(strategy: str, chunks: int, device: str) -> float:
    """Of the first step, less those of the second."""
    torch.set_num_threads(os.cpu_count() or 1)
    tokens, width, vocab = SHAPE.values()
    hidden = torch.randn(tokens, width, device=device, requires_grad=True)
    weight = torch.randn(vocab, width, device=device, requires_grad=True)
    labels = torch.randint(0, vocab, (tokens,), device=device)
    if strategy == UNCHUNKED[0]:

        def loss(h: Tensor, w: Tensor, y: Tensor) -> Tensor:
            return F.cross_entropy((h @ w.t()).float(), y)
    else:
        size = (tokens if strategy == "tokens" else vocab) // chunks
        chunking = Chunking(strategy=strategy, chunk_size=size)

        def loss(h: Tensor, w: Tensor, y: Tensor) -> Tensor:
            return linear_cross_entropy(h, w, y, chunking=chunking)

    warm = torch.compile(lambda v: (v.exp() * 2).sum(), fullgraph=True)  # the compiler's own start is nobody's
    torch.autograd.grad(warm(hidden), hidden)
    compiled = torch.compile(loss, fullgraph=True)
    taken = []
    for _ in range(2):
        start = time.perf_counter()
        torch.autograd.grad(compiled(hidden, weight, labels), (hidden, weight))
        taken.append(time.perf_counter() - start)
    return taken[0] - taken[1]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--rounds", type=int, default=3, help="samples of each (default: 3)")
    parser.add_argument("--output", type=Path, help="a .jsonl file (default: one named after torch and the device)")
    options = parser.parse_args()
    version = torch.__version__.split("+")[0]
    output = options.output or RESULTS / f"compile_time-{version}-{options.device}.jsonl"
    about = {**SHAPE, "dtype": "float32", **machine(options.device)}
    cold = {"TORCHINDUCTOR_FORCE_DISABLE_CACHES": "1", "PYTHONWARNINGS": "ignore"}
    samples: dict[tuple[str, int], list[float]] = {case: [] for case in CASES}
    for number in range(options.rounds):
        for strategy, chunks in CASES:
            one = run_in_child(
                "benches.compile_time:seconds",
                environment=cold,
                strategy=strategy,
                chunks=chunks,
                device=options.device,
            )
            samples[strategy, chunks].append(one)
            print(f"[{number + 1}/{options.rounds}] {strategy}, {chunks} chunks: {one:.1f} s", file=sys.stderr)
    least = statistics.median(samples[UNCHUNKED])
    with output.open("a") as lines:
        for (strategy, chunks), taken in samples.items():
            row: dict[str, Any] = {"strategy": strategy, "chunks": chunks, "ratio": statistics.median(taken) / least}
            row |= {"seconds": [round(s, 2) for s in taken]}
            lines.write(json.dumps(row | about) + "\n")
            print(f"{strategy}, {chunks} chunks: {statistics.median(taken):.1f} s, {row['ratio']:.2f}")
    print(f"written to {output}", file=sys.stderr)


if __name__ == "__main__":
    main()
