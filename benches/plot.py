"""The picture of docs/benchmarks.md, from the committed raw results. tools/figures.py draws it."""

from __future__ import annotations

import json
from collections.abc import Callable
from hashlib import sha256
from typing import Any

from benches.cases import HEADS, MASKED
from benches.providers import FLOOR, OURS
from benches.tables import ROOT, Row, figures, last, masked
from compiled_loss.pictures import BLUE, BROWN, GOLD, GREEN, GREY, ORANGE, PURPLE, RED, write

PICTURE = ROOT / "docs" / "benches.png"
COLORS = {
    "defaults": GREEN,
    "vocab": PURPLE,
    "F.cross_entropy, compiled": RED,
    "F.cross_entropy, eager": GREY,
    "F.linear_cross_entropy": BLUE,
    "Inductor's auto chunker": GOLD,
    "cut-cross-entropy, torch_compile": BROWN,
}
OTHER = ORANGE


def digest() -> bytes:
    """Of what the picture is drawn from, which it carries."""
    drawn = [(*key, row["peak_mib"]) for key, row in last("sizes").items() if "peak_mib" in row]
    return sha256((figures() + json.dumps(drawn)).encode()).hexdigest().encode()


def draw() -> None:
    """Write the picture, and its partner for dark pages."""
    write(figure_of, PICTURE, dpi=100, metadata={"Description": digest().decode()})


def figure_of() -> Any:
    """Draw time against memory, a panel per head, with the floor; below, peaks over N and V, and time over masks."""
    from matplotlib.figure import Figure

    rows = last("cpu")
    heads = list(dict.fromkeys(row["head"] for row in rows.values()))
    figure = Figure(figsize=(13, 8.4), layout="constrained")
    axes = figure.subplots(2, 3)
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
    axes[1, 2].grid()
    entries: dict[str, Any] = {}
    for axis in axes.flat:
        handles, labels = axis.get_legend_handles_labels()
        entries = dict(zip(labels, handles, strict=True)) | entries
    figure.legend(entries.values(), entries.keys(), loc="outside lower center", ncols=4)
    about = next(reversed(rows.values()))
    figure.suptitle(
        f"Loss and gradients on {about['device']}. Above: left and low is better, filled fp32, hollow bf16, round ours"
    )
    return figure


def scatter(axis: Any, rows: list[Row]) -> None:
    from matplotlib import rcParams

    axis.axhline(1.0, color=rcParams["text.color"], linewidth=1, linestyle="--", label=FLOOR)
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

    axis.grid(which="both")
    for one in (axis.xaxis, axis.yaxis):
        one.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
        one.set_major_formatter(FormatStrFormatter("%g"))
        one.set_minor_formatter(NullFormatter())
