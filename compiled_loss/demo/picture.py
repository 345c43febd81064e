"""The picture of a demo: both loss curves, and the memory of both."""

from __future__ import annotations

from functools import partial
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patheffects import withStroke
from matplotlib.ticker import MaxNLocator

from compiled_loss.demo.report import Run, compared, mebibytes
from compiled_loss.pictures import BLUE, ORANGE, write

ORDINARY, OURS = ORANGE, BLUE


def draw(ordinary: Run, ours: Run, title: str, path: Path) -> None:
    """Writes the picture as a PNG at `path`, and its partner for dark pages; a loss that did not run is left out."""
    write(partial(_figure, ordinary, ours, title), path, dpi=150)


def _figure(ordinary: Run, ours: Run, title: str) -> Figure:
    figure = Figure(figsize=(11, 4.8), layout="constrained")
    curves, memory = figure.subplots(1, 2, width_ratios=(3, 2))
    figure.suptitle(title, fontsize=10)
    _curves(curves, ordinary, ours)
    _memory(memory, ordinary, ours)
    return figure


def _curves(axes: Axes, ordinary: Run, ours: Run) -> None:
    """Draws a thick line under a thin one with a margin of background: both are seen where they coincide."""
    for run, color, width, dot in ((ordinary, ORDINARY, 8.0, 8.0), (ours, OURS, 2.0, 3.0)):
        if run.losses:
            steps = range(1, len(run.losses) + 1)
            (line,) = axes.plot(steps, run.losses, "-o", label=run.loss, color=color, linewidth=width, markersize=dot)
            if run is ours:
                line.set_path_effects([withStroke(linewidth=2.2 * width, foreground=axes.get_facecolor())])
    axes.set_title("Training loss")
    axes.set_xlabel("step")
    axes.set_ylabel("loss (nats per token)")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    axes.grid()
    axes.legend()


def _memory(axes: Axes, ordinary: Run, ours: Run) -> None:
    """Draws a bar for each loss that was measured, with its size above it."""
    axes.set_title("Peak memory of a step over the model")
    axes.set_ylabel("memory (MiB)")
    axes.margins(x=0.2, y=0.15)
    for run, color in ((ordinary, ORDINARY), (ours, OURS)):
        if run.peak is not None:
            text = mebibytes(run.peak)
            if run is ours:
                text += "\n" + compared(ordinary.peak, ours.peak, "lower", "higher")
            bar = axes.bar(run.loss, run.peak / 2**20, color=color, width=0.55)
            axes.bar_label(bar, [text.strip()], padding=4, fontweight="bold")
    if not axes.patches:
        axes.set_axis_off()
        axes.text(0.5, 0.5, "not measured", ha="center", va="center", transform=axes.transAxes)
