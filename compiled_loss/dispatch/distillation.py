"""From distillation's arguments to two distributions: its options, its tokens, its teachers.

N tokens (any leading shape), H width, V vocabulary. Nothing is computed before the last check.
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
from compiled_loss.dispatch.keywords import Keywords
from compiled_loss.dispatch.layout import check_class_dim, classes_last
from compiled_loss.dispatch.linear import check_head, computed_dtype
from compiled_loss.distributed import dtensor
from compiled_loss.distributed.vocab_shard import Vocabulary
from compiled_loss.engine.divergence_chunks import Weighted
from compiled_loss.engine.math.divergences import Pair, Target
from compiled_loss.engine.math.statistics import statistics_dtype

Topk = tuple[Tensor, Tensor]


class Options(NamedTuple):
    """What distillation has beside the keywords of all losses."""

    divergence: str
    jsd_weight: Any
    hard_label_weight: Any
    teacher_softcap: Any
    teacher_logit_scale: Any

    def checked(self) -> Options:
        """Raise unless each is in its range; numbers come back as numbers."""
        jsd_weight, hard_label_weight = checks.targets.distillation(
            self.divergence, self.jsd_weight, self.hard_label_weight
        )
        teacher = checks.targets.logit_map(self.teacher_softcap, self.teacher_logit_scale, "teacher_")
        return Options(self.divergence, jsd_weight, hard_label_weight, *teacher)

    @property
    def hard(self) -> bool:
        """Whether the labels' own cross-entropy is wanted."""
        return not numbers.known(self.hard_label_weight, 0)

    def only_cached(self, **teacher: Tensor | None) -> None:
        """Raise where something else is said of a teacher that is cached."""
        checks.targets.no_teacher(
            "teacher_topk",
            **teacher,
            teacher_softcap=self.teacher_softcap,
            teacher_logit_scale=self.teacher_logit_scale,
        )

    def weighted(
        self, tokens: reductions.Tokens, keywords: Keywords, dtype: torch.dtype, outside: Tensor | None
    ) -> Weighted:
        """The coefficients of each token's divergence and cross-entropy, NaN where `outside` is True."""
        weight, active = tokens.weights(dtype), tokens.active
        weight = reductions.divided(weight, weight, keywords.reduction, keywords.num_label_tokens)
        weight = weight * tokens.classes.nan_if_invalid(tokens.labels, dtype)
        if outside is not None:
            weight = torch.where(active & outside, float("nan"), weight)
        soft = weight * ((1 - self.hard_label_weight) * keywords.temperature**2)
        if not self.hard:
            return Weighted(soft, None, None, active)
        return Weighted(soft, weight * self.hard_label_weight, tokens.labels, active)

    def pair(self, like: Tensor, keywords: Keywords, bias: Tensor | None, teacher_bias: Tensor | None) -> Pair:
        """How the engine compares them."""
        return two.pair(
            like,
            keywords.temperature,
            Transform(keywords.softcap, keywords.logit_scale, bias),
            Transform(self.teacher_softcap, self.teacher_logit_scale, teacher_bias),
            jsd_weight=self.jsd_weight if self.divergence == "jsd" else None,
            hard=self.hard,
        )


class Head(NamedTuple):
    """A head as it is given."""

    hidden: Any  # [..., H]
    weight: Any  # [V, H]
    bias: Tensor | None = None  # [V]


def of_logits(
    student_logits: Tensor,  # [..., V]
    teacher_logits: Tensor | None,  # [..., V]
    labels: Tensor,  # [...]
    options: Options,
    keywords: Keywords,
    *,
    teacher_topk: Topk | None,
    class_dim: int,
) -> Tensor:
    """The loss of logits that exist."""
    options, keywords = options.checked(), keywords.checked()
    dim = check_class_dim("student_logits", student_logits, class_dim)
    part = dtensor.logits_layout("student_logits", student_logits, dim, keywords.vocab_shard)
    checks.logits(student_logits, part.size, "student_logits")
    rows, device = dtensor.own_rows(student_logits, part, dim), student_logits.device
    checks.tensor("labels", labels)
    dtensor.check_rows("labels", labels)
    own = dtensor.own_shape(labels, part)
    checks.class_labels(own, labels, "student_logits", rows, student_logits, class_dim)
    keywords.check_tensors(rows, part, device)
    if teacher_topk is None:
        teacher_logits = checks.targets.teacher_given("teacher_logits", teacher_logits)
        check_class_dim("teacher_logits", teacher_logits, class_dim)
        dtensor.check_beside("teacher_logits", teacher_logits, "student_logits", part, dim)
        theirs, mine = (dtensor.own_logits_shape(v, part, dim) for v in (teacher_logits, student_logits))
        checks.targets.same_logits("teacher_logits", teacher_logits, "student_logits", theirs, mine, device)
    else:
        options.only_cached(teacher_logits=teacher_logits)
        _check_topk(teacher_topk, rows, part, class_dim, device)

    labels, keywords = keywords.own(labels, part)
    part.check_equal(labels)
    tokens = keywords.tokens(labels, part.size if options.hard else None, student_logits.dtype)
    student_logits = classes_last("student_logits", dtensor.own(student_logits), class_dim)
    outside, alike = None, labels
    if teacher_logits is not None:
        target = Target(classes_last("teacher_logits", dtensor.own(teacher_logits), class_dim).detach())
    else:
        assert teacher_topk is not None
        values, indices = (classes_last("teacher_topk", dtensor.rows(v, part), class_dim) for v in teacher_topk)
        target, outside, alike = _cached(values, indices, labels, tokens.active, part)
    dtype = statistics_dtype(student_logits.dtype)
    weighted = options.weighted(tokens, keywords, dtype, outside)
    pair = options.pair(student_logits, keywords, None, None)
    losses = two.on_logits(student_logits, target, options.divergence, pair, weighted, part, keywords.compile)
    loss = losses if keywords.reduction == "none" else losses.sum()
    return part.nan_unless_equal(loss, alike, loss)


def of_heads(
    student: Head,
    teacher: Head,
    labels: Tensor,  # [...]
    options: Options,
    keywords: Keywords,
    *,
    teacher_topk: Topk | None,
) -> Tensor:
    """The loss of two heads' logits, which are not held. The keywords' bias is the student's."""
    options, keywords = options.checked(), keywords.checked()
    names = ("student_hidden", "student_weight")
    part = check_head(student.hidden, student.weight, keywords, names)
    shape, device = dtensor.own_shape(student.hidden, part), student.hidden.device
    checks.tensor("labels", labels)
    dtensor.check_rows("labels", labels)
    checks.tokens(dtensor.own_shape(labels, part), labels, names[0], shape, device, student.weight)
    keywords.check_tensors(shape[:-1], part, device)
    if teacher_topk is None:
        check_teacher(teacher, shape, part, device, like="student_weight")
    else:
        options.only_cached(teacher_hidden=teacher.hidden, teacher_weight=teacher.weight, teacher_bias=teacher.bias)
        _check_topk(teacher_topk, shape[:-1], part, -1, device)
    dtype = computed_dtype(student.hidden, student.weight, names)
    how = two.planned(shape, part, keywords, dtype, device, heads=1 if teacher_topk is not None else 2)

    labels, keywords = keywords.own(labels, part)
    part.check_equal(labels)
    tokens = keywords.tokens(labels, part.size if options.hard else None, dtype)
    hidden, weight, bias = dtensor.own_head(student.hidden, student.weight, keywords.bias, part)
    hidden, weight = hidden.to(dtype), weight.to(dtype)
    outside, alike, teacher_bias = None, labels, None
    if teacher_topk is None:
        shared = weight if teacher.weight is student.weight else None
        target, teacher_bias = own_teacher(teacher, shared, part)
    else:
        values, indices = (dtensor.rows(v, part) for v in teacher_topk)
        target, outside, alike = _cached(values, indices, labels, tokens.active, part)
    weighted = options.weighted(tokens, keywords, statistics_dtype(dtype), outside)
    pair = options.pair(hidden, keywords, bias, teacher_bias)
    loss = two.on_head(hidden, weight, target, options.divergence, pair, weighted, part, how, keywords)
    return part.nan_unless_equal(loss, alike, loss)


def check_teacher(
    teacher: Head,
    student: torch.Size,  # a rank's hidden states
    part: Vocabulary,
    device: torch.device,
    *,
    like: str,
    picked: bool = False,
) -> None:
    """Raise unless a teacher's head fits. Its classes lie as those of the weight called `like`, or some are picked."""
    hidden = checks.targets.teacher_given("teacher_hidden", teacher.hidden)
    weight = checks.targets.teacher_given("teacher_weight", teacher.weight)
    names = ("teacher_hidden", "teacher_weight")
    checks.targets.head_weight(names[1], weight, "teacher_bias", teacher.bias)
    for name, value in zip(names, (hidden, weight), strict=True):
        checks.tensor(name, value)
    dtensor.check_rows(names[0], hidden)
    vocab = part.size if not picked else weight.shape[0] if weight.dim() else 0
    checks.targets.teacher(hidden, weight, vocab, dtensor.own_shape(hidden, part)[:-1], student[:-1], device)
    over_classes = [(names[1], weight)]
    if teacher.bias is not None:
        checks.tensor("teacher_bias", teacher.bias)
        over_classes.append(("teacher_bias", teacher.bias))
    for name, value in over_classes:
        if picked:
            dtensor.check_whole(name, value)
        else:
            dtensor.check_beside(name, value, like, part, 0, of_head=True)
    if not picked:
        checks.targets.teacher_rows(weight, dtensor.classes_of(weight, part))
    checks.targets.teacher_bias(teacher.bias, weight)
    computed_dtype(hidden, weight, names)


def own_teacher(
    teacher: Head, shared: Tensor | None, part: Vocabulary, picked: Tensor | None = None
) -> tuple[Target, Tensor | None]:
    """The teacher's head, a rank's own, of the rows that are picked, and its bias.

    `shared` is its weight where it is the student's, which is cast once.
    """
    dtype = computed_dtype(teacher.hidden, teacher.weight, ("teacher_hidden", "teacher_weight"))
    vectors = [None if v is None else dtensor.own(v).detach() for v in (teacher.weight, teacher.bias)]
    if picked is not None:
        vectors = [None if v is None else v[part.own(picked)] for v in vectors]
    weight, bias = vectors
    assert weight is not None
    weight = weight.to(dtype) if shared is None else shared.detach()
    return Target(dtensor.rows(teacher.hidden, part).detach().to(dtype), weight=weight), bias


def _check_topk(teacher_topk: Any, rows: torch.Size, part: Vocabulary, class_dim: int, device: torch.device) -> None:
    """Raise unless it is the top of a distribution for each of a rank's rows."""
    checks.targets.two_tensors("teacher_topk", teacher_topk)
    for i, value in enumerate(teacher_topk):
        name = f"teacher_topk[{i}]"
        dim = check_class_dim(name, value, class_dim)
        dtensor.check_rows(name, value)
        checks.targets.top(name, value, dtensor.own_rows(value, part, dim), value.shape[dim : dim + 1], rows, part.size)
        checks.same_device(name, value, device)
    checks.targets.teacher_topk(*teacher_topk)


def _cached(
    values: Tensor, indices: Tensor, labels: Tensor, active: Tensor, vocabulary: Vocabulary
) -> tuple[Target, Tensor, Tensor]:
    """The cached teacher, where it lists what is no class, and what ranks must have alike.

    Each class is in it once. All else has the value -inf and the index V, which is no class of any rank.
    """
    alike = labels
    if vocabulary.group is not None:
        alike = torch.cat([labels.reshape(-1), indices.reshape(-1)])
        vocabulary.check_equal(alike)
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
    if numbers.can_read_values(values):
        checks.targets.teacher_topk_values(values[active], indices[active], vocabulary.size)
    return Target(values, vocabulary.labels(indices)), outside, alike
