"""Write the tables and pictures of figures from the committed raw results: python tools/figures.py [--check]."""

from __future__ import annotations

import json
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benches" / "results" / "linear_cross_entropy-2.13.0-cpu.jsonl"
START, END = "<!-- figures: tools/figures.py -->\n", "<!-- end of figures -->"


def named(provider: str) -> str:
    name, comma, how = provider.partition(", ")
    return f"`{name}`{comma}{how}" if name.startswith("F.") else provider


def figures() -> str:
    """The tables, from the last run in the file of each thing measured."""
    rows = [json.loads(line) for line in RESULTS.read_text().splitlines()]
    memory = {r["provider"]: r["peak_mib"] for r in rows if r["kind"] == "memory"}
    times = {(r["provider"], r["dtype"]): r for r in rows if r["kind"] == "time"}
    compiled = {(r["strategy"], r["chunks"]): r["seconds"] for r in rows if r["kind"] == "compile"}
    providers = [p for p, dtype in times if dtype == "float32" and p != "three bare GEMMs"]
    rounds = len(next(iter(times.values()))["seconds"])
    about = rows[-1]
    lines = [
        f"{about['device']} ({about['processor']}), torch {about['torch'].split('+')[0]}, {about['date']};",
        f"raw results in `{RESULTS.relative_to(ROOT)}`, written by `make bench`.",
        "",
        "Peak over the inputs of forward and backward, N=4096 H=256 V=65536 fp32:",
        "",
        "| | MiB |",
        "|---|---|",
        *(f"| {named(p)} | {peak:,.0f} |" for p, peak in memory.items()),
        "",
        "Time of forward and backward over three bare GEMMs (1.00, the floor), N=2048 H=1024 V=32768, medians of",
        f'{rounds} interleaved rounds; "defaults" is the same plan as "tokens, 1024 rows", and tells the noise:',
        "",
        "| | fp32 | bf16 |",
        "|---|---|---|",
        *(
            f"| {named(p)} | {times[p, 'float32']['ratio']:.2f} | {times[p, 'bfloat16']['ratio']:.2f} |"
            for p in providers
        ),
        "",
        "Seconds to compile, cold, N=4096 H=256 V=16384 fp32:",
        "",
        "| chunks | 2 | 8 | 32 | 64 |",
        "|---|---|---|---|---|",
        *(
            f"| {s} | " + " | ".join(f"{compiled[s, c]:.1f}" for c in (2, 8, 32, 64)) + " |"
            for s in ("tokens", "vocab")
        ),
    ]
    return "\n".join(lines) + "\n"


def main() -> None:
    sys.path.insert(0, str(ROOT))  # of a checkout that is not installed
    import scaling

    check = "--check" in sys.argv[1:]
    for path, make in ((ROOT / "README.md", figures), (ROOT / "docs" / "scaling.md", scaling.figures)):
        text = path.read_text()
        before, rest = text.split(START)
        made = before + START + make() + END + rest.split(END)[1]
        if not check:
            path.write_text(made)
        elif made != text:
            sys.exit(f"{path.name}: its figures are not those of the raw results: run python tools/figures.py")
    if scaling.digest() not in (scaling.PICTURE.read_bytes() if scaling.PICTURE.exists() else b""):
        if check:
            sys.exit(f"{scaling.PICTURE.name} is not drawn from the raw results: run python tools/figures.py")
        scaling.plot()


if __name__ == "__main__":
    main()
