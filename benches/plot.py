"""The README's tables of times and peaks, and the picture beside them, from the committed raw results.

Measures nothing. tools/figures.py writes them.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable, Iterable
from hashlib import sha256
from pathlib import Path
from typing import Any

from benches.cases import HEADS, MASKED, WANTS
from benches.meter import ratio
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
    FLOOR: "black",
}
OTHER = "#999999"


def lines_of(name: str) -> list[Row]:
    return [json.loads(line) for line in (RESULTS / f"{name}-2.13.0-cpu.jsonl").read_text().splitlines()]


def last(name: str, *, huge_pages: bool = False) -> Rows:
    """The last row of each case and provider that was timed, in the order of the file."""
    rows = [row for row in lines_of(name) if row["huge_pages"] == huge_pages and "seconds" in row]
    found = {(row["case"], row["provider"]): row for row in rows}
    for (case, _), row in found.items():
        row["ratio"] = ratio(row["seconds"], found[case, FLOOR]["seconds"])
    return found


def table(first: str, columns: Iterable[str], rows: dict[str, list[str]]) -> list[str]:
    head = [first, *columns]
    body = [[name, *cells] for name, cells in rows.items()]
    return [f"| {' | '.join(cells)} |" for cells in (head, ["---"] * len(head), *body)]


def named(provider: str) -> str:
    name, comma, how = provider.partition(",")
    return f"`{name}`{comma}{how}" if name.startswith("F.") else provider


def cell(row: Row | None) -> str:
    """A ratio and a peak."""
    return "" if row is None else f"{row['ratio']:.2f} / {row['peak_mib']:,.0f}"


def figures() -> str:
    """All tables."""
    rows = last("cpu")
    about = next(reversed(rows.values()))
    versions = {name: version for row in rows.values() for name, version in row["versions"].items() if version}
    versions.pop("triton", None)  # nothing here runs it
    machine = f"{about['device']} ({about['processor']})"
    lines = [
        f"{machine}, {', '.join(f'{n} {v}' for n, v in versions.items())}, {about['date']}; raw results in",
        "`benches/results`, written by `make bench`, other suites of `benches.run`, and `benches.compile_time`.",
        "",
        "Loss and both gradients on a grid of heads H x V: time over three GEMMs into buffers that exist already",
        "(1.00, the floor), medians of interleaved rounds, and peak over the inputs in MiB. Ours are the",
        "defaults, which chunk over tokens, and vocab.",
        "",
        *grid(rows, last("cpu", huge_pages=True)),
        "",
        *errors(rows),
        "",
        *sizes(last("sizes")),
        "",
        *wants(last("wants")),
        "",
        *curve(last("masked")),
        "",
        *compiling(),
        "",
        *overhead(last("overhead")),
    ]
    return "\n".join(lines) + "\n"


def grid(rows: Rows, huge: Rows) -> list[str]:
    cases = {case: row for (case, _), row in rows.items()}
    columns = [f"{r['head']}, N={r['tokens']}, {'fp32' if r['dtype'] == 'float32' else 'bf16'}" for r in cases.values()]
    body = {}
    for provider in PROVIDERS:
        for found, how in ((rows, ""), (huge, ", huge pages")):
            cells = [cell(found.get((case, provider))) for case in cases]
            if any(cells):
                body[named(provider) + how] = cells
    absent = "; ".join(provider for provider in PROVIDERS if named(provider) not in body)
    return [
        *table("", columns, body),
        "",
        "With huge pages, for which torch asks where `THP_MEM_ALLOC_ENABLE=1` is set, the floor is measured again: on",
        "a CPU much of what these cost over it is the first touch of new memory. Not run, for want of a GPU or of what",
        f"they need: {absent}.",
    ]


def errors(rows: Rows) -> list[str]:
    """The largest of all heads, and of both gradients."""

    def largest(provider: str, dtype: str, parts: tuple[str, ...]) -> str:
        mine = [row["error"] for (_, who), row in rows.items() if who == provider and row["dtype"] == dtype]
        return f"{max(error[part] for error in mine for part in parts):.1e}"

    columns = {
        f"{what}, {short}": (dtype, parts)
        for what, parts in {"loss": ("loss",), "gradients": ("hidden", "weight")}.items()
        for short, dtype in {"fp32": "float32", "bf16": "bfloat16"}.items()
    }
    there = [p for p in PROVIDERS if any(who == p and "error" in row for (_, who), row in rows.items())]
    body = {named(p): [largest(p, *column) for column in columns.values()] for p in there}
    return ["Relative error against fp64, the largest of these heads:", "", *table("", columns, body)]


def sizes(rows: Rows) -> list[str]:
    """As tokens grow."""
    tokens = sorted({row["tokens"] for row in rows.values() if row["head"] == "256 x 65536"})
    found = {(row["tokens"], row["provider"]): row for row in rows.values() if row["head"] == "256 x 65536"}
    providers = [provider for provider in PROVIDERS if (tokens[0], provider) in found]
    body = {named(provider): [cell(found.get((n, provider))) for n in tokens] for provider in providers}
    return ["The same as tokens grow, 256 x 65536, fp32:", "", *table("tokens", map(str, tokens), body)]


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
    columns = [f"{share:.0%}" for share in MASKED]
    body = {named(provider): [f"{one:.2f}" for one in ratios] for provider, ratios in masked(rows).items()}
    return [
        f"Time as tokens are masked, over that of none, {one['head']}, N={one['tokens']}, fp32; ours is told how many "
        "count:",
        "",
        *table("masked", columns, body),
    ]


def masked(rows: Rows) -> dict[str, list[float]]:
    ratios = {(row["masked"], row["provider"]): row["ratio"] for row in rows.values()}
    return {
        provider: [ratios[share, provider] / ratios[0.0, provider] for share in MASKED]
        for provider in PROVIDERS
        if all((share, provider) in ratios for share in MASKED)
    }


def compiling() -> list[str]:
    """Seconds to compile."""
    rows = {(row["strategy"], row["start"], row["chunks"]): row for row in lines_of("compile_time")}
    one, warm = (rows["unchunked", start, 1] for start in ("cold", "warm"))
    counts = sorted({chunks for strategy, _, chunks in rows if strategy != "unchunked"})
    kinds = {
        "tokens": ("tokens", "cold"),
        "vocab": ("vocab", "cold"),
        "tokens, warm": ("tokens", "warm"),
        "tokens, warm, Functions cached": ("tokens", "functions"),
    }
    ratios = {kind: f"{row['ratio']:.2f}" for kind, row in rows.items()}
    return [
        f"Time to compile over that of `F.cross_entropy`, cold ({statistics.median(one['seconds']):.1f} s; warm, "
        f"after another process: {warm['ratio']:.2f}), N={one['tokens']} H={one['width']} V={one['vocab']} fp32:",
        "",
        *table("chunks", map(str, counts), {k: [ratios.get((*s, c), "") for c in counts] for k, s in kinds.items()}),
    ]


def overhead(rows: Rows) -> list[str]:
    """Of a call."""
    one = next(iter(rows.values()))
    ours, theirs, floor = (
        statistics.median(rows[one["case"], provider]["seconds"]) * 1e6 for provider in ("defaults", COMPILED, FLOOR)
    )
    return [
        f"A call of 8 tokens, 8 x 64, in which all but nothing is computed: {ours:.0f} us, of {named(COMPILED)}"
        f" {theirs:.0f} us, of the GEMMs {floor:.0f} us.",
    ]


def digest() -> bytes:
    """Of what the picture is drawn from, which it carries."""
    drawn = [(*key, row["peak_mib"]) for key, row in last("sizes").items() if "peak_mib" in row]
    return sha256((figures() + json.dumps(drawn)).encode()).hexdigest().encode()


def draw() -> None:
    """Time against memory, a head a panel, with the floor; below, peaks as N and V grow, and time as masks do."""
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
    grown = [row for row in last("sizes").values() if "peak_mib" in row]
    tokens, classes = axes[1, 0], axes[1, 1]
    peaks(tokens, [row for row in grown if row["head"] == "256 x 65536"], lambda row: row["tokens"])
    tokens.set(title="as N grows, H x V = 256 x 65536, fp32", xlabel="tokens")
    peaks(classes, [row for row in grown if row["tokens"] == 1024], lambda row: HEADS[row["head"]].vocab)
    classes.set(title="as V grows, H = 256, N = 1024, fp32", xlabel="classes")
    for provider, ratios in reversed(masked(last("masked")).items()):
        color = COLORS.get(provider, OTHER)
        axes[1, 2].plot([100 * share for share in MASKED], ratios, marker=".", color=color, label=provider)
    axes[1, 2].set(
        title="as tokens are masked, 2048 x 8192, fp32",
        xlabel="masked tokens, %",
        ylabel="time over that of none",
        ylim=0,
    )
    axes[1, 2].grid(visible=True, alpha=0.2)
    entries: dict[str, Any] = {}
    for axis in axes.flat:
        handles, labels = axis.get_legend_handles_labels()
        entries = dict(zip(labels, handles, strict=True)) | entries
    figure.legend(entries.values(), entries.keys(), loc="outside lower center", ncols=4, frameon=False)
    about = next(reversed(rows.values()))
    figure.suptitle(
        f"Loss and gradients on {about['device']}. Above: left and low is better, filled fp32, hollow bf16, round ours"
    )
    figure.savefig(PICTURE, dpi=100, metadata={"Description": digest().decode()})
    pyplot.close(figure)


def scatter(axis: Any, rows: list[Row]) -> None:
    axis.axhline(1.0, color=COLORS[FLOOR], linewidth=1, linestyle="--", label=FLOOR)
    for row in reversed(rows):  # ours on top
        color, fp32 = COLORS.get(row["provider"], OTHER), row["dtype"] == "float32"
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


def peaks(axis: Any, rows: list[Row], size: Callable[[Row], int]) -> None:
    for provider in dict.fromkeys(row["provider"] for row in reversed(rows)):  # the defaults on top
        points = sorted((size(row), row["peak_mib"]) for row in rows if row["provider"] == provider)
        axis.plot(*zip(*points, strict=True), marker="o", color=COLORS.get(provider, OTHER), label=provider)
    axis.set(xscale="log", yscale="log", ylabel="peak over the inputs, MiB")
    numbers(axis)


def numbers(axis: Any) -> None:
    """Plain ones, and a grid."""
    from matplotlib.ticker import FormatStrFormatter, LogLocator, NullFormatter

    axis.grid(visible=True, which="both", alpha=0.2)
    for one in (axis.xaxis, axis.yaxis):
        one.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
        one.set_major_formatter(FormatStrFormatter("%g"))
        one.set_minor_formatter(NullFormatter())
