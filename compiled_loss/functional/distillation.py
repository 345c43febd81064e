"""Knowledge distillation: how far a student's distribution is from its teacher's, on logits and on heads.

N tokens (any leading shape), H width, H' the teacher's, V vocabulary, C tokens a chunk. Losses are in nats.

NOTE [Divergences]
With p the teacher's distribution and q the student's, both softened by the temperature T:

    forward_kl   sum(p (log p - log q))                               Hinton et al. 2015, up to the teacher's entropy
    reverse_kl   sum(q (log q - log p))                               Gu et al. 2023, MiniLLM
    jsd          w KL(p || m) + (1 - w) KL(q || m), m = w p + (1 - w) q        Agarwal et al. 2023, GKD, equation 1

and a token's loss is (1 - a) T^2 divergence + a cross-entropy(student, label), a the `hard_label_weight`, its
cross-entropy at temperature 1. T^2 keeps the gradient's size as T changes (Hinton et al., section 2.1).

NOTE [Cached teacher]
`teacher_topk` is a teacher whose top alone was kept: values [..., k], log-probabilities, the largest of
log_softmax(teacher_logits / T), and indices [..., k], int64, of their classes. An entry whose probability is 0, as that
of -inf and of -1e9, is padding: its index may be any number. Of a class that is listed twice, as a sampled token that
was appended to the top, the largest value counts.

What the values leave of 1 is the mass of all other classes. It is compared with the student's on them as one class
(engine/math/top_divergences.py, NOTE [Tail]). The loss is at most that of the whole teacher, equal to it where k is V,
and its gradient leaves the proportions in the tail as they are. The mass at another temperature than the cache's cannot
be known: make it with the loss's own.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from compiled_loss import checks
from compiled_loss import reduction as reductions
from compiled_loss.checks import numbers
from compiled_loss.dispatch import divergence as pair
from compiled_loss.dispatch.layout import classes_last
from compiled_loss.dispatch.linear import computed_dtype
from compiled_loss.distributed import dtensor
from compiled_loss.distributed.vocab_shard import VocabShard, Vocabulary
from compiled_loss.engine.divergence_chunks import Weighted
from compiled_loss.engine.math.divergences import Target
from compiled_loss.engine.math.statistics import statistics_dtype
from compiled_loss.planner.chunking import Chunking


def _weighted(
    labels: Tensor,
    like: Tensor,
    vocab: int,
    *,
    temperature: float,
    hard_label_weight: float,
    ignore_index: int,
    reduction: str,
    num_label_tokens: int | Tensor | None,
    outside: Tensor | None,  # [...] bool, where a cached teacher lists what is no class
) -> Weighted:
    """The coefficients of each token's divergence and cross-entropy. Labels are looked at where they are wanted."""
    checks.reduction(reduction)
    num_label_tokens = checks.count(dtensor.whole(num_label_tokens), reduction)
    checks.count_device(num_label_tokens, labels.device)
    ranged = None if numbers.known(hard_label_weight, 0) else vocab
    tokens = reductions.tokens(labels, None, None, ignore_index=ignore_index, shift=0, vocab=ranged, dtype=like.dtype)
    each = tokens.weights(statistics_dtype(like.dtype))
    poison = tokens.classes.poison(tokens.labels, each.dtype)
    weight = reductions.divided(each, each, reduction, num_label_tokens) * poison
    if outside is not None:
        weight = torch.where(tokens.active & outside, float("nan"), weight)
    soft = weight * ((1 - hard_label_weight) * temperature**2)
    if numbers.known(hard_label_weight, 0):
        return Weighted(soft, None, None, tokens.active)
    return Weighted(soft, weight * hard_label_weight, tokens.labels, tokens.active)


def _top(
    teacher_topk: tuple[Tensor, Tensor], labels: Tensor, vocabulary: Vocabulary, ignore_index: int
) -> tuple[Target, Tensor, Tensor]:
    """The cached teacher, where it lists what is no class, and what ranks must have alike.

    Each class is in it once. All else has the value -inf and the index V, which is no class of any rank.
    """
    values, indices = teacher_topk
    alike = labels
    if vocabulary.group is not None:
        alike = torch.cat([labels.reshape(-1), indices.reshape(-1)])
        vocabulary.compare(alike)
    # Sorted by class, and within a class by value: whatever follows its own class is there twice.
    values, order = values.detach().sort(dim=-1, descending=True, stable=True)
    padding = values.exp() == 0
    indices = indices.gather(-1, order).masked_fill(padding, vocabulary.size)
    indices, order = indices.sort(dim=-1, stable=True)
    values, padding = values.gather(-1, order), padding.gather(-1, order)
    twice = torch.nn.functional.pad(indices[..., 1:] == indices[..., :-1], (1, 0))
    values = values.masked_fill(padding | twice, float("-inf"))
    indices = indices.masked_fill(twice, vocabulary.size)
    outside = (((indices < 0) | (indices >= vocabulary.size)) & ~values.isneginf()).any(-1)
    if numbers.readable(values):
        active = labels != ignore_index
        checks.targets.teacher_topk_values(values[active], indices[active], vocabulary.size)
    return Target(values, vocabulary.labels(indices)), outside, alike


def distillation(
    student_logits: Tensor,  # [..., V]
    teacher_logits: Tensor | None,  # [..., V]
    labels: Tensor,  # [...]
    *,
    teacher_topk: tuple[Tensor, Tensor] | None = None,  # [..., k] each
    divergence: str = "forward_kl",
    jsd_weight: float = 0.5,
    temperature: float = 1.0,
    hard_label_weight: float = 0.0,
    ignore_index: int = -100,
    fp32_upcast: bool = True,
    reduction: str = "mean",
    num_label_tokens: int | Tensor | None = None,
    class_dim: int = -1,
    vocab_shard: VocabShard | None = None,
    chunk_size: int = 0,
    compile: bool | Literal["auto"] = "auto",
) -> Tensor:
    r"""Divergence of a student's logits from a teacher's, in the tokens that `labels` do not ignore.

    A token's loss is (1 - hard_label_weight) T^2 D(p, q) + hard_label_weight (lse - z_y), D as in NOTE [Divergences].

    Args:
        student_logits: [..., V], any strides; fp32, bf16, fp16 or fp64. Never written.
        teacher_logits: the same shape, any of these dtypes, or None beside `teacher_topk`. Never written; gets no
            gradient.
        labels: [...], int64. Only which of them are `ignore_index` matters, unless `hard_label_weight` is given.
        teacher_topk: (values, indices), [..., k] each, floating and int64: NOTE [Cached teacher]. Gets no gradient.
        divergence: "forward_kl", "reverse_kl" or "jsd".
        jsd_weight: the teacher's part of the mixture, between 0 and 1, for "jsd".
        temperature: divides both logits, > 0.
        hard_label_weight: from 0 to 1, the part of the labels' own cross-entropy, in the same pass.
        ignore_index: label of tokens to ignore.
        fp32_upcast: kept for its callers. Statistics and losses are fp32 and gradients in the logits' dtype either way.
        reduction: "mean" over the tokens that count, "sum" or "none".
        num_label_tokens: divides a "sum"; an int or a one-element tensor, never synchronised.
        class_dim: the dimension of both logits that is V, and of `teacher_topk` that is k; see :func:`cross_entropy`.
        vocab_shard: which classes plain logits of both have, where each rank has some: :class:`VocabShard`. DTensors
            say so themselves; all else is alike on the group's ranks.
        chunk_size: kept for its callers, an int >= 0. What it bounds elsewhere, temporaries of [N, V], is never held.
        compile: whether an eager call runs its elementwise work as a compiled kernel; "auto" does on accelerators.
            Under torch.compile it is compiled in any case.

    Returns:
        A scalar, or for "none" the shape of `labels` with 0 where ignored; fp32 (fp64 for fp64 logits). 0, attached to
        the graph, where no token counts.

    Memory:
        Keeps nothing of [N, V] beyond the two logits: one pass forward, one back, which creates the gradient. With
        `teacher_topk` forward copies the student's logits, and lets the copy go.

    Raises:
        ValueError: a shape, device, number or name is off, or, in eager CPU code with `hard_label_weight`, a label is
            out of range, or `teacher_topk` is no part of a distribution; elsewhere a token whose label or indices are
            out of range gives NaN.
            Likewise where ranks of one vocabulary have other labels: an error, elsewhere NaN in all that counts.
        TypeError: a dtype is off.

    Source:
        NeMo Automodel's KDLoss for names and meaning; its defects are not kept.

    Example:
        >>> import torch
        >>> from compiled_loss import distillation
        >>> student = torch.tensor([[2.0, 0.0, 0.0], [0.0, 1.0, 0.0]])
        >>> teacher = torch.tensor([[1.0, 0.0, 0.0], [0.0, 1.0, 0.0]])
        >>> distillation(student, teacher, torch.tensor([0, 1]), reduction="none")
        tensor([0.1120, 0.0000])

    """
    jsd_weight, temperature, hard_label_weight = checks.targets.distillation(
        divergence, jsd_weight, temperature, hard_label_weight, fp32_upcast, chunk_size
    )
    checks.chunking.compiles(compile)
    given = student_logits
    student_logits = classes_last("student_logits", student_logits, class_dim)
    student_logits, vocabulary = dtensor.logits("student_logits", student_logits, vocab_shard)
    checks.logits(student_logits, vocabulary.size, "student_logits")
    checks.tensor("labels", labels)
    dtensor.check_rows("labels", labels)
    labels = dtensor.rows(labels, vocabulary)
    checks.class_labels(labels.shape, labels, "student_logits", student_logits.shape[:-1], given, class_dim)
    vocabulary.compare(labels)
    alike, outside = labels, None
    checks.sharding.spread(reduction, vocabulary.spread)
    vocab = vocabulary.size
    if teacher_topk is None:
        teacher_logits = checks.targets.teacher_given("teacher_logits", teacher_logits)
        teacher_logits = classes_last("teacher_logits", teacher_logits, class_dim)
        teacher_logits = dtensor.beside("teacher_logits", teacher_logits, "student_logits", vocabulary, -1)
        checks.targets.same_logits("teacher_logits", teacher_logits, "student_logits", student_logits)
        target = Target(teacher_logits.detach())
    else:
        if isinstance(teacher_topk, tuple):
            parts = [classes_last(f"teacher_topk[{i}]", value, class_dim) for i, value in enumerate(teacher_topk)]
            teacher_topk = tuple(parts)  # type: ignore[assignment]
        teacher_topk = dtensor.top(teacher_topk, vocabulary)
        checks.targets.teacher_topk(teacher_topk, {"teacher_logits": teacher_logits}, student_logits, vocab)
        target, outside, alike = _top(teacher_topk, labels, vocabulary, ignore_index)
    weighted = _weighted(
        labels,
        student_logits,
        vocab,
        temperature=temperature,
        hard_label_weight=hard_label_weight,
        ignore_index=ignore_index,
        reduction=reduction,
        num_label_tokens=num_label_tokens,
        outside=outside,
    )
    scalars = pair.scalars(student_logits, temperature, jsd_weight if divergence == "jsd" else None)
    rows = pair.on_logits(
        student_logits, target, weighted.labels, weighted.active, divergence, scalars, vocabulary, compile
    )
    loss = reductions.reduced(weighted.of(*rows), reduction)
    return vocabulary.agreed(loss, alike, loss)


def linear_distillation(
    student_hidden: Tensor,  # [..., H]
    student_weight: Tensor,  # [V, H]
    teacher_hidden: Tensor | None,  # [..., H']
    teacher_weight: Tensor | None,  # [V, H']
    labels: Tensor,  # [...]
    *,
    teacher_topk: tuple[Tensor, Tensor] | None = None,  # [..., k] each
    divergence: str = "forward_kl",
    jsd_weight: float = 0.5,
    temperature: float = 1.0,
    hard_label_weight: float = 0.0,
    ignore_index: int = -100,
    reduction: str = "mean",
    num_label_tokens: int | Tensor | None = None,
    vocab_shard: VocabShard | None = None,
    chunking: Chunking = Chunking(),
) -> Tensor:
    r"""`distillation(student_hidden @ student_weight.T, teacher_hidden @ teacher_weight.T, labels)`, logits never held.

    Args:
        student_hidden: [..., H]; fp32, bf16, fp16 or fp64.
        student_weight: [V, H], in its dtype; under autocast both are cast, once.
        teacher_hidden: [..., H']; the width may differ. Gets no gradient. None beside `teacher_topk`.
        teacher_weight: [V, H'], in its dtype. Gets no gradient. None beside `teacher_topk`.
        labels, teacher_topk, divergence, jsd_weight, temperature, hard_label_weight, ignore_index, reduction,
            num_label_tokens: see :func:`distillation`.
        vocab_shard: which classes plain weights of both have, where each rank has some: :class:`VocabShard`. DTensors
            say so themselves; hidden states and all else are alike on the group's ranks, and the student's gradient
            complete on each.
        chunking: tokens a chunk; the vocabulary is not walked here. `memory_budget` is for both logits of a chunk.

    Returns:
        A scalar, or for "none" the shape of `labels` with 0 where ignored; fp32 (fp64 for fp64 inputs).

    Memory:
        Creates no [N, V] tensor. Beyond the inputs: dH [N, H], dW [V, H] and one chunk of both logits, 2 [C, V], or of
        the student's alone beside `teacher_topk`; dH and dW from forward on. 6 N H V + 2 N H' V operations.
        reduction="none" walks again in backward, 8 N H V + 4 N H' V, and keeps O(N) until then. Under functorch
        transforms the logits are held.

    Raises:
        ValueError: a shape, device, number or name is off; `chunking.strategy` is "vocab"; in eager CPU code, see
            :func:`distillation`.
        TypeError: a dtype is off.
        RuntimeError: a second derivative is asked for, outside functorch transforms.

    Source:
        As :func:`distillation`; the chunk loop is that of :func:`linear_cross_entropy`.

    Example:
        >>> import torch
        >>> from compiled_loss import linear_distillation
        >>> hidden, weight = torch.eye(2, requires_grad=True), torch.tensor([[2.0, 0.0], [0.0, 1.0], [0.0, 0.0]])
        >>> teacher = torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.0, 0.0]])
        >>> loss = linear_distillation(hidden, weight, torch.eye(2), teacher, torch.tensor([0, 1]), reduction="sum")
        >>> loss.detach()
        tensor(0.1120)

    """
    jsd_weight, temperature, hard_label_weight = checks.targets.distillation(
        divergence, jsd_weight, temperature, hard_label_weight, True, 0
    )
    names, shared = ("student_hidden", "student_weight"), teacher_weight is student_weight
    student_hidden, weight, _, vocabulary = dtensor.head(student_hidden, student_weight, None, vocab_shard, names)
    checks.head(student_hidden, weight, vocabulary.size, names)
    checks.tensor("labels", labels)
    dtensor.check_rows("labels", labels)
    labels = dtensor.rows(labels, vocabulary)
    checks.tokens(labels.shape, labels, "student_hidden", student_hidden.shape, student_hidden.device, weight)
    vocabulary.compare(labels)
    alike, outside = labels, None
    checks.sharding.spread(reduction, vocabulary.spread)
    dtype = computed_dtype(student_hidden, weight, names)
    hidden, weight = student_hidden.to(dtype), weight.to(dtype)
    vocab = vocabulary.size
    if teacher_topk is None:
        teacher_hidden = checks.targets.teacher_given("teacher_hidden", teacher_hidden)
        teacher_weight = checks.targets.teacher_given("teacher_weight", teacher_weight)
        checks.tensor("teacher_hidden", teacher_hidden)
        dtensor.check_rows("teacher_hidden", teacher_hidden)
        teacher_hidden = dtensor.rows(teacher_hidden, vocabulary)
        teacher_weight = dtensor.beside("teacher_weight", teacher_weight, "student_weight", vocabulary, 0)
        checks.targets.teacher(teacher_hidden, teacher_weight, student_hidden, weight.shape[0])
        names = ("teacher_hidden", "teacher_weight")
        own = weight if shared else teacher_weight  # under autocast one is cast, once
        dtype = computed_dtype(teacher_hidden, own, names)
        states, own = teacher_hidden.detach().to(dtype), own.detach().to(dtype)
        target = Target(states, weight=own)
    else:
        teacher_topk = dtensor.top(teacher_topk, vocabulary)
        given = {"teacher_hidden": teacher_hidden, "teacher_weight": teacher_weight}
        checks.targets.teacher_topk(teacher_topk, given, student_hidden, vocab)
        target, outside, alike = _top(teacher_topk, labels, vocabulary, ignore_index)
    weighted = _weighted(
        labels,
        hidden,
        vocab,
        temperature=temperature,
        hard_label_weight=hard_label_weight,
        ignore_index=ignore_index,
        reduction=reduction,
        num_label_tokens=num_label_tokens,
        outside=outside,
    )
    scalars = pair.scalars(hidden, temperature, jsd_weight if divergence == "jsd" else None)
    scalar = reduction != "none"
    loss = pair.on_head(hidden, weight, target, divergence, scalars, weighted, vocabulary, chunking, scalar=scalar)
    return vocabulary.agreed(loss, alike, loss)
