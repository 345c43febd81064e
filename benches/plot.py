"""The README's tables of times and peaks, and the pictures beside them, from the committed raw results.

Measures nothing. tools/figures.py writes them.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Iterable
from hashlib import sha256
from pathlib import Path
from typing import Any

from benches.cases import HEADS, MASKED, WANTS
from benches.providers import FLOOR, OURS, PLAIN, PROVIDERS

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benches" / "results"
PICTURE = ROOT / "docs" / "benches.png"
COMPILED = next(iter(PLAIN))
Row = dict[str, Any]
Rows = dict[tuple[str, str], Row]  # by case and provider
COLORS = {
    "defaults": "#1b7837",
    "vocab": "#762a83",
    "F.cross_entropy, compiled": "#b2182b",
    "F.cross_entropy, eager": "#525252",
    "F.linear_cross_entropy": "#2166ac",
    "Inductor's auto chunker": "#b8860b",
    "cut-cross-entropy, torch_compile": "#8c510a",
}


def last(name: str, *, huge_pages: bool = False) -> Rows:
    """The last row of each case and provider, in the order of the file."""
    lines = (RESULTS / f"{name}-2.13.0-cpu.jsonl").read_text().splitlines()
    rows = [row for row in map(json.loads, lines) if row.get("huge_pages", False) == huge_pages]
    return {(row["case"], row["provider"]): row for row in rows}


def table(first: str, columns: Iterable[str], rows: dict[str, list[str]]) -> list[str]:
    head = [first, *columns]
    body = [[name, *cells] for name, cells in rows.items()]
    return [f"| {' | '.join(cells)} |" for cells in (head, ["---"] * len(head), *body)]


def named(provider: str) -> str:
    name, comma, how = provider.partition(",")
    return f"`{name}`{comma}{how}" if name.startswith("F.") else provider


def cell(row: Row | None) -> str:
    """A ratio and a peak."""
    if row is None or "ratio" not in row:
        return ""
    return f"{row['ratio']:.2f} / {row['peak_mib']:,.0f}"


def figures() -> str:
    """All tables."""
    rows, huge = last("cpu"), last("cpu", huge_pages=True)
    about = next(reversed(rows.values()))
    versions = about["versions"]
    peers = ", ".join(f"{name} {versions[name]}" for name in versions if "-" in name and versions[name])
    lines = [
        f"{about['device']} ({about['processor']}), torch {versions['torch'].split('+')[0]}, {peers}, {about['date']};",
        "raw results in `benches/results`, written by `python -m benches.run`, `make bench` among them.",
        "",
        "Loss and both gradients on a grid of heads H x V: time over three GEMMs into buffers that exist already",
        "(1.00, the floor), medians of interleaved rounds, and peak over the inputs in MiB. Ours are the defaults,",
        "which walk tokens, and vocab.",
        "",
        *grid(rows, huge),
        "",
        *absent(rows),
        "",
        *wants(last("wants")),
        "",
        *curve(last("masked")),
        "",
        *compiling(),
    ]
    return "\n".join(lines) + "\n"


def grid(rows: Rows, huge: Rows) -> list[str]:
    cases = {case: row for (case, _), row in rows.items()}
    columns = [f"{r['head']}, N={r['tokens']}, {'fp32' if r['dtype'] == 'float32' else 'bf16'}" for r in cases.values()]
    body = {}
    for provider in PROVIDERS:
        cells = [cell(rows.get((case, provider))) for case in cases]
        if any(cells):
            body[named(provider)] = cells
        if any((case, provider) in huge for case in cases) and provider in ("defaults", COMPILED):
            cells = [cell(huge.get((case, provider))) for case in cases]
            body[named(provider) + ", huge pages"] = cells
    return [
        *table("", columns, body),
        "",
        "Huge pages are the environment variable `THP_MEM_ALLOC_ENABLE=1`, with which torch asks for 2 MiB pages: on",
        "a CPU much of what any of these costs over the floor is the first touch of new memory.",
    ]


def absent(rows: Rows) -> list[str]:
    there = {provider for (_, provider), row in rows.items() if "ratio" in row}
    missing = ", ".join(provider for provider in PROVIDERS if provider not in there)
    return [f"Without a GPU these do not run, or are not installed: {missing}."]


def wants(rows: Rows) -> list[str]:
    """What is asked of a loss."""
    one = next(iter(rows.values()))
    asked = {row["wants"]: case for (case, _), row in rows.items()}
    body = {
        f"{what} ({sum(WANTS[what])})": [cell(rows.get((asked[what], p))) for p in ("defaults", COMPILED)]
        for what in WANTS
        if what in asked
    }
    return [
        f"What else is asked of a loss, {one['head']}, N={one['tokens']}, fp32, over as many GEMMs as in brackets:",
        "",
        *table("", ("ours", named(COMPILED)), body),
    ]


def curve(rows: Rows) -> list[str]:
    """Time over that without masked tokens, a provider a line."""
    one = next(iter(rows.values()))
    ratios = masked(rows)
    return [
        f"Time as tokens are masked, over that of none, {one['head']}, N={one['tokens']}, fp32; ours is told how many "
        "count:",
        "",
        *table(
            "masked",
            (f"{share:.0%}" for share in MASKED),
            {named(provider): [f"{ratio:.2f}" for ratio in line] for provider, line in ratios.items()},
        ),
    ]


def masked(rows: Rows) -> dict[str, list[float]]:
    seconds = {(r["masked"], r["provider"]): statistics.median(r["seconds"]) for r in rows.values() if "seconds" in r}
    return {
        provider: [seconds[share, provider] / seconds[0.0, provider] for share in MASKED]
        for provider in (*PROVIDERS, FLOOR)
        if all((share, provider) in seconds for share in MASKED)
    }


def compiling() -> list[str]:
    """Seconds to compile."""
    lines = (RESULTS / "compile_time-2.13.0-cpu.jsonl").read_text().splitlines()
    rows = {(row["strategy"], row["chunks"]): row for row in map(json.loads, lines)}
    one = rows["unchunked", 1]
    counts = sorted({chunks for strategy, chunks in rows if strategy != "unchunked"})
    ratio = {kind: f"{row['ratio']:.2f}" for kind, row in rows.items()}
    return [
        f"Time to compile, cold, over that of `F.cross_entropy` ({statistics.median(one['seconds']):.1f} s), "
        f"N={one['tokens']} H={one['width']} V={one['vocab']} fp32:",
        "",
        *table("chunks", map(str, counts), {s: [ratio.get((s, c), "") for c in counts] for s in ("tokens", "vocab")}),
    ]


def digest() -> bytes:
    """Of what the picture is drawn from, which it carries."""
    scaling = json.dumps([(*key, row.get("seconds"), row.get("peak_mib")) for key, row in last("scaling").items()])
    return sha256((figures() + scaling).encode()).hexdigest().encode()


def draw() -> None:
    """Time against memory, a head a panel, with the floor; below, scaling in N and V, and the masked fraction."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot

    rows = last("cpu")
    heads = list(dict.fromkeys(row["head"] for row in rows.values()))
    figure, axes = pyplot.subplots(2, 3, figsize=(13, 8.4), layout="constrained")
    for axis, head in zip(axes[0], heads, strict=True):
        scatter(axis, [row for row in rows.values() if row["head"] == head and "peak_mib" in row])
        axis.set(title=f"H x V = {head}")
    axes[0, 0].set_ylabel("time over three bare GEMMs")
    scaling = last("scaling").values()
    tokens, classes = axes[1, 0], axes[1, 1]
    lines(tokens, [row for row in scaling if row["head"] == "256 x 65536"], lambda row: row["tokens"])
    tokens.set(title="H x V = 256 x 65536, fp32", xlabel="tokens", ylabel="peak over the inputs, MiB")
    lines(classes, [row for row in scaling if row["tokens"] == 1024], lambda row: HEADS[row["head"]].vocab)
    classes.set(title="H = 256, N = 1024, fp32", xlabel="classes", ylabel="peak over the inputs, MiB")
    for provider, line in masked(last("masked")).items():
        color = COLORS.get(provider, "black")
        axes[1, 2].plot([100 * share for share in MASKED], line, marker=".", color=color, label=provider)
    axes[1, 2].set(title="as tokens are masked", xlabel="masked tokens, %", ylabel="time over that of none", ylim=0)
    axes[1, 2].grid(visible=True, alpha=0.2)
    entries: dict[str, Any] = {}
    for axis in axes.flat:
        handles, labels = axis.get_legend_handles_labels()
        entries |= dict(zip(labels, handles, strict=True))
    figure.legend(entries.values(), entries.keys(), loc="outside lower center", ncols=4, frameon=False)
    about = next(reversed(rows.values()))
    figure.suptitle(
        f"Loss and gradients on {about['device']}. Above: left and low is better, filled fp32, hollow bf16, round ours"
    )
    figure.savefig(PICTURE, dpi=100, metadata={"Description": digest().decode()})
    pyplot.close(figure)


def scatter(axis: Any, rows: list[Row]) -> None:
    axis.axhline(1.0, color="black", linewidth=1, linestyle="--", label=FLOOR)
    for row in rows:
        color, fp32 = COLORS.get(row["provider"], "#999999"), row["dtype"] == "float32"
        axis.scatter(
            row["peak_mib"],
            row["ratio"],
            s=64,
            marker="o" if row["provider"] in OURS else "s",
            facecolors=color if fp32 else "none",
            edgecolors=color,
            linewidths=1.6,
            label=row["provider"] if fp32 else None,
        )
    axis.set(xlabel="peak over the inputs, MiB", xscale="log", yscale="log")
    numbers(axis)


def lines(axis: Any, rows: list[Row], size: Any) -> None:
    for provider in dict.fromkeys(row["provider"] for row in rows if "peak_mib" in row):
        points = sorted((size(row), row["peak_mib"]) for row in rows if row["provider"] == provider)
        axis.plot(*zip(*points, strict=True), marker="o", color=COLORS.get(provider, "#999999"), label=provider)
    axis.set(xscale="log", yscale="log")
    numbers(axis)


def numbers(axis: Any) -> None:
    """Plain ones, and a grid."""
    from matplotlib.ticker import FormatStrFormatter, NullFormatter

    axis.grid(visible=True, which="both", alpha=0.2)
    for one in (axis.xaxis, axis.yaxis):
        one.set_major_formatter(FormatStrFormatter("%g"))
        one.set_minor_formatter(NullFormatter())
