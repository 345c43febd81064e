"""The kinds of divergence: their sums over the vocabulary, and a row's divergence as a function of the sums.

With q = softmax(z) of the student, p of the target, a = log q, b = log p and m = w p + (1 - w) q, each part is a sum
over the vocabulary whose gradient with respect to z is slope - q sum(slope):

    part              sum of                                              slope
    cross_entropy     -p a                                                -p
    forward_kl        p (b - a)                                           -p
    reverse_kl        q (a - b)                                           q (a - b)
    jsd               w p (b - log m) + (1 - w) q (a - log m)             (1 - w) q (a - log m)
    total_variation   |p - q| / 2                                         -q [q < p], or -q / 2 where they are equal

NOTE [Mixtures]
A divergence is a weighted sum of parts and of two functions of parts, with alpha = sum(min(p, q)), which is 1 -
total_variation:

    acceptance        -log(alpha)
    lk                l forward_kl + (1 - l) total_variation, l = exp(-decay alpha) without gradient

So its gradient is a sum of the parts' slopes, each times a coefficient of the row. The coefficients are the weights, 1
/ alpha, l and 1 - l. alpha is one of the sums, and is known before any slope is needed. A mixture reads each logit as
often as a single divergence does.

Where total_variation is below 1/2, the logarithm of alpha is computed as log1p(-total_variation). It is then exactly 0
for equal distributions, and never positive. Elsewhere it is the logarithm of alpha itself, which keeps its digits. An
alpha below the least normal number counts as that number, so -log(alpha) is at most 87.3 in fp32, and its gradient is
finite.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch import Tensor

from compiled_loss.engine.math.logit_maps import LogitMap, times
from compiled_loss.engine.transforms import traced

OVERLAP = "overlap"  # the sum that is alpha
_PARTS = {"acceptance": ("total_variation",), "lk": ("forward_kl", "total_variation")}


class Kind(NamedTuple):
    """The divergences and statistics to compute, as names joined by +: an operator takes no tuple of strings."""

    divergences: str
    statistics: str = ""
    probabilities: bool = False  # whether the target's values are probabilities instead of logits

    @staticmethod
    def of(divergences: Iterable[str], statistics: Iterable[str] = (), *, probabilities: bool = False) -> Kind:
        """Makes the kind from names."""
        return Kind("+".join(divergences), "+".join(statistics), probabilities)

    def wants(self, statistic: str) -> bool:
        """Returns True if the statistic is wanted."""
        return statistic in self.statistics.split("+")

    def parts(self) -> list[str]:
        """Returns the parts that its divergences are made of, each once."""
        found: list[str] = []
        for name in self.divergences.split("+"):
            found += [part for part in _PARTS.get(name, (name,)) if part not in found]
        return found

    def of_overlap(self) -> bool:
        """Returns True if a row's coefficients depend on alpha."""
        return any(name in _PARTS for name in self.divergences.split("+"))


class Pair(NamedTuple):
    """The parameters of a student and a target. All scalars are tensors, as in `Head`.

    The temperature is part of `target_outer`. It is part of `outer` only without labels, because the cross-entropy with
    labels is of z without it. With labels, `inverse_temperature` multiplies the student's z for the divergence.
    """

    inverse_temperature: Tensor | None
    weights: Tensor | None = None  # of each divergence of the `Kind`; None for the one that there is, and 1
    jsd_weight: Tensor | None = None
    lk_decay: Tensor | None = None
    bias: Tensor | None = None  # [V], of the student
    inner: Tensor | None = None
    outer: Tensor | None = None
    target_bias: Tensor | None = None  # [V]
    target_inner: Tensor | None = None
    target_outer: Tensor | None = None

    @property
    def student(self) -> LogitMap:
        """The map from the student's logits to its z, before `inverse_temperature`."""
        return LogitMap(self.bias, self.inner, self.outer)

    @property
    def target(self) -> LogitMap:
        """The map from the target's logits to its z."""
        return LogitMap(self.target_bias, self.target_inner, self.target_outer)

    def over_temperature(self, z: Tensor) -> Tensor:
        """Returns the student's z over the temperature."""
        return times(z, self.inverse_temperature)

    def at(self, inverse_temperature: Tensor | None, *, hard: bool) -> Pair:
        """Returns the same pair at the rows' own temperatures, [rows, 1]; `hard` says that there are labels."""
        if inverse_temperature is None:
            return self
        target_outer = times(inverse_temperature, self.target_outer)
        if hard:
            return self._replace(inverse_temperature=inverse_temperature, target_outer=target_outer)
        return self._replace(outer=times(inverse_temperature, self.outer), target_outer=target_outer)

    def without_maps(self) -> Pair:
        """Returns the pair for z that are computed already."""
        return Pair(None, self.weights, self.jsd_weight, self.lk_decay)


class Distributions(NamedTuple):
    """Both distributions, [rows, V] each."""

    a: Tensor  # log q, the student's
    p: Tensor
    log_p: Tensor | None  # None where p was given: it is computed if needed, and a cross-entropy does not need it

    @property
    def b(self) -> Tensor:
        """The logarithm of p."""
        return self.p.log() if self.log_p is None else self.log_p


def addends(kind: Kind, both: Distributions, pair: Pair) -> dict[str, Tensor]:
    """Returns everything that is summed over the vocabulary, [rows, V] each, by name.

    NOTE [Used once]
    For logits that exist already, a compiled caller's graph contains the body. With the caller's settings Inductor
    writes out what reads more than four tensors and is used twice, in fp32 and as large as the logits. a and b read
    four. So a - b is used once in each sum, and the divergence is put together from the sums. In our loops nothing is
    written out: NOTE [Kernels].
    """
    found: dict[str, Tensor] = {}
    for part in kind.parts():
        summand, slope = _terms(part, both, pair)
        found[_slope_of(part)] = slope
        if summand is not None:
            found[part] = summand
    a, p, _ = both
    if kind.of_overlap() or kind.wants("acceptance"):
        found[OVERLAP] = torch.minimum(p, a.exp())
    if kind.wants("student_entropy"):
        found["student_entropy"] = -_times(a.exp(), a)
    if kind.wants("teacher_entropy"):
        found["teacher_entropy"] = -_times(p, both.b)
    return found


def divergence(kind: Kind, pair: Pair, sums: dict[str, Tensor]) -> Tensor:
    """Returns each row's divergence, [rows], from the sums of the `addends`."""
    parts = {part: _value(part, sums) for part in kind.parts()}
    total = None
    for name, weight in _weights(kind, pair):
        if name == "acceptance":
            value = _negative_log(sums[OVERLAP], parts["total_variation"])
        elif name == "lk":
            share = _share(sums[OVERLAP], pair)
            value = share * parts["forward_kl"] + (1 - share) * parts["total_variation"]
        else:
            value = parts[name]
        value = times(value, weight)
        total = value if total is None else total + value
    assert total is not None
    return total


def slope_sum(kind: Kind, pair: Pair, sums: dict[str, Tensor]) -> Tensor:
    """Returns the sum of all slopes of a row, [rows]."""
    return _combined(
        {part: sums[_slope_of(part)] for part in kind.parts()}, _coefficients(kind, pair, sums.get(OVERLAP))
    )


def slope(kind: Kind, both: Distributions, pair: Pair, overlap: Tensor | None) -> Tensor:
    """Returns the slope of each column, [rows, V]; `overlap` is each row's alpha, needed if the kind depends on it."""
    found = _coefficients(kind, pair, None if overlap is None else overlap.unsqueeze(-1))
    return _combined({part: _terms(part, both, pair)[1] for part in kind.parts()}, found)


def _coefficients(kind: Kind, pair: Pair, overlap: Tensor | None) -> dict[str, Tensor | None]:
    """Returns the factor of each part's slopes; None for 1. `overlap` is a row's alpha."""
    found: dict[str, Tensor | None] = {}

    def add(part: str, value: Tensor | None) -> None:
        before = found.get(part)
        found[part] = value if before is None or value is None else before + value

    for name, weight in _weights(kind, pair):
        if name == "acceptance":
            assert overlap is not None
            add("total_variation", times(1 / _positive(overlap), weight))
        elif name == "lk":
            assert overlap is not None
            share = _share(overlap, pair)
            add("forward_kl", times(share, weight))
            add("total_variation", times(1 - share, weight))
        else:
            add(name, weight)
    return found


def _combined(parts: dict[str, Tensor], factors: dict[str, Tensor | None]) -> Tensor:
    total = None
    for part, value in parts.items():
        value = times(value, factors[part])
        total = value if total is None else total + value
    assert total is not None
    return total


def _weights(kind: Kind, pair: Pair) -> list[tuple[str, Tensor | None]]:
    names = kind.divergences.split("+")
    return [(name, None if pair.weights is None else pair.weights[i]) for i, name in enumerate(names)]


def _slope_of(part: str) -> str:
    return f"slope of {part}"


def _value(part: str, sums: dict[str, Tensor]) -> Tensor:
    """Returns a part's value. The slopes of reverse_kl and jsd are summands as well."""
    slope = sums[_slope_of(part)]
    if part == "reverse_kl":
        return slope.clone()  # no body returns a tensor twice
    return sums[part] + slope if part == "jsd" else sums[part]


def _positive(overlap: Tensor) -> Tensor:
    return overlap.clamp(min=torch.finfo(overlap.dtype).tiny)


def _negative_log(overlap: Tensor, total_variation: Tensor) -> Tensor:
    near = total_variation < 0.5
    small = -_positive(torch.where(near, 1.0, overlap)).log()
    return torch.where(near, -torch.log1p(-torch.where(near, total_variation, 0.0)), small)


def _share(overlap: Tensor, pair: Pair) -> Tensor:
    assert pair.lk_decay is not None
    return (-pair.lk_decay * overlap.detach()).exp()


def _times(p: Tensor, x: Tensor) -> Tensor:
    """Returns p x, and 0 where p is 0, whatever x is."""
    if traced():  # else autograd multiplies the derivative of the branch not taken by 0; two selections spill registers
        x = torch.where(p == 0, 0.0, x)
    return torch.where(p == 0, 0.0, p * x)


def _terms(part: str, both: Distributions, pair: Pair) -> tuple[Tensor | None, Tensor]:
    """Returns a part's summands that are not its slopes, if there are any, and its slopes."""
    a, p, _ = both
    if part == "cross_entropy":
        return -_times(p, a), -p
    b = both.b
    if part == "forward_kl":
        return _times(p, b - a), -p
    q = a.exp()
    if part == "reverse_kl":
        return None, _times(q, a - b)
    if part == "total_variation":
        return (p - q).abs() / 2, -torch.where(q < p, q, torch.where(q == p, q / 2, 0.0))
    w = pair.jsd_weight
    assert w is not None
    return w * _times(p, _log_share(a - b, 1 - w)), (1 - w) * _times(q, _log_share(b - a, w))


def _log_share(ratio: Tensor, part: Tensor) -> Tensor:
    """Returns log(p / m) as -log(1 - part + part exp(ratio)); ratio is log q - log p, and part the share of q in m."""
    return -torch.log1p(part * torch.expm1(ratio.clamp(max=80.0)))  # beyond, exp would overflow, and p is 0
