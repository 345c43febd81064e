"""The bodies of two distributions: `divergences` as functions of tensors alone, and of the kind that a kernel knows.

Bodies as in `bodies.py`: a student's logits [..., V], then `labels` or None, the `Pair` and the target. A whole target
is [..., V] probabilities or logits, a `Whole`. Of a target's top, [..., k], come a `Top`; and the student's own logits
are -inf there, but in `gradient`, which looks at neither.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from compiled_loss.engine.math.divergence_kinds import Kind, Pair
from compiled_loss.engine.math.divergences import Compared, Output, RowGradients, Rows, row
from compiled_loss.engine.math.statistics import depends_on
from compiled_loss.engine.math.top_divergences import TopCompared
from compiled_loss.engine.operators import unpack


class Bodies(NamedTuple):
    """The bodies beside a whole target or its top.

    fold                (labels, *Pair, *target) -> (*Rows, *Found)
    gradient            (labels, *Pair, *target, *Rows, *RowGradients) -> (d[, d of the top]), like logits
    fold_and_gradient   (labels, *Pair, *target, *RowGradients) -> (d[, d of the top], *Found, ...)

    where d is the gradient of the sum of soft * divergence + hard * cross-entropy, and what follows the `Found` is
    returned for NOTE [Few reads] alone. Each takes its `kind` as a keyword.
    """

    fold: Callable[..., Output]
    gradient: Callable[..., Output]
    fold_and_gradient: Callable[..., Output]


class Whole(NamedTuple):
    """A target of which all classes are known."""

    target: Tensor  # [..., V]
    inverse_temperature: Tensor | None = None  # [..., 1]


class Top(NamedTuple):
    """A target of which k classes of each row are known."""

    indices: Tensor  # [..., k], counted from a rank's first class
    values: Tensor  # [..., k], log-probabilities
    top: Tensor  # [..., k], the student's logits there, with their bias
    inverse_temperature: Tensor | None = None  # [..., 1]


class _Labels(NamedTuple):
    labels: Tensor | None


def fold(logits: Tensor, *operands: Tensor | None, kind: Kind, group: str | None = None) -> Output:
    """Beside a whole target."""
    (labels,), pair, beside, _ = unpack(operands, _Labels, Pair, Whole)
    return _folded(_beside_whole(kind, logits, beside, pair, labels), labels, group)


def gradient(logits: Tensor, *operands: Tensor | None, kind: Kind) -> Output:
    """Beside a whole target."""
    (labels,), pair, beside, rows, upstream, _ = unpack(operands, _Labels, Pair, Whole, Rows, RowGradients)
    return (_beside_whole(kind, logits, beside, pair, labels).gradient(labels, rows, upstream, logits.dtype),)


def fold_and_gradient(logits: Tensor, *operands: Tensor | None, kind: Kind, group: str | None = None) -> Output:
    """Beside a whole target."""
    (labels,), pair, beside, upstream, _ = unpack(operands, _Labels, Pair, Whole, RowGradients)
    both = _beside_whole(kind, logits, beside, pair, labels)
    rows, upstream, found, packed = _after_fold(both, labels, None, upstream, group)
    return both.gradient(labels, rows, upstream, logits.dtype), *found, packed


def fold_top(logits: Tensor, *operands: Tensor | None, kind: Kind, group: str | None = None) -> Output:
    """Beside a top."""
    (labels,), pair, beside, _ = unpack(operands, _Labels, Pair, Top)
    return _folded(_beside_top(kind, logits, beside, pair, labels, group), labels, group)


def gradient_top(logits: Tensor, *operands: Tensor | None, kind: Kind, group: str | None = None) -> Output:
    """Beside a top."""
    (labels,), pair, beside, rows, upstream, _ = unpack(operands, _Labels, Pair, Top, Rows, RowGradients)
    return _beside_top(kind, logits, beside, pair, labels, group).gradient(labels, rows, upstream, logits.dtype)


def fold_and_gradient_top(logits: Tensor, *operands: Tensor | None, kind: Kind, group: str | None = None) -> Output:
    """Beside a top."""
    (labels,), pair, beside, upstream, _ = unpack(operands, _Labels, Pair, Top, RowGradients)
    both = _beside_top(kind, logits, beside, pair, labels, group)
    rows, upstream, found, packed = _after_fold(both, labels, beside.indices, upstream, group)
    return *both.gradient(labels, rows, upstream, logits.dtype), *found, packed


WHOLE = Bodies(fold, gradient, fold_and_gradient)
TOP = Bodies(fold_top, gradient_top, fold_and_gradient_top)


def _beside_whole(kind: Kind, logits: Tensor, beside: Whole, pair: Pair, labels: Tensor | None) -> Compared:
    pair = pair.at(beside.inverse_temperature, hard=labels is not None)
    return Compared.of(kind, logits, beside.target, pair)


def _beside_top(
    kind: Kind, logits: Tensor, beside: Top, pair: Pair, labels: Tensor | None, group: str | None
) -> TopCompared:
    pair = pair.at(beside.inverse_temperature, hard=labels is not None)
    return TopCompared.of(kind, logits, beside.top, beside.indices, beside.values, pair, group)


def _folded(both: Compared | TopCompared, labels: Tensor | None, group: str | None) -> Output:
    rows, found = both.fold(labels, group)
    return *rows.present(), *found.present()


def _after_fold(
    both: Compared | TopCompared,
    labels: Tensor | None,
    indices: Tensor | None,
    upstream: RowGradients,
    group: str | None,
) -> tuple[Rows, RowGradients, Output, Tensor]:
    """The rows and their upstream gradients, behind which all reductions are done, in one tensor; and the `Found`."""
    rows, seen = both.fold(labels, group)
    found = seen.present()
    soft, hard = upstream.map(lambda g: depends_on(g, *found))  # all other reductions are in the one tensor
    packed = torch.stack([*rows.present(), soft, *([] if hard is None else [hard])])
    rows, rest = Rows.of(packed.unbind(), both.kind, labels, indices)
    return rows, RowGradients(rest[0], rest[1] if len(rest) > 1 else None), found, packed


class Known(NamedTuple):
    """What the gradient of probabilities needs of a row, [...] each."""

    maximum: Tensor
    log_sum: Tensor
    soft: Tensor


def target_gradient(logits: Tensor, *operands: Tensor | None) -> Output:
    """Compute the gradient of probabilities that are a target: (None, *Pair, target, *Known) -> (d,), like target."""
    _, pair, (target, inverse), known, _ = unpack(operands, _Labels, Pair, Whole, Known)
    pair = pair.at(inverse, hard=False)
    student = pair.student
    bounded = student.bounded(student.biased(logits))
    a = pair.over_temperature(student.scaled(bounded - row(known.maximum))) - row(known.log_sum)
    return (torch.where(row(known.soft) != 0, -row(known.soft) * a, 0.0).to(target.dtype),)
