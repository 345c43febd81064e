"""Both strategies on the CPU's grid, in chunks of five sizes, timed: the planner is judged by it, a model fitted to it.

    python -m benches.search                    # measures, and prints the planner's regret and the fit
    python -m benches.search --read             # of the results there are

The regret of a plan under a memory budget is its time over that of the fastest that was found within the budget.
The fit gives this CPU's rates for `compiled_loss/planner/cost.py`: of GEMMs as the bare ones' time says, the others by
least squares of the logarithm of each time; it needs both dtypes.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from benches.cases import HEADS, SUITES, Case
from benches.meter import ratio
from benches.providers import FLOOR, sized
from benches.run import RESULTS, machine, measured
from compiled_loss import Chunking
from compiled_loss.planner import cost
from compiled_loss.planner.plan import plan

MEMORY = [1e9 * 1.1**i for i in range(60)]  # bytes a second, of which the fit takes one
CHUNK = [0.0, *(1e-5 * 1.3**i for i in range(24))]  # seconds
PARTS = (2, 4, 8, 16, 32)  # of the logits; a budget is as many bytes as one of them


def sizes(case: Case) -> Iterator[tuple[str, int]]:
    """Each strategy and its chunk sizes."""
    for parts in PARTS:
        yield "tokens", case.tokens // parts
        yield "vocab", HEADS[case.head].vocab // parts


def times(rows: list[dict[str, Any]]) -> Iterator[tuple[Case, dict[str, float]]]:
    """Each case with the seconds of who ran it: of the floor, times the ratio to it."""
    for about in {row["case"]: row for row in rows}.values():
        case = Case(**{key: about[key] for key in ("head", "tokens", "dtype", "masked", "wants")})
        mine = {row["provider"]: row["seconds"] for row in rows if row["case"] == about["case"]}
        floor = statistics.median(mine[FLOOR])
        yield case, {provider: floor * ratio(seconds, mine[FLOOR]) for provider, seconds in mine.items()}


def fitted(rows: list[dict[str, Any]]) -> tuple[cost.Rates, float]:
    """The rates, and by what factor a time is missed on average."""
    gemms: dict[str, list[float]] = {"float32": [], "bfloat16": []}
    known = []
    for case, seconds in times(rows):
        sizes_ = (case.tokens, *HEADS[case.head][:2])
        gemms[case.dtype].append(6 * case.tokens * sizes_[1] * sizes_[2] / seconds[FLOOR])
        for strategy, size in sizes(case):
            one = plan(*sizes_, getattr(torch, case.dtype), Chunking(strategy=strategy, chunk_size=size))
            itemsizes = (getattr(torch, case.dtype).itemsize, one.accumulate_dtype.itemsize)
            known.append(((strategy, size, *sizes_, *itemsizes), seconds[sized(strategy, size)]))
    half, single = (statistics.median(gemms[dtype]) for dtype in ("bfloat16", "float32"))

    def missed(rates: cost.Rates) -> float:
        logs = (math.log(cost.seconds(*shape, rates) / seconds) for shape, seconds in known)
        return math.exp(math.sqrt(statistics.fmean(log * log for log in logs)))

    best = min(
        (cost.Rates(half, single, memory, chunk, overlap=False) for memory in MEMORY for chunk in CHUNK), key=missed
    )
    return best, missed(best)


def regrets(rows: list[dict[str, Any]]) -> Iterator[tuple[str, int, str, float]]:
    """Case, parts of a budget, what was planned, and its regret."""
    for case, seconds in times(rows):
        head, dtype = HEADS[case.head], getattr(torch, case.dtype)
        shape = (case.tokens, head.vocab, dtype.itemsize)
        for parts in PARTS:
            budget = math.prod(shape) // parts
            within = [sized(*one) for one in sizes(case) if cost.chunk_bytes(*one, *shape) <= budget]
            chosen = plan(case.tokens, head.width, head.vocab, dtype, Chunking(memory_budget=budget), device="cpu")
            mine = sized(chosen.strategy, chosen.chunk)
            yield str(case), parts, mine, seconds[mine] / min(seconds[each] for each in within)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--read", action="store_true", help="measure nothing")
    parser.add_argument("--only", default="", help="cases whose names contain this")
    parser.add_argument("--rounds", type=int, default=5, help="samples of each time (default: 5)")
    parser.add_argument("--output", type=Path, help="a .jsonl file (default: one named after torch)")
    options = parser.parse_args()
    output = options.output or RESULTS / f"search-{torch.__version__.split('+')[0]}-cpu.jsonl"
    cases = [] if options.read else [case for case in SUITES["cpu"] if options.only in str(case)]
    about, start = machine("cpu"), time.monotonic()
    for number, case in enumerate(cases, 1):
        print(f"[{number}/{len(cases)}, {time.monotonic() - start:.0f} s] {case}", file=sys.stderr, flush=True)
        rows = measured(case, [sized(*one) for one in sizes(case)], "cpu", options.rounds, 0)
        with output.open("a") as lines:
            for row in rows:
                lines.write(json.dumps({"case": str(case), **asdict(case)} | row | about) + "\n")
    known = [json.loads(line) for line in output.read_text().splitlines()]
    for name, parts, chosen, regret in regrets(known):
        print(f"{name}, 1/{parts} of the logits: {chosen}, {regret:.3f} of the fastest")
    if {row["dtype"] for row in known} == {"float32", "bfloat16"}:
        rates, missed = fitted(known)
        print(f"fitted: {rates}, times missed by a factor of {missed:.2f}")


if __name__ == "__main__":
    main()
