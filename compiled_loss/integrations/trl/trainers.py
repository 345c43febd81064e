"""What is replaced in which of TRL's trainers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from compiled_loss.huggingface.families import innermost
from compiled_loss.integrations.trl import checks, head
from compiled_loss.integrations.trl.distillation import GKD, Distillation
from compiled_loss.planner.chunking import Chunking

_WITH_FUSED_HEAD = ("SFTTrainer", "DPOTrainer", "KTOTrainer", "GRPOTrainer", "RLOOTrainer", "GMPOTrainer")
_DISTILLATION: dict[str, Callable[..., Any]] = {"DistillationTrainer": Distillation, "GKDTrainer": GKD}


def fuse_trainer(trainer: Any, *, chunking: Chunking = Chunking()) -> None:
    """Compute a trainer's log-probabilities, entropies and divergences here, once it is made and before `train()`.

    TODO
    """
    name = _kind(trainer)
    if name == "RewardTrainer":
        checks.one_column(trainer)
    if name not in _WITH_FUSED_HEAD and name not in _DISTILLATION:
        checks.whole_logits(trainer)
    unfuse_trainer(trainer)
    if name in _DISTILLATION:
        _DISTILLATION[name](trainer, chunking)
    else:
        for model in _models(trainer):
            head.fuse(model, trainer.accelerator.autocast, chunking)


def unfuse_trainer(trainer: Any) -> None:
    """Give a trainer back its own code; one that is not fused is left as it is.

    TODO
    """
    for value in [*vars(trainer).values()]:
        if isinstance(owner := getattr(value, "__self__", None), (Distillation, GKD)):
            owner.undo()
            return
    for model in _models(trainer):
        head.unfuse(model)


def _kind(trainer: Any) -> str:
    """The class of TRL that it is, or that a user's class inherits from."""
    return next((kind.__name__ for kind in type(trainer).__mro__ if kind.__module__.startswith("trl.")), "")


def _models(trainer: Any) -> list[Any]:
    """The trained one, and the reference where it is another."""
    models = (trainer.model, getattr(trainer, "ref_model", None))
    return [innermost(model) for model in models if model is not None]
