"""Cross-entropy with soft targets: whole distributions instead of labels, as EAGLE-3 trains its draft.

N tokens (any leading shape), H width, H' the teacher's, V vocabulary, C tokens a chunk. Losses are in nats.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from compiled_loss import checks
from compiled_loss import reduction as reductions
from compiled_loss.dispatch import divergence as pair
from compiled_loss.dispatch.linear import computed_dtype
from compiled_loss.distributed import dtensor
from compiled_loss.distributed.vocab_shard import VocabShard
from compiled_loss.engine.divergence_chunks import Weighted
from compiled_loss.engine.math.divergences import Target
from compiled_loss.engine.math.statistics import statistics_dtype
from compiled_loss.planner.chunking import Chunking


def masked_soft_cross_entropy(
    logits: Tensor,  # [..., V]
    target_probs: Tensor,  # [..., V]
    position_mask: Tensor,  # [..., 1] or [...]
    *,
    vocab_shard: VocabShard | None = None,
    compile: bool | Literal["auto"] = "auto",
) -> Tensor:
    r"""Soft-target cross-entropy, the mean over the positions of a mask: sum(w sum_v(-p_v log q_v)) / sum(w).

    Args:
        logits: draft logits [..., V], such as [B, S, V], any strides; fp32, bf16, fp16 or fp64. Never written.
        target_probs: the same shape; any floating dtype, used as it is: not normalised. Gets its gradient.
        position_mask: the shape of the logits with 1 for V, or without its last dimension; no other, and nothing
            broadcasts. Bool, or numbers: 0 ignores a position, fractions weigh it, and the weights are what divides.
        vocab_shard: which classes plain `logits` and `target_probs` have, where each rank has some:
            :class:`VocabShard`. DTensors say so themselves; the mask is alike on the group's ranks, which compare it
            and nothing else.
        compile: whether an eager call runs its elementwise work as a compiled kernel; "auto" does on accelerators.
            Under torch.compile it is compiled in any case.

    Returns:
        A scalar; fp32 (fp64 for fp64 logits). 0, attached to the graph, where the mask is empty.

    Memory:
        Keeps nothing of [N, V] beyond the inputs: one pass forward, one back for each gradient that is wanted.

    Raises:
        ValueError: a shape or device is off.
        TypeError: a dtype is off.

    Source:
        Li et al. 2025, EAGLE-3; the normalisation is that of NeMo Automodel's function of this name, by the number of
        valid positions and not by batch times sequence.

    Example:
        >>> import torch
        >>> from compiled_loss import masked_soft_cross_entropy
        >>> logits = torch.tensor([[[2.0, 0.0], [0.0, 0.0], [9.0, 0.0]]])
        >>> target = torch.full((1, 3, 2), 0.5)
        >>> masked_soft_cross_entropy(logits, target, torch.tensor([[[1], [1], [0]]]))
        tensor(0.9100)

    """
    checks.chunking.compiles(compile)
    logits, vocabulary = dtensor.logits("logits", logits, vocab_shard)
    checks.logits(logits, vocabulary.size)
    target_probs = dtensor.beside("target_probs", target_probs, "logits", vocabulary, -1)
    checks.targets.same_logits("target_probs", target_probs, "logits", logits)
    checks.tensor("position_mask", position_mask)
    dtensor.check_rows("position_mask", position_mask)
    position_mask = dtensor.rows(position_mask, vocabulary)
    checks.targets.position_mask(position_mask, "logits", logits)
    vocabulary.compare(position_mask)
    checks.sharding.spread("mean", vocabulary.spread)
    weight, active = _positions(position_mask, logits)
    scalars = pair.scalars(logits, 1.0)
    soft, _ = pair.on_logits(logits, Target(target_probs), None, active, "probabilities", scalars, vocabulary, compile)
    loss = (reductions.divided(weight, weight, "mean", None) * torch.where(active, soft, 0.0)).sum()
    return vocabulary.agreed(loss, position_mask, loss)


def linear_soft_cross_entropy(
    hidden: Tensor,  # [..., H]
    weight: Tensor,  # [V, H]
    position_mask: Tensor,  # [..., 1] or [...]
    *,
    target_probs: Tensor | None = None,  # [..., V]
    teacher_hidden: Tensor | None = None,  # [..., H']
    teacher_weight: Tensor | None = None,  # [V', H']
    draft_to_target: Tensor | None = None,  # [V]
    temperature: float = 1.0,
    num_label_tokens: int | Tensor | None = None,
    vocab_shard: VocabShard | None = None,
    chunking: Chunking = Chunking(),
) -> Tensor:
    r"""`masked_soft_cross_entropy` of a draft head, whose logits are never held; nor are its teacher's.

    Args:
        hidden: the draft's hidden states [..., H]; fp32, bf16, fp16 or fp64.
        weight: its head [V, H], in the dtype of `hidden`; under autocast both are cast, once.
        position_mask: [..., 1] or [...], see :func:`masked_soft_cross_entropy`.
        target_probs: [..., V], without gradient. Give this, or a teacher's head.
        teacher_hidden: [..., H'], the width may differ. Gets no gradient.
        teacher_weight: [V', H'], in its dtype; V' is V unless `draft_to_target` is given. Gets no gradient.
        draft_to_target: int64 [V], the teacher's row of each draft token, where the draft's vocabulary is a part of
            the teacher's. The teacher's distribution is the softmax over these rows alone.
        temperature: divides both logits, > 0. The loss is not multiplied by its square.
        num_label_tokens: divides the sum, instead of the mask's; an int or a one-element tensor, never synchronised.
        vocab_shard: which classes plain `weight`, `target_probs` and `teacher_weight` have, where each rank has some:
            :class:`VocabShard`. DTensors say so themselves; all else is alike on the group's ranks, the gradient of
            `hidden` complete on each. `draft_to_target` is the whole draft's, its `teacher_weight` whole on every rank.
        chunking: tokens a chunk; the vocabulary is not walked here. `memory_budget` is for all logits of a chunk.

    Returns:
        A scalar; fp32 (fp64 for fp64 inputs).

    Memory:
        Creates no [N, V] tensor. Beyond the inputs: dH [N, H], dW [V, H], and one chunk of logits [C, V], with a
        teacher's head two; with `draft_to_target` also the chosen rows, [V, H']. dH and dW from forward on.

    Raises:
        ValueError: a shape, device or number is off, not exactly one form of target is given, or
            `chunking.strategy` is "vocab".
        TypeError: a dtype is off.
        RuntimeError: a second derivative is asked for, outside functorch transforms.

    Source:
        Li et al. 2025, EAGLE-3, whose draft predicts a part of the vocabulary.

    Example:
        >>> import torch
        >>> from compiled_loss import linear_soft_cross_entropy
        >>> hidden, weight = torch.eye(2, requires_grad=True), torch.tensor([[2.0, 0.0], [0.0, 0.0]])
        >>> teacher = torch.tensor([[0.0, 0.0], [9.0, 9.0], [0.0, 0.0]])
        >>> loss = linear_soft_cross_entropy(
        ...     hidden,
        ...     weight,
        ...     torch.ones(2, 1),
        ...     teacher_hidden=torch.eye(2),
        ...     teacher_weight=teacher,
        ...     draft_to_target=torch.tensor([0, 2]),
        ... )
        >>> loss.detach()
        tensor(0.9100)

    """
    shared = teacher_weight is weight and draft_to_target is None
    hidden, weight, _, vocabulary = dtensor.head(hidden, weight, None, vocab_shard)
    checks.head(hidden, weight, vocabulary.size)
    _, temperature = checks.transform(None, temperature)
    checks.tensor("position_mask", position_mask)
    dtensor.check_rows("position_mask", position_mask)
    position_mask = dtensor.rows(position_mask, vocabulary)
    checks.targets.position_mask(position_mask, "hidden", hidden)
    vocabulary.compare(position_mask)
    target_probs, teacher_hidden, teacher_weight = dtensor.targets(
        target_probs, teacher_hidden, teacher_weight, vocabulary, picked=draft_to_target is not None
    )
    columns = weight.shape[0]
    checks.targets.soft_target(
        target_probs, teacher_hidden, teacher_weight, draft_to_target, hidden, columns, vocabulary.size
    )
    checks.sharding.spread("mean" if num_label_tokens is None else "sum", vocabulary.spread)
    num_label_tokens = checks.count(dtensor.whole(num_label_tokens), "sum")
    checks.count_device(num_label_tokens, hidden.device)
    weights, active = _positions(position_mask, hidden)
    dtype = computed_dtype(hidden, weight)
    hidden, weight = hidden.to(dtype), weight.to(dtype)
    scalars = pair.scalars(hidden, temperature)
    if target_probs is not None:
        kind, target = "probabilities", Target(target_probs)
    else:
        assert teacher_hidden is not None and teacher_weight is not None
        own = (weight if shared else teacher_weight).detach()  # under autocast one is cast, once
        if draft_to_target is not None:
            own = own[vocabulary.own(draft_to_target)]
        dtype = computed_dtype(teacher_hidden, own, ("teacher_hidden", "teacher_weight"))
        states, own = teacher_hidden.detach().to(dtype), own.to(dtype)
        kind, target = "cross_entropy", Target(states, weight=own)
    reduction = "mean" if num_label_tokens is None else "sum"
    soft = reductions.divided(weights, weights, reduction, num_label_tokens)
    weighted = Weighted(soft, None, None, active)
    loss = pair.on_head(hidden, weight, target, kind, scalars, weighted, vocabulary, chunking)
    return vocabulary.agreed(loss, position_mask, loss)


def _positions(mask: Tensor, source: Tensor) -> tuple[Tensor, Tensor]:
    """Each position's weight and whether it counts, shaped like the rows of `source`."""
    rows = mask.reshape(source.shape[:-1])
    return rows.to(statistics_dtype(source.dtype)), rows != 0
