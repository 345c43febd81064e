"""From distillation's arguments to two distributions: its options, its tokens, its teachers.

N tokens (any leading shape), H width, V vocabulary. Options are checked first, then tensors.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from compiled_loss import checks
from compiled_loss import reduction as reductions
from compiled_loss.checks import numbers
from compiled_loss.dispatch import divergence as two
from compiled_loss.dispatch.divergence import Transform
from compiled_loss.dispatch.layout import classes_last
from compiled_loss.dispatch.linear import cast
from compiled_loss.distributed import dtensor
from compiled_loss.distributed.vocab_shard import VocabShard, Vocabulary
from compiled_loss.engine.divergence_chunks import Weighted
from compiled_loss.engine.math.divergences import Pair, Target
from compiled_loss.planner.chunking import Chunking

Topk = tuple[Tensor, Tensor]


class Options(NamedTuple):
    """Checked options; numbers that cannot be read without waiting for a device are tensors."""

    divergence: str
    jsd_weight: Any
    temperature: Any
    hard_label_weight: Any
    student: Transform
    teacher: Transform
    ignore_index: int
    shift: int
    reduction: str

    def tokens(
        self,
        labels: Tensor,
        mask: Tensor | None,
        token_weights: Tensor | None,
        vocabulary: Vocabulary,
        dtype: torch.dtype,
    ) -> reductions.Tokens:
        """The tokens of the loss. Labels are looked at only where their cross-entropy is wanted."""
        return reductions.tokens(
            labels,
            mask,
            token_weights,
            ignore_index=self.ignore_index,
            shift=self.shift,
            vocab=None if numbers.known(self.hard_label_weight, 0) else vocabulary.size,
            dtype=dtype,
        )

    def weighted(
        self, tokens: reductions.Tokens, num_label_tokens: int | Tensor | None, outside: Tensor | None
    ) -> Weighted:
        """The coefficients of each token's divergence and cross-entropy, NaN where `outside` is True."""
        count = checks.count(dtensor.whole(num_label_tokens), self.reduction, tokens.labels.device)
        weight = reductions.divided(tokens.weight, tokens.weight, self.reduction, count) * tokens.poison
        if outside is not None:
            weight = torch.where(tokens.active & outside, float("nan"), weight)
        soft = weight * ((1 - self.hard_label_weight) * self.temperature**2)
        if numbers.known(self.hard_label_weight, 0):
            return Weighted(soft, None, None, tokens.active)
        return Weighted(soft, weight * self.hard_label_weight, tokens.labels, tokens.active)

    def pair(self, like: Tensor, bias: Tensor | None, teacher_bias: Tensor | None) -> Pair:
        """How the engine compares them."""
        return two.pair(
            like,
            self.temperature,
            self.student._replace(bias=bias),
            self.teacher._replace(bias=teacher_bias),
            jsd_weight=self.jsd_weight if self.divergence == "jsd" else None,
            hard=not numbers.known(self.hard_label_weight, 0),
        )

    def only_cached(self, **teacher: Tensor | None) -> None:
        """Raise where something else is said of a teacher that is cached."""
        softcap, logit_scale, _ = self.teacher
        checks.targets.no_teacher("teacher_topk", **teacher, teacher_softcap=softcap, teacher_logit_scale=logit_scale)


def options(
    *,
    divergence: str,
    jsd_weight: Any,
    temperature: Any,
    softcap: Any,
    logit_scale: Any,
    teacher_softcap: Any,
    teacher_logit_scale: Any,
    hard_label_weight: Any,
    ignore_index: int,
    shift: int,
    reduction: str,
    fp32_upcast: bool,
    chunk_size: int,
) -> Options:
    """Check them all."""
    numbers_ = checks.targets.distillation(
        divergence, jsd_weight, temperature, hard_label_weight, fp32_upcast, chunk_size
    )
    student = Transform(*checks.targets.logit_map(softcap, logit_scale))
    teacher = Transform(*checks.targets.logit_map(teacher_softcap, teacher_logit_scale, "teacher_"))
    checks.reduction(reduction)
    return Options(divergence, *numbers_, student, teacher, ignore_index, shift, reduction)


def of_logits(
    student_logits: Tensor,  # [..., V]
    teacher_logits: Tensor | None,  # [..., V]
    labels: Tensor,  # [...]
    options: Options,
    *,
    teacher_topk: Topk | None,
    mask: Tensor | None,
    token_weights: Tensor | None,
    num_label_tokens: int | Tensor | None,
    class_dim: int,
    vocab_shard: VocabShard | None,
    compile: bool | str,
) -> Tensor:
    """The loss of logits that exist."""
    checks.chunking.compiles(compile)
    given = student_logits
    student_logits = classes_last("student_logits", student_logits, class_dim)
    student_logits, vocabulary = dtensor.logits("student_logits", student_logits, vocab_shard)
    checks.logits(student_logits, vocabulary.size, "student_logits")
    labels, mask, token_weights = dtensor.tokens(labels, mask, token_weights, vocabulary)
    checks.class_labels(labels, "student_logits", student_logits, given, class_dim)
    checks.weights(labels, mask, token_weights)
    checks.sharding.spread(options.reduction, vocabulary.spread)
    vocabulary.compare(labels)
    tokens = options.tokens(labels, mask, token_weights, vocabulary, student_logits.dtype)
    alike, outside = labels, None
    if teacher_topk is None:
        teacher_logits = checks.targets.teacher_given("teacher_logits", teacher_logits)
        teacher_logits = classes_last("teacher_logits", teacher_logits, class_dim)
        teacher_logits = dtensor.beside("teacher_logits", teacher_logits, "student_logits", vocabulary, -1)
        checks.targets.same_logits("teacher_logits", teacher_logits, "student_logits", student_logits)
        target = Target(teacher_logits.detach())
    else:
        options.only_cached(teacher_logits=teacher_logits)
        if isinstance(teacher_topk, tuple):
            parts = [classes_last(f"teacher_topk[{i}]", value, class_dim) for i, value in enumerate(teacher_topk)]
            teacher_topk = tuple(parts)  # type: ignore[assignment]
        target, outside, alike = _cached(teacher_topk, student_logits, labels, tokens.active, vocabulary)
    weighted = options.weighted(tokens, num_label_tokens, outside)
    pair = options.pair(student_logits, None, None)
    rows = two.on_logits(student_logits, target, options.divergence, pair, weighted, vocabulary, compile)
    loss = reductions.reduced(rows, options.reduction)
    return vocabulary.agreed(loss, alike, loss)


class Head(NamedTuple):
    """A head as it is given."""

    hidden: Any  # [..., H]
    weight: Any  # [V, H]
    bias: Tensor | None  # [V]


def of_heads(
    student: Head,
    teacher: Head,
    labels: Tensor,  # [...]
    options: Options,
    *,
    teacher_topk: Topk | None,
    mask: Tensor | None,
    token_weights: Tensor | None,
    num_label_tokens: int | Tensor | None,
    vocab_shard: VocabShard | None,
    chunking: Chunking,
) -> Tensor:
    """The loss of two heads' logits, which are not held."""
    two.check(chunking)
    checks.targets.head_weight("student_weight", student.weight, "bias", student.bias)
    checks.targets.head_weight("teacher_weight", teacher.weight, "teacher_bias", teacher.bias)
    names = ("student_hidden", "student_weight")
    given, weight, bias, vocabulary = dtensor.head(*student, vocab_shard, names)
    checks.head(given, weight, bias, vocabulary.size, names)
    labels, mask, token_weights = dtensor.tokens(labels, mask, token_weights, vocabulary)
    checks.tokens(labels, mask, token_weights, "student_hidden", given, weight)
    checks.sharding.spread(options.reduction, vocabulary.spread)
    vocabulary.compare(labels)
    hidden, weight = cast(given, weight, names)
    tokens = options.tokens(labels, mask, token_weights, vocabulary, hidden.dtype)
    alike, outside, teacher_bias = labels, None, None
    if teacher_topk is None:
        shared = weight if teacher.weight is student.weight else None
        target, teacher_bias = _teacher(teacher, given, weight.shape[0], shared, vocabulary)
    else:
        options.only_cached(teacher_hidden=teacher.hidden, teacher_weight=teacher.weight, teacher_bias=teacher.bias)
        target, outside, alike = _cached(teacher_topk, given, labels, tokens.active, vocabulary)
    weighted = options.weighted(tokens, num_label_tokens, outside)
    pair = options.pair(hidden, bias, teacher_bias)
    scalar = options.reduction != "none"
    loss = two.on_head(hidden, weight, target, options.divergence, pair, weighted, vocabulary, chunking, scalar=scalar)
    return vocabulary.agreed(loss, alike, loss)


def _teacher(
    teacher: Head, student: Tensor, rows: int, shared: Tensor | None, vocabulary: Vocabulary
) -> tuple[Target, Tensor | None]:
    """The teacher's head, a rank's own, and its bias. `shared` is its weight where it is the student's, cast once."""
    hidden = checks.targets.teacher_given("teacher_hidden", teacher.hidden)
    weight = checks.targets.teacher_given("teacher_weight", teacher.weight)
    hidden = dtensor.rows("teacher_hidden", hidden, vocabulary)
    weight = dtensor.beside("teacher_weight", weight, "student_weight", vocabulary, 0)
    checks.targets.teacher(hidden, weight, student, rows)
    bias = teacher.bias
    if bias is not None:
        checks.tensor("teacher_bias", bias)
        bias = dtensor.beside("teacher_bias", bias, "student_weight", vocabulary, 0)
        checks.targets.teacher_bias(bias, weight)
    states, own = cast(
        hidden.detach(), (weight if shared is None else shared).detach(), ("teacher_hidden", "teacher_weight")
    )
    return Target(states, weight=own), None if bias is None else bias.detach()


def _cached(
    teacher_topk: Topk, source: Tensor, labels: Tensor, active: Tensor, vocabulary: Vocabulary
) -> tuple[Target, Tensor, Tensor]:
    """The cached teacher, where it lists what is no class, and what ranks must have alike.

    Each class is in it once. All else has the value -inf and the index V, which is no class of any rank.
    """
    teacher_topk = dtensor.top(teacher_topk, vocabulary)
    checks.targets.teacher_topk(teacher_topk, source, vocabulary.size)
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
    twice = pad(indices[..., 1:] == indices[..., :-1], (1, 0))
    values = values.masked_fill(padding | twice, float("-inf"))
    indices = indices.masked_fill(twice, vocabulary.size)
    outside = (((indices < 0) | (indices >= vocabulary.size)) & ~values.isneginf()).any(-1)
    if numbers.readable(values):
        checks.targets.teacher_topk_values(values[active], indices[active], vocabulary.size)
    return Target(values, vocabulary.labels(indices)), outside, alike
