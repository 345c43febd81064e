"""The elementwise mathematics of two distributions over one vocabulary: a student's, of logits, and a target's.

With q = softmax(z) of the student, p of the target, a = log q, b = log p and m = w p + (1 - w) q, each kind is a sum
over the vocabulary whose gradient with respect to z is slope - q sum(slope):

    kind            sum of                                              slope
    probabilities   -p a, p as it is given                              -p
    cross_entropy   -p a                                                -p
    forward_kl      p (b - a)                                           -p
    reverse_kl      q (a - b)                                           q (a - b)
    jsd             w p (b - log m) + (1 - w) q (a - log m)             (1 - w) q (a - log m)

z and the target's logits are divided by one temperature. The cross-entropy with labels is that of the student's logits
at temperature 1. A chunk is whole rows: bodies as in `bodies.py`, `source` the student's, then `labels` or None, the
`Pair`, `target`.
"""

from __future__ import annotations

import types
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from compiled_loss.engine.statistics import after, statistics_dtype

Kind = Literal["probabilities", "cross_entropy", "forward_kl", "reverse_kl", "jsd"]
KINDS: tuple[Kind, ...] = ("probabilities", "cross_entropy", "forward_kl", "reverse_kl", "jsd")
Output = tuple[Tensor, ...]


class Pair(NamedTuple):
    """How two rows are compared. The scalars are tensors, as in `Head`."""

    inverse_temperature: Tensor | None
    jsd_weight: Tensor | None
    target_weight: Tensor | None  # [V, H of the target], where the target is hidden states


class Rows(NamedTuple):
    """What is known of each row, [rows] each: enough to form its gradient in one pass."""

    maximum: Tensor  # of the student's logits, before the temperature
    log_sum: Tensor  # log sum(exp(z - max z))
    slope: Tensor  # sum(slope)
    target_maximum: Tensor | None  # of the target's logits over the temperature
    target_log_sum: Tensor | None
    hard_log_sum: Tensor | None  # log_sum at temperature 1

    def present(self) -> Output:
        """Those that the kind has."""
        return tuple([v for v in self if v is not None])

    @staticmethod
    def of(present: Output, kind: Kind, labels: Tensor | None) -> tuple[Rows, Output]:
        """From the front of a body's outputs, and what follows them."""
        maximum, log_sum, slope = present[:3]
        target_maximum, target_log_sum = (None, None) if kind == "probabilities" else present[3:5]
        rest = present[3:] if kind == "probabilities" else present[5:]
        hard = None if labels is None else rest[0]
        rows = Rows(maximum, log_sum, slope, target_maximum, target_log_sum, hard)
        return rows, tuple(rest) if labels is None else tuple(rest[1:])


def _row(values: Tensor) -> Tensor:
    return values.unsqueeze(-1)


def _times(p: Tensor, x: Tensor) -> Tensor:
    """P x, 0 where p is 0, whatever x is."""
    return p * torch.where(p > 0, x, 0.0)


def _raw(source: Tensor, weight: Tensor | None) -> Tensor:
    raw = source if weight is None else source @ weight.t()
    return raw.to(statistics_dtype(raw.dtype))


def _warmed(raw: Tensor, pair: Pair) -> Tensor:
    return raw if pair.inverse_temperature is None else raw * pair.inverse_temperature


def _terms(kind: Kind, a: Tensor, p: Tensor, b: Tensor | None, pair: Pair) -> tuple[Tensor | None, Tensor]:
    """The summands of the divergence that are not its slopes, and the slopes.

    NOTE [Used once]
    What reads more than four tensors and is used twice is written out by Inductor, in fp32 and as large as the logits.
    a and b read four; so a - b is used once in each sum, and the divergence is put together from sums.
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


def _compared(kind: Kind, z: Tensor, t: Tensor, pair: Pair, rows: Rows) -> tuple[Tensor, Tensor | None, Tensor]:
    """a, and the summands and slopes of rows that are known."""
    a = (z - _row(_warmed(rows.maximum, pair))) - _row(rows.log_sum)
    if rows.target_maximum is None or rows.target_log_sum is None:
        return a, *_terms(kind, a, t, None, pair)
    b = (t - _row(rows.target_maximum)) - _row(rows.target_log_sum)
    return a, *_terms(kind, a, b.exp(), b, pair)


def _fold(kind: Kind, raw: Tensor, t: Tensor, labels: Tensor | None, pair: Pair) -> tuple[Rows, Tensor, Tensor | None]:
    """The rows, their divergence, and their cross-entropy with the labels."""
    z = _warmed(raw, pair)
    maximum = raw.detach().amax(-1)
    log_sum = (z - _row(_warmed(maximum, pair))).exp().sum(-1).log()
    rows = Rows(maximum, log_sum, maximum, None, None, None)
    if kind != "probabilities":
        largest = t.amax(-1)
        rows = rows._replace(target_maximum=largest, target_log_sum=(t - _row(largest)).exp().sum(-1).log())
    _, summands, slopes = _compared(kind, z, t, pair, rows)
    rows = rows._replace(slope=slopes.sum(-1))
    divergence = rows.slope.clone() if summands is None else summands.sum(-1)  # no body returns a tensor twice
    if kind == "jsd":
        divergence = divergence + rows.slope
    if labels is None:
        return rows, divergence, None
    shifted = raw - _row(maximum)
    rows = rows._replace(hard_log_sum=shifted.exp().sum(-1).log())
    assert rows.hard_log_sum is not None
    return rows, divergence, rows.hard_log_sum - torch.where(_hit(raw, labels), shifted, 0.0).sum(-1)


def _hit(raw: Tensor, labels: Tensor) -> Tensor:
    return torch.arange(raw.shape[-1], device=raw.device) == _row(labels)


def _target(target: Tensor, kind: Kind, pair: Pair) -> Tensor:
    """Probabilities, or logits over the temperature."""
    raw = _raw(target, pair.target_weight)
    return raw if kind == "probabilities" else _warmed(raw, pair)


def _gradient(
    kind: Kind, raw: Tensor, t: Tensor, labels: Tensor | None, pair: Pair, rows: Rows, soft: Tensor, hard: Tensor | None
) -> Tensor:
    """Of sum(soft * divergence + hard * cross-entropy) with respect to the student's logits, in fp32."""
    a, _, slopes = _compared(kind, _warmed(raw, pair), t, pair, rows)
    d = _row(soft if pair.inverse_temperature is None else soft * pair.inverse_temperature) * (
        slopes - a.exp() * _row(rows.slope)
    )
    if labels is None or hard is None or rows.hard_log_sum is None:
        return d
    p = ((raw - _row(rows.maximum)) - _row(rows.hard_log_sum)).exp()
    return d + _row(hard) * (p - torch.where(_hit(raw, labels), 1.0, 0.0))


class Bodies(NamedTuple):
    """The bodies of one kind."""

    fold: Callable[..., Output]
    gradient: Callable[..., Output]
    fold_and_gradient: Callable[..., Output]


def _bodies(kind: Kind) -> Bodies:
    def fold(source: Tensor, weight: Tensor | None, *operands: Tensor | None) -> Output:
        """(labels, *Pair, target) -> (*Rows, divergence[, cross-entropy])."""
        labels, pair, target = operands[0], Pair(*operands[1:4]), operands[4]
        assert target is not None
        rows, divergence, hard = _fold(kind, _raw(source, weight), _target(target, kind, pair), labels, pair)
        return (*rows.present(), divergence) if hard is None else (*rows.present(), divergence, hard)

    def gradient(source: Tensor, weight: Tensor | None, *operands: Tensor | None) -> Output:
        """(labels, *Pair, target, *Rows, soft, hard) -> (d,), like source."""
        labels, pair, target = operands[0], Pair(*operands[1:4]), operands[4]
        rows, soft, hard = Rows(*operands[5:11]), operands[11], operands[12]  # type: ignore[arg-type]
        assert target is not None and soft is not None
        raw = _raw(source, weight)
        return (_gradient(kind, raw, _target(target, kind, pair), labels, pair, rows, soft, hard).to(source.dtype),)

    def fold_and_gradient(source: Tensor, weight: Tensor | None, *operands: Tensor | None) -> Output:
        """(labels, *Pair, target, soft, hard) -> (d, packed, loss): soft * divergence + hard * cross-entropy.

        `packed` is returned for NOTE [Few reads] alone.
        """
        labels, pair, target, soft, hard = operands[0], Pair(*operands[1:4]), *operands[4:7]
        assert target is not None and soft is not None
        raw, t = _raw(source, weight), _target(target, kind, pair)
        rows, divergence, cross_entropy = _fold(kind, raw, t, labels, pair)
        loss = soft * divergence
        if cross_entropy is not None and hard is not None:
            loss = loss + hard * cross_entropy
        present = rows.present()
        packed = torch.stack([*present, after(soft, *present, loss), *([] if hard is None else [hard])])
        rows, (soft, *rest) = Rows.of(packed.unbind(), kind, labels)
        d = _gradient(kind, raw, t, labels, pair, rows, soft, rest[0] if rest else None)
        # NaN where a logit is, which it is already: the last expression reads the logits, or Inductor, which cuts a
        # long one in two, would not write its result over them.
        d = torch.where(raw.isnan(), raw, d)
        return d.to(source.dtype), packed, loss

    return Bodies(*(_named(body, f"{body.__name__}_{kind}") for body in (fold, gradient, fold_and_gradient)))


def _named(body: Any, name: str) -> Callable[..., Output]:
    """The body under a name of its own, in its code as well: on torch 2.15 Dynamo reads it there."""
    return types.FunctionType(body.__code__.replace(co_name=name), body.__globals__, name, None, body.__closure__)


BODIES: dict[Kind, Bodies] = {kind: _bodies(kind) for kind in KINDS}


def target_gradient(source: Tensor, weight: Tensor | None, *operands: Tensor | None) -> Output:
    """Of probabilities that are a target: (None, *Pair, target, maximum, log_sum, soft) -> (d,), like target."""
    pair, target = Pair(*operands[1:4]), operands[4]
    maximum, log_sum, soft = operands[5:8]
    assert target is not None and maximum is not None and log_sum is not None and soft is not None
    a = (_warmed(_raw(source, weight), pair) - _row(_warmed(maximum, pair))) - _row(log_sum)
    return (torch.where(_row(soft) != 0, -_row(soft) * a, 0.0).to(target.dtype),)
