"""The elementwise mathematics of logits: plain torch on [rows, columns], written to fuse into one kernel.

`logits` are either a chunk, `rows` tokens by `columns` of the vocabulary, or logits that exist already, [..., V]. After
them every body takes `labels` [rows] and the `Head`, in this order. A body writes to none of its operands. Its caller
writes the results where they belong, the gradient over the logits.

NOTE [Columns are compared, never indexed]
The label's logit is `where(column == label, z, 0).sum(-1)` instead of a gather. The sum fuses into the pass that
computes the statistics. It cannot leave the row, whatever the label is. On torch 2.11 a gather from a buffer that the
graph reuses later read the later values.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from compiled_loss.engine.collectives import largest
from compiled_loss.engine.math import row_losses
from compiled_loss.engine.math.coefficients import Classes
from compiled_loss.engine.math.logit_maps import times
from compiled_loss.engine.math.problem import Head, Labels, Temperature, slack
from compiled_loss.engine.math.statistics import State, Wanted, by_row, depends_on, finish, statistics_dtype
from compiled_loss.engine.operators import is_compiling, unpack

Output = tuple[Tensor, ...]


class Upstream(NamedTuple):
    """The coefficients of a row's gradient, [rows] each.

    With e = exp(z - m), where m is the row's maximum, the gradient of z is e (row - moment (z - m) + square e), and at
    the label it is `target`. c total is added to both, where c are the class weights, or 1.

    NOTE [Few reads]
    Inductor writes out an fp32 intermediate of a pointwise expression that reads more than eight tensors. The result is
    then no longer written over the logits, which costs a second chunk. Therefore:

    1. What can be combined per row is combined before the body.
    2. Vectors and scalars share a tensor where they can.
    3. What is combined per row inside a body is also returned from it, unless it reads more than four tensors and is
       used twice. Otherwise Inductor does not write it out, and reads its parts again for each logit.

    With every option the gradient reads eight: logits, [bias, class weights], scales, labels, maximum, row, target,
    total.
    """

    row: Tensor
    target: Tensor
    total: Tensor | None
    moment: Tensor | None
    square: Tensor | None

    @staticmethod
    def of(
        state: State,
        nll: Tensor | None,
        lse: Tensor | None,
        total: Tensor | None,
        entropy: Tensor | None,
        squares: Tensor | None,
    ) -> Upstream:
        """Makes it from autograd's gradients of the rows' statistics, each of which may be None."""
        softmax, dtype = state.softmax(), state.others.dtype
        nll = torch.zeros_like(state.others) if nll is None else nll.to(dtype)
        row, target, moment, square = nll, -nll * state.others, None, None
        if lse is not None:
            row, target = row + lse, target + lse * softmax.target
        if entropy is not None:
            assert softmax.moment is not None
            row = row + entropy * softmax.moment
            target = target + entropy * (softmax.moment - softmax.gap.clamp(min=-1e4)) * softmax.target
            moment = entropy / softmax.total
        if squares is not None:
            assert softmax.squares is not None and state.squares is not None
            square = 2 * squares / softmax.squares
            row = row - 2 * squares
            # p**2 / sum(p**2) - p, in which nothing is lost where p is near 1
            target = target + square * softmax.target * (softmax.target * state.others - state.squares)
        total = None if total is None else total.to(dtype)
        return Upstream(row / softmax.total, target / softmax.total, total, moment, square)

    def map(self, change: Callable[[Tensor], Tensor]) -> Upstream:
        """Returns a copy with `change` applied to each tensor; None stays None."""
        rest = [None if v is None else change(v) for v in (self.total, self.moment, self.square)]
        return Upstream(change(self.row), change(self.target), *rest)


def _biased(logits: Tensor, head: Head) -> Tensor:
    """Returns the logits with the head's bias, in the dtype of statistics, before `scales`."""
    raw = logits.to(statistics_dtype(logits.dtype))
    return raw if head.bias is None else raw + head.bias.to(raw.dtype)


class _Mapped:
    """z of a chunk's logits, and its slope dz / d raw, [rows, columns].

    NOTE [Computed again]
    On a CPU Inductor writes out an exponential or a tanh that two of a body's loops over columns use, or z and its
    slope. That would be a second chunk, in fp32. So traced code computes z anew for each of the loops: the one that
    finds the maximum, the one that sums, and the one that writes the gradient. Eager code computes it once.
    """

    def __init__(self, raw: Tensor, head: Head, inverse: Tensor | None) -> None:
        self._raw, self._head = raw, head
        self._inverse = inverse if inverse is None or raw.dim() == inverse.dim() else inverse.unsqueeze(-1)
        self._z: Tensor | None = None
        self._capped: Tensor | None = None

    def z(self) -> Tensor:
        """Returns the logits with bias, scale, softcap and temperature."""
        if self._z is None or is_compiling():
            self._z = times(self._of_head(), self._inverse)
        return self._z

    def slope(self) -> Tensor | None:
        """Returns dz / d raw; None for 1."""
        scales, inverse = self._head.scales, self._inverse
        if scales is None or scales.dim() == 0:
            return scales if inverse is None else times(inverse, scales)
        inner, outer = scales.unbind()
        capped = self._tanh(inner)
        return times((inner * outer) * (1 - capped * capped), inverse)

    def _of_head(self) -> Tensor:
        scales = self._head.scales
        if scales is None or scales.dim() == 0:
            return times(self._raw, scales)
        inner, outer = scales.unbind()
        return outer * self._tanh(inner)

    def _tanh(self, inner: Tensor) -> Tensor:
        if self._capped is None or is_compiling():
            self._capped = torch.tanh(self._raw * inner)
        return self._capped


def _columns(z: Tensor, head: Head) -> Tensor:
    columns = torch.arange(z.shape[-1], device=z.device)
    return columns if head.start is None else columns + head.start


def _is_target(z: Tensor, labels: Tensor, head: Head) -> Tensor:
    return _columns(z, head) == labels.unsqueeze(-1)


class _Shifted(NamedTuple):
    """Logits relative to the maximum, [rows, columns]."""

    z: Tensor
    exp: Tensor

    @staticmethod
    def of(z: Tensor, maximum: Tensor) -> _Shifted:
        shifted = z - maximum.unsqueeze(-1)
        return _Shifted(shifted, shifted.exp())


def _seen(
    mapped: _Mapped,
    labels: Tensor,
    is_target: Tensor,
    head: Head,
    inverse: Tensor | None,
    maximum: Tensor,
    wanted: Wanted,
    *,
    whole: bool = False,
) -> tuple[State, _Shifted]:
    """Returns the state of a chunk alone, relative to a maximum that is not below its own, except by rounding."""
    shifted, near = _Shifted.of(mapped.z(), maximum), slack(head, inverse)
    least = maximum if near is None else maximum - near
    others = torch.where(is_target, 0.0, shifted.exp)
    # In a whole row the difference from the maximum is summed. Otherwise Inductor sums the logit in the loop that finds
    # the maximum, and does not unroll it: 67 instructions per logit on sm_90 instead of 57, and one more tanh with a
    # softcap.
    target = torch.where(is_target, shifted.z if whole else mapped.z(), 0.0).sum(-1)
    target = maximum + target if whole else target
    state = State(
        maximum=maximum,
        others=others.sum(-1),
        target_logit=target,
        total=_weighted(mapped.z(), head).sum(-1) if wanted.total else None,
        moment=(others * shifted.z.clamp(min=-1e4)).sum(-1) if wanted.entropy else None,  # exp is 0 before the clamp
        squares=(others * others).sum(-1) if wanted.squares else None,
        argmax=_argmax(mapped.z(), labels, head, least) if wanted.argmax else None,
    )
    return state, shifted


def _weighted(z: Tensor, head: Head) -> Tensor:
    return z if head.class_weights is None else z * head.class_weights.to(z.dtype)


def _argmax(z: Tensor, labels: Tensor, head: Head, least: Tensor) -> Tensor:
    """Returns the first column that is as large as the maximum, minus the label's column; infinity if there is none."""
    behind = (_columns(z, head) - labels.unsqueeze(-1)).to(z.dtype)
    if z.shape[-1] == 0:
        return torch.full_like(least, math.inf)
    return torch.where(z >= least.unsqueeze(-1), behind, math.inf).amin(-1)


def _gradient(
    shifted: _Shifted,
    slope: Tensor | None,
    active: Tensor,
    is_target: Tensor,
    head: Head,
    upstream: Upstream,
    *,
    moved: bool = False,
) -> Tensor:
    """Returns the gradient with respect to the raw logits, in the dtype of statistics."""
    row = upstream.row.unsqueeze(-1)
    if upstream.moment is not None:
        row = row - upstream.moment.unsqueeze(-1) * shifted.z.clamp(min=-1e4)
    if upstream.square is not None:
        row = row + upstream.square.unsqueeze(-1) * shifted.exp
    target = upstream.target.unsqueeze(-1)
    if moved:  # a single `where` would have the strides of the comparison, and not those of the logits
        d = shifted.exp * torch.where(is_target, 0.0, row) + torch.where(is_target, target, 0.0)
    else:
        d = torch.where(is_target, target, shifted.exp * row)
    if upstream.total is not None:
        total = upstream.total.unsqueeze(-1)
        d = d + (total if head.class_weights is None else total * head.class_weights.to(d.dtype))
    return torch.where(active.unsqueeze(-1), d if slope is None else d * slope, 0.0)


def fold(logits: Tensor, *operands: Tensor | None) -> Output:
    """Folds a chunk into the rows' state: (labels, *Head, temperature, *State) -> the new state's parts."""
    (labels,), head, (inverse,), state, _ = unpack(operands, Labels, Head, Temperature, State)
    head = head.unpacked()
    mapped = _Mapped(_biased(logits, head), head, inverse)
    # Detached: the statistics do not depend on the shift, and autograd would split its gradient among ties.
    maximum = by_row(torch.maximum(state.maximum, largest(mapped.z().detach())))
    is_target = _is_target(logits, labels, head)
    wanted = Wanted(*[v is not None for v in state[3:]])
    seen, _ = _seen(mapped, labels, is_target, head, inverse, maximum, wanted)
    folded = state.rescaled(maximum).with_(seen)
    return maximum, *[by_row(v) for v in folded.present()[1:]], maximum  # again: NOTE [Few reads]


def gradient(logits: Tensor, *operands: Tensor | None, classes: Classes, moved: bool = False) -> Output:
    """Computes the logits' gradient: (labels, *Head, temperature, maximum, *Upstream) -> (d,).

    `moved` says that the logits are not contiguous.
    """
    (labels,), head, (inverse,), (maximum, *rest) = unpack(operands, Labels, Head, Temperature)
    head, upstream = head.unpacked(), Upstream(*rest)
    mapped = _Mapped(_biased(logits, head), head, inverse)
    is_target = _is_target(logits, labels, head)
    d = _gradient(
        _Shifted.of(mapped.z(), maximum), mapped.slope(), classes.active(labels), is_target, head, upstream, moved=moved
    )
    return (d.to(logits.dtype),)


def fold_and_gradient(
    logits: Tensor,
    *operands: Tensor | None,
    classes: Classes,
    loss: str,
    statistics: bool = False,
    entropy: bool = False,
    group: str | None = None,
) -> Output:
    """Computes losses and gradient in one pass, of whole rows or of a rank's columns of them.

    (labels, *Head, *numbers, temperature, *inputs) -> (d, loss, *d_inputs, ...)

    `loss` names a row loss, of these numbers and inputs; d is the gradient of the sum of the losses. With `statistics`,
    the `RowStatistics` follow; `entropy` adds the entropy to them. The outputs after these are returned only for
    NOTE [Few reads].
    """
    (labels,), head, rest = unpack(operands, Labels, Head)
    head, of = head.unpacked(), row_losses.of(loss)
    numbers, (inverse, *inputs) = rest[: of.numbers], rest[of.numbers :]
    biased = _biased(logits, head)
    mapped = _Mapped(biased, head, inverse)
    # A softcap keeps the order, so a row's maximum is found before it, which saves a tanh per logit. Where statistics
    # are returned it is found after it: `correct` compares the label's logit with the maximum bit for bit.
    exact = statistics or of.computed
    maximum = largest(mapped.z()) if exact else _Mapped(largest(biased), head, inverse).z()
    maximum = maximum.clamp(min=torch.finfo(maximum.dtype).min)  # no NaN where all of a rank's columns are -inf
    softcap = head.scales is not None and head.scales.dim() > 0
    if softcap:
        maximum = by_row(maximum)
    is_target = _is_target(logits, labels, head)
    wanted = Wanted(total=of.uses.total, entropy=entropy)
    state, shifted = _seen(
        mapped, labels, is_target, head, inverse, maximum, of.uses.union(wanted), whole=group is None
    )
    state = state.all_reduced(group)
    known = finish(state, slack(head, inverse))
    found = of.evaluate(known, labels, classes, numbers, inputs)
    upstream = Upstream.of(state, *found.gradients)
    upstream = upstream._replace(row=depends_on(upstream.row, *state))
    if group is not None or is_compiling():
        shifted = _Shifted.of(mapped.z(), state.maximum)
    d = _gradient(shifted, mapped.slope(), classes.active(labels), is_target, head, upstream).to(logits.dtype)
    returned = [d, by_row(found.loss), *found.d_inputs]
    if statistics:
        returned += map(by_row, known.only(wanted).present())
    returned += [v for v in upstream if v is not None] if of.computed else [upstream.row, upstream.target]
    if softcap and group is None:  # the maximum is then computed in the body; over a group it is written out anyway
        returned.append(maximum)
    return tuple(returned)


def logits_loss_and_gradient(
    logits: Tensor, *operands: Tensor | None, classes: Classes, loss: str, group: str | None = None
) -> Output:
    """Computes a row loss of logits: (labels, *Head, *numbers, temperature, *inputs) -> (d, loss, *d_inputs)."""
    assert group is None
    (labels,), head, rest = unpack(operands, Labels, Head)
    of = row_losses.of(loss)
    numbers, (inverse, *inputs) = rest[: of.numbers], rest[of.numbers :]
    mapped = _Mapped(_biased(logits, head.unpacked()), head.unpacked(), inverse)
    losses, d, d_inputs = of.evaluate(mapped.z(), labels, classes, numbers, inputs)
    slope = mapped.slope()
    d = d if slope is None else d * slope
    d = torch.where(classes.active(labels).unsqueeze(-1), d, 0.0)
    return d.to(logits.dtype), losses, *d_inputs


def transformed(logits: Tensor, head: Head, inverse: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
    """Returns z of logits that exist already, and its slope dz / d raw; None for a slope of 1."""
    mapped = _Mapped(_biased(logits, head), head, inverse)
    return mapped.z(), mapped.slope()
