"""The options of a policy loss, checked, and the loss and its metrics as functions of log-probabilities.

Tokens have any leading shape [...].
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from compiled_loss import checks
from compiled_loss.engine.math.statistics import TokenStatistics
from compiled_loss.functional.policy_terms import (
    KINDS,
    KLS,
    Numbers,
    Rows,
    Terms,
    bounded,
    inputs_of,
    kl_of,
    token_loss,
)
from compiled_loss.functional.weights import means_of_sequences


class PolicyMetrics(NamedTuple):
    """Metrics for logging: means over a rank's tokens that count. Each is [], detached; None if it was not asked for.

    `ratio_mean`, `ratio_min`, `ratio_max`: of the importance ratio, a token's own or its sequence's.
    `kl_to_old`: r - 1 - log r of r = exp(logprob - old_logprob), an estimate of KL(old || new), never negative.
    `clipped_low`: the fraction of tokens whose ratio is below its bound while their advantage is negative.
    `clipped_high`: the fraction of tokens whose ratio is above its bound while their advantage is positive.
    `kl_to_reference`: the estimate that the loss adds.
    `entropy`: of the policy.
    """

    ratio_mean: Tensor
    ratio_min: Tensor
    ratio_max: Tensor
    kl_to_old: Tensor
    clipped_low: Tensor | None
    clipped_high: Tensor | None
    kl_to_reference: Tensor | None
    entropy: Tensor | None


class PolicyLoss(NamedTuple):
    """The result of a policy loss.

    `loss`: a scalar.
    `metrics`: what to log.
    `logprob`: the log-probabilities of the same pass [...], detached.
    """

    loss: Tensor
    metrics: PolicyMetrics
    logprob: Tensor


def checked_numbers(
    *,
    kind: str,
    importance: str,
    clip_low: Any,
    clip_high: Any,
    dual_clip: Any,
    temperature_positive: Any,
    temperature_negative: Any,
    kl: str,
    kl_coefficient: Any,
    entropy_coefficient: Any,
) -> Numbers:
    """Returns the options that are numbers. Raises unless the options are in range and go together."""
    checks.policy.one_of("kind", kind, KINDS)
    checks.policy.one_of("kl", kl, KLS)
    checks.policy.one_of("importance", importance, ("token", "sequence"))
    checks.policy.sequences_alone(kind, importance)
    dual = checks.policy.dual_clip(dual_clip, kind)
    return Numbers(
        checks.policy.at_least_zero("clip_low", clip_low),
        checks.policy.at_least_zero("clip_high", clip_high),
        0.0 if dual is None else dual,
        checks.policy.positive("temperature_positive", temperature_positive),
        checks.policy.positive("temperature_negative", temperature_negative),
        checks.policy.at_least_zero("kl_coefficient", kl_coefficient),
        checks.policy.at_least_zero("entropy_coefficient", entropy_coefficient),
    )


class Policy(NamedTuple):
    """The options of a policy loss."""

    terms: Terms
    rows: Rows  # [...] each
    numbers: Numbers
    importance: str

    @staticmethod
    def of(
        shape: torch.Size,
        device: torch.device,
        *,
        old_logprob: Tensor,
        advantages: Tensor,
        token_weights: Tensor | None,
        reference_logprob: Tensor | None,
        correction: Tensor | None,
        entropy_weights: Tensor | None,
        **options: Any,
    ) -> Policy:
        """Makes it from arguments, which are checked here: the loss's terms, the values of tokens, and the numbers."""
        numbers = checked_numbers(**options)
        advantages = checks.policy.expanded("advantages", advantages, shape, device)
        checks.policy.of_tokens("old_logprob", old_logprob, shape, device, floating=True)
        for name, value in (("reference_logprob", reference_logprob), ("correction", correction)):
            if value is not None:
                checks.policy.of_tokens(name, value, shape, device, floating=True)
        token_weights = checks.policy.broadcast("token_weights", token_weights, shape, device)
        entropy_weights = checks.policy.broadcast("entropy_weights", entropy_weights, shape, device)
        bonus = not checks.policy.is_zero(numbers.entropy_coefficient)
        if reference_logprob is None and not checks.policy.is_zero(numbers.kl_coefficient):
            checks.policy.needed("reference_logprob", None, "kl_coefficient is not 0")
        if entropy_weights is not None:
            checks.policy.needed("token_weights", token_weights, "entropy_weights are given")
        elif bonus:
            entropy_weights = token_weights
        if not bonus:
            entropy_weights = None
        terms = Terms(
            kind=options["kind"],
            dual=options["dual_clip"] is not None,
            kl=None if reference_logprob is None else options["kl"],
            entropy=bonus,
            corrected=correction is not None,
            weighted=token_weights is not None,
        )
        rows = Rows(old_logprob, advantages, token_weights, reference_logprob, correction, entropy_weights)
        return Policy(terms, rows, numbers, options["importance"])

    def without_weights(self) -> tuple[Policy, Tensor | None]:
        """Returns the same policy for tokens that weigh 1, and their weights, which are the entropy's too."""
        rows = self.rows._replace(weight=None, entropy_weight=None)
        return self._replace(terms=self.terms._replace(weighted=False), rows=rows), self.rows.weight

    def with_relative_weights(self) -> tuple[Policy, Tensor]:
        """Returns the same policy with weights relative to the larger of each token's two, and the larger ones.

        The engine scales fp16 gradients by the weight of a token's loss, and does not know of weights inside it.
        """
        weight, bonus = self.rows.weight, self.rows.entropy_weight
        assert weight is not None
        larger = weight.detach().abs()
        if bonus is not None:
            larger = torch.maximum(larger, bonus.detach().abs())
        larger = larger.to(torch.float32).clamp(min=torch.finfo(torch.float32).tiny)  # a weight of 0 has a gradient
        rows = self.rows._replace(weight=weight / larger, entropy_weight=None if bonus is None else bonus / larger)
        return self._replace(rows=rows), larger

    def loss(self, logprob: Tensor, entropy: Tensor | None, counts: Tensor, segment_ids: Tensor | None) -> PolicyLoss:
        """Computes the loss over the tokens that count. The values of other tokens are not used."""
        rows = self.rows.map(lambda v: torch.where(counts, v, 0.0))
        logprob = torch.where(counts, logprob, 0.0)
        entropy = None if entropy is None else torch.where(counts, entropy, 0.0)
        detached, old = logprob.detach(), rows.old_logprob
        if self.importance == "sequence":  # each token has the mean ratio of its sequence
            log_ratio = detached - old.detach()
            free = self.free(log_ratio, rows.advantages)
            if free is not None:  # all other log-ratios are at their bound, without a gradient
                log_ratio = torch.where(free, log_ratio, self.bound(rows.advantages))
            old = detached if free is None else torch.where(free, detached, logprob)
            old = old - means_of_sequences(log_ratio, counts, segment_ids)
        one = torch.ones((), dtype=logprob.dtype, device=logprob.device)
        statistics = TokenStatistics(logprob, logprob, logprob if entropy is None else entropy, counts)
        inputs = inputs_of(rows._replace(old_logprob=old), Numbers(*[one * v for v in self.numbers]))
        loss = torch.where(counts, token_loss(self.terms)(statistics, *inputs), 0.0).sum()
        if rows.weight is None:
            loss = loss / counts.sum().clamp(min=1)
        entropy = None if entropy is None else entropy.detach()
        return PolicyLoss(loss, self._replace(rows=rows).metrics(detached, old, counts, entropy), detached)

    def bound(self, advantages: Tensor) -> Tensor:
        """Returns each token's bound of the log-ratio in "gmpo": the upper one, or the lower one if A < 0."""
        by, ones = self.numbers, torch.ones_like(advantages)  # products: keywords.py, `scales`
        return torch.where(advantages < 0, -(ones * by.clip_low), ones * by.clip_high)

    def free(self, log_ratio: Tensor, advantages: Tensor) -> Tensor | None:
        """Returns True for log-ratios within the bound of "gmpo"; None for other kinds."""
        if self.terms.kind != "gmpo":
            return None
        bound = self.bound(advantages)
        return torch.where(advantages < 0, log_ratio >= bound, log_ratio <= bound)

    def metrics(self, logprob: Tensor, compared: Tensor, counts: Tensor, entropy: Tensor | None) -> PolicyMetrics:
        """Returns metrics of the ratio to `compared`, as in the loss. The KL is of the tokens' own log-ratios."""
        terms, numbers = self.terms, self.numbers
        rows, compared = self.rows.map(Tensor.detach), compared.detach()
        number = counts.sum().clamp(min=1)

        def mean(values: Tensor) -> Tensor:
            return torch.where(counts, values, 0.0).sum() / number

        log_ratio = torch.where(counts, logprob - rows.old_logprob, 0.0)
        ratio = bounded(torch.where(counts, logprob - compared, 0.0)).exp()
        low = high = None
        if terms.kind in ("clip", "cispo_two_sided"):
            low = mean(((ratio < 1 - numbers.clip_low) & (rows.advantages < 0)).to(ratio.dtype))
            high = mean(((ratio > 1 + numbers.clip_high) & (rows.advantages > 0)).to(ratio.dtype))
        elif terms.kind == "gmpo":
            free = self.free(log_ratio, rows.advantages)
            assert free is not None
            low, high = (mean((~free & sign).to(ratio.dtype)) for sign in (rows.advantages < 0, rows.advantages > 0))
        elif terms.kind == "cispo":
            high = mean(((ratio > numbers.clip_high) & (rows.advantages > 0)).to(ratio.dtype))
        reference = None
        if terms.kl is not None and rows.reference_logprob is not None:
            reference = mean(kl_of(terms.kl, logprob, rows.reference_logprob))
        return PolicyMetrics(
            ratio_mean=mean(ratio),
            ratio_min=torch.where(counts, ratio, torch.inf).amin() if ratio.numel() else ratio.new_zeros(()),
            ratio_max=torch.where(counts, ratio, -torch.inf).amax() if ratio.numel() else ratio.new_zeros(()),
            kl_to_old=mean(bounded(log_ratio).expm1() - log_ratio),
            clipped_low=low,
            clipped_high=high,
            kl_to_reference=reference,
            entropy=None if entropy is None else mean(entropy),
        )
