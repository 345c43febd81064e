"""Every walk and many chunk sizes of the CPU's grid, timed: what the planner's cost model is fitted to and judged by.

    python -m benches.search                    # measures, and prints the planner's regret
    python -m benches.search --regret           # of the results there are

The regret of a plan under a memory budget is its time over that of the fastest that was found within the budget.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from benches.cases import HEADS, SUITES, Case
from benches.providers import sized
from benches.run import RESULTS, machine, measured
from compiled_loss import Chunking
from compiled_loss.engine.plan import plan

PARTS = (2, 4, 8, 16, 32)  # of the logits; a budget is as many bytes as one of them


def sizes(case: Case) -> Iterator[tuple[str, int]]:
    """Each walk and its chunk sizes."""
    for parts in PARTS:
        yield "tokens", case.tokens // parts
        yield "vocab", HEADS[case.head].vocab // parts


def regrets(rows: list[dict[str, Any]]) -> Iterator[tuple[str, int, str, float]]:
    """Case, parts of a budget, what was planned, and its regret."""
    cases = {row["case"]: row for row in rows}
    for name, about in cases.items():
        case = Case(**{key: about[key] for key in ("head", "tokens", "dtype", "masked", "wants")})
        head, dtype = HEADS[case.head], getattr(torch, case.dtype)
        seconds = {r["provider"]: statistics.median(r["seconds"]) for r in rows if r["case"] == name}
        for parts in PARTS:
            budget = case.tokens * head.vocab * dtype.itemsize // parts
            within = [sized(*one) for one in sizes(case) if _bytes(case, *one) <= budget]
            chosen = plan(case.tokens, head.width, head.vocab, dtype, Chunking(memory_budget=budget))
            mine = sized(chosen.strategy, chosen.chunk)
            yield name, parts, mine, seconds[mine] / min(seconds[each] for each in within)


def _bytes(case: Case, strategy: str, size: int) -> int:
    """Of a chunk of logits."""
    other = HEADS[case.head].vocab if strategy == "tokens" else case.tokens
    return size * other * getattr(torch, case.dtype).itemsize


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--regret", action="store_true", help="measure nothing")
    parser.add_argument("--only", default="", help="cases whose names contain this")
    parser.add_argument("--rounds", type=int, default=5, help="samples of each time (default: 5)")
    parser.add_argument("--output", type=Path, help="a .jsonl file (default: one named after torch)")
    options = parser.parse_args()
    output = options.output or RESULTS / f"search-{torch.__version__.split('+')[0]}-cpu.jsonl"
    cases = [] if options.regret else [case for case in SUITES["cpu"] if options.only in str(case)]
    about, start = machine("cpu"), time.monotonic()
    for number, case in enumerate(cases, 1):
        print(f"[{number}/{len(cases)}, {time.monotonic() - start:.0f} s] {case}", file=sys.stderr, flush=True)
        rows = measured(case, [sized(*one) for one in sizes(case)], "cpu", options.rounds, 0)
        with output.open("a") as lines:
            for row in rows:
                lines.write(json.dumps({"case": str(case), **asdict(case)} | row | about) + "\n")
    for name, parts, chosen, regret in regrets([json.loads(line) for line in output.read_text().splitlines()]):
        print(f"{name}, 1/{parts} of the logits: {chosen}, {regret:.3f} of the fastest")


if __name__ == "__main__":
    main()
