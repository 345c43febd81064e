"""The bodies of divergences: `divergences` as functions of tensors, and of a kind that is a constant of the kernel.

They are bodies like those in `bodies.py`. Their operands are a student's logits [..., V], `labels` or None, the `Pair`
and the target. A target of which all classes are known is a `Whole`, [..., V] probabilities or logits. A target of
which only the top is known is a `Top`, [..., k]. With a `Top` the student's logits are -inf at the top's classes,
except in `gradient`, where they do not matter: its caller writes the gradient of the top over them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from compiled_loss.engine.math.divergence_kinds import Kind, Pair
from compiled_loss.engine.math.divergences import Compared, Output, RowGradients, Rows, row
from compiled_loss.engine.math.statistics import by_row, depends_on
from compiled_loss.engine.math.top_divergences import TopCompared
from compiled_loss.engine.operators import unpack


class Bodies(NamedTuple):
    """The bodies for a target that is a `Whole`, or for one that is a `Top`.

    fold                (labels, *Pair, *target) -> (*Rows, *Found)
    gradient            (labels, *Pair, *target, *Rows, *RowGradients) -> (d[, d of the top]), like logits
    fold_and_gradient   (labels, *Pair, *target, *RowGradients) -> (d[, d of the top], *Found, ...)

    Here d is the gradient of the sum of soft * divergence + hard * cross-entropy. The outputs after the `Found` are
    returned only for NOTE [Few reads]. Each body takes its `kind` as a keyword.
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
    """Computes `Rows` and `Found`, given a `Whole` target."""
    (labels,), pair, beside, _ = unpack(operands, _Labels, Pair, Whole)
    return _folded(_beside_whole(kind, logits, beside, pair, labels), labels, group)


def gradient(logits: Tensor, *operands: Tensor | None, kind: Kind) -> Output:
    """Computes the gradient, given a `Whole` target and the `Rows`."""
    (labels,), pair, beside, rows, upstream, _ = unpack(operands, _Labels, Pair, Whole, Rows, RowGradients)
    return (_beside_whole(kind, logits, beside, pair, labels).gradient(labels, rows, upstream, logits.dtype),)


def fold_and_gradient(logits: Tensor, *operands: Tensor | None, kind: Kind, group: str | None = None) -> Output:
    """Computes `Found` and the gradient, given a `Whole` target."""
    (labels,), pair, beside, upstream, _ = unpack(operands, _Labels, Pair, Whole, RowGradients)
    both = _beside_whole(kind, logits, beside, pair, labels)
    rows, upstream, found, packed = _after_fold(both, labels, None, upstream, group)
    return both.gradient(labels, rows, upstream, logits.dtype), *found, packed


def fold_top(logits: Tensor, *operands: Tensor | None, kind: Kind, group: str | None = None) -> Output:
    """Computes `Rows` and `Found`, given a `Top`."""
    (labels,), pair, beside, _ = unpack(operands, _Labels, Pair, Top)
    return _folded(_beside_top(kind, logits, beside, pair, labels, group), labels, group)


def gradient_top(logits: Tensor, *operands: Tensor | None, kind: Kind, group: str | None = None) -> Output:
    """Computes the gradients of the logits and of the top's logits, given a `Top` and the `Rows`."""
    (labels,), pair, beside, rows, upstream, _ = unpack(operands, _Labels, Pair, Top, Rows, RowGradients)
    return _beside_top(kind, logits, beside, pair, labels, group).gradient(labels, rows, upstream, logits.dtype)


def fold_and_gradient_top(logits: Tensor, *operands: Tensor | None, kind: Kind, group: str | None = None) -> Output:
    """Computes `Found` and the gradients of the logits and of the top's logits, given a `Top`."""
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
    """Returns the rows, their upstream gradients, the `Found`, and the first two packed in one tensor.

    The upstream gradients depend on all reductions of the logits: see `statistics.depends_on`.
    """
    rows, seen = both.fold(labels, group)
    found = seen.present()
    soft, hard = upstream.map(lambda g: depends_on(g, *found))  # all other reductions are in the one tensor
    packed = torch.stack([by_row(v) for v in (*rows.present(), soft, *([] if hard is None else [hard]))])
    rows, rest = Rows.of(packed.unbind(), both.kind, labels, indices)
    return rows, RowGradients(rest[0], rest[1] if len(rest) > 1 else None), found, packed


class Known(NamedTuple):
    """The operands of a row that the gradient of probabilities needs, [...] each."""

    maximum: Tensor
    log_sum: Tensor
    soft: Tensor


def target_gradient(logits: Tensor, *operands: Tensor | None) -> Output:
    """Computes the gradient of a target's probabilities: (None, *Pair, target, *Known) -> (d,), like target."""
    _, pair, (target, inverse), known, _ = unpack(operands, _Labels, Pair, Whole, Known)
    pair = pair.at(inverse, hard=False)
    student = pair.student
    bounded = student.bounded(student.biased(logits))
    a = pair.over_temperature(student.scaled(bounded - row(known.maximum))) - row(known.log_sum)
    return (torch.where(row(known.soft) != 0, -row(known.soft) * a, 0.0).to(target.dtype),)
