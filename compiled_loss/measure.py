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
_LARGE = 1 << 16  # bytes from which on glibc maps a block for itself, and unmaps it when it is freed
_IS_MAPPED = 2  # glibc's mark of such a block, in the word before it
_MOST_FILLERS = 1 << 14


class PeakMemory:
    """Bytes allocated at the worst moment of a `with` block, and at its end, over what was held at its start.

    On accelerators the allocator's own count. On Linux CPUs the resident set, which counts what was really touched and
    is exact to a few MiB in a process that has done the same work once before (see :func:`run_in_child`), with glibc's
    allocator and less than 1 GiB free in its heap.

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
        self._fillers: list[int] = []

    def __enter__(self) -> PeakMemory:
        gc.collect()
        if self.device.type == "cpu":
            self._fillers = _filled_heap()
            _reset_high_water_mark()
        else:
            torch.accelerator.synchronize()
            torch.get_device_module(self.device).reset_peak_memory_stats(self.device)
        self._start = self.now()
        return self

    def now(self) -> int:
        """Returns the bytes held at this moment, from any start."""
        if self.device.type == "cpu":
            return _status("VmRSS")
        return int(torch.get_device_module(self.device).memory_allocated(self.device))

    def __exit__(self, *_exception: object) -> None:
        if self.device.type == "cpu":
            peak = _status("VmHWM")
        else:
            peak = int(torch.get_device_module(self.device).max_memory_allocated(self.device))
        self.peak, self.held = peak - self._start, self.now() - self._start
        fillers, self._fillers = self._fillers, []
        free = ctypes.CDLL(None).free
        for block in fillers:
            free(ctypes.c_void_p(block))


def run_in_child(function: str, *, environment: dict[str, str] | None = None, **arguments: Any) -> Any:
    """Calls `module:function` in a fresh Python process; arguments and result travel as JSON.

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


def _filled_heap() -> list[int]:
    """Returns blocks that fill the free parts of glibc's heap, after which each large block is mapped for itself.

    A large block taken from the heap would not be counted. One freed there would be counted again when the memory is
    taken from elsewhere. Other allocators give large blocks back.
    """
    libc = ctypes.CDLL(None)
    try:
        glibc = ctypes.CDLL("libc.so.6")
    except OSError:
        return []
    one, other = (ctypes.cast(lib.malloc, ctypes.c_void_p).value for lib in (libc, glibc))
    if one != other or not hasattr(libc, "mallopt"):
        return []
    libc.mallopt(_M_MMAP_THRESHOLD, _LARGE)
    libc.malloc.argtypes, libc.malloc.restype = [ctypes.c_size_t], ctypes.c_void_p
    blocks: list[int] = []
    while len(blocks) < _MOST_FILLERS and (block := libc.malloc(_LARGE)):
        blocks.append(block)
        if ctypes.c_size_t.from_address(block - ctypes.sizeof(ctypes.c_size_t)).value & _IS_MAPPED:
            break
    return blocks
