"""Distillation with statistics of each token from the same pass: divergences, entropies, acceptance.

N tokens (any leading shape), H width, H' the teacher's, V vocabulary. Everything but probabilities is in nats.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Literal, NamedTuple

from torch import Tensor

from compiled_loss import checks
from compiled_loss.dispatch import distillation as dispatch
from compiled_loss.dispatch.keywords import UNCHUNKED, Keywords
from compiled_loss.dispatch.teachers import Head, Stored
from compiled_loss.distributed.vocab_shard import VocabShard
from compiled_loss.engine.math.divergences import Found
from compiled_loss.planner.chunking import Chunking


class DistillationStatistics(NamedTuple):
    """Statistics of each token's two distributions, p the teacher's and q the student's. Each is [...], detached.

    All are at the loss's temperature, 0 for tokens that do not count, and None if they are not wanted. With a cached
    teacher they are over the classes that it lists, and all other classes as one.

    `divergence`: that of the loss, or the weighted sum of several; without T^2 and the token's weight.
    `student_entropy`: -sum(q log q), in nats.
    `teacher_entropy`: -sum(p log p), in nats.
    `acceptance`: sum(min(p, q)), the rate at which speculative decoding accepts the student's tokens.
    `student_mass`: the sum of q over the classes that a cached teacher lists; None with any other teacher.
    `teacher_mass`: the sum of p over the same classes; None with any other teacher.
    """

    divergence: Tensor | None
    student_entropy: Tensor | None
    teacher_entropy: Tensor | None
    acceptance: Tensor | None
    student_mass: Tensor | None
    teacher_mass: Tensor | None


class DistillationLoss(NamedTuple):
    """A distillation loss, with the statistics of each token from the same pass.

    `loss`: a scalar, or for "none" the shape of the labels.
    `statistics`: of each token.
    """

    loss: Tensor
    statistics: DistillationStatistics


WANTED = DistillationStatistics._fields


def distillation_with_statistics(
    student_logits: Tensor,  # [..., V]
    teacher_logits: Tensor | None,  # [..., V]
    labels: Tensor,  # [...]
    *,
    teacher_topk: tuple[Tensor, Tensor] | None = None,  # [..., k] each
    teacher_probabilities: Tensor | None = None,  # [..., V]
    mask: Tensor | None = None,
    token_weights: Tensor | None = None,
    divergence: str | Mapping[str, float | Tensor] = "forward_kl",
    jsd_weight: float = 0.5,
    lk_decay: float = 3.0,
    temperature: float | Tensor = 1.0,
    temperature_squared: bool = True,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    teacher_softcap: float | None = None,
    teacher_logit_scale: float | None = None,
    hard_label_weight: float = 0.0,
    ignore_index: int = -100,
    shift: int = 0,
    reduction: str = "mean",
    num_label_tokens: int | Tensor | None = None,
    class_dim: int = -1,
    vocab_shard: VocabShard | None = None,
    compile: bool | Literal["auto"] = "auto",
    wanted: Collection[str] = WANTED,
) -> DistillationLoss:
    r"""Computes `distillation`, and the statistics of each token in the same pass.

    Args:
        student_logits, teacher_logits, labels, teacher_topk, teacher_probabilities, mask, token_weights, divergence,
            jsd_weight, lk_decay, temperature, temperature_squared, softcap, logit_scale, teacher_softcap,
            teacher_logit_scale, hard_label_weight, ignore_index, shift, reduction, num_label_tokens, class_dim,
            vocab_shard, compile: see :func:`distillation`.
        wanted: names of the statistics to return. The others are None, and cost nothing.

    Returns:
        :class:`DistillationLoss`: the loss, and detached :class:`DistillationStatistics` shaped like `labels`.

    Memory:
        That of :func:`distillation`, and [N] for each statistic.

    Raises:
        ValueError: as :func:`distillation`, or a name in `wanted` is no statistic.
        TypeError: a dtype is wrong, or `wanted` is no collection of names.

    Source:
        As :func:`distillation`.

    Example:
        >>> import torch
        >>> from compiled_loss import distillation_with_statistics
        >>> student, teacher = torch.tensor([[2.0, 0.0], [0.0, 0.0]]), torch.tensor([[0.0, 0.0], [0.0, 0.0]])
        >>> found = distillation_with_statistics(student, teacher, torch.tensor([0, 1]), divergence="acceptance")
        >>> found.loss, found.statistics.acceptance
        (tensor(0.2397), tensor([0.6192, 1.0000]))

    """
    checks.statistics_wanted(wanted, WANTED)
    options = dispatch.Options(
        divergence,
        jsd_weight,
        lk_decay,
        temperature_squared,
        hard_label_weight,
        teacher_softcap,
        teacher_logit_scale,
        wanted,
    )
    keywords = Keywords(
        chunking=UNCHUNKED,
        mask=mask,
        token_weights=token_weights,
        ignore_index=ignore_index,
        softcap=softcap,
        logit_scale=logit_scale,
        temperature=temperature,
        shift=shift,
        reduction=reduction,
        num_label_tokens=num_label_tokens,
        vocab_shard=vocab_shard,
        compile=compile,
    )
    stored = Stored(teacher_topk, teacher_probabilities)
    given = (student_logits, teacher_logits, labels, stored)
    return _seen(*dispatch.of_logits(*given, options, keywords, class_dim=class_dim), wanted)


def linear_distillation_with_statistics(
    student_hidden: Tensor,  # [..., H]
    student_weight: Tensor,  # [V, H]
    teacher_hidden: Tensor | None,  # [..., H']
    teacher_weight: Tensor | None,  # [V, H']
    labels: Tensor,  # [...]
    *,
    bias: Tensor | None = None,  # [V]
    teacher_bias: Tensor | None = None,  # [V]
    teacher_topk: tuple[Tensor, Tensor] | None = None,  # [..., k] each
    teacher_probabilities: Tensor | None = None,  # [..., V]
    mask: Tensor | None = None,
    token_weights: Tensor | None = None,
    divergence: str | Mapping[str, float | Tensor] = "forward_kl",
    jsd_weight: float = 0.5,
    lk_decay: float = 3.0,
    temperature: float | Tensor = 1.0,
    temperature_squared: bool = True,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    teacher_softcap: float | None = None,
    teacher_logit_scale: float | None = None,
    hard_label_weight: float = 0.0,
    ignore_index: int = -100,
    shift: int = 0,
    reduction: str = "mean",
    num_label_tokens: int | Tensor | None = None,
    vocab_shard: VocabShard | None = None,
    chunking: Chunking = Chunking(),
    wanted: Collection[str] = WANTED,
) -> DistillationLoss:
    r"""Computes `linear_distillation`, and the statistics of each token in the same pass, at no other GEMM or kernel.

    Args:
        student_hidden, student_weight, teacher_hidden, teacher_weight, labels, bias, teacher_bias, teacher_topk,
            teacher_probabilities, mask, token_weights, divergence, jsd_weight, lk_decay, temperature,
            temperature_squared, softcap, logit_scale, teacher_softcap, teacher_logit_scale, hard_label_weight,
            ignore_index, shift, reduction, num_label_tokens, vocab_shard, chunking: see :func:`linear_distillation`.
        wanted: names of the statistics to return. The others are None, and cost nothing.

    Returns:
        :class:`DistillationLoss`: the loss, and detached :class:`DistillationStatistics` shaped like `labels`.

    Memory:
        That of :func:`linear_distillation`, and [N] for each statistic.

    Raises:
        ValueError: as :func:`linear_distillation`, or a name in `wanted` is no statistic.
        TypeError: a dtype is wrong, or `wanted` is no collection of names.
        RuntimeError: see :func:`linear_distillation`.

    Source:
        As :func:`distillation`.

    Example:
        >>> import torch
        >>> from compiled_loss import linear_distillation_with_statistics
        >>> hidden, weight = torch.eye(2, requires_grad=True), torch.tensor([[2.0, 0.0], [0.0, 1.0], [0.0, 0.0]])
        >>> teacher = torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.0, 0.0]])
        >>> given = (hidden, weight, torch.eye(2), teacher, torch.tensor([0, 1]))
        >>> loss, statistics = linear_distillation_with_statistics(*given, wanted=("acceptance",))
        >>> statistics.acceptance, statistics.student_entropy
        (tensor([0.7891, 1.0000]), None)

    """
    checks.statistics_wanted(wanted, WANTED)
    options = dispatch.Options(
        divergence,
        jsd_weight,
        lk_decay,
        temperature_squared,
        hard_label_weight,
        teacher_softcap,
        teacher_logit_scale,
        wanted,
    )
    keywords = Keywords(
        bias=bias,
        mask=mask,
        token_weights=token_weights,
        ignore_index=ignore_index,
        softcap=softcap,
        logit_scale=logit_scale,
        temperature=temperature,
        shift=shift,
        reduction=reduction,
        num_label_tokens=num_label_tokens,
        vocab_shard=vocab_shard,
        chunking=chunking,
    )
    student, teacher = Head(student_hidden, student_weight), Head(teacher_hidden, teacher_weight, teacher_bias)
    stored = Stored(teacher_topk, teacher_probabilities)
    return _seen(*dispatch.of_heads(student, teacher, labels, stored, options, keywords), wanted)


def _seen(loss: Tensor, found: Found, wanted: Collection[str]) -> DistillationLoss:
    statistics = [getattr(found, name) if name in wanted else None for name in DistillationStatistics._fields]
    return DistillationLoss(loss, DistillationStatistics(*statistics))
