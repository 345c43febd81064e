"""Functions that a head's logits are asked for: of hidden states, weight and keywords, as our linear functions are."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from compiled_loss.functional.cross_entropy import linear_cross_entropy, linear_cross_entropy_with_statistics
from compiled_loss.functional.statistics import linear_token_statistics
from compiled_loss.integrations.transformers.head_call import HeadCall


def cross_entropy(call: HeadCall, labels: Tensor, given: dict[str, Any]) -> Callable[..., Tensor]:
    """Returns a function that computes the cross-entropy; the call keeps the statistics that are wanted."""

    def loss(hidden: Tensor, weight: Tensor, **keywords: Any) -> Tensor:
        keywords = {**given, **keywords, "chunking": call.chunking}
        if not call.wanted:
            return linear_cross_entropy(hidden, weight, labels, **keywords)
        value, found = linear_cross_entropy_with_statistics(hidden, weight, labels, **keywords)
        call.keep(found)
        return value

    return loss


def logsumexp(call: HeadCall, shape: torch.Size) -> Callable[..., Tensor]:
    """Returns a function that computes the log-sum-exp, [...], of tokens of this shape."""

    def of_tokens(hidden: Tensor, weight: Tensor, **keywords: Any) -> Tensor:
        labels, wanted = hidden.new_zeros(shape, dtype=torch.int64), ("logsumexp",)
        found = linear_token_statistics(hidden, weight, labels, wanted=wanted, chunking=call.chunking, **keywords)
        return found.logsumexp

    return of_tokens


def log_probs(call: HeadCall, labels: Tensor, classes: int) -> Callable[..., tuple[Tensor, Tensor]]:
    """Returns a function that computes the labels' log-probabilities, [...], and the sums of those of all classes."""

    def of_tokens(hidden: Tensor, weight: Tensor, **keywords: Any) -> tuple[Tensor, Tensor]:
        wanted = ("logprob", "logsumexp", "mean_logit")
        found = linear_token_statistics(hidden, weight, labels, wanted=wanted, chunking=call.chunking, **keywords)
        assert found.mean_logit is not None
        return found.logprob, classes * (found.mean_logit - found.logsumexp)

    return of_tokens
