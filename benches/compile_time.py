"""Seconds torch.compile takes, cold, for loss and gradients in more and more chunks, beside the unchunked loss.

    python -m benches.compile_time

Each in a child process of its own, round by round; the compiler's own start is nobody's. Results are appended to
benches/results, one JSON object a line.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import time
from collections import defaultdict

import torch
from torch.nn import functional as F

from benches.run import RESULTS, machine
from compiled_loss import Chunking, linear_cross_entropy
from compiled_loss.measure import run_in_child

TOKENS, WIDTH, VOCAB = 4096, 256, 16384
CHUNKS = {"unchunked": (1,), "tokens": (1, 2, 8, 32, 64), "vocab": (2, 8, 32, 64)}


def measure(strategy: str, chunks: int) -> float:
    torch.set_num_threads(os.cpu_count() or 1)
    h, w = (torch.randn(rows, WIDTH, requires_grad=True) for rows in (TOKENS, VOCAB))
    y = torch.randint(0, VOCAB, (TOKENS,))
    warm = torch.compile(lambda v: (v.exp() * 2).sum(), fullgraph=True)
    torch.autograd.grad(warm(h), h)
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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3, help="samples of each (default: 3)")
    options = parser.parse_args()
    kinds = [(strategy, chunks) for strategy, counts in CHUNKS.items() for chunks in counts]
    seconds = defaultdict(list)
    for number in range(options.rounds):
        for kind in kinds:
            fresh = {"TORCHINDUCTOR_FORCE_DISABLE_CACHES": "1", "PYTHONWARNINGS": "ignore"}
            took = run_in_child("benches.compile_time:measure", environment=fresh, strategy=kind[0], chunks=kind[1])
            seconds[kind].append(took)
            print(f"[{number + 1}/{options.rounds}] {kind[0]}, {kind[1]}: {took:.1f} s", file=sys.stderr, flush=True)
    output, about = RESULTS / f"compile_time-{torch.__version__.split('+')[0]}-cpu.jsonl", machine("cpu")
    unchunked = statistics.median(seconds["unchunked", 1])
    with output.open("a") as lines:
        for (strategy, chunks), samples in seconds.items():
            ratio = round(statistics.median(samples) / unchunked, 3)
            what = {"strategy": strategy, "chunks": chunks, "tokens": TOKENS, "width": WIDTH, "vocab": VOCAB}
            row = what | {"ratio": ratio, "seconds": [round(s, 3) for s in samples]}
            lines.write(json.dumps(row | about) + "\n")
            print(f"{strategy:10} {chunks:3} chunks {statistics.median(samples):6.1f} s  {ratio:.2f}")
    print(f"over the unchunked loss; written to {output}", file=sys.stderr)


if __name__ == "__main__":
    main()
