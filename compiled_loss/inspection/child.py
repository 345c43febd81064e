"""The child process, which answers one request after another until its input ends."""

from __future__ import annotations

import ctypes
import importlib
import os
import pickle
import sys
import traceback
from multiprocessing.connection import Connection
from typing import Any

import torch

from compiled_loss.inspection import errors, fake_device
from compiled_loss.inspection.call import Request
from compiled_loss.inspection.examine import examine
from compiled_loss.inspection.measuring import measure, properties
from compiled_loss.inspection.recorder import Recorder
from compiled_loss.inspection.targets import Target

_LINES = 12  # of an error that are shown


def serve(shim: ctypes.CDLL | None, target: dict[str, Any] | None, requests: int, answers: int) -> None:
    """Answers on file descriptors: ("progress", text)..., then ("done", value) or ("refused|import|error", text)."""
    reading, writing = Connection(requests, writable=False), Connection(answers, readable=False)
    if shim is not None and target is not None:
        try:
            fake_device.install(shim, Target(**target))
        except errors.InspectionError as error:
            writing.send(("refused", str(error)))
            return
    # One recorder for all requests: tensors that a module makes when it is imported belong to the first recorder.
    recorder = Recorder(torch.device("cuda", 0) if target is not None else torch.device("cpu"))
    writing.send(("done", None))
    while True:
        try:
            job, request, sys.path[:] = pickle.loads(reading.recv_bytes())
        except EOFError:
            return
        try:
            writing.send(("done", _do(job, request, recorder, writing)))
        except errors.InspectionError as error:
            writing.send(("refused", str(error)))
        except errors.ImportRaisedError as error:
            writing.send(("import", _readable(error.__cause__ or error)))
        except (Exception, SystemExit) as error:
            writing.send(("error", _readable(error)))
        sys.stdout.flush()


def _do(job: str, request: Request, recorder: Recorder, writing: Connection) -> Any:
    def progress(text: str) -> None:
        writing.send(("progress", text))

    if job == "measure":
        return measure(request)
    if job == "properties":
        return properties()
    return examine(request, recorder, progress).to_json()


def _readable(error: BaseException) -> str:
    """Returns the traceback without the frames of the compiler, which are dozens."""
    libraries = (
        os.path.dirname(torch.__file__),
        os.path.dirname(__file__),
        os.path.dirname(importlib.__file__),
        "<frozen",
    )
    frames = [f for f in traceback.extract_tb(error.__traceback__) if not f.filename.startswith(libraries)]
    said = "".join(traceback.format_exception_only(error)).splitlines(keepends=True)
    # The rest is left out: the dispatcher lists every backend it knows.
    more = [f"... {len(said) - _LINES} more lines\n"] if len(said) > _LINES else []
    return "".join([*traceback.format_list(frames), *said[:_LINES], *more])
