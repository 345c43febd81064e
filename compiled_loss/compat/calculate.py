"""Losses as trainers call them: on a model's output, with multi-token prediction."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from compiled_loss import checks
from compiled_loss.compat.layouts import mask_beside, with_own_ignore_index
from compiled_loss.compat.linear import LinearHeadLoss
from compiled_loss.functional.multi_token import multi_token_targets
from compiled_loss.models import outputs as models


class MTPLosses(NamedTuple):
    """`loss`: the auxiliary one, scaled; `per_depth`: each depth's, before scaling, with their graphs."""

    loss: Tensor
    per_depth: list[Tensor]

    @property
    def per_depth_losses(self) -> list[Tensor]:
        """`per_depth` as Automodel's `MTPLossOutput` calls it."""
        return self.per_depth


def calculate_loss(loss_fn: Any, **kwargs: Any) -> Tensor:
    """Calls a loss with what it takes: logits, or hidden states and the head's weight.

    Args:
        loss_fn: a Module or function. One with `takes_hidden_states = True` is called with hidden_states, labels,
            lm_weight, num_label_tokens, grad_reduce_group and, where there is one, lm_bias; any other with logits,
            labels and num_label_tokens.
        kwargs: labels; logits or hidden_states; for losses of hidden states lm_weight, or the model whose head has it;
            num_label_tokens; grad_reduce_group; loss_weights, shaped like the labels, for losses that take them;
            logits_dtype, which is not looked at. What the loss does not take may be there and is not looked at.
            Labels of -100 become those that the loss ignores.
            The bias is that of the model's head. Beside `lm_weight` it is `lm_bias`, and none without: the model is
            not looked at.

    Returns:
        What the loss returns.

    Memory:
        The loss's.

    Raises:
        ValueError: what the loss takes is missing, or the head's weight is not here.
        TypeError: an unknown keyword, a head that is more than a weight and a bias (adapters, quantised, wrapped), or
            one with a bias and a loss that takes none.

    Example:
        >>> import torch
        >>> from compiled_loss import MaskedCrossEntropy, calculate_loss
        >>> calculate_loss(MaskedCrossEntropy(), logits=torch.zeros(1, 2, 4), labels=torch.tensor([[1, 2]]))
        tensor(2.7726)

    """
    known = (
        "logits",
        "hidden_states",
        "labels",
        "model",
        "lm_weight",
        "num_label_tokens",
        "grad_reduce_group",
        "lm_bias",
        "loss_weights",
        "logits_dtype",
    )
    checks.modules.fields("calculate_loss", kwargs, list(known))
    logits, hidden_states, labels, model, weight, count, group, bias, weights, _ = (kwargs.get(name) for name in known)
    checks.modules.given("labels", labels, loss_fn)
    labels = with_own_ignore_index(labels, checks.modules.ignore_index(None, loss_fn))
    optional = {} if weights is None else {"loss_weights": weights}
    if not getattr(loss_fn, "takes_hidden_states", False):
        checks.modules.given("logits", logits, loss_fn)
        return loss_fn(logits=logits, labels=labels, num_label_tokens=count, **optional)  # type: ignore[no-any-return]
    checks.modules.given("hidden_states", hidden_states, loss_fn)
    if weight is None:
        weight, bias = models.head_weight(model, hidden_states)
    call = {"hidden_states": hidden_states, "labels": labels, "lm_weight": weight, "num_label_tokens": count}
    call |= optional
    if bias is not None:
        checks.modules.takes_bias(loss_fn)
        call["lm_bias"] = bias
    return loss_fn(**call, grad_reduce_group=group)  # type: ignore[no-any-return]


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
    ignore_index: int | None = None,
    cu_seqlens: Tensor | None = None,
    seq_idx: Tensor | None = None,
    lm_weight: Tensor | None = None,
    grad_reduce_group: Any = None,
    lm_bias: Tensor | None = None,
    mask: Tensor | None = None,  # broadcasts to the labels
    loss_weights: Tensor | None = None,  # [B, S] or [S]
    logits_dtype: torch.dtype | None = None,
    return_per_depth: bool = False,
) -> Tensor | MTPLosses:
    """Computes DeepSeek-V3's multi-token prediction through any loss: scaling_factor / D times the sum over D depths.

    Args:
        loss_fn: the main loss; see :func:`calculate_loss`.
        mtp_per_depth_h: each depth's hidden states, [B, S, H] or [1, T, H]. This, or logits.
        mtp_per_depth_logits: each depth's logits, for a loss of logits.
        mtp_per_depth_targets: each depth's targets instead of those made of `labels`, for context parallelism.
        labels: those of the main loss, aligned to it already.
        model: whose head it is, unless `lm_weight` is given or logits are.
        scaling_factor: weight of the auxiliary loss, >= 0.
        num_label_tokens: divides each depth's sum.
        ignore_index: that of the loss, or None for it; put where there is no target.
        cu_seqlens, seq_idx: packing; see :func:`multi_token_targets`.
        lm_weight: the head's weight [V, H], shared with the main loss.
        grad_reduce_group: see :class:`FusedLinearCrossEntropy`.
        lm_bias: the head's bias [V], beside `lm_weight`; without it none is added.
        mask: broadcasts to `labels`; a label counts where it is not 0, and its mask moves with it.
        loss_weights: multiply the tokens' losses at each depth, those of a position and not of its label.
        logits_dtype: kept for its callers.
        return_per_depth: whether to return :class:`MTPLosses`, as :func:`calculate_mtp_losses` does.

    Returns:
        A scalar, or :class:`MTPLosses`.

    Memory:
        The loss's, for each depth: through :class:`FusedLinearCrossEntropy` D gradients of the weight are held at
        once; :func:`multi_token_prediction` holds one.

    Raises:
        ValueError: not exactly one of hidden states and logits, a shape is wrong, or the loss cannot take them.
        TypeError: a dtype is wrong, or the head is one that :func:`calculate_loss` refuses.

    Source:
        DeepSeek-V3 (2024), section 2.2; NeMo Automodel's function of this name.

    Example:
        >>> import torch
        >>> from compiled_loss import FusedLinearCrossEntropy, calculate_mtp_loss
        >>> hidden, labels, weight = [torch.zeros(1, 4, 8)], torch.tensor([[0, 1, 2, 3]]), torch.zeros(5, 8)
        >>> calculate_mtp_loss(FusedLinearCrossEntropy(), mtp_per_depth_h=hidden, labels=labels, lm_weight=weight)
        tensor(0.4828)

    """
    found = calculate_mtp_losses(
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
        lm_bias=lm_bias,
        mask=mask,
        loss_weights=loss_weights,
        logits_dtype=logits_dtype,
    )
    return found if return_per_depth else found.loss


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
    ignore_index: int | None = None,
    cu_seqlens: Tensor | None = None,
    seq_idx: Tensor | None = None,
    lm_weight: Tensor | None = None,
    grad_reduce_group: Any = None,
    lm_bias: Tensor | None = None,
    mask: Tensor | None = None,  # broadcasts to the labels
    loss_weights: Tensor | None = None,  # [B, S] or [S]
    logits_dtype: torch.dtype | None = None,
) -> MTPLosses:
    """Computes `calculate_mtp_loss`, and returns each depth's own loss too.

    Args:
        loss_fn, mtp_per_depth_h, mtp_per_depth_logits, mtp_per_depth_targets, labels, model, scaling_factor,
            num_label_tokens, ignore_index, cu_seqlens, seq_idx, lm_weight, grad_reduce_group, lm_bias, mask,
            loss_weights, logits_dtype: see :func:`calculate_mtp_loss`.

    Memory, Raises: see :func:`calculate_mtp_loss`.

    Returns:
        :class:`MTPLosses`.

    Example:
        >>> import torch
        >>> from compiled_loss import MaskedCrossEntropy, calculate_mtp_losses
        >>> logits, labels = [torch.zeros(1, 4, 5)], torch.tensor([[0, 1, 2, 3]])
        >>> calculate_mtp_losses(MaskedCrossEntropy(reduction="mean"), mtp_per_depth_logits=logits, labels=labels)
        MTPLosses(loss=tensor(0.1609), per_depth=[tensor(1.6094)])

    """
    outputs = checks.modules.mtp_outputs(mtp_per_depth_h, mtp_per_depth_logits, loss_fn)
    given = "mtp_per_depth_h" if mtp_per_depth_logits is None else "mtp_per_depth_logits"
    mask = mask_beside(mask, labels)
    checks.multi_token.scaling(scaling_factor)
    checks.modules.calling({"hidden:": f"{given}:"}, checks.multi_token.sequence, "hidden", outputs)
    for k, states in enumerate(outputs):
        checks.tensor(f"{given}[{k}]", states)
    checks.tensor("labels", labels)
    names = {"targets": "mtp_per_depth_targets"}
    names |= {f"hidden[{k}]:": f"{given}[{k}]:" for k in range(len(outputs))}
    checks.modules.calling(
        names,
        checks.multi_token.depths,
        [states.shape for states in outputs],
        labels.shape,
        labels,
        mtp_per_depth_targets,
        seq_idx,
        cu_seqlens,
        weighed=[] if mask is None else ["mask"],
    )
    ignore_index = checks.modules.ignore_index(ignore_index, loss_fn)
    fused = getattr(loss_fn, "takes_hidden_states", False)
    head: dict[str, Any] = {}
    if fused:
        head = {"lm_weight": lm_weight, "lm_bias": lm_bias, "grad_reduce_group": grad_reduce_group}
        if lm_weight is None:
            head |= shared_head(loss_fn, model, grad_reduce_group, outputs[0])
    losses = []
    for k, states in enumerate(outputs):
        targets = None if mtp_per_depth_targets is None else mtp_per_depth_targets[k]
        if targets is None:
            packing = {"seq_idx": seq_idx, "cu_seqlens": cu_seqlens}
            targets = multi_token_targets(labels, k, ignore_index=ignore_index, mask=mask, **packing)
        states = states.reshape(*labels.shape, states.shape[-1])  # a THD stream is [1, T, H] beside labels [T]
        if not fused and mtp_per_depth_logits is None:
            states = models.head_logits(model, states)
        call = {"hidden_states" if fused else "logits": states, "labels": targets, "num_label_tokens": num_label_tokens}
        call |= {} if loss_weights is None else {"loss_weights": loss_weights}
        names = {"logits:": f"{given}[{k}]:", "hidden_states:": f"{given}[{k}]:"}
        if mtp_per_depth_targets is not None:
            names["labels:"] = f"mtp_per_depth_targets[{k}]:"
        losses.append(checks.modules.calling(names, calculate_loss, loss_fn, **call, **head))
    return MTPLosses(scaling_factor / len(losses) * torch.stack(losses).sum(), losses)


def shared_head(loss_fn: Any, model: Any, group: Any, hidden_states: Any) -> dict[str, Tensor]:
    """Returns the weight and bias of the model's head as a loss takes them, gathered once for all that share them."""
    weight, bias = models.head_weight(model, hidden_states)
    gather: Any = getattr(loss_fn, "materialize_lm_weight", None)
    if gather is not None:
        narrow = {"dtype": getattr(hidden_states, "dtype", None)} if isinstance(loss_fn, LinearHeadLoss) else {}
        weight = gather(weight, grad_reduce_group=group, **narrow)
        bias = None if bias is None else gather(bias, grad_reduce_group=group)
    return {"lm_weight": weight} | ({} if bias is None else {"lm_bias": bias})
