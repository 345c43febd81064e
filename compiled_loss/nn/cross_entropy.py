"""Module shells of cross-entropy."""

from __future__ import annotations

from typing import Literal

from torch import Tensor, nn

from compiled_loss import checks
from compiled_loss.distributed.vocab_shard import VocabShard
from compiled_loss.functional.cross_entropy import cross_entropy, linear_cross_entropy
from compiled_loss.planner.chunking import Chunking


class CrossEntropy(nn.Module):
    """:func:`compiled_loss.cross_entropy` with its keywords kept.

    Example:
        >>> import torch
        >>> from compiled_loss import nn
        >>> nn.CrossEntropy(reduction="sum")(torch.zeros(2, 4), torch.tensor([1, -100]))
        tensor(1.3863)

    """

    class_weights: Tensor | None

    def __init__(
        self,
        *,
        class_weights: Tensor | None = None,
        ignore_index: int = -100,
        label_smoothing: float = 0.0,
        z_loss: float = 0.0,
        softcap: float | None = None,
        temperature: float = 1.0,
        shift: int = 0,
        reduction: str = "mean",
        class_dim: int = -1,
    ) -> None:
        super().__init__()
        checks.transform(softcap, temperature)
        checks.terms(label_smoothing, z_loss)
        checks.alignment(shift, ignore_index, 1)
        checks.reduction(reduction)
        checks.class_dim(class_dim)
        self.register_buffer("class_weights", class_weights)
        self.ignore_index = ignore_index
        self.label_smoothing = label_smoothing
        self.z_loss = z_loss
        self.softcap = softcap
        self.temperature = temperature
        self.shift = shift
        self.reduction = reduction
        self.class_dim = class_dim

    def forward(
        self,
        logits: Tensor,  # [..., V]
        labels: Tensor,  # [...] or [..., V]
        *,
        mask: Tensor | None = None,
        token_weights: Tensor | None = None,
        num_label_tokens: int | Tensor | None = None,
        vocab_shard: VocabShard | None = None,
        compile: bool | Literal["auto"] = "auto",
    ) -> Tensor:
        """The loss; see the function."""
        return cross_entropy(
            logits,
            labels,
            mask=mask,
            token_weights=token_weights,
            num_label_tokens=num_label_tokens,
            class_weights=self.class_weights,
            ignore_index=self.ignore_index,
            label_smoothing=self.label_smoothing,
            z_loss=self.z_loss,
            softcap=self.softcap,
            temperature=self.temperature,
            shift=self.shift,
            reduction=self.reduction,
            class_dim=self.class_dim,
            vocab_shard=vocab_shard,
            compile=compile,
        )


class LinearCrossEntropy(nn.Module):
    """:func:`compiled_loss.linear_cross_entropy` with its keywords kept; weight and bias come with each call.

    Example:
        >>> import torch
        >>> from compiled_loss import nn
        >>> loss = nn.LinearCrossEntropy(softcap=30.0)
        >>> loss(torch.zeros(2, 8), torch.zeros(4, 8), torch.tensor([1, -100]))
        tensor(1.3863)

    """

    class_weights: Tensor | None

    def __init__(
        self,
        *,
        class_weights: Tensor | None = None,
        ignore_index: int = -100,
        label_smoothing: float = 0.0,
        z_loss: float = 0.0,
        softcap: float | None = None,
        temperature: float = 1.0,
        shift: int = 0,
        reduction: str = "mean",
        chunking: Chunking = Chunking(),
    ) -> None:
        super().__init__()
        checks.transform(softcap, temperature)
        checks.terms(label_smoothing, z_loss)
        checks.alignment(shift, ignore_index, 1)
        checks.reduction(reduction)
        checks.instance("chunking", chunking, Chunking)
        self.register_buffer("class_weights", class_weights)
        self.ignore_index = ignore_index
        self.label_smoothing = label_smoothing
        self.z_loss = z_loss
        self.softcap = softcap
        self.temperature = temperature
        self.shift = shift
        self.reduction = reduction
        self.chunking = chunking

    def forward(
        self,
        hidden: Tensor,  # [..., H]
        weight: Tensor,  # [V, H]
        labels: Tensor,  # [...]
        *,
        bias: Tensor | None = None,  # [V]
        mask: Tensor | None = None,
        token_weights: Tensor | None = None,
        num_label_tokens: int | Tensor | None = None,
        vocab_shard: VocabShard | None = None,
    ) -> Tensor:
        """The loss; see the function."""
        return linear_cross_entropy(
            hidden,
            weight,
            labels,
            bias=bias,
            mask=mask,
            token_weights=token_weights,
            num_label_tokens=num_label_tokens,
            class_weights=self.class_weights,
            ignore_index=self.ignore_index,
            label_smoothing=self.label_smoothing,
            z_loss=self.z_loss,
            softcap=self.softcap,
            temperature=self.temperature,
            shift=self.shift,
            reduction=self.reduction,
            chunking=self.chunking,
            vocab_shard=vocab_shard,
        )
