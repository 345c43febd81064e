"""The loss of a pipeline's last stage."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from compiled_loss import checks
from compiled_loss.compat.calculate import calculate_loss, calculate_mtp_losses, shared_head
from compiled_loss.models import outputs as models


class PipelineCausalLMLoss(nn.Module):
    """The loss of a pipeline's last stage: the main one, and while the model trains that of multi-token prediction.

    `output` of the stage is hidden states or logits [B, S, ...]; an object or a tuple as models of Hugging Face return
    it, with `logits`, `hidden_states`, `mtp_per_depth_h`, `mtp_per_depth_logits`, `mtp_loss_scaling_factor`; or a tuple
    `(logits or hidden states, *each depth's, seq_idx)`, seq_idx int32 [B, S], which may be missing: a last element that
    is int32 is taken for it. Without it `cu_seqlens`, an attribute, is the fallback for packed sequences. The model is
    held, and is no child: its parameters are not the loss's.

    A loss of hidden states gets the weight and the bias of the model's head, as it is at each call; a head that is more
    is an error, as in :func:`calculate_loss`. `scaling_factor` weighs multi-token prediction. Without it that is the
    output's `mtp_loss_scaling_factor`, the model's `mtp_config.loss_scaling_factor`, its `mtp_loss_scaling_factor`,
    what its `get_mtp_loss_scaling_factor()` returns, the first there is, or 0.1. `ignore_index` None is the loss's own.

    `num_label_tokens`, the tokens of all microbatches, divides the main loss and each depth's: then the microbatches'
    losses add up to that of the batch, and so do the gradients of a schedule with `scale_grads=False`. Schedules of
    torch >= 2.13 pass it on from `step(..., loss_kwargs={"num_label_tokens": count})`. Older ones pass nothing: give
    them `functools.partial(loss, num_label_tokens=count)`, a tensor that is filled before each step.

    Example:
        >>> import torch
        >>> from compiled_loss import FusedLinearCrossEntropy, PipelineCausalLMLoss
        >>> model = torch.nn.ModuleDict({"lm_head": torch.nn.Linear(8, 5, bias=False)})
        >>> loss = PipelineCausalLMLoss(FusedLinearCrossEntropy(reduction="mean"), model, scaling_factor=0.1)
        >>> stage = (torch.zeros(1, 4, 8), torch.zeros(1, 4, 8), torch.zeros(1, 4, dtype=torch.int32))
        >>> loss(stage, torch.tensor([[0, 1, 2, 3]])).detach()
        tensor(1.7704)

    """

    def __init__(
        self,
        loss_fn: nn.Module,
        model: nn.Module,
        scaling_factor: float | None = None,
        ignore_index: int | None = None,
        grad_reduce_group: Any = None,
    ) -> None:
        super().__init__()
        checks.modules.pipeline(loss_fn, model)
        checks.modules.scaling(scaling_factor, ignore_index)
        checks.sharding.group_of("grad_reduce_group", grad_reduce_group)
        self.loss_fn = loss_fn
        self._model = (model,)  # in a tuple, or it would become a child
        self.scaling_factor = scaling_factor
        self.ignore_index = checks.modules.ignore_index(ignore_index, loss_fn)
        self.grad_reduce_group = grad_reduce_group
        self.cu_seqlens: Tensor | None = None

    @property
    def model(self) -> nn.Module:
        """The model whose head is shared."""
        return self._model[0]

    @staticmethod
    def _extract_seq_idx_tail(output: Any) -> tuple[Tensor | None, Any]:
        """Returns the trailing seq_idx of an output tuple, if its last element is int32, and the rest."""
        if isinstance(output, tuple) and output and isinstance(output[-1], Tensor) and output[-1].dtype == torch.int32:
            checks.modules.seq_idx_tail(output[-1])
            return output[-1], output[:-1]
        return None, output

    def forward(self, output: Any, labels: Tensor, num_label_tokens: int | Tensor | None = None) -> Tensor:
        """The loss of one microbatch: `output` of the last stage, labels [B, S] aligned to it."""
        return checks.modules.calling(_parts(output), self._loss, output, labels, num_label_tokens)

    def _loss(self, output: Any, labels: Tensor, num_label_tokens: int | Tensor | None) -> Tensor:
        seq_idx, output = self._extract_seq_idx_tail(output)
        fused = getattr(self.loss_fn, "takes_hidden_states", False)
        depth_hidden = depth_logits = None
        if isinstance(output, tuple) and not hasattr(output, "_fields"):
            first, *rest = output
            if rest and not fused and getattr(models.inner(self.model), "mtp_outputs_are_logits", False):
                depth_logits = rest
            elif rest:
                depth_hidden = rest
            main = {"hidden_states" if fused else "logits": first}
        elif isinstance(output, Tensor):
            main = {"hidden_states" if fused else "logits": output}
        else:
            depth_hidden, depth_logits = (models.field(output, f"mtp_per_depth_{name}") for name in ("h", "logits"))
            main = {"logits": models.field(output, "logits"), "hidden_states": models.last_hidden_states(output)}
        shared: dict[str, Any] = {"num_label_tokens": num_label_tokens, "grad_reduce_group": self.grad_reduce_group}
        if fused:
            shared |= shared_head(self.loss_fn, self.model, self.grad_reduce_group, main["hidden_states"])
        loss = calculate_loss(self.loss_fn, labels=labels, **main, **shared)
        if (depth_hidden is None and depth_logits is None) or not self.model.training:
            return loss
        factor = models.mtp_factor(self.model, output) if self.scaling_factor is None else self.scaling_factor
        auxiliary = calculate_mtp_losses(
            self.loss_fn,
            mtp_per_depth_h=depth_hidden,
            mtp_per_depth_logits=depth_logits,
            labels=labels,
            model=self.model,
            scaling_factor=0.1 if factor is None else factor,
            ignore_index=self.ignore_index,
            cu_seqlens=self.cu_seqlens,
            seq_idx=seq_idx,
            **shared,
        )
        return loss + auxiliary.loss


def _parts(output: Any) -> dict[str, str]:
    """Returns the names in errors of the parts of a stage's output."""
    if isinstance(output, Tensor):
        main, depths = "output", "output"
    elif isinstance(output, tuple) and not hasattr(output, "_fields"):
        main, depths = "output[0]", "output[1:]"
    else:
        fields = ("logits", "hidden_states", "mtp_per_depth_h", "mtp_per_depth_logits")
        return {f"{name}:": f"output.{name}:" for name in fields[:2]} | {name: f"output.{name}" for name in fields[2:]}
    named = {"logits:": f"{main}:", "hidden_states:": f"{main}:", "seq_idx:": "output[-1]:"}
    return named | {"mtp_per_depth_h": depths, "mtp_per_depth_logits": depths}
