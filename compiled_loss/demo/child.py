"""Child processes that report events while they run, as lines of JSON.

Each measurement has a process to itself, and an interruption kills it wherever it is, in a compiler or in a GEMM.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Generator, Iterator
from typing import Any

Event = dict[str, Any]


def events(module: str, **arguments: Any) -> Generator[Event]:
    """Runs `module`, which calls :func:`serve`, in a fresh Python, and yields its events as they come.

    Inductor's cache starts empty and ends with the process, so that compile time is the time of compiling. If the child
    fails, a RuntimeError has its own messages. Closing the iterator kills the child.
    """
    with (
        tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as cache,
        tempfile.TemporaryFile("w+", errors="replace") as messages,
        subprocess.Popen(
            [sys.executable, "-m", module, json.dumps(arguments)],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=messages,
            env={**os.environ, "TORCHINDUCTOR_CACHE_DIR": cache},
            start_new_session=True,  # a terminal's interrupt reaches this process alone, which then ends the child
        ) as process,
    ):
        assert process.stdout is not None
        try:
            for line in process.stdout:
                yield json.loads(line)
            status = process.wait()
        finally:
            _kill(process)
        if status:
            messages.seek(0)
            raise RuntimeError(f"{messages.read()}{module} failed with exit status {status}")


def serve(job: Callable[..., Iterator[Event]]) -> None:
    """Runs `job` on the arguments, in the child, and writes its events; everything else printed goes to stderr."""
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    try:
        for event in job(**json.loads(sys.argv[1])):
            print(json.dumps(event), file=out, flush=True)
    except BrokenPipeError:  # the parent is gone
        os._exit(1)


def _kill(process: subprocess.Popen[bytes]) -> None:
    """Ends the child and what it started; does nothing where it has ended."""
    if process.poll() is None:
        if hasattr(os, "killpg"):
            os.killpg(process.pid, signal.SIGKILL)
        else:
            process.kill()
