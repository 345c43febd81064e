"""The README's tables of times and peaks, and the picture beside them, from the committed raw results.

Measures nothing. tools/figures.py writes them.
"""

from __future__ import annotations

import json
import statistics
from hashlib import sha256
from pathlib import Path
from typing import Any

from benches.cases import MASKED
from benches.providers import FLOOR, OURS, PROVIDERS

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benches" / "results"
GRID, CURVE = RESULTS / "cpu-2.13.0-cpu.jsonl", RESULTS / "masked-2.13.0-cpu.jsonl"
PICTURE = ROOT / "docs" / "benches.png"
Row = dict[str, Any]
COLORS = {
    "defaults": "#1b7837",
    "tokens": "#5aae61",
    "vocab": "#762a83",
    "F.cross_entropy, compiled": "#b2182b",
    "F.cross_entropy, eager": "#525252",
    "F.linear_cross_entropy": "#2166ac",
    "Inductor's auto chunker": "#b8860b",
    "cut-cross-entropy, torch_compile": "#8c510a",
}


def last(path: Path) -> dict[tuple[str, str], Row]:
    """{(case, provider): the last row of it}, in the order of the file."""
    rows = (json.loads(line) for line in path.read_text().splitlines())
    return {(row["case"], row["provider"]): row for row in rows}


def cell(row: Row | None) -> str:
    """A ratio and a peak."""
    if row is None:
        return ""
    if "ratio" not in row:
        return next(k.replace("_", " ") for k in ("missing", "failed", "out_of_memory") if k in row)
    peak = f" / {row['peak_mib']:,.0f}" if "peak_mib" in row else ""
    return f"{row['ratio']:.2f}{peak}"


def named(provider: str) -> str:
    return f"`{provider.partition(',')[0]}`{''.join(provider.partition(',')[1:])}" if provider[:2] == "F." else provider


def tables() -> str:
    rows = last(GRID)
    cases = {case: row for (case, _), row in rows.items()}
    heads = list(dict.fromkeys(row["head"] for row in cases.values()))
    dtypes = list(dict.fromkeys(row["dtype"] for row in cases.values()))
    columns = [(head, dtype) for head in heads for dtype in dtypes]
    where = {(row["head"], row["dtype"]): case for case, row in cases.items()}
    about = next(reversed(rows.values()))
    rounds = len(about["seconds"]) if "seconds" in about else 5
    lines = [
        f"{about['device']} ({about['processor']}), torch {about['versions']['torch'].split('+')[0]}, {about['date']};",
        f"raw results in `{GRID.relative_to(ROOT)}`, written by `make bench`.",
        "",
        f"Loss and both gradients of N={about['tokens']} tokens, heads H x V: time over three bare GEMMs (the floor),",
        f"medians of {rounds} interleaved rounds / peak over the inputs in MiB. The first three rows are ours.",
        "",
        "| | " + " | ".join(f"{head}, {'fp32' if dtype == 'float32' else 'bf16'}" for head, dtype in columns) + " |",
        "|---" * (len(columns) + 1) + "|",
    ]
    for provider in PROVIDERS:
        found = [rows.get((where[column], provider)) for column in columns]
        if any(row is not None and "ratio" in row for row in found):
            lines.append(f"| {named(provider)} | " + " | ".join(map(cell, found)) + " |")
    absent = [named(p) for p in PROVIDERS if not any("ratio" in r for (_, q), r in rows.items() if q == p)]
    if absent:
        lines += ["", f"Not measured here, for want of a GPU or of what they need: {', '.join(absent)}."]
    if CURVE.exists():
        lines += ["", *curve(last(CURVE))]
    return "\n".join(lines) + "\n"


def curve(rows: dict[tuple[str, str], Row]) -> list[str]:
    """Time over that without masked tokens, a provider a line."""
    seconds = {(r["masked"], r["provider"]): statistics.median(r["seconds"]) for r in rows.values() if "seconds" in r}
    one = next(iter(rows.values()))
    lines = [
        f"Time as tokens are masked, over that of none, {one['head']}, N={one['tokens']}; ours is told how many count:",
        "",
        "| masked | " + " | ".join(f"{masked:.0%}" for masked in MASKED) + " |",
        "|---" * (len(MASKED) + 1) + "|",
    ]
    for provider in (*PROVIDERS, FLOOR):
        if all((masked, provider) in seconds for masked in MASKED):
            ratios = [seconds[masked, provider] / seconds[0.0, provider] for masked in MASKED]
            lines.append(f"| {named(provider)} | " + " | ".join(f"{ratio:.2f}" for ratio in ratios) + " |")
    return lines


def digest() -> bytes:
    """Of what the picture is drawn from, which it carries."""
    return sha256(tables().encode()).hexdigest().encode()


def draw() -> None:
    """Time against memory, a head a panel, with the floor."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot

    rows = last(GRID)
    heads = list(dict.fromkeys(row["head"] for row in rows.values()))
    figure, axes = pyplot.subplots(1, len(heads), figsize=(4.2 * len(heads), 4.2), sharey=True, layout="constrained")
    for axis, head in zip(axes, heads, strict=True):
        axis.axhline(1.0, color="black", linewidth=1, linestyle="--", label=FLOOR)
        for row in rows.values():
            if row["head"] != head or "peak_mib" not in row:
                continue
            color, fp32 = COLORS.get(row["provider"], "#999999"), row["dtype"] == "float32"
            axis.scatter(
                max(1.0, row["peak_mib"]),
                row["ratio"],
                s=64,
                marker="o" if row["provider"] in OURS else "s",
                facecolors=color if fp32 else "none",
                edgecolors=color,
                linewidths=1.6,
                label=row["provider"] if fp32 else None,
            )
        axis.set(title=f"H x V = {head}", xlabel="peak over the inputs, MiB", xscale="log", yscale="log")
        axis.grid(visible=True, which="both", alpha=0.2)
        axis.yaxis.set_major_formatter(mpl.ticker.FormatStrFormatter("%g"))
        axis.yaxis.set_minor_formatter(mpl.ticker.NullFormatter())
    axes[0].set_ylabel("time over three bare GEMMs")
    about = next(reversed(rows.values()))
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=4, frameon=False)
    figure.suptitle(
        f"Loss and gradients of {about['tokens']} tokens on {about['device']}: left and low is better; filled fp32, "
        "hollow bf16, round ours"
    )
    figure.savefig(PICTURE, dpi=110, metadata={"Description": digest().decode()})
    pyplot.close(figure)
