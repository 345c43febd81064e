"""How many floating-point operations our operators do, for `torch.utils.flop_counter`, which cannot look into them.

N tokens, H width, V vocabulary; a chunk's GEMM is 2 rows H columns operations. What eager code multiplies outside of
operators torch counts itself. Importing this file registers the formulas.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch.utils import flop_counter

from compiled_loss.engine import gemm, hosts
from compiled_loss.engine.divergence_bodies import BODIES

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


for _operator, _formula in ((gemm.add_gradients_, of_gradients), (hosts.run_body, of_body)):
    flop_counter.register_flop_formula(_operator._opoverload._overloadpacket)(_formula)
