"""The errors of heads that are more than a weight and a bias; see `checks`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

# By what name the configs of models hold a bound of their logits, and a factor.
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
    """Raise unless one of a model's Modules may be its head."""
    if not names:
        raise ValueError(
            f"model: expected get_output_embeddings() or a Module called lm_head, got {type(model).__name__}: "
            "give lm_weight"
        )
    if len(names) > 1:
        raise ValueError(f"model: expected one Module with lm_head in its name, got {', '.join(names)}: give lm_weight")


def head_set(name: str, head: object) -> None:
    """Raise unless a trainer has given the head."""
    if head is None:
        raise ValueError(f"{name}: expected the model's head before the first call, got None: call set_lm_head(head)")


def adapters(name: str, head: object, active: Sequence[str]) -> None:
    """Raise: adapters change what the head gives."""
    raise TypeError(
        f"{name}: {_expected(head)} with the adapters {', '.join(active)}: merge them, by merge_adapter() or "
        f"merge_and_unload(), train the whole head, by modules_to_save, or {_LOGITS}"
    )


def merged_and_disabled(name: str, head: object, merged: Sequence[str]) -> None:
    """Raise: the weight still holds adapters that the head's next forward would take out."""
    raise ValueError(
        f"{name}: {_expected(head)}, whose adapters {', '.join(merged)} are merged and disabled: "
        "call unmerge_adapter() first"
    )


def members(name: str, head: object, count: int) -> None:
    """Raise unless a container has one member."""
    if count != 1:
        raise TypeError(f"{name}: {_expected(head)} of {count}: {_otherwise()}")


def forward(name: str, head: object) -> None:
    """Raise: the head's class computes something else, or nothing that is known."""
    raise TypeError(f"{name}: {_expected(head)}, which has a forward of its own: {_otherwise()}")


def replaced(name: str, head: object) -> None:
    """Raise: this one's forward is another than its class's."""
    raise TypeError(f"{name}: {_expected(head)} whose forward was replaced on the instance: {_otherwise()}")


def offloaded(name: str, head: object, hook: object) -> None:
    """Raise: the weight comes and goes with the head's forward."""
    raise ValueError(
        f"{name}: {_expected(head)} that {type(hook).__name__} brings to its device in forward alone: "
        f"keep the head on its device, by device_map, or {_LOGITS}"
    )


def hooked(name: str, head: object, hook: object) -> None:
    """Raise: a hook may change what goes in, what comes out, or their gradients."""
    called = getattr(hook, "__qualname__", type(hook).__qualname__)
    raise ValueError(
        f"{name}: {_expected(head)} with the hook {called}, which may change its results: "
        f"remove it, by the handle that registering it returned, or {_LOGITS}"
    )


def present(name: str, head: object, weight: object) -> None:
    """Raise unless the weight is there to be multiplied by."""
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
    """Raise where there are hidden states and no weight."""
    if weight.is_meta and isinstance(beside, Tensor) and not beside.is_meta:
        raise ValueError(
            f"{name}: {_expected(head)} whose weight is on the device meta, offloaded or never loaded: "
            f"keep the head on its device, by device_map, or {_LOGITS}"
        )


def dense(name: str, head: object, weight: Tensor) -> None:
    """Raise unless the weight is what it looks like: floating, strided, multiplied as any other."""
    kind = type(weight)
    own = kind not in (Tensor, nn.Parameter) and not kind.__module__.startswith(_TORCH)
    if own and kind.__torch_dispatch__ is not Tensor.__torch_dispatch__:
        quantised(name, head, kind.__name__)
    if not weight.dtype.is_floating_point or weight.dtype.itemsize == 1:
        quantised(name, head, str(weight.dtype))
    if weight.layout != torch.strided:
        quantised(name, head, str(weight.layout))


def quantised(name: str, head: object, held: str) -> None:
    """Raise: the weight is not held as numbers."""
    raise TypeError(
        f"{name}: {_expected(head)} that is quantised or packed, its weight held as {held}: "
        f"leave the head out of quantisation, dequantise it, or {_LOGITS}"
    )


def without_bias(name: str, head: object, bias: object) -> None:
    """Raise where a head adds what a loss of its weight alone does not."""
    if bias is not None:
        raise ValueError(f"{name}: {_expected(head)} with a bias: give lm_bias beside lm_weight, or {_LOGITS}")


def logit_map(loss: str, softcap: float | None, config: Any) -> None:
    """Raise where a model's config says that its logits are others than the loss's."""
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
