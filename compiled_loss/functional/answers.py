"""Log-probabilities of answers' tokens under a linear head and under a reference, without holding the logits.

Tokens have any shape [...]. H width, V vocabulary.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from compiled_loss import checks, reduction
from compiled_loss.dispatch.keywords import Keywords
from compiled_loss.dispatch.linear import check_tokens, linear_call
from compiled_loss.distributed import dtensor
from compiled_loss.engine.math.statistics import Wanted
from compiled_loss.functional.sequences import Sequences
from compiled_loss.functional.statistics import of_tokens

_NAMES = {"hidden": "reference_hidden", "weight": "reference_weight", "bias": "reference_bias"}


class Reference(NamedTuple):
    """A reference policy: log-probabilities of the tokens, or hidden states and a head, or nothing."""

    logprob: Tensor | None
    hidden: Tensor | None
    weight: Tensor | None  # None for the policy's head
    bias: Tensor | None

    def check(self, labels: Tensor, weight: Tensor, keywords: Keywords, sequences: int, kind: str) -> None:
        """Raises unless the reference fits the policy's tokens."""
        checks.preference.one_reference(self.logprob, self.hidden, self.weight, self.bias, kind)
        checks.preference.reference_logprob(self.logprob, labels.shape, sequences, labels.device)
        if self.hidden is not None:
            weight, keywords = self._head(weight, keywords)
            checks.modules.calling(_NAMES, check_tokens, self.hidden, weight, labels, keywords)

    def logprobs(self, weight: Tensor, labels: Tensor, keywords: Keywords) -> Tensor | None:
        """Returns the reference's log-probabilities, from its hidden states if it has these; without gradient."""
        if self.hidden is None:
            return self.logprob
        weight, keywords = self._head(weight, keywords)
        with torch.no_grad():
            call = checks.modules.calling(_NAMES, linear_call, self.hidden, weight, labels, keywords, statistics=True)
            return of_tokens(call.statistics(Wanted()), call.tokens, ("logprob",)).logprob

    def _head(self, weight: Tensor, keywords: Keywords) -> tuple[Tensor, Keywords]:
        if self.weight is None:
            return weight, keywords
        return self.weight, keywords._replace(bias=self.bias)


class Answers(NamedTuple):
    """Log-probabilities of answers' tokens, [...], those of the reference, and the tokens that count."""

    logprob: Tensor
    reference_logprob: Tensor | None  # of tokens, [...], or of answers
    counts: Tensor
    sequences: Sequences


def check_answers(hidden: Tensor, weight: Tensor, labels: Tensor, keywords: Keywords) -> None:
    """Raises unless a rank has all tokens of its answers."""
    part, _ = check_tokens(hidden, weight, labels, keywords)
    checks.preference.whole_answers(part.token_mesh_dims)


def linear_answers(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    keywords: Keywords,
    reference: Reference,
    segment_ids: Tensor | None,
    number: int,
    of: str,
) -> Answers:
    """Computes the log-probabilities of the answers' tokens.

    Everything is checked already, except numbers and the values in tensors. `of` says what `number` counts.
    """
    call = linear_call(hidden, weight, labels, keywords, statistics=True)
    counts, part = call.tokens.active, call.vocabulary
    if segment_ids is not None:
        segment_ids = reduction.shifted(dtensor.rows(segment_ids, part), call.keywords.shift, -1)
        checks.policy.segments_in_range(segment_ids, counts, number, of)
    logprob = of_tokens(call.statistics(Wanted()), call.tokens, ("logprob",)).logprob
    compared = reference.logprobs(weight, labels, keywords)
    compared = None if compared is None else dtensor.rows(compared, part)
    return Answers(logprob, compared, counts, Sequences(number, segment_ids))
