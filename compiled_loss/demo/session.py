"""The whole demo in order: tokens, a training with each loss, the report."""

from __future__ import annotations

import signal
from contextlib import closing
from dataclasses import asdict
from pathlib import Path
from tempfile import TemporaryDirectory

from rich.console import Console

from compiled_loss.demo import picture, report
from compiled_loss.demo.child import events
from compiled_loss.demo.progress import Bars, Lines, progress
from compiled_loss.demo.report import Run
from compiled_loss.demo.settings import Settings
from compiled_loss.demo.train import LOSSES
from compiled_loss.pictures import dark

INTERRUPTED = 130  # a shell's exit status for it


def demo(settings: Settings, output: Path) -> int:
    """Trains with both losses, reports, and returns the exit status. An interruption leaves a report on what ran."""
    console = Console(highlight=False)
    console.print(str(settings))
    ordinary, ours = (Run(loss) for loss in LOSSES)
    status = 0
    try:
        with TemporaryDirectory() as folder, progress(console) as shown:
            tokens = str(Path(folder, "tokens.pt"))
            found = _tokenise(tokens, settings, shown)
            if found < settings.vocab:
                console.print(f"the text has no more than {found} kinds of token; the head keeps {settings.vocab}")
            for run in (ordinary, ours):
                _train(tokens, settings, run, shown)
    except KeyboardInterrupt:
        status = INTERRUPTED
    handler = signal.signal(signal.SIGINT, signal.SIG_IGN)  # a second Ctrl-C must not cost the picture
    try:
        _report(ordinary, ours, settings, output, console)
    finally:
        signal.signal(signal.SIGINT, handler)
    return status


def _tokenise(path: str, settings: Settings, shown: Bars | Lines) -> int:
    """Saves the tokens at `path`, and returns the number of kinds that the text had."""
    found = 0
    shown.begin("tokenizer", "training on the standard library")
    with closing(events("compiled_loss.demo.text", path=path, vocab=settings.vocab)) as reports:
        for event in reports:
            found = event["vocab"]
            shown.show(f"{event['tokens']:,} tokens of {found:,} kinds", 1, 1)
    return found


def _train(path: str, settings: Settings, run: Run, shown: Bars | Lines) -> None:
    shown.begin(run.loss, "compiling ...")
    with closing(events("compiled_loss.demo.train", path=path, loss=run.loss, settings=asdict(settings))) as reports:
        for event in reports:
            run.add(event)
            if run.losses:
                done, speed = len(run.losses), settings.tokens / run.seconds[-1]
                detail = f"{done}/{settings.steps}  loss {run.losses[-1]:.3f}  {speed:,.0f} tokens/s"
                shown.show(detail, done, settings.steps)


def _report(ordinary: Run, ours: Run, settings: Settings, output: Path, console: Console) -> None:
    if not ordinary.losses:
        console.print("interrupted before the first step")
        return
    console.print(report.table(ordinary, ours))
    picture.draw(ordinary, ours, str(settings), output)
    console.print(f"picture: {output.resolve()}, for dark pages {dark(output).name}", soft_wrap=True, markup=False)
