"""Checks of preference and reward losses."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from compiled_loss.checks import arguments, numbers, options
from compiled_loss.checks.policy import at_least_zero, needed, of_tokens, one_of, segment_tensor, unused


def smoothing(value: Any, kind: str, smoothed: tuple[str, ...]) -> Any:
    """Returns the label smoothing as a number. Raises unless the kind takes it."""
    number = numbers.number("label_smoothing", value)
    if kind not in smoothed:
        zero("label_smoothing", number, kind)
        return number
    if isinstance(number, Tensor):
        return number
    if kind == "robust":
        fits, expected = 0 <= number < 0.5, ">= 0 and < 0.5 beside kind='robust'"
    elif kind == "exo":
        fits, expected = 0 < number < 1, "between 0 and 1 beside kind='exo'"
    else:
        fits, expected = 0 <= number <= 1, "from 0 to 1"
    if not fits:
        raise ValueError(f"label_smoothing: expected a number {expected}, got {value!r}")
    return number


def zero(name: str, value: Any, kind: str) -> None:
    """Raises unless a number is known to be 0."""
    if not numbers.known(value, 0):
        raise ValueError(f"{name}: expected 0 beside kind={kind!r}, got {value!r}")


def divergence(value: str, names: tuple[str, ...], kind: str, scored: tuple[str, ...]) -> None:
    """Raises unless it is a divergence that the kind is defined with."""
    one_of("f_divergence", value, names)
    if value != "reverse_kl" and kind not in scored:
        raise ValueError(f"f_divergence: expected 'reverse_kl' beside kind={kind!r}, got {value!r}")


def normalised_length(value: Any, kind: str) -> None:
    """Raises unless the value is True or False. "orpo" needs True: an answer's odds are those of its mean token."""
    options.flag("length_normalised", value)
    if kind == "orpo" and not value:
        raise ValueError("length_normalised: expected True beside kind='orpo', got False")


def pairs(name: str, shape: torch.Size, segment_ids: Any, num_pairs: Any, device: torch.device) -> int:
    """Returns the number of pairs. Raises unless tokens of this shape, those of `name`, can be of so many."""
    if segment_ids is None:
        unused("num_pairs", num_pairs, "segment_ids are not given")
        if len(shape) != 2 or numbers.holds(shape[0] % 2 != 0, otherwise=False):
            raise ValueError(
                f"{name}: expected 2 P rows of tokens, the chosen answers and then the rejected, got "
                f"{arguments.sizes(shape)}: packed tokens need segment_ids and num_pairs"
            )
        return shape[0] // 2
    segment_tensor(segment_ids, shape, device)
    number: int = numbers.integer("num_pairs", num_pairs)
    if number < 0:
        raise ValueError(f"num_pairs: expected an int >= 0, got {num_pairs!r}")
    return number


def answers(desirable: Any, name: str, shape: torch.Size, segment_ids: Any, device: torch.device) -> int:
    """Returns the number of answers. Raises unless each has a judgement, and tokens of this shape can be of so many."""
    arguments.tensor("desirable", desirable)
    if desirable.dtype != torch.bool:
        raise TypeError(f"desirable: expected bool, got {desirable.dtype}")
    if desirable.dim() != 1:
        raise ValueError(f"desirable: expected [B], one for each answer, got {list(desirable.shape)}")
    arguments.same_device("desirable", desirable, device)
    if segment_ids is not None:
        segment_tensor(segment_ids, shape, device)
    elif len(shape) != 2 or arguments.differ(shape[:1], desirable.shape):
        raise ValueError(
            f"{name}: expected a row of tokens for each of the {desirable.shape[0]} answers, got "
            f"{arguments.sizes(shape)}: packed tokens need segment_ids"
        )
    number: int = desirable.shape[0]
    return number


def of_each(name: str, value: Any, number: int, of: str, device: torch.device) -> None:
    """Raises unless the value is None, or has a number for each of `number` pairs or answers."""
    if value is None:
        return
    arguments.tensor(name, value)
    arguments.floating(name, value)
    if value.dim() != 1 or arguments.differ(value.shape, [number]):
        raise ValueError(f"{name}: expected [{number}], one for each {of}, got {list(value.shape)}")
    arguments.same_device(name, value, device)


def reference_logprob(value: Any, shape: torch.Size, sequences: int, device: torch.device) -> None:
    """Raises unless the value is None, or has a value for each token, or for each sequence."""
    if value is None:
        return
    arguments.tensor("reference_logprob", value)
    if (value.dim() == 1 and len(shape) != 1) or (len(shape) == 1 and not arguments.differ(value.shape, [sequences])):
        of_each("reference_logprob", value, sequences, "answer", device)
    else:
        of_tokens("reference_logprob", value, shape, device, floating=True)


def one_reference(logprob: Any, hidden: Any, weight: Any, bias: Any, kind: str | None = None) -> None:
    """Raises unless the arguments describe one reference at most."""
    if kind == "orpo":
        unused("reference_logprob", logprob, "kind='orpo', which has none")
        unused("reference_hidden", hidden, "kind='orpo', which has none")
    if hidden is not None:
        unused("reference_logprob", logprob, "reference_hidden is given")
    if weight is not None:
        needed("reference_hidden", hidden, "reference_weight is given")
    if bias is not None:
        needed("reference_weight", weight, "reference_bias is given")


def num_chosen_tokens(value: Any) -> Any:
    """Returns the count, or None for none. Raises unless it is >= 0."""
    return None if value is None else at_least_zero("num_chosen_tokens", value)


def whole_answers(token_mesh_dims: tuple[str, ...]) -> None:
    """Raises where tokens are divided between ranks that do not share a vocabulary."""
    if token_mesh_dims:
        raise ValueError(
            "hidden: expected all tokens of each answer on one rank, got them sharded over "
            f"{', '.join(token_mesh_dims)}: use .to_local() of a batch that is divided by pairs"
        )


def baseline(kl: Any, kind: str, device: torch.device) -> None:
    """Raises unless the baseline of "kto" is given for this kind, and for no other."""
    if kind != "kto":
        unused("kl", kl, f"kind={kind!r}, which has no baseline")
        return
    needed("kl", kl, "kind='kto'")
    arguments.tensor("kl", kl)
    arguments.floating("kl", kl)
    if kl.dim() > 1 or not kl.numel():
        raise ValueError(
            f"kl: expected [K], a log-ratio for each mismatched answer, or their mean [], got {list(kl.shape)}"
        )
    arguments.same_device("kl", kl, device)


def rewards(chosen: Any, rejected: Any) -> None:
    """Raises unless each pair has two rewards."""
    arguments.tensor("chosen_rewards", chosen)
    arguments.floating("chosen_rewards", chosen)
    if chosen.dim() != 1:
        raise ValueError(f"chosen_rewards: expected [P], one for each pair, got {list(chosen.shape)}")
    arguments.tensor("rejected_rewards", rejected)
    of_each("rejected_rewards", rejected, chosen.shape[0], "pair", chosen.device)
