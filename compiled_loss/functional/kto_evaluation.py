"""The options of a loss of single answers, checked, and the loss as a function of log-probabilities.

Tokens have any shape [...]; B answers.
"""

from __future__ import annotations

from typing import Any, Literal, NamedTuple, get_args

import torch
from torch import Tensor

from compiled_loss import checks
from compiled_loss.functional.preference_evaluation import mean, sums_of, total
from compiled_loss.functional.sequences import Sequences

Kind = Literal["kto", "apo_zero_unpaired"]
KINDS = get_args(Kind)


class KTOMetrics(NamedTuple):
    """Metrics for logging: means over a rank's answers that have a token. Each is [], detached, and 0 of no answers.

    `reward_desirable`, `reward_undesirable`: beta times the log-ratio of an answer.
    `reward_margin`: their difference.
    `logprob_desirable`, `logprob_undesirable`: the log-probability of an answer, the sum over its tokens.
    `kl`: the baseline; None where there is none.
    """

    reward_desirable: Tensor
    reward_undesirable: Tensor
    reward_margin: Tensor
    logprob_desirable: Tensor
    logprob_undesirable: Tensor
    kl: Tensor | None


class KTOLoss(NamedTuple):
    """The result of a loss of single answers.

    `loss`: a scalar.
    `metrics`: what to log.
    `logprob`: the tokens' log-probabilities [...], 0 where they do not count, detached.
    `sequence_logprob`: the log-probability of each answer [B], detached.
    `reference_sequence_logprob`: the same under the reference, to be cached; None where there is none.
    """

    loss: Tensor
    metrics: KTOMetrics
    logprob: Tensor
    sequence_logprob: Tensor
    reference_sequence_logprob: Tensor | None


class Numbers(NamedTuple):
    """The options that are numbers."""

    beta: Any
    desirable_weight: Any
    undesirable_weight: Any


def checked_numbers(*, kind: str, beta: Any, desirable_weight: Any, undesirable_weight: Any) -> Numbers:
    """Returns the options that are numbers. Raises unless each is in its range."""
    checks.policy.one_of("kind", kind, KINDS)
    return Numbers(
        checks.policy.positive("beta", beta),
        checks.policy.at_least_zero("desirable_weight", desirable_weight),
        checks.policy.at_least_zero("undesirable_weight", undesirable_weight),
    )


class Unpaired(NamedTuple):
    """The options of the loss, and the values of answers besides their tokens."""

    kind: str
    numbers: Numbers
    desirable: Tensor  # [B]
    kl: Tensor | None  # [K] or []
    sequence_weights: Tensor | None  # [B]

    @staticmethod
    def of(
        desirable: Tensor, kl: Tensor | None, sequence_weights: Tensor | None, *, kind: str, **numbers: Any
    ) -> Unpaired:
        """Makes it from arguments, which are checked here, except `desirable`, which is checked already."""
        found = checked_numbers(kind=kind, **numbers)
        checks.preference.baseline(kl, kind, desirable.device)
        checks.preference.of_each("sequence_weights", sequence_weights, desirable.shape[0], "answer", desirable.device)
        return Unpaired(kind, found, desirable, kl, sequence_weights)

    def loss(self, logprob: Tensor, reference_logprob: Tensor | None, counts: Tensor, sequences: Sequences) -> KTOLoss:
        """Computes the loss over the tokens that count. The values of other tokens are not used."""
        logprob = torch.where(counts, logprob, 0.0)
        one = torch.ones((), dtype=logprob.dtype, device=logprob.device)
        numbers, desirable = Numbers(*[one * v for v in self.numbers]), self.desirable
        lengths, sums = sequences.sums(counts.to(logprob.dtype)), sequences.sums(logprob)
        reference = sums_of(reference_logprob, logprob, counts, sequences)
        log_ratios = sums if reference is None else sums - reference
        kl = None if self.kl is None else self.kl.detach().to(logprob.dtype).mean().clamp(min=0)
        gains = log_ratios if kl is None else log_ratios - kl
        losses = (numbers.beta * torch.where(desirable, -gains, gains)).sigmoid()
        losses = losses * torch.where(desirable, numbers.desirable_weight, numbers.undesirable_weight)
        there = lengths > 0
        good, bad = there & desirable, there & ~desirable
        rewards = (numbers.beta * log_ratios).detach()
        metrics = KTOMetrics(
            reward_desirable=mean(rewards, good),
            reward_undesirable=mean(rewards, bad),
            reward_margin=mean(rewards, good) - mean(rewards, bad),
            logprob_desirable=mean(sums, good),
            logprob_undesirable=mean(sums, bad),
            kl=kl,
        )
        loss = total(losses, there, self.sequence_weights)
        return KTOLoss(loss, metrics, logprob.detach(), sums.detach(), reference)
