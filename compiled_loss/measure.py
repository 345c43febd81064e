"""Real peak memory, and child processes to measure it in."""

from __future__ import annotations

import ctypes
import gc
import json
import os
import subprocess
import sys
from typing import Any

import torch

_STATUS = "/proc/self/status"
_M_MMAP_THRESHOLD = -3  # mallopt's name for it in malloc.h


class PeakMemory:
    """Bytes allocated at the worst moment of a `with` block, and at its end, over what was held at its start.

    On accelerators the allocator's own count. On Linux CPUs the resident set, which counts what was really touched and
    is exact to a few MiB in a process that has done the same work once before: see :func:`run_in_child`.

    Example:
        >>> import torch
        >>> from compiled_loss.measure import PeakMemory
        >>> with PeakMemory(torch.device("cpu")) as memory:
        ...     held = torch.ones(1 << 24)
        >>> memory.peak >= memory.held
        True

    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.peak = self.held = 0

    def __enter__(self) -> PeakMemory:
        gc.collect()
        if self.device.type == "cpu":
            _return_freed_blocks()
            _reset_high_water_mark()
        else:
            torch.accelerator.synchronize()
            torch.get_device_module(self.device).reset_peak_memory_stats(self.device)
        self._start = self.now()
        return self

    def now(self) -> int:
        """Bytes held at this moment, from any start."""
        if self.device.type == "cpu":
            return _status("VmRSS")
        return int(torch.get_device_module(self.device).memory_allocated(self.device))

    def __exit__(self, *_exception: object) -> None:
        if self.device.type == "cpu":
            peak = _status("VmHWM")
        else:
            peak = int(torch.get_device_module(self.device).max_memory_allocated(self.device))
        self.peak, self.held = peak - self._start, self.now() - self._start


def run_in_child(function: str, *, environment: dict[str, str] | None = None, **arguments: Any) -> Any:
    """Call `module:function` in a fresh Python process; arguments and result travel as JSON.

    The child's own output goes to stderr, so that its progress is seen. Raises RuntimeError where it fails.
    """
    program = (
        "import importlib, json, os, sys; out = os.dup(1); os.dup2(2, 1); m, f = sys.argv[1].split(':'); "
        "r = getattr(importlib.import_module(m), f)(**json.loads(sys.argv[2])); "
        "sys.stdout.flush(); os.write(out, json.dumps(r).encode())"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, function, json.dumps(arguments)],
        stdout=subprocess.PIPE,
        env={**os.environ, **(environment or {})},
        check=False,
    )
    if done.returncode:
        raise RuntimeError(
            f"{function} failed in a child process with exit status {done.returncode}: see its output above"
        )
    return json.loads(done.stdout)


def _status(name: str) -> int:
    try:
        with open(_STATUS) as lines:
            return next(int(line.split()[1]) << 10 for line in lines if line.startswith(name + ":"))
    except FileNotFoundError:
        raise RuntimeError(
            f"memory on a CPU is measured through {_STATUS}, which {sys.platform} lacks: use Linux or an accelerator"
        ) from None


def _reset_high_water_mark() -> None:
    with open("/proc/self/clear_refs", "w") as control:
        control.write("5")


def _return_freed_blocks() -> None:
    """Have glibc give large blocks back when they are freed; musl does so anyway and has no mallopt."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(_M_MMAP_THRESHOLD, 1 << 16)
