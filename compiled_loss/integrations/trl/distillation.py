"""Divergences of TRL's distillation trainers, without either model's logits.

NOTE [Where TRL takes divergences]
`GKDTrainer` calls both models and gives their logits to its `generalized_jsd_loss`: deferred logits come to ours. In
`DistillationTrainer._compute_loss` a backbone gives hidden states, and a function of its module takes these, both
heads and what TRL knows of their softcaps and scales. There the whole model stands in for its backbone, with deferred
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
from compiled_loss.integrations.trl._interim import DeferredLogits, deferring
from compiled_loss.planner.chunking import Chunking


class Distillation:
    """The methods of a `DistillationTrainer` that are ours."""

    def __init__(self, trainer: Any, chunking: Chunking) -> None:
        self.compute_loss, self.last_hidden_state = trainer._compute_loss, trainer._get_last_hidden_state
        self.chunking = chunking
        trainer._compute_loss, trainer._get_last_hidden_state = self._compute_loss, self._deferred

    def undo(self, trainer: Any) -> None:
        """Leave the class's methods."""
        del trainer._compute_loss, trainer._get_last_hidden_state

    def _compute_loss(self, *args: Any) -> Any:
        with _in_place(self._divergence):
            return self.compute_loss(*args)

    def _deferred(self, model: Any, *args: Any, **kwargs: Any) -> DeferredLogits:
        return self.last_hidden_state(_AsBackbone(model), *args, **kwargs)

    def _divergence(
        self,
        student: DeferredLogits,
        teacher: DeferredLogits,
        student_weight: Tensor,
        teacher_weight: Tensor,
        completion_mask: Tensor,
        beta: float,
        num_items_in_batch: int | Tensor | None = None,
        temperature: float = 1.0,
        **_: Any,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The loss, the student's entropy summed over tokens, and how many these are."""
        mask = completion_mask != 0
        found = divergence(student, teacher, mask, beta, temperature, num_items_in_batch, self.chunking)
        entropy = found.statistics.student_entropy
        assert entropy is not None
        return found.loss, entropy.sum(), mask.sum()


class _AsBackbone(nn.Module):
    """A whole model in the place of its backbone: its logits, deferred, for hidden states."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.whole = model

    def base_model(self, **inputs: Any) -> Any:
        with deferring(self.whole):
            return SimpleNamespace(last_hidden_state=self.whole(**inputs).logits)


class GKD:
    """The methods of a `GKDTrainer` that are ours."""

    def __init__(self, trainer: Any, chunking: Chunking) -> None:
        self.compute_loss = trainer.compute_loss
        self.trainer, self.chunking = trainer, chunking
        trainer.compute_loss, trainer.generalized_jsd_loss = self._compute_loss, self._divergence

    def undo(self, trainer: Any) -> None:
        """Leave the class's methods."""
        del trainer.compute_loss, trainer.generalized_jsd_loss

    def _compute_loss(self, model: Any, inputs: Any, return_outputs: bool = False, **kwargs: Any) -> Any:
        """The logits that `compute_metrics` reads are computed once more, where there is one."""
        unwrap = self.trainer.accelerator.unwrap_model
        with deferring(unwrap(model)), deferring(unwrap(self.trainer.teacher_model)):
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
    """TRL's generalised Jensen-Shannon divergence: forward KL at 0, reverse KL at 1."""
    kinds = {0: "forward_kl", 1: "reverse_kl"}
    count = mask.sum().clamp(min=1) if num_items_in_batch is None else num_items_in_batch
    if chunking.max_label_tokens is None and not torch.compiler.is_compiling():
        student, teacher, mask = student[mask], teacher[mask], mask[mask]

    def loss(hidden: Tensor, weight: Tensor, options: dict[str, Any]) -> DistillationLoss:
        def beside(teacher_hidden: Tensor, teacher_weight: Tensor, of_teacher: dict[str, Any]) -> DistillationLoss:
            return linear_distillation_with_statistics(
                hidden,
                weight,
                teacher_hidden,
                teacher_weight,
                torch.where(mask, 0, -100),
                divergence=kinds.get(beta, "jsd"),
                jsd_weight=0.5 if beta in kinds else beta,
                temperature=temperature,
                temperature_squared=False,
                reduction="sum",
                num_label_tokens=count,
                chunking=chunking,
                wanted=("student_entropy",),
                **options,
                **{f"teacher_{name}": value for name, value in of_teacher.items()},
            )

        return teacher.call(beside)

    return student.call(loss)


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
