"""Streams and events of a GPU that is not there: everything runs in order, and nothing waits."""

from __future__ import annotations

import contextlib
from typing import Any

import torch


class Event:
    """An event that is recorded and reached at once."""

    def __init__(self, *arguments: Any, **options: Any) -> None: ...

    def record(self, stream: Any = None) -> None:
        """Does nothing."""

    wait = record

    def synchronize(self) -> None:
        """Does nothing."""

    def query(self) -> bool:
        """Returns True: the event was reached."""
        return True


class Stream:
    """The only stream."""

    device = torch.device("cuda", 0)
    device_index = stream_id = cuda_stream = priority = 0
    device_type = 1  # CUDA's in c10

    def __init__(self, *arguments: Any, **options: Any) -> None: ...

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Stream)

    def __hash__(self) -> int:
        return hash(Stream)

    def wait_stream(self, stream: Any) -> None:
        """Does nothing."""

    wait_event = wait_stream

    def record_event(self, event: Event | None = None) -> Event:
        """Returns the event, or a new one."""
        return Event() if event is None else event

    def synchronize(self) -> None:
        """Does nothing."""

    def query(self) -> bool:
        """Returns True: everything is done."""
        return True


def install() -> None:
    """Puts them into `torch.cuda`, for programs that overlap communication with computation."""
    cuda: Any = torch.cuda
    only = Stream()
    cuda.Stream, cuda.Event = Stream, Event
    cuda.current_stream = lambda *a, **k: only
    cuda.default_stream = lambda *a, **k: only
    cuda.stream = contextlib.nullcontext
    cuda.set_stream = lambda stream: None
