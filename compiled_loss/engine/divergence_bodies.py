"""The bodies of two distributions: `divergences` as functions of tensors alone, one of each kind and purpose.

A chunk is whole rows: bodies as in `bodies.py`, `source` the student's, then `labels` or None, `Pair` and `Target`.
"""

from __future__ import annotations

import types
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from compiled_loss.engine.divergences import (
    KINDS,
    Compared,
    Kind,
    Output,
    Pair,
    Rows,
    Target,
    row,
    warmed,
)
from compiled_loss.engine.gemm import dense, logits
from compiled_loss.engine.statistics import after, statistics_dtype
from compiled_loss.engine.top_divergences import TopCompared


class Bodies(NamedTuple):
    """The bodies of one kind."""

    fold: Callable[..., Output]
    gradient: Callable[..., Output]
    fold_and_gradient: Callable[..., Output]


def _bodies(kind: Kind) -> Bodies:
    def compared(
        source: Tensor,
        weight: Tensor | None,
        operands: tuple[Tensor | None, ...],
        group: str | None,
        *,
        fold: bool = True,
    ) -> Compared | TopCompared:
        pair, target = Pair(*operands[1:4]), Target(*operands[4:6])  # type: ignore[arg-type]
        if target.indices is None:
            return Compared.of(kind, source, weight, target.values, pair)
        return TopCompared.of(kind, source, weight, target, pair, group, fold=fold)

    def fold(source: Tensor, weight: Tensor | None, *operands: Tensor | None, group: str | None = None) -> Output:
        """(labels, *Pair, *Target) -> (*Rows, divergence[, cross-entropy])."""
        rows, divergence, hard = compared(source, weight, operands, group).fold(operands[0], group)
        return (*rows.present(), divergence) if hard is None else (*rows.present(), divergence, hard)

    def gradient(source: Tensor, weight: Tensor | None, *operands: Tensor | None, group: str | None = None) -> Output:
        """(labels, *Pair, *Target, *Rows, soft, hard) -> (d,), like source; a top is looked up again."""
        rows, soft, hard = Rows(*operands[6:12]), operands[12], operands[13]  # type: ignore[arg-type]
        assert soft is not None
        rows_of = compared(source, weight, operands, group, fold=False)
        d = rows_of.gradient(operands[0], rows, soft, hard, source.dtype)
        return (d if weight is None else dense(d),)

    def fold_and_gradient(
        source: Tensor, weight: Tensor | None, *operands: Tensor | None, group: str | None = None
    ) -> Output:
        """(labels, *Pair, *Target, soft, hard) -> (d, loss, ...): soft * divergence + hard * cross-entropy.

        What follows is returned to be written out: for NOTE [Few reads], or the logits would stay for their top's sake.
        """
        labels, indices, soft, hard = operands[0], *operands[5:8]
        assert soft is not None
        rows_of = compared(source, weight, operands, group)
        rows, divergence, cross_entropy = rows_of.fold(labels, group)
        loss = soft * divergence
        if cross_entropy is not None and hard is not None:
            loss = loss + hard * cross_entropy
        present, top = rows.present(), rows_of if isinstance(rows_of, TopCompared) else None
        first = None if top is None else top.first
        packed = torch.stack([*present, after(soft, *present, loss), *(v for v in (hard, first) if v is not None)])
        rows, (soft, *rest) = Rows.of(packed.unbind(), kind, labels, indices)
        if top is not None and first is not None:
            rows_of, rest = top._replace(first=rest[-1]), rest[:-1]  # no pop: Dynamo 2.11 makes a tuple of the rest
        d = rows_of.gradient(labels, rows, soft, rest[0] if rest else None, source.dtype)
        return (d, loss, packed) if top is None else (d, loss, packed, top.top)

    return Bodies(*(_named(body, f"{body.__name__}_{kind}") for body in (fold, gradient, fold_and_gradient)))


def _named(body: Any, name: str) -> Callable[..., Output]:
    """The body under a name of its own, in its code as well: on torch 2.15 Dynamo reads it there."""
    own = types.FunctionType(body.__code__.replace(co_name=name), body.__globals__, name, None, body.__closure__)
    own.__kwdefaults__ = body.__kwdefaults__
    return own


BODIES: dict[Kind, Bodies] = {kind: _bodies(kind) for kind in KINDS}


def target_gradient(source: Tensor, weight: Tensor | None, *operands: Tensor | None) -> Output:
    """Of probabilities that are a target: (None, *Pair, target, maximum, log_sum, soft) -> (d,), like target."""
    pair, target = Pair(*operands[1:4]), operands[4]
    maximum, log_sum, soft = operands[5:8]
    assert target is not None and maximum is not None and log_sum is not None and soft is not None
    raw = logits(source, weight)
    a = (warmed(raw.to(statistics_dtype(raw.dtype)), pair) - row(warmed(maximum, pair))) - row(log_sum)
    return (torch.where(row(soft) != 0, -row(soft) * a, 0.0).to(target.dtype),)
