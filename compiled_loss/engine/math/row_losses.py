"""Row losses: functions of a row's statistics and inputs, with their gradients, which operators know by name.

NOTE [Row losses]
A body needs the loss of a row and its gradient while the row's logits are alive. An operator takes no function, so the
body is given the name of a `RowLoss`, a string. A compiled caller is compiled again only for another name. The name of
the library's own cross-entropy says which of its coefficients are present. A user's function is traced once for each
set of numbers that it closes over. Its name is a digest of the traced code, so that two functions that compute the same
share kernels.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from torch import Tensor

from compiled_loss.engine.math.coefficients import Classes, Coefficients, combine
from compiled_loss.engine.math.statistics import RowStatistics, Wanted


class RowGradients(NamedTuple):
    """The gradients of a row's loss with respect to its statistics, [rows] each; None for 0."""

    d_nll: Tensor
    d_lse: Tensor | None
    d_total: Tensor | None
    d_entropy: Tensor | None
    d_squares: Tensor | None


class Evaluated(NamedTuple):
    """The losses of rows, 0 where a row does not count, and their gradients."""

    loss: Tensor  # [rows]
    gradients: RowGradients
    d_inputs: tuple[Tensor, ...]  # gradients of the inputs that want one, 0 where a row does not count


class RowLoss(NamedTuple):
    """A loss of rows, as a function with its properties.

    `evaluate` takes the statistics, labels, `Classes`, numbers ([] tensors) and inputs ([rows, ...] tensors), and
    returns `Evaluated`. If `of_logits` is True, it takes z, [rows, V], instead of statistics, and returns the losses,
    the gradient of z, and `d_inputs`.
    """

    evaluate: Callable[..., Any]
    uses: Wanted
    numbers: int
    linear: int  # the number of inputs, counted from the first, in which it is linear
    wanted: tuple[int, ...]  # the inputs that want a gradient
    computed: bool  # whether its gradients are computed, instead of being operands: bodies.py, NOTE [Few reads]
    of_logits: bool


class Named(NamedTuple):
    """The name of a `RowLoss`, with what autograd has to know of it."""

    name: str
    number_count: int
    wanted: tuple[int, ...]


_FOUND: dict[str, RowLoss] = {}


def define(name: str, loss: RowLoss) -> None:
    """Registers a loss under its name."""
    _FOUND[name] = loss


def of(name: str) -> RowLoss:
    """Returns the loss of that name."""
    kind, _, coefficients = name.partition(":")
    return _cross_entropy(coefficients) if kind == "cross_entropy" else _FOUND[name]


def uses_total(name: str) -> bool:
    """Returns True if the loss of that name uses a row's total.

    Unlike `of`, it has no cache, of which Dynamo would warn: it is called where Dynamo traces.
    """
    kind, _, coefficients = name.partition(":")
    if kind == "cross_entropy":
        return dict(zip(Coefficients._fields, coefficients, strict=True))["total"] != "-"
    return _FOUND[name].uses.total


def cross_entropy(coefficients: Coefficients, *, gradients: bool) -> Named:
    """Returns the name of `combine` with these coefficients; its inputs are the coefficients that are not None."""
    name = "cross_entropy:"
    for value in coefficients:
        name += "-" if value is None else "d" if gradients and value.requires_grad else "c"
    return Named(name, 0, _wanted(name.partition(":")[2]))


def _wanted(coefficients: str) -> tuple[int, ...]:
    return tuple([i for i, kind in enumerate(coefficients.replace("-", "")) if kind == "d"])


def user_name(digest: str, uses: Wanted) -> str:
    """Returns the name of a user's loss: the statistics that it uses, and a digest."""
    return " ".join(["user", *[name for name, used in zip(Wanted._fields, uses, strict=True) if used]]) + f":{digest}"


def uses(loss: Named) -> Wanted:
    """Returns the statistics that a user's loss uses, which its name lists."""
    _, *names = loss.name.partition(":")[0].split(" ")
    return Wanted(*[name in names for name in Wanted._fields])


@functools.cache
def _cross_entropy(coefficients: str) -> RowLoss:
    there = [kind != "-" for kind in coefficients]
    wants = [kind == "d" for kind in coefficients]

    def evaluate(
        known: RowStatistics, labels: Tensor, classes: Classes, _numbers: Sequence[Tensor], inputs: Sequence[Tensor]
    ) -> Evaluated:
        left = list(inputs)
        by = Coefficients(*[left.pop(0) if one else None for one in there])
        nll = by.label_weight(labels, classes, known.nll.dtype)
        by = by._replace(nll=nll)
        lse = by.lse
        if by.square is not None:
            of_square = 2 * by.square * known.lse
            lse = of_square if lse is None else lse + of_square
        gradients = RowGradients(nll, lse, by.total, None, None)
        values = (known.nll, known.lse, known.total, known.lse.square())
        d_inputs = [_of_rows(v, labels, classes) for v, wanted in zip(values, wants, strict=True) if wanted]
        return Evaluated(combine(known, by, labels, classes), gradients, tuple(d_inputs))

    return RowLoss(
        evaluate,
        uses=Wanted(total=there[2]),
        numbers=0,
        linear=sum(there),
        wanted=_wanted(coefficients),
        computed=False,
        of_logits=False,
    )


def _of_rows(value: Tensor | None, labels: Tensor, classes: Classes) -> Tensor:
    assert value is not None
    return value.masked_fill(labels == classes.ignored, 0.0)
