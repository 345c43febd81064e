"""Calls in another process: one that hangs or crashes ends that process, and not the caller."""

from __future__ import annotations

import contextlib
import importlib
import multiprocessing
import os
import signal
import traceback
from multiprocessing.connection import Connection
from typing import Any

START = 60.0  # seconds a new process has until it answers
END = 10.0  # seconds a killed one has until it is gone


class CallError(RuntimeError):
    """Why there is no result."""


class Worker:
    """A process that makes one call after another; after a call that failed the next one gets a fresh process."""

    def __init__(self) -> None:
        self._process: multiprocessing.process.BaseProcess | None = None

    def call(self, function: str, arguments: dict[str, Any], seconds: float) -> Any:
        """What `module:function` returns, or a `CallError` after at most so many seconds."""
        try:
            if self._process is None:
                self._start()
            self._connection.send((function, arguments))
            kind, value = self._answer(seconds)
        except BaseException:
            self.close()
            raise
        if kind == "failed":
            self.close()  # an error of the GPU stays with the process that met it
            raise CallError(value)
        return value

    def close(self) -> None:
        """End the process, and what it has started."""
        if self._process is None:
            return
        process, self._process = self._process, None
        assert process.pid is not None
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.kill()
        process.join(END)
        self._connection.close()

    def _start(self) -> None:
        spawning = multiprocessing.get_context("spawn")  # a fork cannot use a GPU
        self._connection, theirs = spawning.Pipe()
        self._process = spawning.Process(target=serve, args=(theirs,))
        self._process.start()
        theirs.close()  # so that its end is seen
        self._answer(START)

    def _answer(self, seconds: float) -> tuple[str, Any]:
        assert self._process is not None
        if not self._connection.poll(seconds):
            raise CallError(f"no answer after {seconds:.0f} s")
        try:
            kind, value = self._connection.recv()
        except (EOFError, ConnectionError):
            self._process.join(END)
            raise CallError(f"the process ended with exit code {self._process.exitcode}") from None
        return kind, value


def serve(connection: Connection) -> None:
    """Make the calls until one fails, or until nobody asks."""
    os.setpgid(0, 0)  # close() ends the group
    os.dup2(2, 1)  # stdout is the caller's
    connection.send(("ready", None))
    with contextlib.suppress(EOFError):
        while True:
            function, arguments = connection.recv()
            module, name = function.split(":")
            try:
                found = getattr(importlib.import_module(module), name)(**arguments)
            except Exception as error:
                traceback.print_exc()
                connection.send(("failed", f"{type(error).__name__}: {error}"))
                return
            connection.send(("done", found))
