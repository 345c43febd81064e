"""Dispatch of distillation: from its arguments, with their options, tokens and teacher, to two distributions.

N tokens (any leading shape), H width, V vocabulary. Nothing is computed before the last check.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from compiled_loss import checks
from compiled_loss import reduction as reductions
from compiled_loss.checks import numbers
from compiled_loss.dispatch import divergence as two
from compiled_loss.dispatch.divergence import Transform
from compiled_loss.dispatch.keywords import Keywords
from compiled_loss.dispatch.layout import check_class_dim, classes_last
from compiled_loss.dispatch.linear import check_head, computed_dtype
from compiled_loss.dispatch.teachers import Head, Stored, cached, check_teacher, check_topk, own_teacher
from compiled_loss.distributed import dtensor
from compiled_loss.distributed.vocab_shard import Vocabulary
from compiled_loss.engine.divergence_chunks import Weighted
from compiled_loss.engine.math.divergence_kinds import Kind, Pair
from compiled_loss.engine.math.divergences import Found, Target
from compiled_loss.engine.math.statistics import statistics_dtype


class Options(NamedTuple):
    """The options of distillation besides the keywords of all losses."""

    divergence: Any  # a name, or weights by name
    jsd_weight: Any
    lk_decay: Any
    temperature_squared: bool
    hard_label_weight: Any
    teacher_softcap: Any
    teacher_logit_scale: Any
    wanted: Any = ()  # names of statistics
    names: tuple[str, ...] = ()  # of the divergences, once they are checked
    weights: tuple[Any, ...] | None = None  # of each divergence; None if a single one was named

    def checked(self) -> Options:
        """Returns the options with divergences as names and numbers as numbers. Raises unless each is in its range."""
        names, weights = checks.divergences.named(self.divergence)
        jsd_weight, lk_decay, hard_label_weight = checks.divergences.options(
            self.jsd_weight, self.lk_decay, self.temperature_squared, self.hard_label_weight
        )
        softcap, logit_scale = checks.targets.logit_map(self.teacher_softcap, self.teacher_logit_scale, "teacher_")
        return self._replace(
            jsd_weight=jsd_weight,
            lk_decay=lk_decay,
            hard_label_weight=hard_label_weight,
            teacher_softcap=softcap,
            teacher_logit_scale=logit_scale,
            names=names,
            weights=weights,
        )

    @property
    def hard(self) -> bool:
        """True if the cross-entropy with the labels is wanted."""
        return not numbers.known(self.hard_label_weight, 0)

    def kind(self, stored: Stored) -> Kind:
        """Returns the engine's `Kind`: the divergences and statistics to compute."""
        return Kind.of(self.names, sorted(self.wanted), probabilities=stored.probabilities is not None)

    def weighted(
        self, tokens: reductions.Tokens, keywords: Keywords, dtype: torch.dtype, outside: Tensor | None
    ) -> Weighted:
        """Returns the coefficients of each token's divergence and cross-entropy, NaN where `outside` is True."""
        weight, active = tokens.weights(dtype), tokens.active
        weight = reductions.divided(weight, weight, keywords.reduction, keywords.num_label_tokens)
        weight = weight * tokens.classes.nan_if_invalid(tokens.labels, dtype)
        if outside is not None:
            weight = torch.where(active & outside, float("nan"), weight)
        soft = weight * (1 - self.hard_label_weight)
        if self.temperature_squared:
            inverse = keywords.inverse_temperature(tokens, dtype)
            soft = soft * keywords.temperature**2 if inverse is None else soft / inverse.square()
        if not self.hard:
            return Weighted(soft, None, None, active)
        return Weighted(soft, weight * self.hard_label_weight, tokens.labels, active)

    def pair(self, like: Tensor, keywords: Keywords, bias: Tensor | None, teacher_bias: Tensor | None) -> Pair:
        """Returns the engine's `Pair`: the parameters of student and teacher."""
        return two.pair(
            like,
            keywords.temperature,
            Transform(keywords.softcap, keywords.logit_scale, bias),
            Transform(self.teacher_softcap, self.teacher_logit_scale, teacher_bias),
            weights=self.weights,
            jsd_weight=self.jsd_weight if "jsd" in self.names else None,
            lk_decay=self.lk_decay if "lk" in self.names else None,
            hard=self.hard,
        )


def of_logits(
    student_logits: Tensor,  # [..., V]
    teacher_logits: Tensor | None,  # [..., V]
    labels: Tensor,  # [...]
    stored: Stored,
    options: Options,
    keywords: Keywords,
    *,
    class_dim: int,
) -> tuple[Tensor, Found]:
    """Returns the loss of logits that exist already, and its statistics, [...]."""
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
    stored.check_alone(
        teacher_logits=teacher_logits,
        teacher_softcap=options.teacher_softcap,
        teacher_logit_scale=options.teacher_logit_scale,
    )
    name, whole = "teacher_logits", teacher_logits
    if stored.topk is not None:
        check_topk(stored.topk, rows, part, class_dim, device)
    else:
        if stored.probabilities is not None:
            name, whole = "teacher_probabilities", stored.probabilities
        whole = checks.targets.teacher_given(name, whole)
        check_class_dim(name, whole, class_dim)
        dtensor.check_beside(name, whole, "student_logits", part, dim)
        theirs, mine = (dtensor.own_logits_shape(v, part, dim) for v in (whole, student_logits))
        checks.targets.same_logits(name, whole, "student_logits", theirs, mine, device)

    labels, keywords = keywords.own(labels, part)
    part.check_equal(labels)
    tokens = keywords.tokens(labels, part.size if options.hard else None, student_logits.dtype)
    student_logits = classes_last("student_logits", dtensor.own(student_logits), class_dim)
    outside, alike = None, labels
    if stored.topk is not None:
        values, indices = (classes_last("teacher_topk", dtensor.rows(v, part), class_dim) for v in stored.topk)
        target, outside, alike = cached(values, indices, labels, tokens.active, part)
    else:
        assert whole is not None
        target = Target(classes_last(name, dtensor.own(whole), class_dim).detach())
    dtype = statistics_dtype(student_logits.dtype)
    target = two.at_temperatures(target, keywords, tokens, dtype)
    weighted = options.weighted(tokens, keywords, dtype, outside)
    pair = options.pair(student_logits, keywords, None, None)
    losses, found = two.on_logits(student_logits, target, options.kind(stored), pair, weighted, part, keywords.compile)
    loss = losses if keywords.reduction == "none" else losses.sum()
    return _with_statistics(loss, found, tokens.active, outside, alike, options, part)


def of_heads(
    student: Head,
    teacher: Head,
    labels: Tensor,  # [...]
    stored: Stored,
    options: Options,
    keywords: Keywords,
) -> tuple[Tensor, Found]:
    """Returns the loss of two heads, whose logits are never stored whole, and its statistics, [...].

    The bias among the keywords is the student's.
    """
    options, keywords = options.checked(), keywords.checked()
    names = ("student_hidden", "student_weight")
    part = check_head(student.hidden, student.weight, keywords, names)
    shape, device = dtensor.own_shape(student.hidden, part), student.hidden.device
    checks.tensor("labels", labels)
    dtensor.check_rows("labels", labels)
    checks.tokens(dtensor.own_shape(labels, part), labels, names[0], shape, device, student.weight)
    keywords.check_tensors(shape[:-1], part, device)
    stored.check_alone(
        teacher_hidden=teacher.hidden,
        teacher_weight=teacher.weight,
        teacher_bias=teacher.bias,
        teacher_softcap=options.teacher_softcap,
        teacher_logit_scale=options.teacher_logit_scale,
    )
    heads = 1
    if stored.topk is not None:
        check_topk(stored.topk, shape[:-1], part, -1, device)
    elif stored.probabilities is not None:
        name, value = "teacher_probabilities", stored.probabilities
        checks.tensor(name, value)
        dtensor.check_beside(name, value, names[1], part, -1)
        own = dtensor.own_logits_shape(value, part, value.dim() - 1)
        expected = torch.Size([*shape[:-1], part.stop - part.start])
        checks.targets.same_logits(name, value, "the student's logits", own, expected, device)
    else:
        check_teacher(teacher, shape, part, device, like="student_weight")
        heads = 2
    dtype = computed_dtype(student.hidden, student.weight, names)
    how = two.planned(shape, part, keywords, dtype, device, heads=heads)

    labels, keywords = keywords.own(labels, part)
    part.check_equal(labels)
    tokens = keywords.tokens(labels, part.size if options.hard else None, dtype)
    hidden, weight, bias = dtensor.own_head(student.hidden, student.weight, keywords.bias, part)
    hidden, weight = hidden.to(dtype), weight.to(dtype)
    outside, alike, teacher_bias = None, labels, None
    if stored.topk is not None:
        values, indices = (dtensor.rows(v, part) for v in stored.topk)
        target, outside, alike = cached(values, indices, labels, tokens.active, part)
    elif stored.probabilities is not None:
        target = Target(dtensor.own(stored.probabilities).detach())
    else:
        shared = weight if teacher.weight is student.weight else None
        target, teacher_bias = own_teacher(teacher, shared, part)
    target = two.at_temperatures(target, keywords, tokens, dtype)
    weighted = options.weighted(tokens, keywords, statistics_dtype(dtype), outside)
    pair = options.pair(hidden, keywords, bias, teacher_bias)
    loss, found = two.on_head(hidden, weight, target, options.kind(stored), pair, weighted, part, how, keywords)
    return _with_statistics(loss, found, tokens.active, outside, alike, options, part)


def _with_statistics(
    loss: Tensor,
    found: Found,
    active: Tensor,  # [...]
    outside: Tensor | None,  # [...], tokens whose cached teacher lists an id that is no class
    alike: Tensor,
    options: Options,
    part: Vocabulary,
) -> tuple[Tensor, Found]:
    """Returns the loss and the statistics, both NaN where ranks disagree.

    Statistics are 0 for tokens that do not count, and NaN where `outside` is True.
    """
    if not options.wanted:
        return part.nan_unless_equal(loss, alike, loss), found
    fits = part.nan_unless_equal(torch.ones_like(active, dtype=loss.dtype), alike, loss)
    if outside is not None:
        fits = torch.where(outside, float("nan"), fits)
    statistics = found.map(lambda v: torch.where(active, v.detach() * fits, 0.0))
    return part.nan_unless_equal(loss, alike, loss), statistics
