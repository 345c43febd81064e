"""torchtitan's loss of an output head, without its logits.

B sequences, S positions, H width, V vocabulary.

NOTE [torchtitan's layouts]
The loss takes hidden states and the head's weight as torchtitan's model and FSDP leave them. With "partial_dtensor" and
"full_dtensor" they are DTensors over the mesh dimension "tp", which know their own layout. With "spmd_types" they are
plain tensors: hidden states whose gradient is this rank's part of a sum over ranks, and the rank's own rows of the
weight.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import spmd_types as spmd
import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard
from torchtitan.components.loss import IGNORE_INDEX, BaseLoss, ChunkedLossWrapper
from torchtitan.config import CompileConfig
from torchtitan.distributed.spmd_types import current_spmd_mesh, spmd_mesh_size

from compiled_loss import checks
from compiled_loss.functional.cross_entropy import linear_cross_entropy
from compiled_loss.models.output_head import OutputHead, output_head
from compiled_loss.planner.chunking import Chunking


class LinearCrossEntropyLoss(ChunkedLossWrapper):  # the trainer gives the head to no other class
    """:func:`compiled_loss.linear_cross_entropy` in the place of torchtitan's `ChunkedLossWrapper`.

    A model's own softcap and multiplier of the logits, as Muse Glimmer's head has them, are those of the loss. A head
    that is more is an error, and so is an input of the loss that is none of a cross-entropy.
    """

    @dataclass(kw_only=True, slots=True)
    class Config(BaseLoss.Config):
        """The config of the loss, a trainer's `loss`."""

        label_smoothing: float = 0.0
        """Share of a uniform distribution in the target, from 0 to 1."""
        z_loss: float = 0.0
        """Weight of the squared log-sum-exp, >= 0."""
        chunking: Chunking = Chunking()
        """The chunks of the loss. They change speed and memory, and never the result."""

    def __init__(self, config: Config, *, compile_config: CompileConfig | None = None) -> None:
        self.config = config
        self.fn = linear_cross_entropy
        self._maybe_compile(compile_config)
        self.lm_head: nn.Module | None = None

    def __call__(
        self,
        pred: Tensor,  # [B, S, H]
        labels: Tensor,  # [B, S]
        global_valid_tokens: Tensor | None = None,
        *,
        positions: Tensor | None = None,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The sum of the tokens' losses over `global_valid_tokens`, and no metrics.

        `positions` is the trainer's, for losses that depend on it.
        """
        checks.heads.head_set("lm_head", self.lm_head)
        module: Any = self.lm_head
        sharded = isinstance(module, FSDPModule)
        with spmd.no_typecheck():
            if sharded:
                module.unshard()  # for all chunks; backward reduces the gradient, and frees it
            head = output_head(module, "lm_head", known=_capped_forwards())
            hidden, (weight, bias) = _distributed(pred, head, module.out_features)
            loss = self.fn(
                hidden,
                weight,
                labels,
                bias=bias,
                **_logit_map(module),
                ignore_index=IGNORE_INDEX,
                label_smoothing=self.config.label_smoothing,
                z_loss=self.config.z_loss,
                reduction="sum",
                num_label_tokens=global_valid_tokens,
                chunking=self.config.chunking,
            )
            if sharded and not loss.requires_grad:
                module.reshard()
        if spmd.is_type_checking():
            spmd.assert_type(loss, {"dp": spmd.P, "cp": spmd.P, "tp": spmd.I})
        return loss, {}


def _distributed(hidden: Tensor, head: OutputHead, vocab_size: int) -> tuple[Tensor, OutputHead]:
    """Returns both as DTensors with their layouts over the ranks: NOTE [torchtitan's layouts]."""
    if spmd_mesh_size("tp") == 1:
        return hidden, head
    mesh = current_spmd_mesh()["tp"]

    def rows(value: Tensor) -> Tensor:
        shape = torch.Size([vocab_size, *value.shape[1:]])
        return DTensor.from_local(value, mesh, [Shard(0)], run_check=False, shape=shape, stride=value.stride())

    hidden = DTensor.from_local(hidden, mesh, [Replicate()], run_check=False, grad_placements=[Partial()])
    return hidden, OutputHead(rows(head.weight), None if head.bias is None else rows(head.bias))


def _capped_forwards() -> list[Callable[..., Tensor]]:
    """Returns the forward of Muse Glimmer's head; none before its module is imported."""
    module = sys.modules.get("torchtitan.models.muse_glimmer.model")
    return [] if module is None else [module.SoftCappedLinear.forward]


def _logit_map(module: Any) -> dict[str, Any]:
    """Returns a head's softcap and multiplier of its logits, as keywords."""
    if type(module).forward not in _capped_forwards():
        return {}
    return {"softcap": module.output_soft_cap_temp, "logit_scale": module.output_multiplier}
