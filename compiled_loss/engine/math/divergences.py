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
at temperature 1. `raw` are the student's logits in fp32 before the temperature, `t` the target.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from compiled_loss.engine.collectives import largest, reduced
from compiled_loss.engine.math.statistics import statistics_dtype
from compiled_loss.engine.transforms import traced

Kind = Literal["probabilities", "cross_entropy", "forward_kl", "reverse_kl", "jsd"]
Output = tuple[Tensor, ...]
KINDS: tuple[Kind, ...] = ("probabilities", "cross_entropy", "forward_kl", "reverse_kl", "jsd")


class Pair(NamedTuple):
    """How two rows are compared. The scalars are tensors, as in `Head`."""

    inverse_temperature: Tensor | None
    jsd_weight: Tensor | None


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
    """What is known of each row, [rows] each: enough to form its gradient in one pass."""

    maximum: Tensor  # of the student's logits, before the temperature
    log_sum: Tensor  # log sum(exp(z - max z)); where only the target's top is known, over the rest of the row
    slope: Tensor | None  # sum(slope)
    target_maximum: Tensor | None  # of the target's logits over the temperature
    target_log_sum: Tensor | None
    hard_log_sum: Tensor | None  # log_sum of the whole row at temperature 1

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


def row(values: Tensor) -> Tensor:
    """Beside each column."""
    return values.unsqueeze(-1)


def warmed(raw: Tensor, pair: Pair) -> Tensor:
    """Over the temperature."""
    return raw if pair.inverse_temperature is None else raw * pair.inverse_temperature


def hit(raw: Tensor, labels: Tensor) -> Tensor:
    """Which column is the label's."""
    return torch.arange(raw.shape[-1], device=raw.device) == row(labels)


def _times(p: Tensor, x: Tensor) -> Tensor:
    """P x, 0 where p is 0, whatever x is."""
    if traced():  # or autograd would multiply the derivative of what is not taken by 0; two selections spill registers
        x = torch.where(p == 0, 0.0, x)
    return torch.where(p == 0, 0.0, p * x)


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


class Compared(NamedTuple):
    """Rows of logits beside whole rows of a target."""

    kind: Kind
    pair: Pair
    raw: Tensor  # [rows, V], the student's logits before the temperature, in fp32
    t: Tensor  # [rows, V], probabilities, or logits over the temperature

    @staticmethod
    def of(kind: Kind, logits: Tensor, target: Tensor, pair: Pair) -> Compared:
        """From logits on either side, or probabilities on the target's."""
        t = target.to(statistics_dtype(target.dtype))
        raw = logits.to(statistics_dtype(logits.dtype))
        return Compared(kind, pair, raw, t if kind == "probabilities" else warmed(t, pair))

    def fold(self, labels: Tensor | None, group: str | None) -> tuple[Rows, Tensor, Tensor | None]:
        """The rows, their divergence, and their cross-entropy with the labels; over a group in three collectives."""
        kind, pair, raw, t = self
        z = warmed(raw, pair)
        maxima = [largest(raw.detach()), *([] if kind == "probabilities" else [largest(t)])]
        maximum, *target_maximum = reduced(maxima, "max", group)
        shifted = raw - row(maximum)
        sums = [(z - row(warmed(maximum, pair))).exp().sum(-1)]
        sums += [(t - row(m)).exp().sum(-1) for m in target_maximum]
        sums += [] if labels is None else [shifted.exp().sum(-1)]
        log_sum, *log_sums = [value.log() for value in reduced(sums, "sum", group)]
        rows = Rows(maximum, log_sum, None, None, None, None)
        if target_maximum:
            rows = rows._replace(target_maximum=target_maximum[0], target_log_sum=log_sums[0])
        _, summands, slopes = self._terms(rows)
        sums = [slopes.sum(-1)]
        sums += [] if summands is None else [summands.sum(-1)]
        sums += [] if labels is None else [torch.where(hit(raw, labels), shifted, 0.0).sum(-1)]
        slope, *sums = reduced(sums, "sum", group)
        rows = rows._replace(slope=slope)
        divergence = slope.clone() if summands is None else sums[0]  # no body returns a tensor twice
        if kind == "jsd":
            divergence = divergence + slope
        if labels is None:
            return rows, divergence, None
        return rows._replace(hard_log_sum=log_sums[-1]), divergence, log_sums[-1] - sums[-1]

    def gradient(
        self, labels: Tensor | None, rows: Rows, soft: Tensor, hard: Tensor | None, dtype: torch.dtype
    ) -> Tensor:
        """Of sum(soft * divergence + hard * cross-entropy) with respect to the student's logits."""
        pair, raw = self.pair, self.raw
        assert rows.slope is not None
        a, _, slopes = self._terms(rows)
        d = row(soft if pair.inverse_temperature is None else soft * pair.inverse_temperature) * (
            slopes - a.exp() * row(rows.slope)
        )
        if labels is not None and hard is not None and rows.hard_log_sum is not None:
            p = ((raw - row(rows.maximum)) - row(rows.hard_log_sum)).exp()
            d = d + row(hard) * (p - torch.where(hit(raw, labels), 1.0, 0.0))
        return over(raw, d, soft, hard).to(dtype)

    def _terms(self, rows: Rows) -> tuple[Tensor, Tensor | None, Tensor]:
        """A, and the summands and slopes of rows that are known."""
        kind, pair, raw, t = self
        a = (warmed(raw, pair) - row(warmed(rows.maximum, pair))) - row(rows.log_sum)
        if rows.target_maximum is None or rows.target_log_sum is None:
            return a, *_terms(kind, a, t, None, pair)
        b = (t - row(rows.target_maximum)) - row(rows.target_log_sum)
        return a, *_terms(kind, a, b.exp(), b, pair)


def over(raw: Tensor, d: Tensor, soft: Tensor, hard: Tensor | None) -> Tensor:
    """The gradient d, 0 in rows without a loss, whatever they and their target hold.

    NaN where a logit is, which it is already: the last expression reads the logits, or Inductor, which cuts a long one
    in two, would not write it over them.
    """
    counts = soft != 0 if hard is None else (soft != 0) | (hard != 0)
    return torch.where(row(counts), torch.where(raw.isnan(), raw, d), 0.0)
