"""Checks of models whose heads are fused."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NoReturn

from torch import nn

_PLAIN = "call unfuse_head(model), and set_loss_function(model) for a loss without fp32 copies of the logits"


def takes_labels(model: object, parameters: list[str]) -> None:
    """Raises unless the model computes a loss."""
    if "labels" not in parameters:
        raise TypeError(
            f"model: expected one of transformers whose forward takes labels, got {type(model).__name__}: "
            "call linear_cross_entropy on its hidden states"
        )


def has_head(model: Any) -> nn.Module:
    """Returns the module that computes the model's logits, or those of a model in it. Raises unless there is one."""
    heads = [_head(model)]
    if heads == [None] and isinstance(model, nn.Module):
        found = {id(head): head for head in map(_head, model.modules()) if head is not None}
        heads = list(found.values())
    head = heads[0] if len(heads) == 1 else None
    if not isinstance(head, nn.Module) or isinstance(head, (nn.Embedding, nn.ModuleList)):
        got = " and ".join(type(head).__name__ for head in heads) or "none"
        raise TypeError(
            "model: expected one of transformers, whose get_output_embeddings() returns the Linear that gives its "
            f"logits, got {type(model).__name__} with {got}: use set_loss_function(model)"
        )
    return head


def _head(model: Any) -> Any:
    return model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None


def fused_already(model: object) -> NoReturn:
    """Raises an error: a head is fused once."""
    raise ValueError(
        f"model: expected one whose head is not fused, got {type(model).__name__}: unfuse_head(model) first"
    )


def shared_head(model: object) -> NoReturn:
    """Raises an error: this model's head is that of another fused model, too."""
    raise ValueError(
        f"model: expected a head that no other fused model has, got {type(model).__name__} with such a one: "
        "unfuse_head(the other) first"
    )


def not_fused(model: object) -> NoReturn:
    """Raises an error: there is nothing to undo."""
    raise ValueError(f"model: expected one that fuse_head was called with, got {type(model).__name__}")


def loss_of_logits(model: object, head_called: bool, loss_computed: bool) -> None:
    """Raises where a model's forward did not compute its loss from its head's logits."""
    if not head_called:
        raise RuntimeError(
            f"model: expected a forward that calls the head which fuse_head found, got {type(model).__name__}'s, which "
            "does not, or whose head was replaced since (by peft, resize_token_embeddings or another): "
            f"unfuse_head(model) before, and fuse_head(model) after that; otherwise {_PLAIN}"
        )
    if not loss_computed:
        raise RuntimeError(
            f"model: expected a loss that is cross_entropy of the head's logits, got {type(model).__name__}, which "
            f"computes another or none: {_PLAIN}"
        )


def head_arguments(head: object, keywords: Mapping[str, object]) -> NoReturn:
    """Raises an error: the head is called with more arguments than hidden states."""
    raise TypeError(
        f"model: expected a forward that calls its head with hidden states alone, got {type(head).__name__} "
        f"called with {', '.join(keywords) or 'further arguments'}: {_PLAIN}"
    )


def operation(model: str, name: str) -> str:
    """Returns the error's text for an operation on logits that cannot be done to hidden states."""
    return (
        "model: expected a forward that scales, bounds, selects and reshapes its logits and computes cross_entropy of "
        f"them, got {model}, which also does {name}: {_PLAIN}"
    )


def released(name: str) -> str:
    """Returns the error's text for a use of logits without which the loss was computed."""
    return (
        f"logits: expected no use of a training step's, which fuse_head(model) does not compute, got {name}: "
        "call the model without labels, in eval() or under no_grad(), or unfuse_head(model)"
    )


def own_unit(modules: int) -> None:
    """Raises where FSDP2 freed the head's weight with those of other modules."""
    if modules != 1:
        raise ValueError(
            "model: expected a head that is an FSDP2 unit by itself, or stays gathered, got one in a unit of "
            f"{modules} modules: fully_shard(head), or fully_shard([...], reshard_after_forward=False)"
        )
