"""Module shells of distillation."""

from __future__ import annotations

from typing import Literal

from torch import Tensor, nn

from compiled_loss import checks
from compiled_loss.distributed.vocab_shard import VocabShard
from compiled_loss.functional.distillation import distillation, linear_distillation
from compiled_loss.planner.chunking import Chunking


class Distillation(nn.Module):
    """:func:`compiled_loss.distillation` with its keywords kept; a cached teacher comes with each call.

    Example:
        >>> import torch
        >>> from compiled_loss import nn
        >>> student, teacher = torch.tensor([[2.0, 0.0]]), torch.tensor([[0.0, 0.0]])
        >>> nn.Distillation()(student, teacher, torch.tensor([1]))
        tensor(0.4338)

    """

    def __init__(
        self,
        *,
        divergence: str = "forward_kl",
        jsd_weight: float = 0.5,
        temperature: float = 1.0,
        hard_label_weight: float = 0.0,
        ignore_index: int = -100,
        fp32_upcast: bool = True,
        reduction: str = "mean",
        class_dim: int = -1,
        chunk_size: int = 0,
    ) -> None:
        super().__init__()
        checks.targets.distillation(divergence, jsd_weight, temperature, hard_label_weight, fp32_upcast, chunk_size)
        checks.alignment(0, ignore_index, 1)
        checks.reduction(reduction)
        checks.class_dim(class_dim)
        self.divergence = divergence
        self.jsd_weight = jsd_weight
        self.temperature = temperature
        self.hard_label_weight = hard_label_weight
        self.ignore_index = ignore_index
        self.fp32_upcast = fp32_upcast
        self.reduction = reduction
        self.class_dim = class_dim
        self.chunk_size = chunk_size

    def forward(
        self,
        student_logits: Tensor,  # [..., V]
        teacher_logits: Tensor | None,  # [..., V]
        labels: Tensor,  # [...]
        *,
        teacher_topk: tuple[Tensor, Tensor] | None = None,  # [..., k] each
        num_label_tokens: int | Tensor | None = None,
        vocab_shard: VocabShard | None = None,
        compile: bool | Literal["auto"] = "auto",
    ) -> Tensor:
        """The loss; see the function."""
        return distillation(
            student_logits,
            teacher_logits,
            labels,
            teacher_topk=teacher_topk,
            num_label_tokens=num_label_tokens,
            divergence=self.divergence,
            jsd_weight=self.jsd_weight,
            temperature=self.temperature,
            hard_label_weight=self.hard_label_weight,
            ignore_index=self.ignore_index,
            fp32_upcast=self.fp32_upcast,
            reduction=self.reduction,
            class_dim=self.class_dim,
            chunk_size=self.chunk_size,
            compile=compile,
            vocab_shard=vocab_shard,
        )


class LinearDistillation(nn.Module):
    """:func:`compiled_loss.linear_distillation` with its keywords kept; both heads come with each call.

    Example:
        >>> import torch
        >>> from compiled_loss import nn
        >>> student, teacher = torch.tensor([[2.0], [0.0]]), torch.zeros(2, 3)
        >>> nn.LinearDistillation()(torch.ones(1, 1), student, torch.ones(1, 3), teacher, torch.tensor([1]))
        tensor(0.4338)

    """

    def __init__(
        self,
        *,
        divergence: str = "forward_kl",
        jsd_weight: float = 0.5,
        temperature: float = 1.0,
        hard_label_weight: float = 0.0,
        ignore_index: int = -100,
        reduction: str = "mean",
        chunking: Chunking = Chunking(),
    ) -> None:
        super().__init__()
        checks.targets.distillation(divergence, jsd_weight, temperature, hard_label_weight, True, 0)
        checks.alignment(0, ignore_index, 1)
        checks.reduction(reduction)
        checks.instance("chunking", chunking, Chunking)
        self.divergence = divergence
        self.jsd_weight = jsd_weight
        self.temperature = temperature
        self.hard_label_weight = hard_label_weight
        self.ignore_index = ignore_index
        self.reduction = reduction
        self.chunking = chunking

    def forward(
        self,
        student_hidden: Tensor,  # [..., H]
        student_weight: Tensor,  # [V, H]
        teacher_hidden: Tensor | None,  # [..., H']
        teacher_weight: Tensor | None,  # [V, H']
        labels: Tensor,  # [...]
        *,
        teacher_topk: tuple[Tensor, Tensor] | None = None,  # [..., k] each
        num_label_tokens: int | Tensor | None = None,
        vocab_shard: VocabShard | None = None,
    ) -> Tensor:
        """The loss; see the function."""
        return linear_distillation(
            student_hidden,
            student_weight,
            teacher_hidden,
            teacher_weight,
            labels,
            teacher_topk=teacher_topk,
            num_label_tokens=num_label_tokens,
            divergence=self.divergence,
            jsd_weight=self.jsd_weight,
            temperature=self.temperature,
            hard_label_weight=self.hard_label_weight,
            ignore_index=self.ignore_index,
            reduction=self.reduction,
            chunking=self.chunking,
            vocab_shard=vocab_shard,
        )
