"""Checks of TRL's trainers."""

from __future__ import annotations

from typing import Any, NoReturn

from torch import Tensor

_FUSED = "SFT, DPO, KTO, GRPO, RLOO, Distillation or GKD"


def one_column(trainer: object) -> NoReturn:
    """Raises an error: a reward model's head has one column."""
    raise TypeError(
        f"trainer: expected one of a language model ({_FUSED}), got {type(trainer).__name__}, whose model's head has "
        "one column: there are no logits over a vocabulary to save, train it as it is"
    )


def unknown(trainer: object) -> NoReturn:
    """Raises an error: it is not known how the trainer computes its loss."""
    raise TypeError(
        f"trainer: expected one with TRL's fused head, or its distillation ({_FUSED}), got {type(trainer).__name__}, "
        "which is none of them; most others compute their loss from logits [B, S, V] in their own code: train it as it "
        "is, or write its loss with linear_token_statistics, linear_preference_loss or linear_distillation"
    )


def asked(model: object, names: dict[str, Any], expected: tuple[str, ...]) -> None:
    """Raises unless TRL's fused head tells what was asked of it."""
    missing = [name for name in expected if name not in names]
    if missing:
        raise ValueError(
            f"trainer: expected a {type(model).__name__} with the fused head of TRL 1.16, which holds "
            f"{', '.join(expected)}, got one without {', '.join(missing)}: install trl==1.16.*"
        )


def not_fused(model: object) -> None:
    """Raises where `fuse_head` has put its forward over TRL's."""
    if "_compiled_loss_fused_head" in vars(model):
        raise ValueError(
            f"trainer: expected a {type(model).__name__} whose head is not fused, got one that fuse_head was called "
            "with: unfuse_head(model) first, fuse_trainer(trainer) does all of it"
        )


def original(model: object, forward: Any) -> None:
    """Raises where a copy of a fused model is called: its forward is the original's, with the original's weights."""
    if getattr(forward, "__self__", model) is not model:
        raise ValueError(
            f"model: expected the {type(model).__name__} that a trainer was made with, got a copy of it, whose forward "
            "TRL has bound to the original: copy the model before the trainer is made"
        )


def aux_loss(model: object, outputs: Any) -> Tensor:
    """Returns the loss of the experts from a model's outputs. Raises where there is none."""
    value: Tensor | None = outputs.get("aux_loss")
    if value is None:
        raise ValueError(
            f"model: expected one whose forward returns aux_loss where output_router_logits asks for it, got "
            f"{type(model).__name__}: set router_aux_loss_coef=0 in the trainer's config, or call unfuse_trainer"
        )
    return value
