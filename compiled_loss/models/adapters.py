"""The operands of a head with LoRA: a wider weight, and wider hidden states.

NOTE [LoRA as a wider head]
W h + s B A dropout(h) is [W, B] times [h, s A dropout(h)]. The dropout is applied where PEFT applies it. An update that
is small compared with W keeps its digits; they would be lost in the sum of a bf16 weight. The price is r more columns
of H, and a copy of W in each call.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from compiled_loss import checks
from compiled_loss.models.output_head import OutputHead, active_adapters, output_head, unchanged


def head_operands(module: Any, name: str, hidden: Tensor) -> tuple[Tensor, OutputHead]:
    """Returns hidden states [..., H + r] and a head [V, H + r], with the same product as the module on [..., H].

    Raises: see :func:`output_head`; for variants of LoRA, such as DoRA, a TypeError.
    """
    adapters = _lora(module, name)
    if not adapters:
        return hidden, output_head(module, name)
    weight, bias = output_head(module.base_layer, name)
    inputs, weights = [hidden], [weight]
    for adapter in adapters:
        down, up, scaling = module.lora_A[adapter], module.lora_B[adapter], module.scaling[adapter]
        low = down(module.lora_dropout[adapter](hidden.to(down.weight.dtype))) * scaling
        inputs.append(low.to(hidden.dtype))
        weights.append(up.weight.to(weight.dtype))
        if up.bias is not None:
            bias = up.bias * scaling if bias is None else bias + up.bias * scaling
    return torch.cat(inputs, -1), OutputHead(torch.cat(weights, 1), bias)


def base_weight(module: Any, name: str) -> Tensor:
    """Returns the weight [V, H] of a head without its LoRA. Raises where its operands are not known."""
    return output_head(module.base_layer if _lora(module, name) else module, name).weight


def _lora(module: Any, name: str) -> list[str]:
    """Returns LoRA's adapters that change the head's results."""
    if not hasattr(module, "lora_A") or type(module).__name__ != "Linear" or module.disable_adapters or module.merged:
        return []
    adapters = active_adapters(module)
    variants = [adapter for adapter in adapters if adapter in module.lora_variant]
    if variants:
        checks.heads.adapters(name, module, variants)
    if adapters:
        unchanged(module, name)
    return adapters
