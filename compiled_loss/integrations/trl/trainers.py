"""The replacements in TRL's trainers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from compiled_loss import checks as arguments
from compiled_loss.huggingface.families import innermost
from compiled_loss.integrations.trl import checks, head
from compiled_loss.integrations.trl.distillation import GKD, Distillation
from compiled_loss.planner.chunking import Chunking

_WITH_FUSED_HEAD = ("SFTTrainer", "DPOTrainer", "KTOTrainer", "GRPOTrainer", "RLOOTrainer", "GMPOTrainer")
_DISTILLATION: dict[str, Callable[..., Any]] = {"DistillationTrainer": Distillation, "GKDTrainer": GKD}


def fuse_trainer(trainer: Any, *, chunking: Chunking = Chunking()) -> None:
    """Computes a trainer's log-probabilities, entropies and divergences here: one call before `trainer.train()`.

    ============================================  ====================================================================
    trainer of TRL 1.16                           what is replaced
    ============================================  ====================================================================
    SFT, DPO, KTO, GRPO, RLOO; experimental GMPO  the fused head of the model, and of a reference of its own
    Distillation                                  the divergence from the teacher, and the student's entropy
    experimental GKD                              the divergence; neither model's logits are computed any more
    ============================================  ====================================================================

    Losses, clipping, accumulation and what is logged stay the trainer's own code, of numbers equal to rounding.
    What a model does to its logits (a softcap, a scale) is its own forward's code; one that does what a linear head
    cannot is an error that names the operation. A class that inherits from one of these is treated as it.

    Tokens that count are copied together before the head, which on a GPU waits for their number, as TRL does. With
    `Chunking(max_label_tokens=...)` there is a fixed number of them, and nothing waits.

    Args:
        trainer: one of the above, made and not yet trained, or trained. PEFT, gradient checkpointing and accumulation,
            mixed precision and data parallelism are its own matter. A second call changes `chunking`.
        chunking: see :class:`compiled_loss.Chunking`. Gradients of log-probabilities need the vocab strategy, which is
            what "auto" chooses.

    Memory:
        Creates no [N, V] tensor: a chunk of logits, and O(N) kept for backward; of divergences dH and dW as well. Where
        `compute_metrics` wants logits in an evaluation, the trainer computes them as before.

    Raises:
        TypeError: the trainer is another one (ORPO, CPO, TPO and others read whole logits in their own code), or a
            `RewardTrainer`, whose head has one column.
        ValueError: its models have no fused head of TRL 1.16.

    Example:
        >>> from compiled_loss.integrations.trl import fuse_trainer
        >>> def train(trainer):  # trl.SFTTrainer(model, args, train_dataset=...), or another
        ...     fuse_trainer(trainer)
        ...     trainer.train()

    """
    arguments.instance("chunking", chunking, Chunking)
    name = _kind(trainer)
    if name == "RewardTrainer":
        checks.one_column(trainer)
    if name not in _WITH_FUSED_HEAD and name not in _DISTILLATION:
        checks.unknown(trainer)
    unfuse_trainer(trainer)
    if name in _DISTILLATION:
        _DISTILLATION[name](trainer, chunking)
    else:
        for model in _models(trainer):
            head.fuse(model, trainer.accelerator.autocast, chunking)


def unfuse_trainer(trainer: Any) -> None:
    """Gives a trainer its own code back, before or after training; one that is not fused stays as it is.

    Args:
        trainer: one that :func:`fuse_trainer` was called with.

    Example:
        >>> from compiled_loss.integrations.trl import fuse_trainer, unfuse_trainer
        >>> def compare(trainer):
        ...     fuse_trainer(trainer)
        ...     ours = trainer.evaluate()
        ...     unfuse_trainer(trainer)
        ...     return ours, trainer.evaluate()

    """
    for value in [*vars(trainer).values()]:
        if isinstance(owner := getattr(value, "__self__", None), (Distillation, GKD)):
            owner.undo()
            return
    for model in _models(trainer):
        head.unfuse(model)


def _kind(trainer: Any) -> str:
    """Returns the name of the trainer's class of TRL, or of the one that a user's class inherits from."""
    return next((kind.__name__ for kind in type(trainer).__mro__ if kind.__module__.startswith("trl.")), "")


def _models(trainer: Any) -> list[Any]:
    """Returns the trained model, and the reference if it is a different one."""
    models = (trainer.model, getattr(trainer, "ref_model", None))
    return [innermost(model) for model in models if model is not None]
