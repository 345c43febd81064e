"""How many floating-point operations our operators do, for `torch.utils.flop_counter`, which cannot look into them.

N tokens, H width, V vocabulary; a chunk's GEMM is 2 rows H columns operations. What eager code multiplies outside of
operators torch counts itself. Its counter imports Triton, which takes longer than the rest of it by far, so it is not
imported here: the formulas are registered as soon as somebody else imports it.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from types import ModuleType
from typing import Any

import torch

from compiled_loss.engine import gemm, hosts
from compiled_loss.engine.divergence_bodies import BODIES
from compiled_loss.engine.operators import DEFINED

_COUNTER = "torch.utils.flop_counter"
_COMPARED = {body.__name__ for kind in BODIES.values() for body in kind}
Shape = Sequence[int]


def of_gradients(
    _fenced: Shape,
    d_hidden: Shape | None,
    d_weight: Shape | None,
    _d_bias: Shape | None,
    d: Shape,  # [rows, columns]
    hidden: Shape,  # [rows, H]
    *_rest: Any,
    **_keywords: Any,
) -> int:
    """Of `gemm.add_gradients_`: one GEMM for each gradient that is wanted."""
    return sum(_of_product(d, hidden[1]) for wanted in (d_hidden, d_weight) if wanted is not None)


def of_body(
    body: str, source: Shape, weight: Shape | None, operands: Sequence[Shape | None], *_rest: Any, **_keywords: Any
) -> int:
    """Of `hosts.run_body`: the logits of a chunk, and those of a target that is hidden states."""
    if weight is None:
        return 0
    count = _of_product(source, weight[0])
    if body in _COMPARED:
        target_weight, target = operands[3:5]  # after the labels and two scalars: `Pair`, `Target`
        if target_weight is not None and target is not None:
            count += _of_product(target, weight[0] if len(target_weight) == 1 else target_weight[0])
    return count


def _of_product(a: Shape, columns: int) -> int:
    return 2 * a[0] * a[1] * columns


def _register(counter: ModuleType) -> None:
    for operator, formula in ((gemm.add_gradients_, of_gradients), (hosts.run_body, of_body)):
        counter.register_flop_formula(operator._opoverload._overloadpacket)(formula)
    for one in DEFINED:
        counter.register_flop_formula(getattr(torch.ops.compiled_loss, one.name))(one.operations)


class _OnImport(MetaPathFinder):
    """Finds the counter as everybody does, and registers the formulas once it is there."""

    def find_spec(self, fullname: str, path: Any = None, target: ModuleType | None = None) -> ModuleSpec | None:
        """Of no other module."""
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
    """Now, or when the counter is imported."""
    if _COUNTER in sys.modules:
        _register(sys.modules[_COUNTER])
    else:
        sys.meta_path.insert(0, _OnImport())
