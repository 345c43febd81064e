"""Modules of losses of a head with the names, signatures and defaults of NeMo Automodel; no mathematics.

A loss that takes a head's hidden states and weight instead of logits declares it by `takes_hidden_states = True`.
`calculate_loss` needs nothing else, whoever wrote the loss. If the head has a bias, the loss gets it as `lm_bias`.
"""

from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch import distributed as dist

from compiled_loss import checks
from compiled_loss.compat.layouts import beside, mask_beside, with_own_ignore_index
from compiled_loss.distributed.materialize import materialize
from compiled_loss.functional.cross_entropy import linear_cross_entropy
from compiled_loss.models import outputs as models
from compiled_loss.models.output_head import output_head
from compiled_loss.nn.base import Loss, loss_module
from compiled_loss.planner.chunking import Chunking


@dataclass(eq=False, repr=False)
class LinearHeadLoss(Loss):
    """The base of losses of hidden states and a head's weight."""

    takes_hidden_states: ClassVar[bool] = True

    @checks.modules.named(
        hidden="hidden_states",
        weight="lm_weight",
        bias="lm_bias",
        softcap="logit_softcapping",
        token_weights="loss_weights",
        second="third",
    )
    def forward(
        self,
        hidden_states: Tensor,
        labels: Tensor,
        lm_weight: Tensor,
        num_label_tokens: int | Tensor | None = None,
        grad_reduce_group: Any = None,
        loss_weights: Tensor | None = None,
        lm_bias: Tensor | None = None,
        *,
        mask: Tensor | None = None,
        logits_dtype: torch.dtype | None = None,
    ) -> Tensor:
        """The loss of hidden states [B, S, H] and labels [B, S] under a head [V, H], and its bias [V] if it has one.

        Both may be a THD stream: [1, T, H] with labels [T]. A weight wider than the hidden states, as FSDP holds it
        under a mixed-precision policy, is multiplied in their dtype, and its gradient is in its own. Labels of -100
        are ignored beside those of `ignore_index`, and those where the mask is 0. `loss_weights`, shaped like the
        labels, multiply the tokens' losses of a "sum". `logits_dtype` is kept for its callers: no logits are rounded
        to less than the head's product is.
        """
        kept: Any = self  # the fields of a subclass
        checks.modules.weighs_a_sum(loss_weights, kept.reduction)
        checks.modules.dtype_of_logits(logits_dtype)
        gather = self.materialize_lm_weight
        mask = mask_beside(mask, labels)
        return linear_cross_entropy(
            beside(hidden_states, labels),
            gather(lm_weight, grad_reduce_group=grad_reduce_group, dtype=getattr(hidden_states, "dtype", None)),
            with_own_ignore_index(labels, kept.ignore_index),
            bias=None if lm_bias is None else gather(lm_bias, grad_reduce_group=grad_reduce_group),
            mask=mask != 0 if isinstance(mask, Tensor) else mask,
            token_weights=mask_beside(loss_weights, labels),
            ignore_index=kept.ignore_index,
            softcap=kept.softcap,
            reduction=kept.reduction,
            num_label_tokens=num_label_tokens,
            chunking=kept.chunks,
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

    def validate_lm_head(self, lm_head: Any, *, model_config: Any = None) -> Any:
        """Returns the head. Raises unless the loss of its weight alone is the model's own.

        `model_config` is the model's. Its text part may have a softcap or a factor of the logits, which has to be the
        loss's.
        """
        checks.heads.without_bias("lm_head", lm_head, output_head(lm_head, "lm_head").bias)
        kept: Any = self
        checks.heads.logit_map(type(self).__name__, kept.softcap, model_config)
        return lm_head

    def prepare_lm_weight(self, lm_head: Any, *, model_config: Any = None, grad_reduce_group: Any = None) -> Tensor:
        """The head's weight for the main loss and all others that share it, in the dtype in which FSDP computes."""
        weight = output_head(self.validate_lm_head(lm_head, model_config=model_config), "lm_head").weight
        policy = getattr(lm_head._get_fsdp_state(), "_mp_policy", None) if _is_fully_sharded(lm_head) else None
        return self.materialize_lm_weight(
            weight, grad_reduce_group=grad_reduce_group, dtype=getattr(policy, "param_dtype", None)
        )


def _is_fully_sharded(module: Any) -> bool:
    """Returns True if fully_shard manages a Module. There is none before its package is imported."""
    package = getattr(dist, "fsdp", None)
    return package is not None and isinstance(module, package.FSDPModule)


def prepare_lm_weight(loss_fn: Any, model: Any, *, grad_reduce_group: Any = None) -> Tensor:
    """The weight of a model's head, gathered once, for a loss of it and those of all MTP depths.

    Args:
        loss_fn: a loss that takes hidden states.
        model: whose head it is; may be in DistributedDataParallel. What its `config` says of the logits has to be what
            the loss does to them.
        grad_reduce_group: see :class:`FusedLinearCrossEntropy`.

    Returns:
        The weight [V, H], in the dtype in which FSDP computes.

    Memory:
        The whole weight, where it is sharded or of another dtype.

    Raises:
        ValueError: the head has a bias, which goes beside the weight; or the model's logits are not the loss's.
        TypeError: a head that is more than its weight.

    Example:
        >>> import torch
        >>> from compiled_loss import ChunkedCrossEntropy, prepare_lm_weight
        >>> model = torch.nn.ModuleDict({"lm_head": torch.nn.Linear(8, 5, bias=False)})
        >>> prepare_lm_weight(ChunkedCrossEntropy(), model).shape
        torch.Size([5, 8])

    """
    module, _ = models.head(model)
    config = getattr(models.inner(model), "config", None)
    weight: Tensor = loss_fn.prepare_lm_weight(module, model_config=config, grad_reduce_group=grad_reduce_group)
    return weight


@dataclass(eq=False, repr=False)
class FusedLinearCrossEntropyOptions:
    """The keywords that `FusedLinearCrossEntropy` and its config keep."""

    ignore_index: int = -100
    """Label of tokens to ignore."""
    logit_softcapping: float = 0.0
    """Bound of the logits; 0 for none."""
    reduction: str = "sum"
    """"sum", "mean" or "none"."""
    impl: str = "cce"
    """Accepted and ignored, "cce" or "torch_compile"."""
    chunking: Chunking = field(default=Chunking(), kw_only=True)
    """The chunks of the loss. They change speed and memory, and never the result."""


@loss_module()
@dataclass(eq=False, repr=False)
class FusedLinearCrossEntropy(FusedLinearCrossEntropyOptions, LinearHeadLoss):
    """:func:`compiled_loss.linear_cross_entropy`: logits are never held. `logit_softcapping` 0 means none.

    Example:
        >>> import torch
        >>> from compiled_loss import FusedLinearCrossEntropy
        >>> FusedLinearCrossEntropy()(torch.zeros(1, 2, 8), torch.tensor([[1, -100]]), torch.zeros(4, 8))
        tensor(1.3863)

    """

    def __post_init__(self) -> None:
        checks.modules.implementation(self.impl)

    @property
    def softcap(self) -> float | None:
        """The bound of the logits, or None."""
        return self.logit_softcapping or None

    @property
    def chunks(self) -> Chunking:
        """The chunks of the loss."""
        return self.chunking


@dataclass(eq=False, repr=False)
class ChunkedCrossEntropyOptions:
    """The keywords that `ChunkedCrossEntropy` and its config keep."""

    chunk_len: int = 512
    """Tokens per chunk, > 0."""
    compile: bool = True
    """True to run a chunk's elementwise work as a compiled kernel in eager calls. It hides the Module's method."""
    ignore_index: int = -100
    """Label of tokens to ignore."""
    reduction: str = "sum"
    """"sum", "mean" or "none"."""


@loss_module()
@dataclass(eq=False, repr=False)
class ChunkedCrossEntropy(ChunkedCrossEntropyOptions, LinearHeadLoss):  # type: ignore[misc]  # `compile`
    """:func:`compiled_loss.linear_cross_entropy` in chunks of `chunk_len` tokens.

    `reduction="none"` is chunked over the vocabulary instead, as many columns as the planner chooses.

    Example:
        >>> import torch
        >>> from compiled_loss import ChunkedCrossEntropy
        >>> loss = ChunkedCrossEntropy(chunk_len=1, compile=False)
        >>> loss(torch.zeros(1, 2, 8), torch.tensor([[1, -100]]), torch.zeros(4, 8))
        tensor(1.3863)

    """

    softcap: ClassVar[float | None] = None

    def __post_init__(self) -> None:
        checks.flag("compile", self.compile)
        rows = self.chunk_len if self.reduction != "none" else None
        named = {"chunk_size": "chunk_len"}
        self.chunks = checks.modules.calling(named, Chunking, chunk_size=rows, compile=self.compile)
