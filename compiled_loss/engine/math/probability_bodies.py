"""The bodies of the cross-entropy with class probabilities, as torch's cross-entropy takes them.

With t = c ((1 - e) p + e / V), c the class weights and e the smoothing, a row's loss is sum(t (lse - z)). The operands
are None, because there is no label, the `Head` and the `Target`. Its `smoothing` is [2], 1 - e and e / V, or None. They
are bodies like those in `bodies.py`. t is formed where it is used: nothing of [N, V] is kept.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from compiled_loss.engine.math.bodies import Output, transformed
from compiled_loss.engine.math.divergence_kinds import Kind, Pair
from compiled_loss.engine.math.divergences import Compared, row
from compiled_loss.engine.math.problem import Head, Labels
from compiled_loss.engine.operators import unpack

_KIND = Kind("cross_entropy", probabilities=True)
_SCALARS = Pair(None)  # the head has the scalars


class Target(NamedTuple):
    """The operands after the `Head`."""

    smoothing: Tensor | None  # [2]
    probabilities: Tensor  # [..., V]


def fold_beside_probabilities(logits: Tensor, *operands: Tensor | None, group: str | None = None) -> Output:
    """Folds whole rows: (None, *Head, *Target) -> (maximum, log sum(exp(z - maximum)), sum(t), loss)."""
    _, head, target, _ = unpack(operands, Labels, Head, Target)
    z, _ = transformed(logits, head)
    rows, found = Compared(_KIND, _SCALARS, z, _weighted(target, head, z)).fold(None, group)
    assert rows.slope is not None
    return rows.maximum, rows.log_sum, -rows.slope, found.divergence


def gradient_beside_probabilities(logits: Tensor, *operands: Tensor | None) -> Output:
    """Computes the logits' gradient: (None, *Head, *Target, maximum, log_sum, mass, d loss, d lse) -> (d,)."""
    _, head, target, (maximum, log_sum, mass, loss, lse) = unpack(operands, Labels, Head, Target)
    z, slope = transformed(logits, head)
    q = ((z - row(maximum)) - row(log_sum)).exp()
    d = q * row(loss * mass + lse) - row(loss) * _weighted(target, head, z)
    d = d if slope is None else d * slope
    return (torch.where(row((loss != 0) | (lse != 0)), d, 0.0).to(logits.dtype),)  # 0 * NaN would be NaN


def gradient_of_probabilities(logits: Tensor, *operands: Tensor | None) -> Output:
    """Computes the probabilities' gradient: (None, *Head, *Target, maximum, log_sum, d loss) -> (d,)."""
    _, head, target, (maximum, log_sum, loss) = unpack(operands, Labels, Head, Target)
    z, _ = transformed(logits, head)
    d = row(loss) * (row(log_sum) - (z - row(maximum)))
    if target.smoothing is not None:
        d = d * target.smoothing[0]
    if head.class_weights is not None:
        d = d * head.class_weights.to(d.dtype)
    return (torch.where(row(loss) != 0, d, 0.0).to(target.probabilities.dtype),)


def _weighted(target: Target, head: Head, z: Tensor) -> Tensor:
    """Returns t, the weights of a row's log-probabilities."""
    t = target.probabilities.to(z.dtype)
    if target.smoothing is not None:
        t = t * target.smoothing[0] + target.smoothing[1]
    return t if head.class_weights is None else t * head.class_weights.to(z.dtype)
