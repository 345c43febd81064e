"""The tables of docs/benchmarks.md, from the committed raw results.

Measures nothing. tools/figures.py writes them.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from benches.cases import MASKED, WANTS
from benches.meter import ratio
from benches.providers import FLOOR, PLAIN, PROVIDERS

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benches" / "results"
COMPILED = next(iter(PLAIN))
Row = dict[str, Any]
Rows = dict[tuple[str, str], Row]  # by case and provider


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
        f"{machine}, {', '.join(f'{n} {v}' for n, v in versions.items())}, {about['date']}. The raw results are in",
        "`benches/results`. `make bench`, the other suites of `benches.run`, and `benches.compile_time` write them.",
        "",
        "### Loss and both gradients",
        "",
        "The columns are heads H x V with N tokens. Each cell is *time / memory*. Time is the median over interleaved",
        "rounds, relative to three bare GEMMs into buffers that exist already: 1.00 is the lower bound. Memory is the",
        "peak above the inputs in MiB. `defaults` (chunks of tokens) and `vocab` (chunks of the vocabulary) are",
        "the strategies of this library.",
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
        "With `THP_MEM_ALLOC_ENABLE=1` torch uses huge pages, and the bare GEMMs were measured again with them. On",
        "a CPU, much of the time above the bare GEMMs is the first touch of new memory: huge pages make it cheaper.",
        f"These were not run, because they need a GPU or a package that was not there: {absent}.",
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
    return [
        "### Errors",
        "",
        "Relative error against fp64, the largest over these heads:",
        "",
        *table("", columns, body),
    ]


def sizes(rows: Rows) -> list[str]:
    """As tokens grow."""
    tokens = sorted({row["tokens"] for row in rows.values() if row["head"] == "256 x 65536"})
    found = {(row["tokens"], row["provider"]): row for row in rows.values() if row["head"] == "256 x 65536"}
    providers = [provider for provider in PROVIDERS if (tokens[0], provider) in found]
    body = {named(provider): [cell(found.get((n, provider))) for n in tokens] for provider in providers}
    return [
        "### More tokens",
        "",
        "Loss and both gradients on the head 256 x 65536 in fp32, as the number of tokens grows:",
        "",
        *table("tokens", map(str, tokens), body),
    ]


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
        "### Other losses",
        "",
        f"The head {one['head']} with N={one['tokens']} in fp32. The brackets say how many bare GEMMs are 1.00.",
        '"loss" has no gradient, and "none" is `reduction="none"`.',
        "",
        *table("", ("ours", named(COMPILED)), body),
    ]


def curve(rows: Rows) -> list[str]:
    """Time over that without masked tokens, a provider a line."""
    one = next(iter(rows.values()))
    columns = [f"{share:.0%}" for share in MASKED]
    body = {named(provider): [f"{one:.2f}" for one in ratios] for provider, ratios in masked(rows).items()}
    return [
        "### Masked tokens",
        "",
        f"Time relative to that without masked tokens, {one['head']}, N={one['tokens']}, fp32. This library was told",
        "how many tokens count (`max_label_tokens`).",
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
        "vocab, warm": ("vocab", "warm"),
    }
    ratios = {kind: f"{row['ratio']:.2f}" for kind, row in rows.items()}
    return [
        "### Time to compile",
        "",
        f"Relative to compiled `F.cross_entropy` without a cache, {statistics.median(one['seconds']):.1f} s. With the",
        f"cache of an earlier process `F.cross_entropy` took {warm['ratio']:.2f} of that.",
        f"N={one['tokens']}, H={one['width']}, V={one['vocab']}, fp32. Cold and warm starts were measured in two runs,",
        "each relative to its own `F.cross_entropy`.",
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
        "### Cost of a call",
        "",
        f"A call with almost nothing to compute (8 tokens, head 8 x 64) takes {ours:.0f} us. {named(COMPILED)} takes "
        f"{theirs:.0f} us, and the bare GEMMs take {floor:.0f} us.",
    ]
