"""Teachers that a student is compared with: a head, the top of a distribution, or probabilities.

N tokens (any leading shape), H width, V vocabulary. All checks come first.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from compiled_loss import checks
from compiled_loss.checks import numbers
from compiled_loss.dispatch.layout import check_class_dim
from compiled_loss.dispatch.linear import computed_dtype
from compiled_loss.distributed import dtensor
from compiled_loss.distributed.vocab_shard import Vocabulary
from compiled_loss.engine.math.divergences import Target

Topk = tuple[Tensor, Tensor]


class Head(NamedTuple):
    """The arguments of a head as they were given."""

    hidden: Any  # [..., H]
    weight: Any  # [V, H]
    bias: Tensor | None = None  # [V]


class Stored(NamedTuple):
    """A teacher whose distributions exist already: the top of each, or the whole. At most one is given."""

    topk: Topk | None  # [..., k] each
    probabilities: Tensor | None  # [..., V]

    def check_alone(self, **others: object) -> None:
        """Raises an error if a stored teacher is given together with another argument of the teacher."""
        if self.topk is not None:
            checks.targets.no_teacher("teacher_topk", teacher_probabilities=self.probabilities, **others)
        elif self.probabilities is not None:
            checks.targets.no_teacher("teacher_probabilities", **others)


def check_teacher(
    teacher: Head,
    student: torch.Size,  # a rank's hidden states
    part: Vocabulary,
    device: torch.device,
    *,
    like: str,
    picked: bool = False,
) -> None:
    """Raises an error unless a teacher's head fits the student's hidden states.

    Its classes are laid out like those of the weight called `like`, or some of them are picked.
    """
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
    """Returns this rank's part of the teacher's head, of the rows that are picked, and its bias.

    If the teacher's weight is the student's, `shared` is that weight, which is cast once.
    """
    dtype = computed_dtype(teacher.hidden, teacher.weight, ("teacher_hidden", "teacher_weight"))
    vectors = [None if v is None else dtensor.own(v).detach() for v in (teacher.weight, teacher.bias)]
    if picked is not None:
        vectors = [None if v is None else v[part.own(picked)] for v in vectors]
    weight, bias = vectors
    assert weight is not None
    weight = weight.to(dtype) if shared is None else shared.detach()
    return Target(dtensor.rows(teacher.hidden, part).detach().to(dtype), weight=weight), bias


def check_topk(teacher_topk: Any, rows: torch.Size, part: Vocabulary, class_dim: int, device: torch.device) -> None:
    """Raises an error unless it is the top of a distribution for each of a rank's rows."""
    checks.targets.two_tensors("teacher_topk", teacher_topk)
    for i, value in enumerate(teacher_topk):
        name = f"teacher_topk[{i}]"
        dim = check_class_dim(name, value, class_dim)
        dtensor.check_rows(name, value)
        checks.targets.top(name, value, dtensor.own_rows(value, part, dim), value.shape[dim : dim + 1], rows, part.size)
        checks.same_device(name, value, device)
    checks.targets.teacher_topk(*teacher_topk)


def cached(
    values: Tensor, indices: Tensor, labels: Tensor, active: Tensor, vocabulary: Vocabulary
) -> tuple[Target, Tensor, Tensor]:
    """Returns the cached teacher, True for tokens where it lists an id that is no class, and what ranks must share.

    Each class is in it once. Every other place has the value -inf and the index V, which is no class of any rank.
    """
    alike = labels
    if vocabulary.group is not None:
        alike = torch.cat([labels.reshape(-1), indices.reshape(-1)])
        vocabulary.check_equal(alike)
    # Sorted by class, and within a class by value: an entry that follows one of the same class is a repetition.
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
