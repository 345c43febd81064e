"""The parent's side of a child process.

NOTE [Children]
A child is a fresh interpreter, not a fork. A fork of a process that has used torch inherits its locks, its OpenMP
threads and, with a GPU, a context that does not work. The caller's own process is never changed. One child serves every
inspection for one target until the caller ends. A real run for measuring gets a child of its own, so that it starts
afresh.
"""

from __future__ import annotations

import atexit
import contextlib
import json
import os
import pickle
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable
from dataclasses import asdict
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from compiled_loss.inspection import errors, fake_device
from compiled_loss.inspection.targets import Target

Progress = Callable[[str], None]
_BOOTSTRAP = Path(__file__).with_name("bootstrap.py")


class Child:
    """A process that answers requests; `target` is the GPU it pretends to have."""

    def __init__(self, target: Target | None) -> None:
        shim = None if target is None else str(fake_device.build())
        reading, answers = os.pipe()
        requests, writing = os.pipe()
        settings = {
            "path": sys.path,
            "shim": shim,
            "target": None if target is None else asdict(target),
            "input": requests,
            "output": answers,
        }
        self._output = tempfile.TemporaryFile()  # noqa: SIM115 - open as long as the process
        try:
            self._process = subprocess.Popen(
                [sys.executable, str(_BOOTSTRAP), json.dumps(settings)],
                stdin=subprocess.DEVNULL,
                stdout=self._output,
                stderr=subprocess.STDOUT,
                pass_fds=(requests, answers),
                env={"TORCHINDUCTOR_COMPILE_THREADS": "1", **os.environ},  # more workers would have nothing to do
            )
        except OSError as error:
            for end in (reading, writing):
                os.close(end)
            self._output.close()
            errors.died(error, "")
        finally:
            os.close(requests)
            os.close(answers)
        self._reading = Connection(reading, writable=False)
        self._writing = Connection(writing, readable=False)
        self._lock = threading.Lock()
        self._files: dict[str, float] = {}
        try:
            kind, value = self._receive(None)  # ready
            if kind == "refused":
                raise errors.InspectionError(value)
        except BaseException:
            self.close()
            raise

    def ask(self, job: str, request: Any, name: str, progress: Progress | None = None) -> Any:
        """Returns the answer to one request."""
        with self._lock:
            try:
                with contextlib.suppress(BrokenPipeError):  # it is gone, and reading says how
                    self._writing.send_bytes(pickle.dumps((job, request, sys.path)))
                kind, value = self._receive(progress)
            except BaseException:  # an answer may still be on its way
                self.close()
                raise
        if kind == "refused":
            raise errors.InspectionError(value)
        if kind == "import":
            errors.imported(name, value)
        if kind == "error":
            errors.raised(name, value)
        return value

    def knows_older(self, file: str) -> bool:
        """Returns True if the file has changed since this was first asked about it."""
        changed = os.path.getmtime(file)
        return self._files.setdefault(file, changed) != changed

    @property
    def alive(self) -> bool:
        """True if the process can be asked."""
        return self._process.poll() is None and not self._writing.closed

    def close(self) -> None:
        """Ends the process."""
        self._writing.close()
        self._reading.close()
        self._process.kill()
        self._process.wait()
        self._output.close()

    def _receive(self, progress: Progress | None) -> tuple[str, Any]:
        while True:
            try:
                kind, value = self._reading.recv()
            except (EOFError, OSError):
                status = self._process.wait()
                self._output.seek(0)
                errors.died(status, self._output.read().decode(errors="replace"))
            if kind != "progress":
                return kind, value
            if progress is not None:
                progress(value)


_children: dict[tuple[int, Target | None], Child] = {}
_starting = threading.Lock()


def child_for(target: Target | None, file: str | None = None) -> Child:
    """Returns the child for a target, and starts it if there is none; a fork of this process gets children of its own.

    A child imports a module once. If `file`, that of the function, has changed since, a new child takes over.
    """
    key = (os.getpid(), target)
    with _starting:
        child = _children.get(key)
        if child is not None and not (child.alive and (file is None or not child.knows_older(file))):
            child.close()
            child = None
        if child is None:
            child = _children[key] = Child(target)
        if file is not None:
            child.knows_older(file)
        return child


@atexit.register
def _close_all() -> None:
    for (pid, _), child in _children.items():
        if pid == os.getpid() and child.alive:
            child.close()
