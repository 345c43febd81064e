"""What one rank of up to 1024 runs for a head of 262144 classes, read from its compiled code, with no GPU.

    python -m benches.scaling                     # replaces the results of this torch; `make scaling` also the page

Generated for sm_90 with torch's fake group; nothing is timed or sent. Results are one JSON object a line: memory,
operations, the roofline of everything but collectives, and the collectives. docs/scaling.md is made of them.
"""

from __future__ import annotations

import datetime
import json
import sys
from collections import Counter
from dataclasses import asdict
from pathlib import Path

import torch

from compiled_loss import Chunking
from compiled_loss.inspection import GPUS, inspect

RESULTS = Path(__file__).parent / "results"
N, H, V = 8192, 4096, 262144
RANKS = [2**i for i in range(11)]
GPU = "H100"


def main() -> None:
    sys.path.insert(0, str(Path(__file__).parents[1] / "tests" / "support"))
    rows = []
    for ranks in RANKS:
        for strategy in ("tokens", "one chunk", "vocab"):
            rows.append(read(strategy, ranks, N))
    for ranks in (1, 8):  # a replica's part of the tokens
        rows += [read("tokens", ranks, N // replicas) for replicas in RANKS[1:] if ranks * replicas <= RANKS[-1]]
    path = RESULTS / f"scaling-{torch.__version__.split('+')[0]}-sm_90.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def read(strategy: str, ranks: int, tokens: int) -> dict[str, object]:
    import inspected_ranks

    chunking = {
        "tokens": Chunking(strategy="tokens"),
        "one chunk": Chunking(strategy="tokens", chunk_size=tokens),
        "vocab": Chunking(strategy="vocab"),
    }[strategy]
    call = inspected_ranks.linear(inspected_ranks.Part(V, ranks, 0), chunking)
    inputs = f"bf16[{tokens},{H}]:grad", f"bf16[{V // ranks},{H}]:grad", f"int64[{tokens}]:0..{V - 1}"
    found = inspect(call, *inputs, assemble=False)
    collectives = Counter(one for p in found.passes for one in p.collectives)
    print(f"{strategy}, {ranks} ranks, {tokens} tokens: {found.seconds:.0f} s", flush=True)
    return {
        "strategy": strategy,
        "ranks": ranks,
        "tokens": tokens,
        "shape": f"{tokens}x{H}x{V}",
        "peak_bytes": [p.peak_bytes for p in found.passes],
        "operations": found.operations,
        "seconds": sum(x.seconds(GPUS[GPU]) for p in found.passes for x in p.launches if x.kind != "collective"),
        "collectives": [{**asdict(one), "count": count} for one, count in collectives.items()],
        "device": f"no GPU: compiled code for {found.device}, rates of {GPU}",
        "torch": found.torch,
        "triton": found.triton,
        "date": datetime.date.today().isoformat(),
    }


if __name__ == "__main__":
    main()
