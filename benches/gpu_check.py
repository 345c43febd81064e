"""All that waits for a GPU, in one run of at most six minutes: tests, values, peaks, predictions and times.

    python -m benches.gpu_check               # needs torch with CUDA and nothing else
    python -m benches.gpu_check --dry-run     # every part on a CPU: eager, and too small to say anything

The parts stand in order of importance, each in a process that it may crash. One that hangs is killed, and one that does
not fit into the time left is skipped. Results are appended to benches/results, one JSON object a line, as parts end.
Those of a dry run go to a temporary file unless `--output` names one.
"""

from __future__ import annotations

import argparse
import datetime
import json
import re
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from benches.cases import Case
from benches.gpu_parts import COMPILED, WAYS, Row
from benches.isolation import CallError, Worker
from benches.providers import OURS
from benches.run import RESULTS, line

PATIENCE = 3  # times the seconds that a part is expected to take, after which it is killed
WIDTH = 300  # most characters of an error's line in the table
FAILED = {"failed", "out_of_memory"}


@dataclass(frozen=True)
class Part:
    name: str
    function: str  # module:name
    arguments: dict[str, Any]
    seconds: float  # expected


@dataclass(frozen=True)
class Setting:
    device: str
    target: str  # the inspector's name of the device
    heads: tuple[str, ...]  # the first one is looked at most
    tokens: tuple[int, ...]
    dtype: str
    rounds: int
    test_workers: int


GPU = Setting(
    device="cuda",
    target="cuda:sm_90",
    heads=("Llama-3 8B", "Qwen-3 8B", "Gemma-2 9B"),
    tokens=(8192, 512, 32768),
    dtype="bfloat16",
    rounds=7,
    test_workers=4,
)
DRY = Setting(device="cpu", target="cpu", heads=("8 x 64",), tokens=(16,), dtype="float32", rounds=2, test_workers=0)


def parts(setting: Setting) -> Iterator[Part]:
    """In order of importance."""
    device, target = setting.device, setting.target

    def times(case: Case, seconds: float) -> Part:
        names = [name for name in (*OURS, COMPILED) if case.wants != "none" or name != "vocab"]  # there the default
        arguments = {"case": asdict(case), "names": names, "device": device, "rounds": setting.rounds}
        return Part(f"times: {case}", "benches.gpu_parts:times", arguments, seconds)

    first, *others = (Case(head=head, tokens=setting.tokens[0], dtype=setting.dtype) for head in setting.heads)
    yield Part("tests", "benches.gpu_parts:tests", {"seconds": 100, "workers": setting.test_workers}, 60)
    arguments = {"case": asdict(first), "device": device}
    yield Part(f"values: {first}", "benches.gpu_parts:values", {**arguments, "names": WAYS}, 50)
    yield times(first, 18)
    for name in OURS:
        more = {**arguments, "name": name, "target": target}
        yield Part(f"predictions: {first}, {name}", "benches.gpu_parts:predictions", more, 30)
    for case in others:
        yield times(case, 18)
    yield times(replace(first, masked=0.7), 15)
    for wants in ("loss", "none"):
        yield times(replace(first, wants=wants), 15)
    for tokens in setting.tokens[1:]:
        for case in (first, *others):
            yield times(replace(case, tokens=tokens), 12 if tokens < first.tokens else 20)


def outcome(part: Part, worker: Worker, left: float) -> list[Row]:
    """The part's rows, or one that says why there are none."""
    if left < part.seconds:
        return [{"skipped": f"takes about {part.seconds:.0f} s, {max(0, left):.0f} s are left"}]
    try:
        rows: list[Row] = worker.call(part.function, part.arguments, min(left, PATIENCE * part.seconds))
    except CallError as error:
        return [{"failed": str(error)}]
    if failures(rows):
        worker.close()  # the next part must not meet what a failure has left behind
    return rows


def failures(rows: list[Row]) -> bool:
    return any(FAILED & row.keys() for row in rows)


def described(part: Part, rows: list[Row], seconds: float) -> list[str]:
    """The part's lines of the table: its own, and one a row."""
    whole = [f"{key}: {value}" for row in rows if "provider" not in row for key, value in row.items()]
    status = whole[0] if whole else "with failures" if failures(rows) else "done"
    lines = [f"{part.name}: {status} ({seconds:.0f} s)"]
    for row in rows:
        if "provider" in row:
            more = ", ".join(f"{key} {value}" for key, value in row.get("noted", {}).items())
            lines.append(f"{line(row)}  {more}".rstrip())
    return [brief(text) for text in lines]


def brief(text: str) -> str:
    """The first and the last line; the results have all of them."""
    first, *_, last = text.splitlines() * 2
    return first[:WIDTH] if first == last else f"{first[:WIDTH]} ... {last.strip()[:WIDTH]}"


def about(worker: Worker, device: str) -> dict[str, Any]:
    """What it runs on, asked in the other process: the driver may hang."""
    try:
        found: dict[str, Any] = worker.call("benches.run:machine", {"device": device}, 60)
    except CallError as error:
        return {"date": datetime.date.today().isoformat(), "device": device, "unknown": str(error)}
    return found


def path(options: argparse.Namespace, machine: dict[str, Any]) -> Path:
    """Where results go."""
    if options.output is not None:
        return Path(options.output)
    device = re.sub(r"[^a-z0-9]+", "-", machine["device"].lower())
    folder = Path(tempfile.gettempdir()) if options.dry_run else RESULTS
    return folder / f"gpu_check-{torch.__version__.split('+')[0]}-{device}-{machine['date']}.jsonl"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=330, help="for all parts together (default: 330)")
    parser.add_argument("--dry-run", action="store_true", help="on a CPU, small and eager")
    parser.add_argument("--output", type=Path, help="a .jsonl file (default: named after torch, device and date)")
    options = parser.parse_args()
    setting = DRY if options.dry_run else GPU
    start, worker, table, failed = time.monotonic(), Worker(), [], False
    try:
        machine = about(worker, setting.device)
        output = path(options, machine)
        output.parent.mkdir(parents=True, exist_ok=True)
        for part in parts(setting):
            begun = time.monotonic()
            print(f"[{begun - start:.0f} s] {part.name}", file=sys.stderr, flush=True)
            rows = outcome(part, worker, options.seconds - (begun - start))
            with output.open("a") as lines:
                for row in rows:
                    lines.write(json.dumps({"part": part.name, **row, **machine}) + "\n")
            table += described(part, rows, time.monotonic() - begun)
            failed |= failures(rows)
    finally:
        worker.close()
    print(f"written to {output}", ", ".join(f"{key} {value}" for key, value in machine.items()), sep="\n")
    print("\n".join(table))
    sys.exit(int(failed))


if __name__ == "__main__":
    main()
