"""Live memory over the launches: as a skyline in a terminal, and as a picture."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from itertools import accumulate
from math import ceil
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console, ConsoleOptions, RenderResult
from rich.text import Text

from compiled_loss.inspection.record import Inspection
from compiled_loss.inspection.targets import GPUS
from compiled_loss.pictures import COLORS, write

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

ROW = 0.045  # height of a row of GEMMs, of the highest curve's


def scaled(number: float, step: int, units: Sequence[str]) -> str:
    """Returns a number in the largest of `units` in which it is at least 1; a unit is `step` times the one before."""
    power = max((i for i in range(len(units)) if abs(number) >= step**i), default=0)
    return f"{number / step**power:,.{2 if power else 0}f} {units[power]}"


def size(number: float) -> str:
    """Returns bytes as text."""
    return scaled(number, 1024, ("B", "KiB", "MiB", "GiB"))


@dataclass(frozen=True)
class Skyline:
    """Live bytes in blocks, `top` bytes at the full height: forward | backward."""

    inspection: Inspection
    top: int

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        blocks, rows = " ..::==##" if options.ascii_only else " ▁▂▃▄▅▆▇█", 4
        passes = [[launch.live_bytes for launch in p.launches] for p in self.inspection.passes if p.launches]
        heights = []
        for live in passes:
            width = max((options.max_width - 1) * len(live) // sum(map(len, passes)), 1)
            spans = [live[len(live) * i // width : ceil(len(live) * (i + 1) / width)] for i in range(width)]
            heights.append([ceil(8 * rows * max(span) / self.top) for span in spans])
        for row in reversed(range(rows)):
            line = "|".join("".join(blocks[min(max(h - 8 * row, 0), 8)] for h in part) for part in heights)
            yield Text(line, "cyan", no_wrap=True, overflow="crop")


def plot(inspections: Sequence[Inspection], path: Path) -> None:
    """Writes a PNG with a curve for each inspection, and its partner for dark pages; several curves share a width."""
    write(partial(_figure, inspections), path, dpi=150)


def _figure(inspections: Sequence[Inspection]) -> Figure:
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    figure = Figure(figsize=(11, 5.2), layout="constrained")
    axes = figure.subplots()
    versions = dict.fromkeys(f"{i.device}, torch {i.torch}" for i in inspections)
    figure.suptitle("; ".join(versions), fontsize=10)
    axes.set_title("Live memory over the inputs, launch by launch")
    top = max((live for i in inspections for live in (i.peak_bytes, *_live(i))), default=0)
    unit, name = (2**30, "GiB") if top >= 2**30 else (2**20, "MiB")
    height = max(top / unit, 1e-3)
    label, edges = _horizontal(inspections)
    axes.set_xlabel(label)
    axes.set_ylabel(f"memory ({name})")
    for i, (inspection, x) in enumerate(zip(inspections, edges, strict=True)):
        _curve(axes, inspection, x, unit, COLORS[i % len(COLORS)], -(i + 0.6) * ROW * height, ROW * height)
    axes.set_ylim(-(len(inspections) + 0.2) * ROW * height, 1.06 * height)
    axes.yaxis.set_major_locator(MaxNLocator(6))
    axes.set_yticks([tick for tick in axes.get_yticks() if 0 <= tick <= height])
    if len(inspections) == 1:
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    axes.set_xlim(0, max((x[-1] for x in edges), default=0) or 1)
    axes.grid(axis="y")
    if any(_live(inspection) for inspection in inspections):
        title = "dashed: backward begins; ticks below the curves: GEMMs"
        figure.legend(loc="outside lower center", ncols=2, title=title, title_fontsize=9)
    else:
        axes.text(0.5, 0.5, "nothing was launched", ha="center", transform=axes.transAxes)
    return figure


def _curve(
    axes: Axes, inspection: Inspection, edges: Sequence[float], unit: int, color: str, offset: float, length: float
) -> None:
    """Draws an inspection: its steps, where backward begins, and its row of GEMMs at `offset`."""
    values = [live / unit for live in _live(inspection)]
    if not values:
        return
    axes.stairs(values, edges, fill=True, color=color, alpha=0.12)
    label = f"{inspection.name}: peak {size(inspection.peak_bytes)}"
    axes.stairs(values, edges, baseline=None, color=color, linewidth=1.8, label=label)
    if inspection.backward is not None:
        axes.axvline(edges[len(inspection.forward.launches)], color=color, linestyle="--", linewidth=1)
    launches = [launch for p in inspection.passes for launch in p.launches]
    gemms = [sum(edges[i : i + 2]) / 2 for i, launch in enumerate(launches) if launch.kind == "gemm"]
    axes.eventplot(gemms, lineoffsets=offset, linelengths=0.7 * length, linewidths=0.8, colors=color)


def _live(inspection: Inspection) -> list[int]:
    return [launch.live_bytes for p in inspection.passes for launch in p.launches]


def _horizontal(inspections: Sequence[Inspection]) -> tuple[str, list[list[float]]]:
    """Returns the axis' label, and for each inspection where on it each launch begins and the last one ends."""
    counted = [[float(n) for n in range(len(_live(inspection)) + 1)] for inspection in inspections]
    if len(inspections) == 1:
        return "launches", counted
    gpus = [next((name for name, gpu in GPUS.items() if gpu.target == i.device), "") for i in inspections]
    label, edges = "fraction of each one's launches", counted
    if all(gpus):
        seconds = [
            [launch.seconds(GPUS[n]) for p in i.passes for launch in p.launches]
            for i, n in zip(inspections, gpus, strict=True)
        ]
        label = f"fraction of each one's roofline time on {', '.join(dict.fromkeys(gpus))}"
        edges = [[0.0, *accumulate(each)] for each in seconds]
    return label, [[x / (each[-1] or 1) for x in each] for each in edges]
