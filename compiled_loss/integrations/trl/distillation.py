"""Divergences of TRL's distillation trainers, without either model's logits.

NOTE [Where TRL takes divergences]
`GKDTrainer` calls both models and gives their logits to its `generalized_jsd_loss`. There the deferred logits are given
to our function. In `DistillationTrainer._compute_loss`, backbones return hidden states, and a function of the trainer's
module takes these, both heads and what TRL knows of their softcaps and scales. There the whole model takes the place of
its backbone, its deferred logits that of hidden states, and our function that of the module's.
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
        """Restores the methods of the class."""
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
        """Returns the loss, the student's entropy summed over tokens, and the number of these tokens."""
        mask = completion_mask != 0
        found = divergence(student, teacher, mask, beta, temperature, num_items_in_batch, self.chunking)
        entropy = found.statistics.student_entropy
        assert entropy is not None
        return found.loss, entropy.sum(), mask.sum()


class _AsBackbone(nn.Module):
    """A whole model in the place of its backbone: TRL calls the backbone inside of Accelerate's autocast."""

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
        """Restores the methods of the class."""
        del self.trainer.compute_loss, self.trainer.generalized_jsd_loss

    def _compute_loss(self, model: Any, inputs: Any, return_outputs: bool = False, **kwargs: Any) -> Any:
        """Computes the loss. If there is a `compute_metrics`, the logits that it reads are computed once more."""
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
    """Returns TRL's generalised Jensen-Shannon divergence, and the student's entropy."""
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
    labels = torch.where(mask, 0, -100)  # only -100 has a meaning here

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
    """Puts a function in the place of the one that `DistillationTrainer._compute_loss` calls."""
    from trl.trainer import distillation_trainer as module

    theirs = module._chunked_divergence_loss
    module._chunked_divergence_loss = function
    try:
        yield
    finally:
        module._chunked_divergence_loss = theirs
