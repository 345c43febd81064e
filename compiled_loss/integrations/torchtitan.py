"""torchtitan's loss of an output head, without its logits.

B sequences, S positions, H width, V vocabulary.

NOTE [torchtitan's layouts]
The loss takes hidden states and the head's weight as torchtitan's model and FSDP leave them. Under "partial_dtensor" and
"full_dtensor" they are DTensors, which say themselves how they lie. Under "spmd_types" they are a rank's own plain
tensors: hidden states whose gradient is a part of the sum over "tp", and the rank's rows of the weight.
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
        """The config that a trainer's `loss` is."""

        label_smoothing: float = 0.0
        """Share of a uniform distribution in the target, from 0 to 1."""
        z_loss: float = 0.0
        """Weight of the squared log-sum-exp, >= 0."""
        chunking: Chunking = Chunking()
        """How the loss is chunked, which does not change what it is."""

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
        head = self.lm_head
        if head is None:
            raise ValueError("lm_head: expected the model's head before the first call, got None: call set_lm_head(...)")
        sharded = isinstance(head, FSDPModule)
        with spmd.no_typecheck():
            if sharded:
                head.unshard()  # once for all chunks; backward reduces its gradient, and frees it
            hidden, (weight, bias) = _distributed(pred, output_head(head, "lm_head", known=_capped_forwards()), head)
            loss = self.fn(
                hidden,
                weight,
                labels,
                bias=bias,
                **_logit_map(head),
                ignore_index=IGNORE_INDEX,
                label_smoothing=self.config.label_smoothing,
                z_loss=self.config.z_loss,
                reduction="sum",
                num_label_tokens=global_valid_tokens,
                chunking=self.config.chunking,
            )
            if sharded and not loss.requires_grad:
                head.reshard()
        if spmd.is_type_checking():
            spmd.assert_type(loss, {"dp": spmd.P, "cp": spmd.P, "tp": spmd.I})
        return loss, {}


def _distributed(hidden: Tensor, head: OutputHead, module: nn.Module) -> tuple[Tensor, OutputHead]:
    """Both with the ranks' shares written on them: NOTE [torchtitan's layouts]."""
    if spmd_mesh_size("tp") == 1:
        return hidden, head
    mesh = current_spmd_mesh()["tp"]
    size = torch.Size([module.out_features])
    rows = [
        value
        if value is None
        else DTensor.from_local(
            value, mesh, [Shard(0)], run_check=False, shape=size + value.shape[1:], stride=value.stride()
        )
        for value in head
    ]
    return DTensor.from_local(hidden, mesh, [Replicate()], run_check=False, grad_placements=[Partial()]), OutputHead(*rows)


def _capped_forwards() -> list[Callable[..., Tensor]]:
    """The forward of Muse Glimmer's head. Nobody has one who has not imported it."""
    module = sys.modules.get("torchtitan.models.muse_glimmer.model")
    return [] if module is None else [module.SoftCappedLinear.forward]


def _logit_map(head: nn.Module) -> dict[str, Any]:
    """What a head does to its logits, in our words."""
    if type(head).forward not in _capped_forwards():
        return {}
    return {"softcap": head.output_soft_cap_temp, "logit_scale": head.output_multiplier}
