"""Checks of heads that may be more than a weight and a bias."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

# The names by which models' configs hold a bound of their logits, and a factor.
SOFTCAPS = ("final_logit_softcapping", "logits_soft_cap", "output_logit_soft_cap")  # Gemma; RecurrentGemma; xLSTM
FACTORS = (
    "logit_scale",  # Cohere
    "logits_scaling",  # Granite, HyperCLOVA X
    "lm_head_multiplier",  # Falcon-H1
    "output_multiplier",  # Muse
)

_LOGITS = "use a loss of logits"
_TORCH = ("torch.distributed.", "torch._subclasses.")  # DTensor; fake and functional tensors
_PACKED = ("qweight", "W_q", "weight_packed", "packed_weight")  # GPTQ and AWQ; HQQ; compressed-tensors; others


def one_head(model: object, names: Sequence[str]) -> None:
    """Raises unless one of a model's Modules may be its head."""
    if not names:
        raise ValueError(
            f"model: expected get_output_embeddings() or a Module called lm_head, got {type(model).__name__}: "
            "give lm_weight"
        )
    if len(names) > 1:
        raise ValueError(f"model: expected one Module with lm_head in its name, got {', '.join(names)}: give lm_weight")


def head_set(name: str, head: object) -> None:
    """Raises unless a trainer has given the head."""
    if head is None:
        raise ValueError(f"{name}: expected the model's head before the first call, got None: call set_lm_head(head)")


def adapters(name: str, head: object, active: Sequence[str]) -> None:
    """Raises an error: adapters change the head's results."""
    raise TypeError(
        f"{name}: {_expected(head)} with the adapters {', '.join(active)}: merge them, by merge_adapter() or "
        f"merge_and_unload(), train the whole head, by modules_to_save, or {_LOGITS}"
    )


def merged_and_disabled(name: str, head: object, merged: Sequence[str]) -> None:
    """Raises an error: the weight still holds adapters that the head's next forward would unmerge."""
    raise ValueError(
        f"{name}: {_expected(head)}, whose adapters {', '.join(merged)} are merged and disabled: "
        "call unmerge_adapter() first"
    )


def members(name: str, head: object, count: int) -> None:
    """Raises unless a container has one member."""
    if count != 1:
        raise TypeError(f"{name}: {_expected(head)} of {count}: {_otherwise()}")


def forward(name: str, head: object) -> None:
    """Raises an error: the head's class has a forward of its own, whose results are not known."""
    raise TypeError(f"{name}: {_expected(head)}, which has a forward of its own: {_otherwise()}")


def replaced(name: str, head: object) -> None:
    """Raises an error: this head's forward is not that of its class."""
    raise TypeError(f"{name}: {_expected(head)} whose forward was replaced on the instance: {_otherwise()}")


def offloaded(name: str, head: object, hook: object) -> None:
    """Raises an error: the weight is on its device only during the head's forward."""
    raise ValueError(
        f"{name}: {_expected(head)} that {type(hook).__name__} brings to its device in forward alone: "
        f"keep the head on its device, by device_map, or {_LOGITS}"
    )


def hooked(name: str, head: object, hook: object) -> None:
    """Raises an error: a hook may change the head's inputs, its results, or their gradients."""
    called = getattr(hook, "__qualname__", type(hook).__qualname__)
    raise ValueError(
        f"{name}: {_expected(head)} with the hook {called}, which may change its results: "
        f"remove it, by the handle that registering it returned, or {_LOGITS}"
    )


def present(name: str, head: object, weight: object) -> None:
    """Raises unless the head's weight is a tensor that holds all its numbers."""
    if not isinstance(weight, Tensor):
        if any(hasattr(head, packed) for packed in _PACKED):
            quantised(name, head, "packed integers")
        raise TypeError(f"{name}: {_expected(head)} without a weight: {_otherwise()}")
    if weight.numel() == 0 and any(hasattr(weight, mark) for mark in ("ds_id", "ds_tensor", "ds_numel")):
        raise ValueError(
            f"{name}: {_expected(head)} whose weight ZeRO-3 holds in parts, of 0 elements here: "
            "gather it around loss and backward, by deepspeed.zero.GatheredParameters(head.parameters())"
        )


def loaded(name: str, head: object, weight: Tensor, beside: object) -> None:
    """Raises where the hidden states have data and the weight has none."""
    if weight.is_meta and isinstance(beside, Tensor) and not beside.is_meta:
        raise ValueError(
            f"{name}: {_expected(head)} whose weight is on the device meta, offloaded or never loaded: "
            f"keep the head on its device, by device_map, or {_LOGITS}"
        )


def dense(name: str, head: object, weight: Tensor) -> None:
    """Raises unless the weight is an ordinary tensor: floating, strided, and multiplied like any other."""
    kind = type(weight)
    own = kind not in (Tensor, nn.Parameter) and not kind.__module__.startswith(_TORCH)
    if own and kind.__torch_dispatch__ is not Tensor.__torch_dispatch__:
        quantised(name, head, kind.__name__)
    if not weight.dtype.is_floating_point or weight.dtype.itemsize == 1:
        quantised(name, head, str(weight.dtype))
    if weight.layout != torch.strided:
        quantised(name, head, str(weight.layout))


def quantised(name: str, head: object, held: str) -> None:
    """Raises an error: the weight is quantised or packed."""
    raise TypeError(
        f"{name}: {_expected(head)} that is quantised or packed, its weight held as {held}: "
        f"leave the head out of quantisation, dequantise it, or {_LOGITS}"
    )


def without_bias(name: str, head: object, bias: object) -> None:
    """Raises where a head has a bias, and the loss takes its weight alone."""
    if bias is not None:
        raise ValueError(f"{name}: {_expected(head)} with a bias: give lm_bias beside lm_weight, or {_LOGITS}")


def logit_map(loss: str, softcap: float | None, config: Any) -> None:
    """Raises where a model's config has a softcap or a factor that the loss does not apply."""
    config = config.get_text_config() if hasattr(config, "get_text_config") else config
    given = [name for name in SOFTCAPS if getattr(config, name, None) is not None]
    for name in given or SOFTCAPS[:1]:
        own = getattr(config, name, None)
        if own != softcap:
            expected = f"a softcap of {own}" if own is not None else "no softcap"
            raise ValueError(
                f"model_config: expected {softcap}, which {loss} applies, as {name}, got {own}: "
                f"use a loss with {expected}, or {_LOGITS}"
            )
    for name in FACTORS:
        scale = getattr(config, name, None)
        if isinstance(scale, (int, float)) and scale != 1:
            raise ValueError(f"model_config: expected {name} of 1, for {loss} does not scale, got {scale}: {_LOGITS}")


def _expected(head: object) -> str:
    kind = type(head)
    return f"expected a head that is its weight and bias, an nn.Linear, got {kind.__module__}.{kind.__qualname__}"


def _otherwise() -> str:
    return f"give lm_weight where its weight is all it is, or {_LOGITS}"
