"""The options of a preference loss, checked, and the loss and its metrics as functions of log-probabilities.

Tokens have any shape [...]; P pairs are 2 P sequences, the chosen answers and then the rejected.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from compiled_loss import checks
from compiled_loss.functional.preference_terms import (
    DIVERGENCES,
    KINDS,
    MARGINED,
    SCORED,
    SMOOTHED,
    Numbers,
    pair_losses,
    scores,
)
from compiled_loss.functional.sequences import Sequences


class PreferenceMetrics(NamedTuple):
    """Metrics for logging: means over a rank's pairs that have a token. Each is [], detached.

    `reward_chosen`, `reward_rejected`: beta times the score that the loss compares.
    `reward_margin`: their difference.
    `accuracy`: the fraction of pairs whose chosen answer has the greater reward.
    `logprob_chosen`, `logprob_rejected`: the log-probability of an answer, the sum over its tokens.
    `nll_chosen`: the mean negative log-likelihood of the chosen answers' tokens.
    """

    reward_chosen: Tensor
    reward_rejected: Tensor
    reward_margin: Tensor
    accuracy: Tensor
    logprob_chosen: Tensor
    logprob_rejected: Tensor
    nll_chosen: Tensor


class PreferenceLoss(NamedTuple):
    """The result of a preference loss.

    `loss`: a scalar.
    `metrics`: what to log.
    `logprob`: the tokens' log-probabilities [...], 0 where they do not count, detached.
    `sequence_logprob`: the log-probability of each answer [2 P], detached.
    `reference_sequence_logprob`: the same under the reference, to be cached; None where there is none.
    """

    loss: Tensor
    metrics: PreferenceMetrics
    logprob: Tensor
    sequence_logprob: Tensor
    reference_sequence_logprob: Tensor | None


def checked_numbers(
    *,
    kind: str,
    beta: Any,
    label_smoothing: Any,
    margin: Any,
    length_normalised: bool,
    f_divergence: str,
    alpha: Any,
    sft_coefficient: Any,
) -> Numbers:
    """Returns the options that are numbers. Raises unless the options are in range and go together."""
    checks.policy.one_of("kind", kind, KINDS)
    checks.preference.normalised_length(length_normalised, kind)
    checks.preference.divergence(f_divergence, DIVERGENCES, kind, SCORED)
    numbers = Numbers(
        checks.policy.positive("beta", beta),
        checks.preference.smoothing(label_smoothing, kind, SMOOTHED),
        checks.policy.at_least_zero("margin", margin),
        checks.policy.number("alpha", alpha),
        checks.policy.at_least_zero("sft_coefficient", sft_coefficient),
    )
    if kind not in MARGINED:
        checks.preference.zero("margin", numbers.margin, kind)
    return numbers


class Preference(NamedTuple):
    """The options of a preference loss, and the values of pairs besides their tokens."""

    kind: str
    f_divergence: str
    length_normalised: bool
    numbers: Numbers
    pair_margins: Tensor | None  # [P]
    pair_weights: Tensor | None  # [P]
    num_chosen_tokens: int | Tensor | None

    @staticmethod
    def of(
        pairs: int,
        device: torch.device,
        *,
        kind: str,
        pair_margins: Tensor | None,
        pair_weights: Tensor | None,
        f_divergence: str,
        length_normalised: bool,
        num_chosen_tokens: Any,
        **numbers: Any,
    ) -> Preference:
        """Makes it from arguments, which are checked here."""
        found = checked_numbers(kind=kind, f_divergence=f_divergence, length_normalised=length_normalised, **numbers)
        checks.preference.of_each("pair_margins", pair_margins, pairs, "pair", device)
        checks.preference.of_each("pair_weights", pair_weights, pairs, "pair", device)
        if pair_margins is not None and kind not in MARGINED:
            checks.policy.unused("pair_margins", pair_margins, f"kind={kind!r}, which has no margin")
        tokens = checks.preference.num_chosen_tokens(num_chosen_tokens)
        return Preference(kind, f_divergence, length_normalised, found, pair_margins, pair_weights, tokens)

    def loss(
        self, logprob: Tensor, reference_logprob: Tensor | None, counts: Tensor, sequences: Sequences
    ) -> PreferenceLoss:
        """Computes the loss over the tokens that count. The values of other tokens are not used."""
        logprob = torch.where(counts, logprob, 0.0)
        one = torch.ones((), dtype=logprob.dtype, device=logprob.device)
        numbers, pairs = Numbers(*[one * v for v in self.numbers]), sequences.number // 2
        lengths, sums = sequences.sums(counts.to(logprob.dtype)), sequences.sums(logprob)
        reference = sums_of(reference_logprob, logprob, counts, sequences)
        log_ratios = sums if reference is None else sums - reference
        if self.length_normalised:
            log_ratios = log_ratios / lengths.clamp(min=1)
        values = scores(self.f_divergence, log_ratios, numbers.alpha)
        chosen, rejected = values[:pairs], values[pairs:]
        there = lengths[:pairs] + lengths[pairs:] > 0
        margins = numbers.margin
        if self.pair_margins is not None:
            margins = margins + torch.where(there, self.pair_margins.to(logprob.dtype), 0.0)
        losses = pair_losses(self.kind, chosen, rejected, margins.expand(pairs), numbers)
        loss = total(losses, there, self.pair_weights)
        nll, tokens = -sums[:pairs].sum(), lengths[:pairs].sum()
        if not checks.policy.is_zero(self.numbers.sft_coefficient):
            number = tokens if self.num_chosen_tokens is None else one * self.num_chosen_tokens
            loss = loss + numbers.sft_coefficient * nll / number.clamp(min=1)
        metrics = PreferenceMetrics(
            reward_chosen=mean(numbers.beta * chosen, there),
            reward_rejected=mean(numbers.beta * rejected, there),
            reward_margin=mean(numbers.beta * (chosen - rejected), there),
            accuracy=mean((chosen > rejected).to(logprob.dtype), there),
            logprob_chosen=mean(sums[:pairs], there),
            logprob_rejected=mean(sums[pairs:], there),
            nll_chosen=(nll / tokens.clamp(min=1)).detach(),
        )
        return PreferenceLoss(loss, metrics, logprob.detach(), sums.detach(), reference)


def sums_of(logprob: Tensor | None, like: Tensor, counts: Tensor, sequences: Sequences) -> Tensor | None:
    """Returns a reference's log-probability of each sequence, from that of tokens or of sequences; without gradient."""
    if logprob is None:
        return None
    logprob = logprob.detach().to(like.dtype)
    if logprob.shape != counts.shape:
        there = sequences.sums(counts.to(like.dtype)) > 0
        return torch.where(there, logprob, 0.0)
    return sequences.sums(torch.where(counts, logprob, 0.0))


def total(losses: Tensor, there: Tensor, weights: Tensor | None) -> Tensor:
    """Returns the sum of the losses that are there times their weights; without weights, their mean."""
    if weights is None:
        return torch.where(there, losses, 0.0).sum() / there.sum().clamp(min=1)
    weights = torch.where(there, weights.to(losses.dtype), 0.0)
    return (torch.where(there, losses, 0.0) * weights).sum()


def mean(values: Tensor, there: Tensor) -> Tensor:
    """Returns the mean of the values that are there, detached; 0 if there is none."""
    return torch.where(there, values.detach(), 0.0).sum() / there.sum().clamp(min=1)
