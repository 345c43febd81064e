"""Formulas that count the floating-point operations of our operators, for `torch.utils.flop_counter`.

The counter cannot look into our operators. Outside of operators, torch itself counts what eager code multiplies. The
counter imports Triton, which takes far longer than the rest of its import, so it is not imported here: the formulas are
registered as soon as other code imports it.
"""

from __future__ import annotations

import sys
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from types import ModuleType
from typing import Any

import torch

from compiled_loss.engine.operators import DEFINED

_COUNTER = "torch.utils.flop_counter"


def _register(counter: ModuleType) -> None:
    for name, one in DEFINED.items():
        packet = getattr(torch.ops.compiled_loss, name.removeprefix("compiled_loss::"))
        counter.register_flop_formula(packet)(one.operations)


class _OnImport(MetaPathFinder):
    """Finds the counter as any import does, and registers the formulas once it is loaded."""

    def find_spec(self, fullname: str, path: Any = None, target: ModuleType | None = None) -> ModuleSpec | None:
        """Finds the counter where it is, so that loading it registers the formulas; finds no other module."""
        if fullname != _COUNTER:
            return None
        sys.meta_path.remove(self)
        spec = find_spec(fullname)
        if spec is not None and spec.loader is not None:
            execute = spec.loader.exec_module

            def execute_and_register(module: ModuleType) -> None:
                execute(module)
                _register(module)

            spec.loader.exec_module = execute_and_register  # type: ignore[method-assign]
        return spec


def register() -> None:
    """Registers the formulas now, or when the counter is imported."""
    if _COUNTER in sys.modules:
        _register(sys.modules[_COUNTER])
    else:
        sys.meta_path.insert(0, _OnImport())
