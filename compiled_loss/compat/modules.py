"""Modules with the names, signatures and defaults of NeMo Automodel; no mathematics.

A loss that takes a head's hidden states and weight instead of logits says so with `takes_hidden_states = True`: that is
all that `calculate_loss` asks of it, whoever wrote it. Of a head with a bias it gets that too, as `lm_bias`.

The fields are spelled once, in a dataclass of options that the Module and its config inherit: NOTE [Kept keywords].
Errors name the arguments of these Modules and not those of the functions below.
"""

from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor

from compiled_loss import checks
from compiled_loss.compat.masked_cross_entropy import masked_cross_entropy
from compiled_loss.distributed.materialize import materialize
from compiled_loss.distributed.vocab_shard import Ranks, VocabShard
from compiled_loss.functional.cross_entropy import linear_cross_entropy
from compiled_loss.functional.distillation import distillation
from compiled_loss.nn.base import Loss, loss_module
from compiled_loss.planner.chunking import Chunking


@dataclass(eq=False, repr=False)
class MaskedCrossEntropyOptions:
    """The keywords that `MaskedCrossEntropy` and its config keep."""

    fp32_upcast: bool = True
    """Kept for its callers; without effect."""
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

    @checks.modules.named(**{"class_dim=1": "logits.movedim(1, -1)"})
    def forward(
        self,
        logits: Tensor,
        labels: Tensor,
        mask: Tensor | None = None,
        num_label_tokens: int | Tensor | None = None,
    ) -> Tensor:
        """The loss of logits [B, S, V] and labels [B, S], or of a THD stream: [1, T, V] and [T]."""
        return masked_cross_entropy(
            beside(logits, labels),
            labels,
            mask_beside(mask, labels),
            fp32_upcast=self.fp32_upcast,
            ignore_index=self.ignore_index,
            reduction=self.reduction,
            num_label_tokens=num_label_tokens,
        )


@dataclass(eq=False, repr=False)
class FusedLinearCrossEntropyOptions:
    """The keywords that `FusedLinearCrossEntropy` and its config keep."""

    ignore_index: int = -100
    """Label of tokens to ignore."""
    logit_softcapping: float = 0.0
    """Bound of the logits; 0 for none."""
    reduction: str = "sum"
    """"sum", "mean" or "none"."""
    chunking: Chunking = field(default=Chunking(), kw_only=True)
    """How the loss is chunked, which does not change what it is."""


@loss_module()
@dataclass(eq=False, repr=False)
class FusedLinearCrossEntropy(FusedLinearCrossEntropyOptions, Loss):
    """:func:`compiled_loss.linear_cross_entropy`: logits are never held. `logit_softcapping` 0 means none.

    Example:
        >>> import torch
        >>> from compiled_loss import FusedLinearCrossEntropy
        >>> FusedLinearCrossEntropy()(torch.zeros(1, 2, 8), torch.tensor([[1, -100]]), torch.zeros(4, 8))
        tensor(1.3863)

    """

    takes_hidden_states: ClassVar[bool] = True

    @checks.modules.named(
        hidden="hidden_states", weight="lm_weight", bias="lm_bias", softcap="logit_softcapping", second="third"
    )
    def forward(
        self,
        hidden_states: Tensor,
        labels: Tensor,
        lm_weight: Tensor,
        num_label_tokens: int | Tensor | None = None,
        grad_reduce_group: Any = None,
        lm_bias: Tensor | None = None,
    ) -> Tensor:
        """The loss of hidden states [B, S, H] and labels [B, S] under a head [V, H], and its bias [V] if it has one.

        Both may be a THD stream: [1, T, H] with labels [T]. A weight wider than the hidden states, as FSDP holds it
        under a mixed-precision policy, is multiplied in their dtype, and its gradient is in its own.
        """
        gather = self.materialize_lm_weight
        return linear_cross_entropy(
            beside(hidden_states, labels),
            gather(lm_weight, grad_reduce_group=grad_reduce_group, dtype=getattr(hidden_states, "dtype", None)),
            labels,
            bias=None if lm_bias is None else gather(lm_bias, grad_reduce_group=grad_reduce_group),
            ignore_index=self.ignore_index,
            softcap=self.logit_softcapping or None,
            reduction=self.reduction,
            num_label_tokens=num_label_tokens,
            chunking=self.chunking,
        )

    @staticmethod
    def materialize_lm_weight(
        lm_weight: Tensor, *, grad_reduce_group: Any = None, dtype: torch.dtype | None = None
    ) -> Tensor:
        """The whole weight: gathered once where it is a DTensor, to be shared by the main loss and all MTP depths.

        Its gradient is reduce-scattered once as the ranks' mean, which is what FSDP makes of all others. The weight is
        gathered over `grad_reduce_group`, or without it over all its mesh. The group may be that of one dimension, or
        of several, flattened (HSDP). What is sharded over another dimension than the group's stays so, and is a
        vocabulary over ranks; given to `forward` with the same group, it is not gathered again.

        Where `dtype` is narrower than the weight's, the weight is gathered in it, and its gradient reduced in the
        weight's: a mixed-precision policy's `param_dtype`, which is that of the hidden states.
        """
        checks.sharding.group_of("grad_reduce_group", grad_reduce_group)
        return materialize(lm_weight, grad_reduce_group, dtype)


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
    """Kept for its callers; without effect."""
    tp_group: Any = None
    """The tensor-parallel process group, which exists where the program runs."""
    chunk_size: int = 0
    """Kept for its callers, an int >= 0; without effect."""
    temperature_squared: bool = field(default=True, kw_only=True)
    """Whether the loss is multiplied by the temperature's square."""


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


def beside(values: Tensor, labels: Tensor) -> Tensor:
    """Logits or hidden states [..., X] in the shape of the labels, where one of both is flat or has a 1 more."""
    if not isinstance(values, Tensor) or not isinstance(labels, Tensor) or not values.dim():
        return values
    theirs, shape = values.shape[:-1], labels.shape
    if theirs == shape or theirs.numel() != shape.numel():
        return values
    flat = len(theirs) <= 1 or len(shape) <= 1 or [n for n in theirs if n != 1] == [n for n in shape if n != 1]
    return values.reshape(*shape, values.shape[-1]) if flat else values


def mask_beside(mask: Tensor | None, labels: Tensor) -> Tensor | None:
    """A mask of as many tokens in the shape of the labels, as `beside`."""
    if not isinstance(mask, Tensor) or mask.shape == labels.shape:
        return mask
    return beside(mask.unsqueeze(-1), labels).squeeze(-1)


def _shard(ranks: Ranks, logits: Tensor) -> VocabShard | None:
    """The rank's part of logits; None of what are none, and whose errors are the function's."""
    return ranks.shard(logits) if isinstance(logits, Tensor) and logits.dim() else None
