"""The bodies of two distributions: `divergences` as functions of tensors alone, one of each kind and purpose.

Bodies as in `bodies.py`: a student's logits [..., V], then `labels` or None and the `Pair`. Beside a whole target comes
that, [..., V] probabilities or logits. Beside a target's top, [..., k], come its indices, its log-probabilities and the
student's logits there; and the student's own are without them, -inf, but in `gradient`, which looks at neither.
"""

from __future__ import annotations

import types
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from compiled_loss.engine.math.divergences import KINDS, Compared, Kind, Output, Pair, Rows, row, warmed
from compiled_loss.engine.math.statistics import after, statistics_dtype
from compiled_loss.engine.math.top_divergences import TopCompared

Operands = tuple[Tensor | None, ...]


class Bodies(NamedTuple):
    """The bodies of one kind, beside a whole target or its top.

    fold                (labels, *Pair, *target) -> (*Rows, divergence[, cross-entropy])
    gradient            (labels, *Pair, *target, *Rows, soft, hard) -> (d[, d of the top]), like logits
    fold_and_gradient   (labels, *Pair, *target, soft, hard) -> (d[, d of the top], loss, ...)

    where loss is soft * divergence + hard * cross-entropy, and what follows it is returned for NOTE [Few reads] alone.
    """

    fold: Callable[..., Output]
    gradient: Callable[..., Output]
    fold_and_gradient: Callable[..., Output]


def _whole(kind: Kind) -> Bodies:
    def compared(logits: Tensor, operands: Operands) -> Compared:
        target = operands[3]
        assert target is not None
        return Compared.of(kind, logits, target, Pair(*operands[1:3]))

    def fold(logits: Tensor, *operands: Tensor | None, group: str | None = None) -> Output:
        return _folded(compared(logits, operands), operands[0], group)

    def gradient(logits: Tensor, *operands: Tensor | None) -> Output:
        rows, soft, hard = Rows(*operands[4:10]), operands[10], operands[11]  # type: ignore[arg-type]
        assert soft is not None
        return (compared(logits, operands).gradient(operands[0], rows, soft, hard, logits.dtype),)

    def fold_and_gradient(logits: Tensor, *operands: Tensor | None, group: str | None = None) -> Output:
        labels, soft, hard = operands[0], operands[4], operands[5]
        assert soft is not None
        both = compared(logits, operands)
        rows, loss, soft, hard, packed = _weighted(both, kind, labels, None, soft, hard, group)
        return both.gradient(labels, rows, soft, hard, logits.dtype), loss, packed

    return _named(kind, fold, gradient, fold_and_gradient)


def _beside_top(kind: Kind) -> Bodies:
    def compared(logits: Tensor, operands: Operands, group: str | None) -> TopCompared:
        indices, values, top = operands[3:6]
        assert indices is not None and values is not None and top is not None
        return TopCompared.of(kind, logits, top, indices, values, Pair(*operands[1:3]), group)

    def fold_top(logits: Tensor, *operands: Tensor | None, group: str | None = None) -> Output:
        return _folded(compared(logits, operands, group), operands[0], group)

    def gradient_top(logits: Tensor, *operands: Tensor | None, group: str | None = None) -> Output:
        rows, soft, hard = Rows(*operands[6:12]), operands[12], operands[13]  # type: ignore[arg-type]
        assert soft is not None
        return compared(logits, operands, group).gradient(operands[0], rows, soft, hard, logits.dtype)

    def fold_and_gradient_top(logits: Tensor, *operands: Tensor | None, group: str | None = None) -> Output:
        labels, indices, soft, hard = operands[0], operands[3], operands[6], operands[7]
        assert soft is not None
        both = compared(logits, operands, group)
        rows, loss, soft, hard, packed = _weighted(both, kind, labels, indices, soft, hard, group)
        return *both.gradient(labels, rows, soft, hard, logits.dtype), loss, packed

    return _named(kind, fold_top, gradient_top, fold_and_gradient_top)


def _folded(both: Compared | TopCompared, labels: Tensor | None, group: str | None) -> Output:
    rows, divergence, hard = both.fold(labels, group)
    return (*rows.present(), divergence) if hard is None else (*rows.present(), divergence, hard)


def _weighted(
    both: Compared | TopCompared,
    kind: Kind,
    labels: Tensor | None,
    indices: Tensor | None,
    soft: Tensor,
    hard: Tensor | None,
    group: str | None,
) -> tuple[Rows, Tensor, Tensor, Tensor | None, Tensor]:
    """The rows, the loss, and its coefficients, behind which the reductions are done; rows and coefficients in one."""
    rows, divergence, cross_entropy = both.fold(labels, group)
    loss = soft * divergence
    if cross_entropy is not None and hard is not None:
        loss = loss + hard * cross_entropy
    present = rows.present()
    packed = torch.stack([*present, after(soft, *present, loss), *([] if hard is None else [hard])])
    rows, (soft, *rest) = Rows.of(packed.unbind(), kind, labels, indices)
    return rows, loss, soft, rest[0] if rest else None, packed


def _named(kind: Kind, *bodies: Any) -> Bodies:
    """The bodies, with the kind in their names; in their code as well: on torch 2.15 Dynamo reads it there."""
    found = []
    for body in bodies:
        name = f"{body.__name__}_{kind}"
        own = types.FunctionType(body.__code__.replace(co_name=name), body.__globals__, name, None, body.__closure__)
        own.__kwdefaults__ = body.__kwdefaults__
        found.append(own)
    return Bodies(*found)


WHOLE: dict[Kind, Bodies] = {kind: _whole(kind) for kind in KINDS}
TOP: dict[Kind, Bodies] = {kind: _beside_top(kind) for kind in KINDS}


def target_gradient(logits: Tensor, *operands: Tensor | None) -> Output:
    """Of probabilities that are a target: (None, *Pair, target, maximum, log_sum, soft) -> (d,), like target."""
    pair, (target, maximum, log_sum, soft) = Pair(*operands[1:3]), operands[3:7]
    assert target is not None and maximum is not None and log_sum is not None and soft is not None
    raw = logits.to(statistics_dtype(logits.dtype))
    a = (warmed(raw, pair) - row(warmed(maximum, pair))) - row(log_sum)
    return (torch.where(row(soft) != 0, -row(soft) * a, 0.0).to(target.dtype),)
