"""Module shell of cross-entropy with soft targets."""

from __future__ import annotations

from torch import Tensor, nn

from compiled_loss import checks
from compiled_loss.distributed.vocab_shard import VocabShard
from compiled_loss.functional.soft_cross_entropy import linear_soft_cross_entropy
from compiled_loss.planner.chunking import Chunking


class LinearSoftCrossEntropy(nn.Module):
    """:func:`compiled_loss.linear_soft_cross_entropy` with its keywords kept; the target comes with each call.

    Example:
        >>> import torch
        >>> from compiled_loss import nn
        >>> loss = nn.LinearSoftCrossEntropy()
        >>> loss(torch.zeros(1, 8), torch.zeros(4, 8), torch.ones(1), target_probs=torch.full((1, 4), 0.25))
        tensor(1.3863)

    """

    def __init__(
        self,
        *,
        temperature: float = 1.0,
        chunking: Chunking = Chunking(),
    ) -> None:
        super().__init__()
        checks.transform(None, temperature)
        checks.instance("chunking", chunking, Chunking)
        self.temperature = temperature
        self.chunking = chunking

    def forward(
        self,
        hidden: Tensor,  # [..., H]
        weight: Tensor,  # [V, H]
        position_mask: Tensor,  # [..., 1] or [...]
        *,
        target_probs: Tensor | None = None,  # [..., V]
        teacher_hidden: Tensor | None = None,  # [..., H']
        teacher_weight: Tensor | None = None,  # [V, H']
        draft_to_target: Tensor | None = None,  # [V]
        num_label_tokens: int | Tensor | None = None,
        vocab_shard: VocabShard | None = None,
    ) -> Tensor:
        """The loss; see the function."""
        return linear_soft_cross_entropy(
            hidden,
            weight,
            position_mask,
            target_probs=target_probs,
            teacher_hidden=teacher_hidden,
            teacher_weight=teacher_weight,
            draft_to_target=draft_to_target,
            num_label_tokens=num_label_tokens,
            temperature=self.temperature,
            chunking=self.chunking,
            vocab_shard=vocab_shard,
        )
