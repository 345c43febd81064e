"""A call of a fused head, and the second one in which its loss is computed.

NOTE [Called twice]
Where a head is a unit of its own of FSDP2 or ZeRO-3, its weight is there while it is called, and gone after. The loss
of its logits is asked for after. So the loss calls the head again, with what it wants in place of logits, and all hooks
do what they do for any Linear: gather the weight, free it, gather it for backward and reduce its gradient.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from compiled_loss.engine.math.statistics import TokenStatistics
from compiled_loss.functional.cross_entropy import linear_cross_entropy, linear_cross_entropy_with_statistics
from compiled_loss.functional.statistics import linear_token_statistics
from compiled_loss.integrations.transformers.transform import Transform
from compiled_loss.models.output_head import output_head
from compiled_loss.planner.chunking import Chunking


class HeadCall:
    """A head's logits [..., V] of one call, and what became of them."""

    def __init__(
        self, model: str, module: nn.Module, tokens: torch.Size, chunking: Chunking, wanted: Collection[str]
    ) -> None:
        self.model = model
        self.module: Any = module
        self.tokens = tokens  # the shape of all but the classes
        self.chunking = chunking
        self.wanted = wanted
        self.made: list[Any] = []  # deferred logits, of which one may outlive the model's forward
        self.losses = 0
        self.statistics: TokenStatistics | None = None

    def cross_entropy(self, hidden: Tensor, transform: Transform, labels: Tensor, keywords: dict[str, Any]) -> Tensor:
        """The cross-entropy of these logits: see `torch.nn.functional.cross_entropy`."""
        self.losses += 1
        loss: Tensor = self.module(hidden, asked=CrossEntropy(self, transform, labels, keywords))
        return loss

    def logsumexp(self, hidden: Tensor, transform: Transform) -> Tensor:
        """Their log-sum-exp [...], differentiable."""
        values: Tensor = self.module(hidden, asked=LogSumExp(self, transform))
        return values

    def of_tokens(self, values: Tensor) -> Tensor:
        """Statistics shaped as the head's tokens, where the loss is of all of them."""
        return values.reshape(self.tokens) if values.numel() == self.tokens.numel() else values

    def release(self) -> None:
        """Hold hidden states and head no longer."""
        for deferred in self.made:
            deferred.release()
        self.made = []
        self.module = None


class CrossEntropy(NamedTuple):
    """A loss of a head's logits."""

    call: HeadCall
    transform: Transform
    labels: Tensor
    keywords: dict[str, Any]

    def answer(self, module: nn.Module, hidden: Tensor) -> Tensor:
        """The loss, with this head."""
        call, keywords = self.call, {**self.keywords, **self.transform.keywords(), "chunking": self.call.chunking}
        weight, bias = self.transform.head(output_head(module, "model.get_output_embeddings()"))
        if not call.wanted:
            return linear_cross_entropy(hidden, weight, self.labels, bias=bias, **keywords)
        loss, found = linear_cross_entropy_with_statistics(hidden, weight, self.labels, bias=bias, **keywords)
        kept: dict[str, Any] = {
            name: call.of_tokens(value) if name in call.wanted else None for name, value in found._asdict().items()
        }
        call.statistics = TokenStatistics(**kept)
        return loss


class LogSumExp(NamedTuple):
    """The log-sum-exp of a head's logits."""

    call: HeadCall
    transform: Transform

    def answer(self, module: nn.Module, hidden: Tensor) -> Tensor:
        """It, with this head."""
        weight, bias = self.transform.head(output_head(module, "model.get_output_embeddings()"))
        labels = hidden.new_zeros(hidden.shape[:-1], dtype=torch.int64)
        found = linear_token_statistics(
            hidden,
            weight,
            labels,
            bias=bias,
            wanted=("logsumexp",),
            chunking=self.call.chunking,
            **self.transform.keywords(),
        )
        return found.logsumexp


Question = CrossEntropy | LogSumExp
