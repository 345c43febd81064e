"""Inspections in a test suite: put `pytest_plugins = ["compiled_loss.pytest_plugin"]` in conftest.py.

def test_my_loss(inspected):
    assert_peak_below(inspected(my_loss, "bf16[8192,4096]:grad", "bf16[131072,4096]:grad", "int64[8192]"), 2 << 30)
"""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable
from typing import Any

import pytest

from compiled_loss.inspection import Inspection, inspect


@pytest.fixture(scope="session")
def inspected() -> Callable[..., Inspection]:
    """`compiled_loss.inspection.inspect` without real runs; equal calls are answered once a session.

    A test is skipped only where a GPU's code cannot be generated at all: no Linux, or no triton for this Python. A
    missing compiler or package fails.
    """
    known: dict[str, tuple[object, Inspection]] = {}

    def inspected(fn: Callable[..., Any], *inputs: Any, device: str = "cuda:sm_90", **options: Any) -> Inspection:
        if device != "cpu" and not sys.platform.startswith("linux"):
            pytest.skip(f"GPU CODE IS NOT TESTED: it is generated on Linux only, this is {sys.platform}")
        if device != "cpu" and importlib.util.find_spec("triton") is None and not _triton_exists():
            pytest.skip(f"GPU CODE IS NOT TESTED: no triton for {sys.implementation.name} {sys.version_info[:2]}")
        key = repr((id(fn), inputs, device, sorted(options.items())))
        if key not in known:
            known[key] = fn, inspect(fn, *inputs, device=device, **{"measure": False, **options})  # fn keeps its id
        return known[key][1]

    return inspected


def _triton_exists() -> bool:
    """Returns True if PyPI has triton for this interpreter: CPython on x86-64 or 64-bit ARM."""
    import platform

    return sys.implementation.name == "cpython" and platform.machine() in ("x86_64", "aarch64")
