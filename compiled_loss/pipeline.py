"""Losses as trainers call them: from a model's output, with multi-token prediction, as a pipeline's last stage."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from compiled_loss import depth_checks, shell_checks
from compiled_loss.functional.multi_token import multi_token_targets


class MTPLosses(NamedTuple):
    """`loss`: the auxiliary one, scaled; `per_depth`: each depth's, before scaling, with their graphs."""

    loss: Tensor
    per_depth: list[Tensor]


def calculate_loss(loss_fn: Any, **kwargs: Any) -> Tensor:
    """Call a loss with what it takes: logits, or hidden states and the head's weight.

    Args:
        loss_fn: a Module or function. One with `takes_hidden_states = True` is called with hidden_states, labels,
            lm_weight, num_label_tokens and grad_reduce_group; any other with logits, labels and num_label_tokens.
        kwargs: labels; logits or hidden_states; for losses of hidden states lm_weight, or the model to find it in;
            num_label_tokens; grad_reduce_group. What the loss does not take may be there and is not looked at.

    Returns:
        What the loss returns.

    Memory:
        The loss's.

    Raises:
        ValueError: what the loss takes is missing.
        TypeError: an unknown keyword.

    Example:
        >>> import torch
        >>> from compiled_loss import MaskedCrossEntropy, calculate_loss
        >>> calculate_loss(MaskedCrossEntropy(), logits=torch.zeros(1, 2, 4), labels=torch.tensor([[1, 2]]))
        tensor(2.7726)

    """
    known = ("logits", "hidden_states", "labels", "model", "lm_weight", "num_label_tokens", "grad_reduce_group")
    shell_checks.fields("calculate_loss", kwargs, list(known))
    logits, hidden_states, labels, model, lm_weight, count, group = (kwargs.get(name) for name in known)
    shell_checks.given("labels", labels, loss_fn)
    if not getattr(loss_fn, "takes_hidden_states", False):
        shell_checks.given("logits", logits, loss_fn)
        return loss_fn(logits=logits, labels=labels, num_label_tokens=count)  # type: ignore[no-any-return]
    shell_checks.given("hidden_states", hidden_states, loss_fn)
    return loss_fn(  # type: ignore[no-any-return]
        hidden_states=hidden_states,
        labels=labels,
        lm_weight=_head_weight(model) if lm_weight is None else lm_weight,
        num_label_tokens=count,
        grad_reduce_group=group,
    )


def calculate_mtp_loss(
    loss_fn: Any,
    *,
    mtp_per_depth_h: Sequence[Tensor] | None = None,  # D of [B, S, H]
    mtp_per_depth_logits: Sequence[Tensor] | None = None,  # D of [B, S, V]
    mtp_per_depth_targets: Sequence[Tensor] | None = None,  # D of [B, S]
    labels: Tensor,  # [B, S] or [S]
    model: nn.Module | None = None,
    scaling_factor: float = 0.1,
    num_label_tokens: int | Tensor | None = None,
    ignore_index: int = -100,
    cu_seqlens: Tensor | None = None,
    seq_idx: Tensor | None = None,
    lm_weight: Tensor | None = None,
    grad_reduce_group: Any = None,
) -> Tensor:
    """DeepSeek-V3's multi-token-prediction loss through any loss: scaling_factor / D times the sum over the depths.

    Args:
        loss_fn: the main loss; see :func:`calculate_loss`.
        mtp_per_depth_h: each depth's hidden states, [B, S, H] or [1, T, H]. This, or logits.
        mtp_per_depth_logits: each depth's logits, for a loss of logits.
        mtp_per_depth_targets: each depth's targets instead of those made of `labels`, for context parallelism.
        labels: those of the main loss, aligned to it already.
        model: where the head is found, unless `lm_weight` is given or logits are.
        scaling_factor: weight of the auxiliary loss, >= 0.
        num_label_tokens: divides each depth's sum.
        ignore_index: that of the loss; put where there is no target.
        cu_seqlens, seq_idx: packing; see :func:`multi_token_targets`.
        lm_weight: the head's weight [V, H], shared with the main loss.
        grad_reduce_group: see :class:`FusedLinearCrossEntropy`.

    Returns:
        A scalar.

    Memory:
        The loss's, for each depth: through :class:`FusedLinearCrossEntropy` D gradients of the weight are held at
        once; :func:`multi_token_prediction` holds one.

    Raises:
        ValueError: not exactly one of hidden states and logits, a shape is off, or the loss cannot take them.
        TypeError: a dtype is off.

    Source:
        DeepSeek-V3 (2024), section 2.2; NeMo Automodel's function of this name.

    Example:
        >>> import torch
        >>> from compiled_loss import FusedLinearCrossEntropy, calculate_mtp_loss
        >>> hidden, labels, weight = [torch.zeros(1, 4, 8)], torch.tensor([[0, 1, 2, 3]]), torch.zeros(5, 8)
        >>> calculate_mtp_loss(FusedLinearCrossEntropy(), mtp_per_depth_h=hidden, labels=labels, lm_weight=weight)
        tensor(0.4828)

    """
    return calculate_mtp_losses(
        loss_fn,
        mtp_per_depth_h=mtp_per_depth_h,
        mtp_per_depth_logits=mtp_per_depth_logits,
        mtp_per_depth_targets=mtp_per_depth_targets,
        labels=labels,
        model=model,
        scaling_factor=scaling_factor,
        num_label_tokens=num_label_tokens,
        ignore_index=ignore_index,
        cu_seqlens=cu_seqlens,
        seq_idx=seq_idx,
        lm_weight=lm_weight,
        grad_reduce_group=grad_reduce_group,
    ).loss


def calculate_mtp_losses(
    loss_fn: Any,
    *,
    mtp_per_depth_h: Sequence[Tensor] | None = None,  # D of [B, S, H]
    mtp_per_depth_logits: Sequence[Tensor] | None = None,  # D of [B, S, V]
    mtp_per_depth_targets: Sequence[Tensor] | None = None,  # D of [B, S]
    labels: Tensor,  # [B, S] or [S]
    model: nn.Module | None = None,
    scaling_factor: float = 0.1,
    num_label_tokens: int | Tensor | None = None,
    ignore_index: int = -100,
    cu_seqlens: Tensor | None = None,
    seq_idx: Tensor | None = None,
    lm_weight: Tensor | None = None,
    grad_reduce_group: Any = None,
) -> MTPLosses:
    """`calculate_mtp_loss`, and each depth's own loss.

    Args, Memory, Raises: see :func:`calculate_mtp_loss`.

    Returns:
        :class:`MTPLosses`.

    Example:
        >>> import torch
        >>> from compiled_loss import MaskedCrossEntropy, calculate_mtp_losses
        >>> logits, labels = [torch.zeros(1, 4, 5)], torch.tensor([[0, 1, 2, 3]])
        >>> calculate_mtp_losses(MaskedCrossEntropy(reduction="mean"), mtp_per_depth_logits=logits, labels=labels)
        MTPLosses(loss=tensor(0.1609), per_depth=[tensor(1.6094)])

    """
    outputs = shell_checks.mtp_outputs(mtp_per_depth_h, mtp_per_depth_logits, loss_fn)
    depth_checks.depths(outputs, labels, mtp_per_depth_targets, seq_idx, cu_seqlens, scaling_factor)
    shell_checks.same_ignore_index(ignore_index, loss_fn)
    fused = getattr(loss_fn, "takes_hidden_states", False)
    if fused and lm_weight is None:
        lm_weight = _head_weight(model)
    losses = []
    for k, states in enumerate(outputs):
        targets = None if mtp_per_depth_targets is None else mtp_per_depth_targets[k]
        if targets is None:
            targets = multi_token_targets(labels, k, ignore_index=ignore_index, seq_idx=seq_idx, cu_seqlens=cu_seqlens)
        states = states.reshape(*labels.shape, states.shape[-1])  # a THD stream is [1, T, H] beside labels [T]
        call = {"labels": targets, "num_label_tokens": num_label_tokens}
        if fused:
            call |= {"hidden_states": states, "lm_weight": lm_weight, "grad_reduce_group": grad_reduce_group}
        else:
            call["logits"] = states if mtp_per_depth_logits is not None else _head(model)(states)
        losses.append(calculate_loss(loss_fn, **call))
    return MTPLosses(scaling_factor / len(losses) * torch.stack(losses).sum(), losses)


class PipelineCausalLMLoss(nn.Module):
    """The loss of a pipeline's last stage: the main one, and while the model trains that of multi-token prediction.

    `output` of the stage is hidden states or logits [B, S, ...]; an object or a tuple as models of Hugging Face return
    it, with `logits`, `hidden_states`, `mtp_per_depth_h`, `mtp_per_depth_logits`, `mtp_loss_scaling_factor`; or a tuple
    (logits or hidden states, *each depth's, seq_idx), seq_idx int32 [B, S], which may be missing: a last element that
    is int32 is taken for it. Without it `cu_seqlens`, an attribute, is the fallback for packed sequences. The model is
    held, and is no child: its parameters are not the loss's.

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
        ignore_index: int = -100,
        grad_reduce_group: Any = None,
    ) -> None:
        super().__init__()
        shell_checks.scaling(scaling_factor, ignore_index)
        shell_checks.same_ignore_index(ignore_index, loss_fn)
        self.loss_fn = loss_fn
        self._model = (model,)  # in a tuple, or it would become a child
        self.scaling_factor = scaling_factor
        self.ignore_index = ignore_index
        self.grad_reduce_group = grad_reduce_group
        self.cu_seqlens: Tensor | None = None

    @property
    def model(self) -> nn.Module:
        """The model whose head is shared."""
        return self._model[0]

    @staticmethod
    def _extract_seq_idx_tail(output: Any) -> tuple[Tensor | None, Any]:
        """The trailing seq_idx of an output tuple, if its last element is int32, and the rest."""
        if isinstance(output, tuple) and output and isinstance(output[-1], Tensor) and output[-1].dtype == torch.int32:
            shell_checks.seq_idx_tail(output[-1])
            return output[-1], output[:-1]
        return None, output

    def forward(self, output: Any, labels: Tensor, num_label_tokens: int | Tensor | None = None) -> Tensor:
        """The loss of one microbatch: `output` of the last stage, labels [B, S] aligned to it."""
        seq_idx, output = self._extract_seq_idx_tail(output)
        fused = getattr(self.loss_fn, "takes_hidden_states", False)
        factor = getattr(self.model, "mtp_loss_scaling_factor", None)
        asked: Any = getattr(self.model, "get_mtp_loss_scaling_factor", None)
        if asked is not None:
            factor = asked()
        if isinstance(output, tuple) and not hasattr(output, "_fields"):
            first, *rest = output
            depth_logits = rest if rest and not fused and getattr(self.model, "mtp_outputs_are_logits", False) else None
            depth_hidden = rest if rest and depth_logits is None else None
            main = {"hidden_states" if fused else "logits": first}
        elif isinstance(output, Tensor):
            depth_hidden = depth_logits = None
            main = {"hidden_states" if fused else "logits": output}
        else:
            depth_hidden, depth_logits = _field(output, "mtp_per_depth_h"), _field(output, "mtp_per_depth_logits")
            given = _field(output, "mtp_loss_scaling_factor")
            factor = factor if given is None else given
            main = {"logits": _field(output, "logits"), "hidden_states": _last(_field(output, "hidden_states"))}
        weight = _head_weight(self.model) if fused else None
        materialize: Any = getattr(self.loss_fn, "materialize_lm_weight", None)
        if weight is not None and materialize is not None:
            weight = materialize(weight, grad_reduce_group=self.grad_reduce_group)
        shared = {
            "model": self.model,
            "lm_weight": weight,
            "grad_reduce_group": self.grad_reduce_group,
            "num_label_tokens": num_label_tokens,
        }
        loss = calculate_loss(self.loss_fn, labels=labels, **main, **shared)
        if (depth_hidden is None and depth_logits is None) or not self.model.training:
            return loss
        if self.scaling_factor is not None:
            factor = self.scaling_factor
        return loss + calculate_mtp_loss(
            self.loss_fn,
            mtp_per_depth_h=depth_hidden,
            mtp_per_depth_logits=depth_logits,
            labels=labels,
            scaling_factor=0.1 if factor is None else factor,
            ignore_index=self.ignore_index,
            cu_seqlens=self.cu_seqlens,
            seq_idx=seq_idx,
            **shared,
        )


def _field(output: Any, name: str) -> Any:
    return output.get(name) if isinstance(output, dict) else getattr(output, name, None)


def _last(hidden_states: Any) -> Any:
    """The last layer's hidden states, of all layers' or as they are."""
    return hidden_states[-1] if isinstance(hidden_states, (list, tuple)) else hidden_states


def _head(model: Any) -> Any:
    """The model's head: `get_output_embeddings()`, or the Module called lm_head."""
    embeddings = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    if embeddings is not None:
        return embeddings
    for name, module in model.named_modules() if isinstance(model, nn.Module) else ():
        if name.split(".")[-1] == "lm_head":
            return module
    return shell_checks.no_head(model)


def _head_weight(model: Any) -> Tensor:
    weight: Tensor = _head(model).weight
    return weight
