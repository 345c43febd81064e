"""Checks of models of `transformers`."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, NoReturn

from torch import Tensor, nn

from compiled_loss import checks

_INSTEAD = "use set_loss_function(model), which leaves them to the model"


def vocab_size(value: int, logits: Tensor) -> None:
    """Raises unless the logits are those of a vocabulary of this size."""
    if value != logits.shape[-1]:
        raise ValueError(f"vocab_size: expected V = {logits.shape[-1]}, the logits' last dimension, got {value}")


def number(name: str, value: Any) -> float:
    """Returns a number of a model that changes its logits or its loss. Raises where it is not a number."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        raise TypeError(f"model: expected a number as {name}, got {value!r}: {_INSTEAD}")
    return float(value)


def unreadable(kind: type) -> NoReturn:
    """Raises an error: the source of a class cannot be read."""
    raise TypeError(
        f"model: expected a class whose source can be read, for its forward says what becomes of logits and loss, "
        f"got {kind.__name__}: put it in a file"
    )


def unknown_loss_function(model: object, name: str) -> NoReturn:
    """Raises an error: the loss that takes the logits is not a known one."""
    raise ValueError(
        f"model: expected one whose loss_function is its class's ForCausalLMLoss or ForMaskedLMLoss, or ours, "
        f"got {type(model).__name__}, whose is {name}"
    )


def same_shift(model: object, by: int, known: Mapping[str, int]) -> None:
    """Raises where the model has a loss that is neither its class's nor one of ours with the same meaning."""
    function = getattr(model, "__dict__", {}).get("_loss_function")
    if function is not None:
        name = getattr(function, "__name__", type(function).__name__)
        if known.get(name) != by:
            unknown_loss_function(model, name)


def shifts(by: int) -> None:
    """Raises where the labels of the calling model are aligned to its logits."""
    if by != 1:
        raise ValueError(
            "labels: expected a model whose labels are shifted by its loss_function, got one whose labels are aligned "
            "to its logits: use set_loss_function(model), or aligned_lm_loss"
        )


def takes_loss_function(model: object) -> None:
    """Raises where the model has no loss_function to set."""
    if not hasattr(type(model), "loss_function"):
        raise TypeError(
            f"model: expected one of transformers, with a loss_function, or a wrapper of one, "
            f"got {type(model).__name__}"
        )


def calls_loss_function(model: object, calls: bool, others: tuple[str, ...]) -> None:
    """Raises where a model's own loss is computed without its loss_function."""
    if not calls:
        raise ValueError(
            f"model: expected one whose forward calls self.loss_function, got {type(model).__name__}, "
            f"{_own(others)}: compute the loss of its logits, by cross_entropy"
        )


def whole_loss(model: object, elsewhere: bool, others: tuple[str, ...]) -> None:
    """Raises where a loss may come from a different model than the one whose loss_function is set."""
    if elsewhere:
        raise ValueError(
            f"model: expected one whose own loss_function gives its loss, got {type(model).__name__}, {_own(others)}: "
            "give the model inside that computes it"
        )


def known_loss(model: object, others: tuple[str, ...]) -> None:
    """Raises where a model's own loss has parts that are not computed from hidden states and head."""
    if others:
        raise ValueError(
            f"model: expected one whose loss is its loss_function's of logits and labels, "
            f"got {type(model).__name__}, {_own(others)}: {_INSTEAD}"
        )


def _own(others: tuple[str, ...]) -> str:
    return f"whose loss is also {'; '.join(others)}" if others else "which does not"


def causal(model: object) -> None:
    """Raises where a model makes its decoder's inputs from its labels."""
    if getattr(getattr(model, "config", None), "is_encoder_decoder", False):
        raise ValueError(
            f"model: expected a causal model, got {type(model).__name__}, an encoder and a decoder, whose inputs are "
            "made of the labels: use set_loss_function(model)"
        )


def last_hidden_state(outputs: object) -> Tensor:
    """Returns the last of a model's hidden states. Raises where it did not return any."""
    states = getattr(outputs, "hidden_states", None)
    if states is None:
        raise ValueError(
            f"outputs: expected hidden_states, got {type(outputs).__name__} without: "
            "call the model with **LinearCausalLMLoss.forward_keywords, that is output_hidden_states=True"
        )
    last: Tensor = states[-1]
    return last


def width(hidden: Tensor, weight: Tensor) -> None:
    """Raises unless the head can multiply the hidden states."""
    if hidden.dim() != 3 or hidden.shape[-1] != weight.shape[1]:
        raise ValueError(
            f"outputs: expected as last of hidden_states [B, S, {weight.shape[1]}], which the head multiplies, got "
            f"{checks.sizes(hidden.shape)}: the model does more between them, use set_loss_function(model)"
        )


def whole(weight: Tensor) -> None:
    """Raises where not all of the head's rows are here."""
    if weight.is_meta:
        raise ValueError(
            "model: expected the head on a device, got a weight on meta: it is offloaded; keep the head on its device, "
            "by device_map, or use set_loss_function(model)"
        )
    placed = getattr(weight, "placements", None)
    if placed is not None or weight.dim() != 2 or weight.numel() == 0:
        got = f"a weight placed {placed}" if placed is not None else f"a weight {checks.sizes(weight.shape)}"
        raise ValueError(
            f"model: expected the whole head [V, H] on every rank, got {got}: with FSDP2, call model.unshard() between "
            "forward and loss, or fully_shard(model, reshard_after_forward=False)"
        )


def same_shape(own: tuple[int, ...], logits: Tensor) -> None:
    """Raises unless logits are [B, K, V], of the last K positions."""
    batch, length, vocab = own
    if logits.dim() != 3 or logits.shape[::2] != (batch, vocab) or not 0 < logits.shape[1] <= length:
        raise ValueError(
            f"outputs: expected logits [{batch}, up to {length}, {vocab}] of the last positions, as the head has "
            f"classes, got {checks.sizes(logits.shape)}: the model does more to them, use set_loss_function(model)"
        )


def other_logits(softcap: float | None, temperature: float, off: float) -> NoReturn:
    """Raises an error: a model's logits are not its head's."""
    raise ValueError(
        "model: expected as logits its head's of the last hidden state, "
        f"with softcap {softcap} and temperature {temperature} from its config, got others, by up to {off:.3g}: "
        "it does more to them, use set_loss_function(model)"
    )


def smoothing(trainers: float, own: float) -> None:
    """Raises where the Trainer smooths labels by a different number."""
    if trainers != own:
        raise ValueError(
            f"label_smoothing: expected {trainers}, the Trainer's label_smoothing_factor, which it does not apply "
            f"beside a compute_loss_func, got {own}: LinearCausalLMLoss(model, label_smoothing={trainers})"
        )


def has_head(model: Any) -> nn.Module:
    """Returns the model's head. Raises where it has none."""
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    if not isinstance(head, nn.Module):
        raise TypeError(
            "model: expected one of transformers, whose get_output_embeddings() returns its head, "
            f"got {type(model).__name__} with {type(head).__name__}: use set_loss_function(model)"
        )
    return head
