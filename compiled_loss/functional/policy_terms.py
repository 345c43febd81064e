"""The terms of policy losses: functions of one token, a `token_loss` for each set of terms."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from compiled_loss.engine.math.statistics import TokenStatistics

KINDS = ("clip", "cispo", "cispo_two_sided", "sapo", "gmpo", "reinforce")
KLS = ("k1", "k2", "k3", "k1_straight_through", "k3_straight_through")


class Terms(NamedTuple):
    """The terms that a loss has. A kernel has them as constants, and the numbers as operands."""

    kind: str
    dual: bool
    kl: str | None
    entropy: bool
    corrected: bool
    weighted: bool


class Numbers(NamedTuple):
    """The options that are numbers. A number is not used unless the loss has its term."""

    clip_low: Any
    clip_high: Any
    dual_clip: Any
    temperature_positive: Any
    temperature_negative: Any
    kl_coefficient: Any
    entropy_coefficient: Any


class Rows(NamedTuple):
    """The values of a token besides its statistics; None where no term needs them."""

    old_logprob: Tensor
    advantages: Tensor
    weight: Tensor | None
    reference_logprob: Tensor | None
    correction: Tensor | None
    entropy_weight: Tensor | None

    def map(self, change: Callable[[Tensor], Tensor]) -> Rows:
        """Returns a copy with `change` applied to each value; None stays None."""
        old_logprob, advantages, *rest = self
        return Rows(change(old_logprob), change(advantages), *[None if v is None else change(v) for v in rest])


def inputs_of(rows: Rows, numbers: Numbers) -> tuple[Any, ...]:
    """Returns the inputs of `token_loss`."""
    return (*[v for v in rows if v is not None], *numbers)


def kl_of(kl: str, logprob: Tensor, reference_logprob: Tensor) -> Tensor:
    """Returns an estimate of KL(policy || reference) from the token that was sampled."""
    log_ratio = reference_logprob - logprob
    k2 = log_ratio.square() / 2
    if kl == "k2":
        return k2
    estimate = -log_ratio if kl.startswith("k1") else bounded(log_ratio).expm1() - log_ratio
    return (estimate - k2).detach() + k2 if kl.endswith("straight_through") else estimate


def bounded(log_ratio: Tensor) -> Tensor:
    """Returns the log-ratio, at most 80: its exponential is then finite in fp32, and times 0 it is not NaN."""
    return log_ratio.clamp(max=80.0)


def token_loss(terms: Terms) -> Callable[..., Tensor]:
    """Returns the loss function of these terms."""
    return _TOKEN_LOSSES[tuple(terms)]


def _surrogate(terms: Terms, logprob: Tensor, old_logprob: Tensor, advantages: Tensor, by: Numbers) -> Tensor:
    """Returns the policy term of each token."""
    if terms.kind == "reinforce":
        return -logprob * advantages
    ratio = bounded(logprob - old_logprob).exp()
    if terms.kind == "gmpo":  # the ratio is a sequence's, whose log-ratios are clipped already
        return -ratio * advantages
    if terms.kind == "cispo":
        return -torch.minimum(ratio, by.clip_high).detach() * advantages * logprob
    if terms.kind == "cispo_two_sided":
        return -_clipped(ratio, by).detach() * advantages * logprob
    if terms.kind == "sapo":
        temperature = torch.where(advantages > 0, by.temperature_positive, by.temperature_negative)
        return -torch.sigmoid(temperature * (ratio - 1)) * 4 / temperature * advantages
    losses = -torch.minimum(ratio * advantages, _clipped(ratio, by) * advantages)
    if terms.dual:
        losses = torch.where(advantages < 0, torch.minimum(losses, -by.dual_clip * advantages), losses)
    return losses


def _clipped(ratio: Tensor, by: Numbers) -> Tensor:
    return torch.clamp(ratio, 1 - by.clip_low, 1 + by.clip_high)


def _made(terms: Terms) -> Callable[..., Tensor]:
    there = (terms.weighted, terms.kl is not None, terms.corrected, terms.entropy and terms.weighted)

    def policy(statistics: TokenStatistics, *inputs: Any) -> Tensor:
        old_logprob, advantages, *rest = inputs
        left = list(rest)  # Dynamo 2.11 makes a tuple of them
        rows = Rows(old_logprob, advantages, *[left.pop(0) if one else None for one in there])
        by = Numbers(*left)
        losses = _surrogate(terms, statistics.logprob, rows.old_logprob, rows.advantages, by)
        if rows.correction is not None:
            losses = losses * rows.correction
        if terms.kl is not None and rows.reference_logprob is not None:
            losses = losses + by.kl_coefficient * kl_of(terms.kl, statistics.logprob, rows.reference_logprob)
        if rows.weight is not None:
            losses = losses * rows.weight
        if terms.entropy:
            entropy = by.entropy_coefficient * statistics.entropy
            losses = losses - (entropy if rows.entropy_weight is None else entropy * rows.entropy_weight)
        return losses

    return policy


_FLAGS = (False, True)
# One function for each set of terms, made once: its name is a constant under torch.compile (engine/user_losses.py).
_TOKEN_LOSSES = {
    tuple(terms): _made(terms)
    for kind in KINDS
    for dual in (_FLAGS if kind == "clip" else (False,))
    for kl in (None, *KLS)
    for entropy in _FLAGS
    for corrected in _FLAGS
    for weighted in _FLAGS
    for terms in [Terms(kind, dual, kl, entropy, corrected, weighted)]
}
