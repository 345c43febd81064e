"""Modules of losses of logits with the names, signatures and defaults of NeMo Automodel; no mathematics.

The fields are spelled once, in a dataclass of options that the Module and its config inherit: NOTE [Kept keywords].
Errors name the arguments of these Modules and not those of the functions below.
"""

from dataclasses import dataclass, field
from typing import Any, ClassVar

from torch import Tensor

from compiled_loss import checks
from compiled_loss.compat.layouts import beside, mask_beside, with_own_ignore_index
from compiled_loss.compat.masked_cross_entropy import masked_cross_entropy
from compiled_loss.distributed.vocab_shard import Ranks, VocabShard
from compiled_loss.functional.distillation import distillation
from compiled_loss.nn.base import Loss, loss_module


@dataclass(eq=False, repr=False)
class MaskedCrossEntropyOptions:
    """The keywords that `MaskedCrossEntropy` and its config keep."""

    fp32_upcast: bool = True
    """Accepted and ignored."""
    ignore_index: int = -100
    """Label of tokens to ignore."""
    reduction: str = "sum"
    """"sum", "mean" or "none"."""


@loss_module()
@dataclass(eq=False, repr=False)
class MaskedCrossEntropy(MaskedCrossEntropyOptions, Loss):
    """:func:`compiled_loss.masked_cross_entropy` with its keywords kept: `fp32_upcast`, `ignore_index`, `reduction`.

    Example:
        >>> import torch
        >>> from compiled_loss import MaskedCrossEntropy
        >>> MaskedCrossEntropy()(torch.zeros(1, 2, 4), torch.tensor([[1, -100]]))
        tensor(1.3863)

    """

    takes_hidden_states: ClassVar[bool] = False

    @checks.modules.named(token_weights="loss_weights", **{"class_dim=1": "logits.movedim(1, -1)"})
    def forward(
        self,
        logits: Tensor,
        labels: Tensor,
        mask: Tensor | None = None,
        num_label_tokens: int | Tensor | None = None,
        loss_weights: Tensor | None = None,
    ) -> Tensor:
        """The loss of logits [B, S, V] and labels [B, S], or of a THD stream: [1, T, V] and [T].

        Labels of -100 are ignored beside those of `ignore_index`. `loss_weights`, shaped like the labels, multiply the
        tokens' losses of a "sum".
        """
        checks.modules.weighs_a_sum(loss_weights, self.reduction)
        return masked_cross_entropy(
            beside(logits, labels),
            with_own_ignore_index(labels, self.ignore_index),
            mask_beside(mask, labels),
            token_weights=mask_beside(loss_weights, labels),
            fp32_upcast=self.fp32_upcast,
            ignore_index=self.ignore_index,
            reduction=self.reduction,
            num_label_tokens=num_label_tokens,
        )


@dataclass(eq=False, repr=False)
class TEParallelCrossEntropyOptions:
    """The keywords that `TEParallelCrossEntropy` and its config keep."""

    ignore_index: int = -100
    """Label of tokens to ignore."""
    reduction: str = "sum"
    """"sum", "mean" or "none"."""
    tp_group: Any = None
    """The tensor-parallel process group, which exists where the program runs."""


@loss_module()
@dataclass(eq=False, repr=False)
class TEParallelCrossEntropy(TEParallelCrossEntropyOptions, Loss):
    """Cross-entropy on logits whose vocabulary is sharded over `tp_group`, or over a DTensor's own mesh.

    Each rank of `tp_group` has as many classes as the others, in the order of the group. Parts that differ in size are
    a DTensor, or `vocab_shard` of :func:`compiled_loss.masked_cross_entropy`.

    Example:
        >>> import torch
        >>> from compiled_loss import TEParallelCrossEntropy
        >>> TEParallelCrossEntropy()(torch.zeros(1, 2, 4), torch.tensor([[1, -100]]))
        tensor(1.3863)

    """

    takes_hidden_states: ClassVar[bool] = False

    def __post_init__(self) -> None:
        self._ranks = Ranks(self.tp_group)

    @checks.modules.named(vocab_size="logits", **{"class_dim=1": "logits.movedim(1, -1)"})
    def forward(
        self,
        logits: Tensor,
        labels: Tensor,
        mask: Tensor | None = None,
        num_label_tokens: int | Tensor | None = None,
    ) -> Tensor:
        """The loss of logits [..., V], or a rank's part of them, and labels [...], or of a THD stream.

        `num_label_tokens` divides a "sum", and is not looked at in the other reductions, as Automodel's is not.
        """
        return masked_cross_entropy(
            beside(logits, labels),
            labels,
            mask_beside(mask, labels),
            ignore_index=self.ignore_index,
            reduction=self.reduction,
            num_label_tokens=num_label_tokens if self.reduction == "sum" else None,
            vocab_shard=_shard(self._ranks, logits),
        )


@dataclass(eq=False, repr=False)
class KDLossOptions:
    """The keywords that `KDLoss` and its config keep."""

    ignore_index: int = -100
    """Label of tokens to ignore."""
    temperature: float = 1.0
    """Divides both logits, > 0."""
    fp32_upcast: bool = True
    """Accepted and ignored."""
    tp_group: Any = None
    """The tensor-parallel process group, which exists where the program runs."""
    chunk_size: int = 0
    """Accepted and ignored, an int >= 0."""
    temperature_squared: bool = field(default=True, kw_only=True)
    """True to multiply the loss by the temperature's square."""


@loss_module()
@dataclass(eq=False, repr=False)
class KDLoss(KDLossOptions, Loss):
    """Forward KL of a student from its teacher, times T squared: :func:`compiled_loss.distillation` with keywords kept.

    `tp_group`: see :class:`TEParallelCrossEntropy`; of both logits.

    Example:
        >>> import torch
        >>> from compiled_loss import KDLoss
        >>> student, teacher = torch.tensor([[[2.0, 0.0]]]), torch.tensor([[[0.0, 0.0]]])
        >>> KDLoss()(student, teacher, torch.tensor([[1]]))
        tensor(0.4338)

    """

    takes_hidden_states: ClassVar[bool] = False

    def __post_init__(self) -> None:
        self._ranks = Ranks(self.tp_group)

    @checks.modules.named(
        num_label_tokens="num_batch_labels",
        vocab_size="student_logits",
        **{"class_dim=1": "student_logits.movedim(1, -1)"},
    )
    def forward(
        self,
        student_logits: Tensor,
        teacher_logits: Tensor,
        labels: Tensor,
        num_batch_labels: int | Tensor | None = None,
    ) -> Tensor:
        """The sum over the valid tokens of labels [...] over `num_batch_labels`, or their mean."""
        checks.tensor("teacher_logits", teacher_logits)  # `distillation` has another form of it
        return distillation(
            beside(student_logits, labels),
            beside(teacher_logits, labels),
            labels,
            temperature=self.temperature,
            temperature_squared=self.temperature_squared,
            ignore_index=self.ignore_index,
            fp32_upcast=self.fp32_upcast,
            reduction="mean" if num_batch_labels is None else "sum",
            num_label_tokens=num_batch_labels,
            vocab_shard=_shard(self._ranks, student_logits),
            chunk_size=self.chunk_size,
        )


def _shard(ranks: Ranks, logits: Tensor) -> VocabShard | None:
    """Returns the rank's part of logits; None if they are no logits, for which the function itself raises."""
    return ranks.shard(logits) if isinstance(logits, Tensor) and logits.dim() else None
