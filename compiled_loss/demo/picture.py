"""The picture of a demo: both loss curves, and the memory of both."""

from __future__ import annotations

from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from compiled_loss.demo.report import Run, compared, mebibytes

ORDINARY, OURS = "#f4a582", "#2166ac"  # apart in hue and in lightness


def draw(ordinary: Run, ours: Run, title: str, path: Path) -> None:
    """Writes the picture at `path` as a PNG; a loss that did not run is left out."""
    figure = Figure(figsize=(11, 4.8), layout="constrained")
    FigureCanvasAgg(figure)  # no display needed
    curves, memory = figure.subplots(1, 2, width_ratios=(3, 2))
    figure.suptitle(title, fontsize=10, color="0.35")
    _curves(curves, ordinary, ours)
    _memory(memory, ordinary, ours)
    for axes in (curves, memory):
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, format="png", dpi=150)


def _curves(axes: Axes, ordinary: Run, ours: Run) -> None:
    """Draws a thick light line under a thin dashed one: both are seen where they coincide."""
    for run, line, color, width, dot in ((ordinary, "-o", ORDINARY, 7.0, 7.0), (ours, "--o", OURS, 1.8, 3.0)):
        if run.losses:
            steps = range(1, len(run.losses) + 1)
            axes.plot(steps, run.losses, line, label=run.loss, color=color, linewidth=width, markersize=dot)
    axes.set_title("Training loss")
    axes.set_xlabel("step")
    axes.set_ylabel("loss (nats per token)")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    axes.grid(alpha=0.25)
    axes.legend(frameon=False)


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
        axes.text(0.5, 0.5, "not measured", ha="center", va="center", transform=axes.transAxes, color="0.5")
