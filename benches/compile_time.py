"""Seconds torch.compile takes for loss and gradients in more and more chunks, beside the unchunked loss.

    python -m benches.compile_time

Cold, and after a process that has compiled the same. Each in a child process of its own, round by round; the
compiler's own start is nobody's. Results are appended to benches/results, one JSON object a line; ratios are over the
unchunked loss, cold.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from collections import defaultdict

import torch
from torch.nn import functional as F

from benches.run import RESULTS, machine
from compiled_loss import Chunking, linear_cross_entropy
from compiled_loss.measure import run_in_child

TOKENS, WIDTH, VOCAB = 4096, 256, 16384
CHUNKS = {"unchunked": (1,), "tokens": (1, 2, 8, 32, 64), "vocab": (2, 8, 32, 64)}
WARM = [("unchunked", 1), ("tokens", 8), ("tokens", 64), ("vocab", 8)]
STARTS = {"cold": {"TORCHINDUCTOR_FORCE_DISABLE_CACHES": "1"}, "warm": {}}


def measure(strategy: str, chunks: int) -> float:
    torch.set_num_threads(os.cpu_count() or 1)
    h, w = (torch.randn(rows, WIDTH, requires_grad=True) for rows in (TOKENS, VOCAB))
    y = torch.randint(0, VOCAB, (TOKENS,))
    other = torch.compile(lambda v: (v.exp() * 2).sum(), fullgraph=True)
    torch.autograd.grad(other(h), h)
    if strategy == "unchunked":
        loss = torch.compile(lambda: F.cross_entropy(h @ w.t(), y), fullgraph=True)
    else:
        chunking = Chunking(strategy=strategy, chunk_size=(TOKENS if strategy == "tokens" else VOCAB) // chunks)
        loss = torch.compile(lambda: linear_cross_entropy(h, w, y, chunking=chunking), fullgraph=True)

    def timed() -> float:
        start = time.perf_counter()
        torch.autograd.grad(loss(), (h, w))
        return time.perf_counter() - start

    first, second, third = timed(), timed(), timed()  # the second may compile again
    return first + second - 2 * third


def in_child(strategy: str, chunks: int, start: str) -> float:
    with tempfile.TemporaryDirectory() as folder:
        environment = {"TORCHINDUCTOR_CACHE_DIR": folder, "PYTHONWARNINGS": "ignore", **STARTS[start]}
        for _ in range(1 if start == "cold" else 2):
            took: float = run_in_child(
                "benches.compile_time:measure", environment=environment, strategy=strategy, chunks=chunks
            )
    return took


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3, help="samples of each (default: 3)")
    parser.add_argument("--starts", nargs="+", choices=STARTS, default=list(STARTS), help="(default: all)")
    options = parser.parse_args()
    kinds = [(strategy, chunks, "cold") for strategy, counts in CHUNKS.items() for chunks in counts]
    kinds += [(*kind, "warm") for kind in WARM]
    kinds = [kind for kind in kinds if kind[2] in options.starts or kind[0] == "unchunked"]
    seconds = defaultdict(list)
    for number in range(options.rounds):
        for kind in kinds:
            seconds[kind].append(in_child(*kind))
            what = f"{kind[0]}, {kind[1]}, {kind[2]}"
            print(f"[{number + 1}/{options.rounds}] {what}: {seconds[kind][-1]:.1f} s", file=sys.stderr, flush=True)
    output, about = RESULTS / f"compile_time-{torch.__version__.split('+')[0]}-cpu.jsonl", machine("cpu")
    unchunked = statistics.median(seconds["unchunked", 1, "cold"])
    with output.open("a") as lines:
        for (strategy, chunks, start), samples in seconds.items():
            ratio = round(statistics.median(samples) / unchunked, 3)
            row = {"strategy": strategy, "chunks": chunks, "start": start}
            row |= {"tokens": TOKENS, "width": WIDTH, "vocab": VOCAB}
            row |= {"ratio": ratio, "seconds": [round(s, 3) for s in samples]}
            lines.write(json.dumps(row | about) + "\n")
            print(f"{strategy:10} {chunks:3} chunks, {start:4} {statistics.median(samples):6.1f} s  {ratio:.2f}")
    print(f"over the unchunked loss, cold; written to {output}", file=sys.stderr)


if __name__ == "__main__":
    main()
