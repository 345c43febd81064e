"""The command `compiled-loss inspect`: it runs inspections, and reports to a terminal and files."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from compiled_loss.inspection import arguments
from compiled_loss.inspection.cases import Case, cases_of
from compiled_loss.pictures import dark

if TYPE_CHECKING:
    from compiled_loss.inspection.record import Inspection


def add(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Adds the subcommand."""
    arguments.add(commands).set_defaults(run=run)


def run(given: argparse.Namespace) -> int:
    """Inspects, reports, writes the files that were asked for, and returns the exit status."""
    asked = {"rich": True, "cloudpickle": True, "matplotlib": given.plot is not None}
    missing = [name for name, needed in asked.items() if needed and find_spec(name) is None]
    if missing:
        raise RuntimeError(f"inspect needs {', '.join(missing)}: pip install 'compiled-loss[inspect]'")
    try:
        cases = cases_of(given)
        if given.dump is not None:
            given.dump.mkdir(parents=True, exist_ok=True)
    except (ValueError, OSError) as error:
        raise RuntimeError(str(error)) from None
    found = [_inspect(case, given, given.dump and given.dump / str(i)) for i, case in enumerate(cases, 1)]
    _report(found, given)
    return 0


def _inspect(case: Case, given: argparse.Namespace, folder: Path | None) -> Inspection:
    from compiled_loss.inspection.inspector import inspect

    if folder is not None and given.compare is None:
        folder = given.dump
    with _progress(f"{case.label} on {case.device}") as progress:
        found = inspect(
            case.fn,
            *case.inputs,
            device=case.device,
            backward=case.backward,
            dynamic=case.dynamic,
            options=case.inductor,
            assemble=given.assemble,
            measure=given.measure,
            loss=case.loss,
            dump=folder,
            progress=progress,
        )
    found = replace(found, name=case.label)
    if folder is not None:
        from compiled_loss.inspection.dump import dump

        dump(found, folder)  # under this name
    return found


@contextmanager
def _progress(text: str) -> Iterator[Callable[[str], None]]:
    """Shows on stderr what is being done: on a terminal as it changes, elsewhere in one line."""
    from rich.console import Console
    from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

    console = Console(stderr=True, highlight=False)
    if not console.is_terminal:
        console.print(f"inspecting {text}", markup=False, soft_wrap=True)
        yield lambda step: None
        return
    columns = SpinnerColumn(), TimeElapsedColumn(), TextColumn("{task.description}", markup=False)
    with Progress(*columns, console=console, transient=True) as shown:
        task = shown.add_task(f"{text}: starting", total=None)
        yield lambda step: shown.update(task, description=f"{text}: {step}")


def _report(found: Sequence[Inspection], given: argparse.Namespace) -> None:
    from rich.console import Console

    from compiled_loss.inspection.table import report

    console = Console(highlight=False)
    console.print(report(*found))
    if given.json is not None:
        texts = [inspection.to_json() for inspection in found]
        given.json.write_text(texts[0] if len(texts) == 1 else f"[{', '.join(texts)}]", encoding="utf-8")
    drawn = []
    if given.plot is not None:
        from compiled_loss.inspection.picture import plot

        plot(found, given.plot)
        drawn = [given.plot, dark(given.plot)]
    pages = [] if given.dump is None else sorted(given.dump.glob("index.html" if len(found) == 1 else "*/index.html"))
    for path in filter(None, (given.json, *drawn, *pages)):
        console.print(f"wrote {path}", markup=False, soft_wrap=True)
