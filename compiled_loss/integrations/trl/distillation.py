"""Divergences of TRL's distillation trainers, without either model's logits.

NOTE [Where TRL takes divergences]
`GKDTrainer` calls both models and gives their logits to its `generalized_jsd_loss`: there, deferred logits come to
ours. In `DistillationTrainer._compute_loss` backbones give hidden states, and a function of its module takes these,
both heads and what TRL knows of their softcaps and scales. There a whole model stands in for its backbone, its deferred
logits for hidden states, and ours for that function.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from compiled_loss.functional.distillation_statistics import DistillationLoss, linear_distillation_with_statistics
from compiled_loss.integrations.transformers.deferred import DeferredLogits
from compiled_loss.integrations.transformers.deferring import deferring
from compiled_loss.integrations.trl.head import compacts
from compiled_loss.planner.chunking import Chunking

_ENDS = {0.0: "forward_kl", 1.0: "reverse_kl"}  # of the generalised Jensen-Shannon divergence


class Distillation:
    """The methods of a `DistillationTrainer` that are ours."""

    def __init__(self, trainer: Any, chunking: Chunking) -> None:
        self.trainer, self.chunking = trainer, chunking
        self.compute_loss, self.last_hidden_state = trainer._compute_loss, trainer._get_last_hidden_state
        trainer._compute_loss, trainer._get_last_hidden_state = self._compute_loss, self._last_hidden_state

    def undo(self) -> None:
        """Leave the class's methods."""
        del self.trainer._compute_loss, self.trainer._get_last_hidden_state

    def _compute_loss(self, student: Any, *args: Any) -> Any:
        with deferring(student), deferring(self.trainer.teacher_model), _in_place(self._divergence):
            return self.compute_loss(student, *args)

    def _last_hidden_state(self, model: Any, *args: Any, **kwargs: Any) -> DeferredLogits:
        logits: DeferredLogits = self.last_hidden_state(_AsBackbone(model), *args, **kwargs)
        return logits

    def _divergence(
        self,
        student: DeferredLogits,
        teacher: DeferredLogits,
        student_weight: Tensor,
        teacher_weight: Tensor,
        completion_mask: Tensor,
        beta: float,
        num_items_in_batch: int | Tensor | None,
        temperature: float,
        **_: Any,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The loss, the student's entropy summed over tokens, and how many these are."""
        mask = completion_mask != 0
        found = divergence(student, teacher, mask, beta, temperature, num_items_in_batch, self.chunking)
        entropy = found.statistics.student_entropy
        assert entropy is not None
        return found.loss, entropy.sum(), mask.sum()


class _AsBackbone(nn.Module):
    """A whole model in the place of its backbone: as TRL calls that, beneath the autocast of Accelerate."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.whole = vars(model).get("_original_forward", model)

    def base_model(self, **inputs: Any) -> Any:
        return SimpleNamespace(last_hidden_state=self.whole(**inputs).logits)


class GKD:
    """The methods of a `GKDTrainer` that are ours."""

    def __init__(self, trainer: Any, chunking: Chunking) -> None:
        self.trainer, self.chunking = trainer, chunking
        self.compute_loss = trainer.compute_loss
        trainer.compute_loss, trainer.generalized_jsd_loss = self._compute_loss, self._divergence

    def undo(self) -> None:
        """Leave the class's methods."""
        del self.trainer.compute_loss, self.trainer.generalized_jsd_loss

    def _compute_loss(self, model: Any, inputs: Any, return_outputs: bool = False, **kwargs: Any) -> Any:
        """The logits that `compute_metrics` reads are computed once more, where there is one."""
        autocast = self.trainer.accelerator.autocast()  # as around the forward that multiplied by the head
        with autocast, deferring(model), deferring(self.trainer.teacher_model):
            loss = self.compute_loss(model, inputs, **kwargs)
        if not return_outputs:
            return loss
        if self.trainer.compute_metrics is None:
            return loss, {}
        return loss, model(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"])

    def _divergence(
        self,
        student_logits: DeferredLogits,
        teacher_logits: DeferredLogits,
        labels: Tensor,
        beta: float = 0.5,
        temperature: float = 1.0,
        num_items_in_batch: int | Tensor | None = None,
    ) -> Tensor:
        mask = labels != -100
        return divergence(
            student_logits, teacher_logits, mask, beta, temperature, num_items_in_batch, self.chunking
        ).loss


def divergence(
    student: DeferredLogits,
    teacher: DeferredLogits,
    mask: Tensor,
    beta: float,
    temperature: float,
    num_items_in_batch: int | Tensor | None,
    chunking: Chunking,
) -> DistillationLoss:
    """TRL's generalised Jensen-Shannon divergence, and the student's entropy."""
    options: dict[str, Any] = {
        "divergence": _ENDS.get(beta, "jsd"),
        "jsd_weight": beta if 0 < beta < 1 else 0.5,
        "temperature": temperature,
        "temperature_squared": False,
        "reduction": "sum",
        "num_label_tokens": mask.sum().clamp(min=1) if num_items_in_batch is None else num_items_in_batch,
        "chunking": chunking,
        "wanted": ("student_entropy",),
    }
    if compacts(chunking):
        student, teacher, mask = student[mask], teacher[mask], mask[mask]
    labels = torch.where(mask, 0, -100)  # of which only -100 means something here

    def of_student(hidden: Tensor, weight: Tensor, **head: Any) -> DistillationLoss:
        def of_both(teacher_hidden: Tensor, teacher_weight: Tensor, **teacher_head: Any) -> DistillationLoss:
            of_teacher = {f"teacher_{name}": value for name, value in teacher_head.items()}
            given = {**options, **head, **of_teacher}
            return linear_distillation_with_statistics(hidden, weight, teacher_hidden, teacher_weight, labels, **given)

        both: DistillationLoss = teacher.apply(of_both)
        return both

    found: DistillationLoss = student.apply(of_student)
    return found


@contextlib.contextmanager
def _in_place(function: Any) -> Iterator[None]:
    """A function in the place of the one that `DistillationTrainer._compute_loss` calls."""
    from trl.trainer import distillation_trainer as module

    theirs = module._chunked_divergence_loss
    module._chunked_divergence_loss = function
    try:
        yield
    finally:
        module._chunked_divergence_loss = theirs
