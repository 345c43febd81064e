"""The progress of the demo: bars on a terminal, elsewhere a plain line every few seconds."""

from __future__ import annotations

import time

from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TaskID, TextColumn, TimeElapsedColumn

SECONDS_A_LINE = 5.0


class Bars:
    """One bar per stage, which pulses until the stage knows how long it is."""

    def __init__(self, console: Console) -> None:
        self._task = TaskID(0)
        self._bars = Progress(
            SpinnerColumn(finished_text="✓"),
            TextColumn("{task.description:<21}"),
            BarColumn(16),
            TextColumn("{task.fields[detail]}"),
            TimeElapsedColumn(),
            console=console,
        )

    def __enter__(self) -> Bars:
        self._bars.start()
        return self

    def __exit__(self, *_exception: object) -> None:
        self._bars.stop()

    def begin(self, stage: str, detail: str) -> None:
        self._task = self._bars.add_task(stage, total=None, detail=detail)

    def show(self, detail: str, done: int, total: int) -> None:
        self._bars.update(self._task, completed=done, total=total, detail=detail)


class Lines:
    """Progress as plain lines, where there is no cursor to move: a log file, a pipe."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._stage = ""
        self._last = 0.0

    def __enter__(self) -> Lines:
        return self

    def __exit__(self, *_exception: object) -> None:
        pass

    def begin(self, stage: str, detail: str) -> None:
        self._stage = stage
        self._print(detail)

    def show(self, detail: str, done: int, total: int) -> None:
        if done == total or time.monotonic() - self._last > SECONDS_A_LINE:
            self._print(detail)

    def _print(self, text: str) -> None:
        self._last = time.monotonic()
        self._console.print(f"{self._stage}: {text}", markup=False, highlight=False)


def progress(console: Console) -> Bars | Lines:
    """Returns the one that suits `console`."""
    return Bars(console) if console.is_terminal else Lines(console)
