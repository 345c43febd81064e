"""Module shell of multi-token prediction."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from compiled_loss import checks
from compiled_loss.distributed.vocab_shard import VocabShard
from compiled_loss.functional.multi_token import multi_token_prediction
from compiled_loss.planner.chunking import Chunking


class MultiTokenPrediction(nn.Module):
    """:func:`compiled_loss.multi_token_prediction` with its keywords kept; the packing comes with each call.

    Example:
        >>> import torch
        >>> from compiled_loss import nn
        >>> hidden = [torch.zeros(1, 4, 8), torch.zeros(1, 4, 8)]
        >>> nn.MultiTokenPrediction(scaling_factor=1.0)(hidden, torch.zeros(5, 8), torch.tensor([[0, 1, 2, 3]]))
        tensor(1.6094)

    """

    def __init__(
        self,
        *,
        scaling_factor: float = 0.1,
        ignore_index: int = -100,
        softcap: float | None = None,
        chunking: Chunking = Chunking(),
    ) -> None:
        super().__init__()
        checks.multi_token.scaling(scaling_factor)
        checks.alignment(0, ignore_index, 1)
        checks.transform(softcap, 1.0)
        checks.instance("chunking", chunking, Chunking)
        self.scaling_factor = scaling_factor
        self.ignore_index = ignore_index
        self.softcap = softcap
        self.chunking = chunking

    def forward(
        self,
        hidden: Sequence[Tensor],  # D of [..., H]
        weight: Tensor,  # [V, H]
        labels: Tensor,  # [...]
        *,
        seq_idx: Tensor | None = None,  # [B, S] or [S]
        cu_seqlens: Tensor | None = None,  # [sequences + 1]
        targets: Sequence[Tensor] | None = None,  # D of [...]
        mask: Tensor | None = None,  # broadcasts to the labels
        num_label_tokens: int | Tensor | None = None,
        vocab_shard: VocabShard | None = None,
    ) -> Tensor:
        """The loss; see the function."""
        return multi_token_prediction(
            hidden,
            weight,
            labels,
            seq_idx=seq_idx,
            cu_seqlens=cu_seqlens,
            targets=targets,
            mask=mask,
            num_label_tokens=num_label_tokens,
            scaling_factor=self.scaling_factor,
            ignore_index=self.ignore_index,
            softcap=self.softcap,
            chunking=self.chunking,
            vocab_shard=vocab_shard,
        )
