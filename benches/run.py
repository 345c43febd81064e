"""Time, memory and error of the losses beside what else there is, on this machine.

    python -m benches.run                       # the CPU's grid
    python -m benches.run --suite gpu           # needs torch with CUDA and nothing else
    python -m benches.run --suite masked --only 70%

Times are ratios to the bare GEMMs of the same run. Results are appended to benches/results, one JSON object a line,
with every sample and what they were measured on.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from dataclasses import asdict
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from benches.cases import SUITES, Case
from benches.providers import MODES, OURS, PLAIN, PROVIDERS
from compiled_loss.measure import run_in_child

RESULTS = Path(__file__).parent / "results"
LEADERS = [*OURS, next(iter(PLAIN))]  # where all the others have been measured once
HUGE_PAGES = "THP_MEM_ALLOC_ENABLE"  # torch asks for them for each large tensor
PACKAGES = ("triton", "liger-kernel", "cut-cross-entropy", "quack-kernels")


def machine(device: str) -> dict[str, Any]:
    """What the figures are figures of."""
    versions: dict[str, str | None] = {"torch": torch.__version__, "cuda": torch.version.cuda}
    for name in PACKAGES:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            versions[name] = None
    found: dict[str, Any] = {
        "date": datetime.date.today().isoformat(),
        "revision": asked(["git", "-C", str(RESULTS), "describe", "--always", "--dirty"]),
        "python": platform.python_version(),
        "versions": versions,
    }
    if device == "cpu":
        cores = Path("/proc/cpuinfo")
        names = [n for n in cores.read_text().splitlines() if n.startswith("model name")] if cores.exists() else []
        model = names[0].split(":")[1].strip() if names else platform.processor()
        pages = Path("/sys/kernel/mm/transparent_hugepage/enabled")  # "never" makes nothing of HUGE_PAGES
        what = {"device": f"{os.cpu_count()} CPU cores", "processor": model or platform.machine()}
        return found | what | {"huge_pages_of_linux": pages.read_text().strip() if pages.exists() else None}
    module = torch.get_device_module(device)
    query = "driver_version,power.limit,clocks.max.sm,clocks.max.mem"
    about = asked(["nvidia-smi", f"--query-gpu={query}", "--format=csv,noheader"])
    return found | {"device": module.get_device_name(), query: about}


def asked(command: list[str]) -> str | None:
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def measured(
    case: Case, names: list[str], device: str, rounds: int, seed: int, *, huge_pages: bool = False
) -> list[dict[str, Any]]:
    environment = {"PYTHONWARNINGS": "ignore", HUGE_PAGES: str(int(huge_pages))}
    if device == "cpu":  # compile times are cold; on a GPU they would be all there is time for
        environment["TORCHINDUCTOR_FORCE_DISABLE_CACHES"] = "1"
    found: list[dict[str, Any]] = run_in_child(
        "benches.meter:measure",
        environment=environment,
        case=asdict(case),
        names=names,
        device=device,
        rounds=rounds,
        seed=seed,
    )
    return found


def quartiles(seconds: list[float]) -> list[float]:
    return statistics.quantiles(seconds, n=4, method="inclusive") if len(seconds) > 1 else seconds * 3


def line(row: dict[str, Any]) -> str:
    """A provider, in a line of a table."""
    for key in ("missing", "failed", "out_of_memory"):
        if key in row:
            return f"  {row['provider']:34} {key.replace('_', ' ')}: {row[key]}"
    text = f"  {row['provider']:34}"
    if "seconds" in row:
        low, middle, high = (s * 1e3 for s in quartiles(row["seconds"]))
        text += f" {row['ratio']:6.3f} {middle:9.2f} ms ({low:.2f} to {high:.2f})"
    if "peak_mib" in row:
        text += f" {row['peak_mib']:9.0f} MiB"
    if "error" in row:
        text += f"  errors {' '.join(f'{v:.1e}' for v in row['error'].values())}"
    return text


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--suite", choices=list(SUITES), default="gpu" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--device", default=None, help="default: cuda for the suite gpu, else cpu")
    parser.add_argument("--only", default="", help="cases whose names contain this")
    parser.add_argument("--providers", nargs="+", choices=[*PROVIDERS, *MODES], help="default: all, then the leaders")
    parser.add_argument("--rounds", type=int, default=None, help="samples of each time (default: 3, on a GPU 20)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--huge-pages", action="store_true", help=f"with {HUGE_PAGES}=1: fewer page faults on a CPU")
    parser.add_argument("--output", type=Path, help="a .jsonl file (default: one named after the suite and torch)")
    options = parser.parse_args()
    device = options.device or ("cuda" if options.suite == "gpu" else "cpu")
    rounds = options.rounds or (3 if device == "cpu" else 20)
    version = torch.__version__.split("+")[0]
    output = options.output or RESULTS / f"{options.suite}-{version}-{device}.jsonl"
    output.parent.mkdir(parents=True, exist_ok=True)
    cases = [case for case in SUITES[options.suite] if options.only in str(case)]
    about, table, start = machine(device), [], time.monotonic()
    seen: set[tuple[str, str]] = set()
    for number, case in enumerate(cases, 1):
        print(f"[{number}/{len(cases)}, {time.monotonic() - start:.0f} s] {case}", file=sys.stderr, flush=True)
        everyone = (case.head, case.dtype) not in seen or case.masked  # some skip masked tokens
        seen.add((case.head, case.dtype))
        names = options.providers or (list(PROVIDERS) if everyone else LEADERS)
        rows = measured(case, names, device, rounds, options.seed, huge_pages=options.huge_pages)
        with output.open("a") as lines:
            for row in rows:
                what = {
                    "suite": options.suite,
                    "case": str(case),
                    **asdict(case),
                    "seed": options.seed,
                    "huge_pages": options.huge_pages,
                }
                lines.write(json.dumps(what | row | about) + "\n")
        table += [str(case), *map(line, rows)]
    print("\n".join(table))
    print(f"over the bare GEMMs, median (quartiles); written to {output}", file=sys.stderr)


if __name__ == "__main__":
    main()
