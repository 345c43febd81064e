"""Dispatch from the arguments of soft-target cross-entropy to two distributions.

N tokens (any leading shape), H width, V vocabulary. Nothing is computed before the last check.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from compiled_loss import checks
from compiled_loss import reduction as reductions
from compiled_loss.dispatch import divergence as two
from compiled_loss.dispatch.divergence import Transform
from compiled_loss.dispatch.keywords import Keywords
from compiled_loss.dispatch.linear import check_head, computed_dtype
from compiled_loss.dispatch.teachers import Head, check_teacher, own_teacher
from compiled_loss.distributed import dtensor
from compiled_loss.distributed.vocab_shard import Vocabulary
from compiled_loss.engine.divergence_chunks import Weighted
from compiled_loss.engine.math.divergence_kinds import Kind
from compiled_loss.engine.math.divergences import Target
from compiled_loss.engine.math.statistics import statistics_dtype


class Teacher(NamedTuple):
    """A teacher's head, and the parameters of its logits' transform."""

    head: Head
    softcap: Any
    logit_scale: Any


def of_logits(logits: Tensor, target_probs: Tensor, position_mask: Tensor, keywords: Keywords) -> Tensor:
    """Returns the loss of logits that exist already."""
    keywords = keywords.checked()
    checks.tensor("logits", logits)
    dim, device = logits.dim() - 1, logits.device
    part = dtensor.logits_layout("logits", logits, dim, keywords.vocab_shard)
    checks.logits(logits, part.size)
    checks.tensor("target_probs", target_probs)
    dtensor.check_beside("target_probs", target_probs, "logits", part, -1)
    theirs, mine = (dtensor.own_logits_shape(v, part, dim) for v in (target_probs, logits))
    checks.targets.same_logits("target_probs", target_probs, "logits", theirs, mine, device)
    rows = dtensor.own_rows(logits, part, dim)
    _check_mask(position_mask, "logits", rows, part, keywords, device)

    weighted, compared, tokens, keywords = _weighted(position_mask, rows, keywords, part, logits.dtype)
    logits, target = dtensor.own(logits), Target(dtensor.own(target_probs))
    target = two.at_temperatures(target, keywords, tokens, logits.dtype)
    pair = two.pair(logits, keywords.temperature, Transform(keywords.softcap, keywords.logit_scale))
    kind = Kind("cross_entropy", probabilities=True)
    losses, _ = two.on_logits(logits, target, kind, pair, weighted, part, keywords.compile)
    loss = losses if keywords.reduction == "none" else losses.sum()
    return part.nan_unless_equal(loss, compared, loss)


def of_heads(
    hidden: Tensor,  # [..., H]
    weight: Tensor,  # [V, H]
    position_mask: Tensor,
    target_probs: Tensor | None,
    teacher: Teacher,
    draft_to_target: Tensor | None,
    keywords: Keywords,
) -> Tensor:
    """Returns the loss of a draft's head, whose logits are never stored whole."""
    keywords, head = keywords.checked(), teacher.head
    softcap, logit_scale = checks.targets.logit_map(teacher.softcap, teacher.logit_scale, "teacher_")
    checks.targets.one_target(target_probs, head.hidden, head.weight, draft_to_target)
    part = check_head(hidden, weight, keywords)
    shape, device = dtensor.own_shape(hidden, part), hidden.device
    _check_mask(position_mask, "hidden", shape[:-1], part, keywords, device)
    if target_probs is not None:
        checks.targets.no_teacher(
            "target_probs", teacher_bias=head.bias, teacher_softcap=softcap, teacher_logit_scale=logit_scale
        )
        checks.tensor("target_probs", target_probs)
        dtensor.check_beside("target_probs", target_probs, "weight", part, -1)
        own = dtensor.own_logits_shape(target_probs, part, target_probs.dim() - 1)
        expected = torch.Size([*shape[:-1], part.stop - part.start])
        checks.targets.target_probs(target_probs, own, expected, device)
    else:
        check_teacher(head, shape, part, device, like="weight", picked=draft_to_target is not None)
        if draft_to_target is not None:
            checks.targets.draft_to_target(draft_to_target, part.size, device)
    dtype = computed_dtype(hidden, weight)
    how = two.planned(shape, part, keywords, dtype, device, heads=1 if target_probs is not None else 2)

    weighted, compared, tokens, keywords = _weighted(position_mask, shape[:-1], keywords, part, dtype)
    shared = head.weight is weight and draft_to_target is None
    hidden, weight, bias = dtensor.own_head(hidden, weight, keywords.bias, part)
    hidden, weight = hidden.to(dtype), weight.to(dtype)
    if target_probs is not None:
        target, teacher_bias = Target(dtensor.own(target_probs)), None
    else:
        target, teacher_bias = own_teacher(head, weight if shared else None, part, draft_to_target)
    draft = Transform(keywords.softcap, keywords.logit_scale, bias)
    target = two.at_temperatures(target, keywords, tokens, dtype)
    pair = two.pair(hidden, keywords.temperature, draft, Transform(softcap, logit_scale, teacher_bias))
    kind = Kind("cross_entropy", probabilities=target_probs is not None)
    loss, _ = two.on_head(hidden, weight, target, kind, pair, weighted, part, how, keywords)
    return part.nan_unless_equal(loss, compared, loss)


def _check_mask(
    position_mask: Tensor, name: str, rows: torch.Size, part: Vocabulary, keywords: Keywords, device: torch.device
) -> None:
    checks.tensor("position_mask", position_mask)
    dtensor.check_rows("position_mask", position_mask)
    checks.targets.position_mask(position_mask, dtensor.own_shape(position_mask, part), name, rows, device)
    keywords.check_tensors(rows, part, device)


class _Positions(NamedTuple):
    """The coefficients of positions, the tensor that must be equal on all ranks, the tokens, and a rank's keywords."""

    weighted: Weighted
    compared: Tensor
    tokens: reductions.Tokens
    keywords: Keywords


def _weighted(
    position_mask: Tensor, rows: torch.Size, keywords: Keywords, part: Vocabulary, dtype: torch.dtype
) -> _Positions:
    """Returns the positions of this rank, with their weights."""
    positions = torch.zeros(rows, dtype=torch.int64, device=position_mask.device)  # all of them count
    positions, keywords = keywords.own(positions, part)
    mask = dtensor.rows(position_mask, part).reshape(rows)
    tokens = keywords._replace(mask=mask).tokens(positions, None, dtype)
    weight = tokens.weights(statistics_dtype(dtype))
    compared = weight.detach()
    part.check_equal(compared)
    soft = reductions.divided(weight, weight, keywords.reduction, keywords.num_label_tokens)
    return _Positions(Weighted(soft, None, None, tokens.active), compared, tokens, keywords)
