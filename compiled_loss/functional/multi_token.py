"""Multi-token prediction: DeepSeek-V3's auxiliary loss on labels further ahead.

B sequences of S tokens, N = B S, H width, V vocabulary, D depths, k a depth from 0. Losses are in nats.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from compiled_loss import checks
from compiled_loss.dispatch.keywords import Keywords
from compiled_loss.dispatch.linear import check_head, linear_call
from compiled_loss.distributed import dtensor
from compiled_loss.distributed.vocab_shard import VocabShard
from compiled_loss.engine.math.statistics import statistics_dtype
from compiled_loss.functional.statistics import of_tokens
from compiled_loss.planner.chunking import Chunking


class MultiTokenLosses(NamedTuple):
    """`loss`: the auxiliary one, a scalar; `per_depth`: each depth's own before scaling, [D], detached."""

    loss: Tensor
    per_depth: Tensor


def multi_token_targets(
    labels: Tensor,  # [B, S] or [S]
    depth: int,
    *,
    ignore_index: int = -100,
    seq_idx: Tensor | None = None,  # [B, S] or [S]
    cu_seqlens: Tensor | None = None,  # [sequences + 1]
    mask: Tensor | None = None,  # broadcasts to the labels
) -> Tensor:
    """Makes the labels of one depth: at position t the main loss's label of t + depth + 1.

    Args:
        labels: [B, S], [S] or THD [1, T], int64: those of the main loss, aligned to it already. Never written.
        depth: k, from 0.
        ignore_index: what is put where there is no such label: at the last k + 1 positions, and where position
            t + k + 1 is in another packed sub-sequence.
        seq_idx: which sub-sequence each token is in; only equality matters. The shape of `labels`, or [S], or [1, S]
            for labels [S].
        cu_seqlens: where sub-sequences begin, and where the last one ends, [sequences + 1] or [1, sequences + 1]; what
            comes after that end is padding, whose targets are ignored. Not looked at beside `seq_idx`.
        mask: broadcasts to `labels`; where it is 0, the label is nobody's target.

    Returns:
        [B, S] or [S] like `labels`, int64; a new tensor.

    Memory:
        A few [B, S] of integers.

    Raises:
        ValueError: a shape, device or number is wrong.
        TypeError: a dtype is wrong.

    Source:
        DeepSeek-V3 (2024), section 2.2; NeMo Automodel's calculate_mtp_loss for the packing.

    Example:
        >>> import torch
        >>> from compiled_loss import multi_token_targets
        >>> multi_token_targets(torch.arange(6), 0, cu_seqlens=torch.tensor([0, 4, 6]))
        tensor([   1,    2,    3, -100,    5, -100])

    """
    checks.multi_token.multi_token(labels, depth, ignore_index, seq_idx, cu_seqlens, mask)
    if mask is not None:
        labels = torch.where(mask == 0, ignore_index, labels)
    segments = None
    if seq_idx is not None:
        segments = seq_idx.reshape(labels.shape) if seq_idx.numel() == labels.numel() else seq_idx.expand(labels.shape)
    elif cu_seqlens is not None:
        ends = cu_seqlens.reshape(-1)[1:].contiguous()
        segments = torch.searchsorted(ends, torch.arange(labels.shape[-1], device=labels.device), right=True)
        segments = torch.where(segments < ends.numel(), segments, -1).expand(labels.shape)
    ahead = min(depth + 1, labels.shape[-1])
    targets = _ahead(labels, ahead, ignore_index)
    if segments is None:
        return targets
    same = (segments == _ahead(segments, ahead, -1)) & (segments >= 0 if seq_idx is None else True)
    return torch.where(same, targets, ignore_index)


def multi_token_prediction(
    hidden: Sequence[Tensor],  # D of [..., H]
    weight: Tensor,  # [V, H]
    labels: Tensor,  # [...]
    *,
    scaling_factor: float = 0.1,
    ignore_index: int = -100,
    seq_idx: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    targets: Sequence[Tensor] | None = None,  # D of [...]
    mask: Tensor | None = None,  # broadcasts to the labels
    token_weights: Tensor | None = None,  # broadcasts to the labels
    num_label_tokens: int | Tensor | None = None,
    bias: Tensor | None = None,  # [V]
    softcap: float | None = None,
    logit_scale: float = 1.0,
    temperature: float | Tensor = 1.0,
    vocab_shard: VocabShard | None = None,
    chunking: Chunking = Chunking(),
) -> Tensor:
    """Computes scaling_factor / D times the sum over D depths of the cross-entropy of their targets.

    Args:
        hidden: each depth's hidden states, [B, S, H], [S, H] or [1, T, H]; fp32, bf16, fp16 or fp64.
        weight: the head's weight [V, H], which the main loss shares.
        labels: those of the main loss, aligned to it, [B, S] or [S]; see :func:`multi_token_targets`.
        scaling_factor: weight of the auxiliary loss, >= 0.
        ignore_index, seq_idx, cu_seqlens: see :func:`multi_token_targets`.
        targets: each depth's, instead of what is made of `labels`: under context parallelism they are made before the
            sequence is split.
        mask: broadcasts to `labels`; 0 ignores a label at every depth, fractions weigh it. It moves with its label:
            depth k at position t has that of t + k + 1. None beside `targets`.
        token_weights: broadcasts to `labels`, differentiable; they weigh as fractions of a mask do, and move with it.
            None beside `targets`.
        num_label_tokens: divides each depth's sum; without it each depth is the mean over its own targets, weighed.
        bias, softcap, logit_scale, temperature, vocab_shard, chunking: see :func:`linear_cross_entropy`.

    Returns:
        A scalar; fp32 (fp64 for fp64 inputs). 0, attached to the graph, where no target counts.

    Memory:
        One pass over all depths: D copies [N, H] of hidden, one dW [V, H] however many depths there are, one chunk of
        logits. Creates no [N, V] tensor.

    Raises:
        ValueError: a shape, device or number is wrong.
        TypeError: a dtype is wrong.

    Source:
        DeepSeek-V3 (2024), section 2.2, equations 24 and 25.

    Example:
        >>> import torch
        >>> from compiled_loss import multi_token_prediction
        >>> hidden = [torch.zeros(1, 4, 8), torch.zeros(1, 4, 8)]
        >>> multi_token_prediction(hidden, torch.zeros(5, 8), torch.tensor([[0, 1, 2, 3]]), scaling_factor=1.0)
        tensor(1.6094)

    """
    return multi_token_losses(
        hidden,
        weight,
        labels,
        scaling_factor=scaling_factor,
        ignore_index=ignore_index,
        seq_idx=seq_idx,
        cu_seqlens=cu_seqlens,
        targets=targets,
        mask=mask,
        token_weights=token_weights,
        num_label_tokens=num_label_tokens,
        bias=bias,
        softcap=softcap,
        logit_scale=logit_scale,
        temperature=temperature,
        vocab_shard=vocab_shard,
        chunking=chunking,
    ).loss


def multi_token_losses(
    hidden: Sequence[Tensor],  # D of [..., H]
    weight: Tensor,  # [V, H]
    labels: Tensor,  # [...]
    *,
    scaling_factor: float = 0.1,
    ignore_index: int = -100,
    seq_idx: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    targets: Sequence[Tensor] | None = None,  # D of [...]
    mask: Tensor | None = None,  # broadcasts to the labels
    token_weights: Tensor | None = None,  # broadcasts to the labels
    num_label_tokens: int | Tensor | None = None,
    bias: Tensor | None = None,  # [V]
    softcap: float | None = None,
    logit_scale: float = 1.0,
    temperature: float | Tensor = 1.0,
    vocab_shard: VocabShard | None = None,
    chunking: Chunking = Chunking(),
) -> MultiTokenLosses:
    """Computes `multi_token_prediction`, and each depth's loss in the same pass.

    Args, Memory, Raises: see :func:`multi_token_prediction`.

    Returns:
        :class:`MultiTokenLosses`.

    Example:
        >>> import torch
        >>> from compiled_loss import multi_token_losses
        >>> hidden = [torch.zeros(1, 4, 8), torch.zeros(1, 4, 8)]
        >>> multi_token_losses(hidden, torch.zeros(5, 8), torch.tensor([[0, 1, 2, 3]]), scaling_factor=0.5)
        MultiTokenLosses(loss=tensor(0.8047), per_depth=tensor([1.6094, 1.6094]))

    """
    checks.multi_token.sequence("hidden", hidden)
    scaling_factor = checks.multi_token.scaling(scaling_factor)
    keywords = Keywords(
        bias=bias,
        mask=mask,
        token_weights=token_weights,
        ignore_index=ignore_index,
        softcap=softcap,
        logit_scale=logit_scale,
        temperature=temperature,
        reduction="sum",
        num_label_tokens=num_label_tokens,
        vocab_shard=vocab_shard,
        chunking=chunking,
    ).checked()
    for k, states in enumerate(hidden):
        part = check_head(states, weight, keywords, (f"hidden[{k}]", "weight"))
    checks.tensor("labels", labels)
    dtensor.check_rows("labels", labels)
    rows = checks.multi_token.depths(
        [dtensor.own_shape(states, part) for states in hidden],
        dtensor.own_shape(labels, part),
        labels,
        targets,
        seq_idx,
        cu_seqlens,
        weighed=[name for name, value in (("mask", mask), ("token_weights", token_weights)) if value is not None],
    )
    keywords.check_tensors(dtensor.own_shape(labels, part), part, labels.device)
    checks.sharding.token_mesh_dims("mean" if num_label_tokens is None else "sum", part.token_mesh_dims)

    labels, keywords = keywords.own(labels, part)
    states = torch.stack([dtensor.replicated(one, part) for one in hidden])
    if targets is None:
        packing = {"seq_idx": seq_idx, "cu_seqlens": cu_seqlens}
        depths = range(len(hidden))
        targets = [multi_token_targets(labels, k, ignore_index=keywords.ignore_index, **packing) for k in depths]
    dtype = statistics_dtype(states.dtype)
    weights = None
    for factor in (keywords.mask, keywords.token_weights):
        if factor is not None:
            factor = factor.to(dtype).expand(labels.shape)
            weights = factor if weights is None else weights * factor
    stacked = torch.stack([target.reshape(rows) for target in targets])
    counted = (stacked != keywords.ignore_index).to(dtype)
    if weights is not None:
        moved = torch.stack([_ahead(weights, k + 1, 0).reshape(rows) for k in range(len(hidden))])
        counted = torch.where(counted != 0, moved, 0.0)
        stacked = torch.where(moved != 0, stacked, keywords.ignore_index)
    counts = counted.flatten(1).sum(-1)
    if keywords.num_label_tokens is not None:
        counts = torch.ones_like(counts) * keywords.num_label_tokens
    share = torch.where(counts == 0, 0.0, 1.0 / torch.where(counts == 0, 1.0, counts))
    scale = (share * (scaling_factor / len(hidden))).reshape(-1, *(1,) * len(rows))
    if isinstance(chunking.max_label_tokens, int):  # of each depth
        chunking = replace(chunking, max_label_tokens=chunking.max_label_tokens * len(hidden))
    temperature_ = keywords.token_temperature
    call = keywords._replace(
        mask=None,
        token_weights=scale * counted,
        token_temperature=None if temperature_ is None else temperature_.expand(labels.shape).reshape(rows),
        num_label_tokens=None,
        chunking=chunking,
    )
    linear = linear_call(states, weight, stacked, call)
    loss, found = linear.loss_and_statistics()
    logprob = of_tokens(found, linear.tokens).logprob.detach() * counted.detach()
    return MultiTokenLosses(loss, -(logprob.flatten(1).sum(-1) * share.detach()))


def _ahead(values: Tensor, by: int, fill: int) -> Tensor:
    """Returns values[..., t + by] at t, and `fill` at the last `by` positions."""
    return torch.nn.functional.pad(values[..., by:], (0, by), value=fill)
