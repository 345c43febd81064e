"""Two revisions of the library side by side, and the unchunked loss: compile time, step, peak, cost of a call.

    git worktree add ../old 2ab09b4
    python -m benches.beside ../old

Each build is a process of its own. One at a time is asked for a sample, in turn, forth and back. Compile times are of
cold starts, a fresh process and an empty cache for each sample. Ratios are of medians, to the compiled unchunked loss.
Results are appended to benches/results, one JSON object a line.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parents[1]
BUILDS = ("unchunked", "old", "new")
SHAPE, SMALL = (1024, 256, 16384), (8, 8, 64)  # tokens, width, vocab
CASES: list[tuple[tuple[int, int, int], str, int | None]] = [  # and the number of chunks, None for the defaults
    *((SHAPE, strategy, chunks) for strategy in ("tokens", "vocab") for chunks in (1, 8, 64)),
    ((1024, 320, 50257), "tokens", None),
    ((1024, 320, 50257), "vocab", None),
    ((1024, 768, 50257), "tokens", None),
    ((1024, 896, 16384), "tokens", None),
    ((4096, 256, 65536), "tokens", None),
    (SMALL, "tokens", None),
    (SMALL, "vocab", None),
]
COMPILED_ONLY = [(SHAPE, strategy, 1024) for strategy in ("tokens", "vocab")]  # which the first edition cannot


def child(build: str, mode: str, shape: tuple[int, int, int], strategy: str, chunks: int | None) -> None:
    """Answer each line of input: seconds of so many steps, or of the first one, or the peak of one."""
    import torch
    from torch.nn import functional as F

    torch.set_num_threads(os.cpu_count() or 1)
    torch.manual_seed(0)
    tokens, width, vocab = shape
    hidden, weight = (torch.randn(rows, width, requires_grad=True) for rows in (tokens, vocab))
    labels = torch.randint(0, vocab, (tokens,))
    loss: Callable[..., torch.Tensor]
    if build == "unchunked":

        def loss(h: torch.Tensor, w: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
            return F.cross_entropy(h @ w.t(), y)
    else:
        import compiled_loss

        size = None if chunks is None else -(-(tokens if strategy == "tokens" else vocab) // chunks)
        chunking = compiled_loss.Chunking(strategy=strategy, chunk_size=size)  # type: ignore[arg-type]

        def loss(h: torch.Tensor, w: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
            return compiled_loss.linear_cross_entropy(h, w, y, chunking=chunking)

    if mode == "compiled":
        started = torch.compile(lambda v: (v.exp() * 2).sum(), fullgraph=True)  # the compiler's own start is nobody's
        torch.autograd.grad(started(hidden), hidden)
        loss = torch.compile(loss, fullgraph=True)

    def seconds(steps: int) -> float:
        start = time.perf_counter()
        for _ in range(steps):
            torch.autograd.grad(loss(hidden, weight, labels), (hidden, weight))
        return (time.perf_counter() - start) / steps

    for line in sys.stdin:
        request, steps = line.split()
        if request == "peak":
            from compiled_loss.measure import PeakMemory

            with PeakMemory(torch.device("cpu")) as memory:
                seconds(1)
            answer: float = memory.peak
        else:
            answer = seconds(int(steps))
        print(answer, flush=True)


class Build:
    """A build in a process of its own, asked for samples."""

    def __init__(self, build: str, root: Path, mode: str, case: tuple[Any, ...], folder: str) -> None:
        environment = {"PYTHONPATH": str(root), "TORCHINDUCTOR_CACHE_DIR": folder, "PYTHONWARNINGS": "ignore"}
        self._child = subprocess.Popen(
            [sys.executable, __file__, "--child", json.dumps([build, mode, *case])],
            env=os.environ | environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def ask(self, request: str, steps: int = 1) -> float:
        """A sample."""
        assert self._child.stdin is not None and self._child.stdout is not None
        print(request, steps, file=self._child.stdin, flush=True)
        answer = self._child.stdout.readline()
        if not answer:
            raise RuntimeError(f"a build ended with status {self._child.wait()}")
        return float(answer)

    def close(self) -> None:
        """End it."""
        self._child.communicate()


@contextmanager
def builds(old: Path, mode: str, case: tuple[Any, ...], folder: str) -> Iterator[dict[str, Build]]:
    found = {name: Build(name, old if name == "old" else HERE, mode, case, folder) for name in BUILDS}
    try:
        yield found
    finally:
        for one in found.values():
            one.close()


def steps(old: Path, mode: str, case: tuple[Any, ...], rounds: int, folder: str) -> dict[str, Any]:
    """Seconds of steps, and the bytes that one holds over its inputs."""
    several = 100 if case[0] == SMALL else 1
    with builds(old, mode, case, folder) as found:
        for one in found.values():
            one.ask("step", 3 * several)
        samples = {name: [] for name in found}
        for i in range(rounds):
            for name in [*found] if i % 2 else reversed(found):
                samples[name].append(found[name].ask("step", several))
        peaks = {name: int(one.ask("peak")) for name, one in found.items()}
    return {"seconds": samples, "peak_bytes": peaks}


def compiling(old: Path, case: tuple[Any, ...], samples: int) -> dict[str, list[float]]:
    """Seconds to compile where nothing was compiled before, and then where it was."""
    found: dict[str, list[float]] = {f"{name}, {start}": [] for name in BUILDS for start in ("cold", "warm")}
    able = [name for name in BUILDS if name != "old" or case not in COMPILED_ONLY]
    for _ in range(samples):
        for name in able:
            with tempfile.TemporaryDirectory() as folder:
                for start in ("cold", "warm"):
                    one = Build(name, old if name == "old" else HERE, "compiled", case, folder)
                    first, second = one.ask("step"), one.ask("step")
                    one.close()
                    found[f"{name}, {start}"].append(first - second)
    return found


def ratios(samples: dict[str, list[float]]) -> dict[str, float]:
    """Of medians, to the unchunked loss's, of the same start."""
    medians = {name: statistics.median(values) for name, values in samples.items() if values}
    found = {}
    for name, median in medians.items():
        _, comma, start = name.partition(", ")
        found[name] = round(median / medians[f"unchunked{comma}{start}"], 3)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("old", type=Path, nargs="?", help="a checkout of the revision to compare with")
    parser.add_argument("--rounds", type=int, default=9, help="samples of each step (default: 9)")
    parser.add_argument("--compiles", type=int, default=3, help="samples of each compile time (default: 3)")
    parser.add_argument("--only", default="", help="cases whose name has this text")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        child(*json.loads(options.child))
        return
    if options.old is None:
        parser.error("expected the checkout to compare with")
    import torch

    sys.path.insert(0, str(HERE))
    from benches.run import RESULTS, machine

    output = RESULTS / f"beside-{torch.__version__.split('+')[0]}-cpu.jsonl"
    revision = subprocess.check_output(["git", "rev-parse", "--short", "HEAD"], cwd=options.old, text=True).strip()
    about = {"old_revision": revision} | machine("cpu")
    with tempfile.TemporaryDirectory() as folder:
        for case in [*CASES, *COMPILED_ONLY]:
            tokens, width, vocab = case[0]
            name = f"{tokens} x {width} x {vocab} {case[1]} {case[2] or 'default'}"
            if options.only not in name or (case in COMPILED_ONLY and not options.compiles):
                continue
            row: dict[str, Any] = {"case": name}
            if case not in COMPILED_ONLY and options.rounds:
                for mode in ("compiled", "eager"):
                    found = steps(options.old, mode, case, options.rounds, folder)
                    row[mode] = {"step": ratios(found["seconds"])} | found
            if case[0] != SMALL and options.compiles:
                row["compile_seconds"] = compiling(options.old, case, options.compiles)
                row["compile"] = ratios(row["compile_seconds"])
            with output.open("a") as lines:
                lines.write(json.dumps(row | about) + "\n")
            shown = {
                mode: (row[mode]["step"], row[mode]["peak_bytes"]) for mode in ("compiled", "eager") if mode in row
            }
            print(f"{name}: {shown} {row.get('compile', '')}", flush=True)
    print(f"written to {output}", file=sys.stderr)


if __name__ == "__main__":
    main()
