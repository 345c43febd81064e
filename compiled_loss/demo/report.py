"""The measurements of each loss, and the final table."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from statistics import median

from rich.table import Column, Table

from compiled_loss.demo.child import Event


@dataclass(slots=True)
class Run:
    """A training with one loss, as far as it came; None stands for a value that was not measured."""

    loss: str
    losses: list[float] = field(default_factory=list)  # nats per token, one value per step
    seconds: list[float] = field(default_factory=list)
    compile_seconds: float | None = None
    peak: int | None = None  # bytes over the model

    def add(self, event: Event) -> None:
        """Adds what the child reports: see `train`."""
        if "loss" in event:
            self.losses.append(event["loss"])
            self.seconds.append(event["seconds"])
        else:
            self.compile_seconds, self.peak = event["compile_seconds"], event["peak"]

    @property
    def step_seconds(self) -> float | None:
        return median(self.seconds) if self.seconds else None

    @property
    def last_loss(self) -> float | None:
        return self.losses[-1] if self.losses else None


def largest_difference(ordinary: Run, ours: Run) -> float | None:
    """The largest difference between the loss curves, over the steps that both took."""
    return max((abs(a - b) for a, b in zip(ordinary.losses, ours.losses, strict=False)), default=None)


def compared(ordinary: float | None, ours: float | None, less: str, more: str) -> str:
    """Returns how many times less `ours` is, or more, as text; an empty text where either is unknown."""
    if not ordinary or not ours:
        return ""
    times = f"{max(ordinary / ours, ours / ordinary):.1f}"
    return "equal" if times == "1.0" else f"{times} times {less if ours < ordinary else more}"


def mebibytes(size: float) -> str:
    """Returns bytes in the unit of the report."""
    return f"{size / 2**20:,.0f} MiB"


def table(ordinary: Run, ours: Run) -> Table:
    """Returns a table of every figure of both runs, and of what lies between them."""
    numbers = (Column(run.loss, justify="right") for run in (ordinary, ours))
    result = Table("", *numbers, "", box=None, collapse_padding=True, pad_edge=False)  # fits 80 columns

    def row(name: str, shown: Callable[[float], str], values: tuple[float | None, float | None], between: str) -> None:
        result.add_row(name, *("-" if value is None else shown(value) for value in values), between)

    difference = largest_difference(ordinary, ours)
    row("loss at the last step", "{:.4f}".format, (ordinary.last_loss, ours.last_loss), "")
    apart = ("-", "") if difference is None else (f"{difference:.1e}", "nats")
    result.add_row("curves' largest difference", "", *apart)
    seconds = ordinary.step_seconds, ours.step_seconds
    row("step time", "{:.3f} s".format, seconds, compared(*seconds, "faster", "slower"))
    seconds = ordinary.compile_seconds, ours.compile_seconds
    row("compile time", "{:.1f} s".format, seconds, compared(*seconds, "faster", "slower"))
    peaks = ordinary.peak, ours.peak
    row("peak memory over the model", mebibytes, peaks, compared(*peaks, "lower", "higher"))
    return result
