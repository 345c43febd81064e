"""The elementwise mathematics of two distributions over one vocabulary: a student's, of logits, and a target's.

With q = softmax(z) of the student, p of the target, a = log q, b = log p and m = w p + (1 - w) q, each kind is a sum
over the vocabulary whose gradient with respect to z is slope - q sum(slope):

    kind            sum of                                              slope
    probabilities   -p a, p as it is given                              -p
    cross_entropy   -p a                                                -p
    forward_kl      p (b - a)                                           -p
    reverse_kl      q (a - b)                                           q (a - b)
    jsd             w p (b - log m) + (1 - w) q (a - log m)             (1 - w) q (a - log m)

A `LogitMap` makes the z of each side. The cross-entropy with labels is that of the student's z at temperature 1.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from compiled_loss.engine.collectives import all_reduced, largest
from compiled_loss.engine.math.logit_maps import LogitMap, times
from compiled_loss.engine.transforms import traced

Kind = Literal["probabilities", "cross_entropy", "forward_kl", "reverse_kl", "jsd"]
Output = tuple[Tensor, ...]
KINDS: tuple[Kind, ...] = ("probabilities", "cross_entropy", "forward_kl", "reverse_kl", "jsd")


class Pair(NamedTuple):
    """How two rows are compared. All scalars are tensors, as in `Head`.

    A temperature is part of each `outer`, but for the student's where there are labels: their cross-entropy is of z
    without it, and `inverse_temperature` multiplies z for the divergence.
    """

    inverse_temperature: Tensor | None
    jsd_weight: Tensor | None
    bias: Tensor | None = None  # [V], of the student
    inner: Tensor | None = None
    outer: Tensor | None = None
    target_bias: Tensor | None = None  # [V]
    target_inner: Tensor | None = None
    target_outer: Tensor | None = None

    @property
    def student(self) -> LogitMap:
        """What makes the student's z, before `inverse_temperature`."""
        return LogitMap(self.bias, self.inner, self.outer)

    @property
    def target(self) -> LogitMap:
        """What makes the target's z, of logits."""
        return LogitMap(self.target_bias, self.target_inner, self.target_outer)

    def over_temperature(self, z: Tensor) -> Tensor:
        """The student's z over the temperature."""
        return times(z, self.inverse_temperature)


class Target(NamedTuple):
    """What rows are compared with."""

    values: Tensor  # [rows, V] probabilities or logits, [rows, H of the target], or [rows, k] log-probabilities
    indices: Tensor | None = None  # [rows, k], of the classes whose log-probabilities alone are known
    weight: Tensor | None = None  # [V, H of the target], where the values are hidden states

    def map(self, change: Callable[[Tensor], Tensor]) -> Target:
        """What has rows changed."""
        indices = None if self.indices is None else change(self.indices)
        return self._replace(values=change(self.values), indices=indices)


class Rows(NamedTuple):
    """What is known of each row, [rows] each: enough to form its gradient in one pass.

    The maxima are of bounded logits, `LogitMap.bounded`; the log_sums are log sum(exp(z - max z)).
    """

    maximum: Tensor  # of the student
    log_sum: (
        Tensor  # of the student, over the temperature; where only the target's top is known, over all other classes
    )
    slope: Tensor | None  # sum(slope)
    target_maximum: Tensor | None
    target_log_sum: Tensor | None
    hard_log_sum: Tensor | None  # of the student's whole row at temperature 1

    def present(self) -> Output:
        """Those that there are."""
        return tuple([v for v in self if v is not None])

    @staticmethod
    def there(kind: Kind, labels: object, indices: object) -> tuple[bool, ...]:
        """Which of them there are, of labels and indices that may be None."""
        logits = indices is None and kind != "probabilities"
        return (True, True, indices is None, logits, logits, labels is not None)

    @staticmethod
    def of(present: Sequence[Tensor], kind: Kind, labels: object, indices: object) -> tuple[Rows, list[Tensor]]:
        """From the front of a body's outputs, and what follows them."""
        left = list(present)
        rows = Rows(*[left.pop(0) if field else None for field in Rows.there(kind, labels, indices)])  # type: ignore[arg-type]
        return rows, left


class RowGradients(NamedTuple):
    """The gradients with respect to each row's divergence and cross-entropy, [rows] each."""

    soft: Tensor
    hard: Tensor | None

    def counts(self) -> Tensor:
        """Whether a row has any."""
        return self.soft != 0 if self.hard is None else (self.soft != 0) | (self.hard != 0)

    def map(self, change: Callable[[Tensor], Tensor]) -> RowGradients:
        """Each changed; what is None stays None."""
        return RowGradients(change(self.soft), None if self.hard is None else change(self.hard))


def row(values: Tensor) -> Tensor:
    """Beside each column."""
    return values.unsqueeze(-1)


def is_target(logits: Tensor, labels: Tensor) -> Tensor:
    """Which column is the label's."""
    return torch.arange(logits.shape[-1], device=logits.device) == row(labels)


def _times(p: Tensor, x: Tensor) -> Tensor:
    """P x, 0 where p is 0, whatever x is."""
    if traced():  # or autograd would multiply the derivative of what is not taken by 0; two selections spill registers
        x = torch.where(p == 0, 0.0, x)
    return torch.where(p == 0, 0.0, p * x)


def _terms(kind: Kind, a: Tensor, p: Tensor, b: Tensor | None, pair: Pair) -> tuple[Tensor | None, Tensor]:
    """The summands of the divergence that are not its slopes, and the slopes.

    NOTE [Used once]
    Where logits exist, the compiler is the caller's: it writes out what reads more than four tensors and is used twice,
    in fp32 and as large as the logits. a and b read four; so a - b is used once in each sum, and the divergence is put
    together from sums. In loops nothing is written out, NOTE [Kernels].
    """
    if b is None or kind == "cross_entropy":
        return -_times(p, a), -p
    if kind == "forward_kl":
        return _times(p, b - a), -p
    q = a.exp()
    if kind == "reverse_kl":
        return None, _times(q, a - b)
    w = pair.jsd_weight
    assert w is not None
    return w * _times(p, _log_share(a - b, 1 - w)), (1 - w) * _times(q, _log_share(b - a, w))


def _log_share(ratio: Tensor, part: Tensor) -> Tensor:
    """-log(1 - part + part exp(ratio)): of p over m, where ratio is log q - log p and part that of q in m."""
    return -torch.log1p(part * torch.expm1(ratio.clamp(max=80.0)))  # beyond, exp would overflow, and p is 0


class Compared(NamedTuple):
    """Rows of logits beside whole rows of a target."""

    kind: Kind
    pair: Pair
    logits: Tensor  # [rows, V], the student's with their bias, in fp32
    target: Tensor  # [rows, V], probabilities, or logits with their bias

    @staticmethod
    def of(kind: Kind, logits: Tensor, target: Tensor, pair: Pair) -> Compared:
        """From logits on either side, or probabilities on the target's."""
        return Compared(kind, pair, pair.student.biased(logits), pair.target.biased(target))

    def fold(self, labels: Tensor | None, group: str | None) -> tuple[Rows, Tensor, Tensor | None]:
        """The rows, their divergence, and their cross-entropy with the labels; over a group in three collectives."""
        kind, pair, logits, target = self
        student, beside = pair.student, pair.target
        # Before the tanh, which keeps the order: one less for each logit. Detached: no sum depends on the shift.
        maxima = [largest(logits.detach()), *([] if kind == "probabilities" else [largest(target.detach())])]
        maximum, *target_maximum = all_reduced(maxima, "max", group)
        maximum, target_maximum = student.bounded(maximum), [beside.bounded(m) for m in target_maximum]
        bounded = student.bounded(logits)
        shifted = student.scaled(bounded - row(maximum))
        sums = [pair.over_temperature(shifted).exp().sum(-1)]
        sums += [beside.scaled(beside.bounded(target) - row(m)).exp().sum(-1) for m in target_maximum]
        sums += [] if labels is None else [shifted.exp().sum(-1)]
        log_sum, *log_sums = [value.log() for value in all_reduced(sums, "sum", group)]
        rows = Rows(maximum, log_sum, None, None, None, None)
        if target_maximum:
            rows = rows._replace(target_maximum=target_maximum[0], target_log_sum=log_sums[0])
        _, summands, slopes = self._terms(rows, bounded)
        sums = [slopes.sum(-1)]
        sums += [] if summands is None else [summands.sum(-1)]
        sums += [] if labels is None else [torch.where(is_target(logits, labels), shifted, 0.0).sum(-1)]
        slope, *sums = all_reduced(sums, "sum", group)
        rows = rows._replace(slope=slope)
        divergence = slope.clone() if summands is None else sums[0]  # no body returns a tensor twice
        if kind == "jsd":
            divergence = divergence + slope
        if labels is None:
            return rows, divergence, None
        return rows._replace(hard_log_sum=log_sums[-1]), divergence, log_sums[-1] - sums[-1]

    def gradient(self, labels: Tensor | None, rows: Rows, upstream: RowGradients, dtype: torch.dtype) -> Tensor:
        """Of sum(soft * divergence + hard * cross-entropy) with respect to the student's raw logits."""
        pair, student = self.pair, self.pair.student
        assert rows.slope is not None
        bounded, (soft, hard) = student.bounded(self.logits), upstream.map(lambda g: times(g, student.factor()))
        a, _, slopes = self._terms(rows, bounded)
        d = row(pair.over_temperature(soft)) * (slopes - a.exp() * row(rows.slope))
        if labels is not None and hard is not None and rows.hard_log_sum is not None:
            p = (student.scaled(bounded - row(rows.maximum)) - row(rows.hard_log_sum)).exp()
            d = d + row(hard) * (p - torch.where(is_target(bounded, labels), 1.0, 0.0))
        return over(self.logits, times(d, student.slope(bounded)), upstream).to(dtype)

    def _terms(self, rows: Rows, bounded: Tensor) -> tuple[Tensor, Tensor | None, Tensor]:
        """A, and the summands and slopes of rows that are known; the student's logits are `bounded`."""
        kind, pair, _, target = self
        student, beside = pair.student, pair.target
        a = pair.over_temperature(student.scaled(bounded - row(rows.maximum))) - row(rows.log_sum)
        if rows.target_maximum is None or rows.target_log_sum is None:
            return a, *_terms(kind, a, target, None, pair)
        b = beside.scaled(beside.bounded(target) - row(rows.target_maximum)) - row(rows.target_log_sum)
        return a, *_terms(kind, a, b.exp(), b, pair)


def over(logits: Tensor, d: Tensor, upstream: RowGradients) -> Tensor:
    """The gradient d, 0 in rows without a loss, whatever they and their target hold.

    NaN where a logit is, which it is already: the last expression reads the logits, or Inductor, which cuts a long one
    in two, would not write it over them.
    """
    return torch.where(row(upstream.counts()), torch.where(logits.isnan(), logits, d), 0.0)
