"""The weight and the bias that a head multiplies by, whatever wraps it. Nothing that may wrap it is imported.

NOTE [What a head may be]
A head may be an `nn.Linear`, a subclass that keeps its forward, or an `nn.Embedding` that a model multiplies by. It may
be an object with a weight and no forward, or a container of one of these. It may be wrapped by PEFT, as long as PEFT
changes nothing but the weight. Everything else is an error, because a loss of the weight alone would not be the loss of
the head.

Hooks are refused, because it cannot be known whether they change something. Hooks of torch.distributed and DeepSpeed
are allowed: they bring weights and tokens to where they are needed, and if they have not done so yet, the weight shows
it. Also allowed are a forward that the tensor parallelism of transformers puts around that of a DTensor, one that
torchtitan puts around any, which does the same, and ours.

A caller that applies the further mathematics of a class, a softcap for instance, gives the class's forward as `known`.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Collection
from typing import Any, NamedTuple

from torch import Tensor, nn

from compiled_loss import checks

_WRAPPED = ("_orig_mod", "_checkpoint_wrapped_module")  # torch.compile; checkpoint_wrapper
_CONTAINERS = (nn.Sequential, nn.ModuleList, nn.ModuleDict)
_FORWARDS = (nn.Linear.forward, nn.Embedding.forward, nn.Module.forward, nn.ParameterDict.forward)
_HOOKS = ("_forward_pre_hooks", "_forward_hooks", "_backward_pre_hooks", "_backward_hooks")
_MOVING = ("torch.distributed.", "deepspeed.")
_OURS = "_leaves_head_as_it_is"


class OutputHead(NamedTuple):
    """`weight` [V, H] and `bias` [V] or None, as the head's forward would use them, with their graphs."""

    weight: Tensor
    bias: Tensor | None


def output_head(module: Any, name: str = "model", known: Collection[Callable[..., Any]] = ()) -> OutputHead:
    """Returns the weight and bias of a head: NOTE [What a head may be].

    Args:
        module: the head.
        name: its name in errors.
        known: forwards of classes of heads whose own mathematics the caller applies.

    Returns:
        :class:`OutputHead`; of a parametrized head, or one with trainable tokens, new tensors of this call.

    Raises:
        TypeError: it is more than a weight and a bias.
        ValueError: its weight is not here, or a hook changes its results.

    """
    inner = _inner(module, name)
    if inner is not module:
        if "_orig_mod" not in module._modules:  # torch.compile's replaces forward
            unchanged(module, name)
        return output_head(inner, name, known)
    if hasattr(type(module), "get_merged_weights"):  # trainable tokens, whose forward adds no bias
        output_head(module.base_layer, name)
        unchanged(module, name)
        return OutputHead(module.get_merged_weights(active_adapters(module)), None)
    weight: Any = getattr(module, "weight", None)
    bias = getattr(module, "bias", None)
    bias = bias if isinstance(bias, Tensor) else None
    for value in (weight,) if bias is None else (weight, bias):
        checks.heads.present(name, module, value)
    checks.heads.dense(name, module, weight)
    if isinstance(module, nn.Module):
        if type(module).forward not in (*_FORWARDS, *known):
            checks.heads.forward(name, module)
        unchanged(module, name)
    return OutputHead(weight, bias)


def leaves_head(forward: Callable[..., Any]) -> Callable[..., Any]:
    """Marks a forward that may stand on a head in place of its class's, because the head multiplies as before."""
    setattr(forward, _OURS, True)
    return forward


def _inner(module: Any, name: str) -> Any:
    """Returns the module that does the work of `module`, one step further in; `module` itself where there is none."""
    children = getattr(module, "_modules", {})
    for wrapped in _WRAPPED:
        if wrapped in children:
            return children[wrapped]
    if isinstance(module, _CONTAINERS):
        if type(module).forward not in (nn.Sequential.forward, nn.Module.forward):
            checks.heads.forward(name, module)
        members = list(module.children())
        checks.heads.members(name, module, len(members))
        return members[0]
    if "modules_to_save" in children and "original_module" in children:
        saved, active = module.modules_to_save, _names(module.active_adapter)
        on = not module.disable_adapters and active and all(adapter in saved for adapter in active)
        return saved[active[0]] if on else module.original_module
    if "token_adapter" in children:
        return module.token_adapter
    return _without_adapters(module, name) if hasattr(type(module), "get_base_layer") else module


def _without_adapters(module: Any, name: str) -> Any:
    """Returns the layer inside if PEFT's adapters do not change it: merged, disabled, or none of this layer.

    A layer with trainable tokens is returned itself.
    """
    active, merged = active_adapters(module), list(module.merged_adapters)
    if module.disable_adapters and merged:
        checks.heads.merged_and_disabled(name, module, merged)
    if module.disable_adapters or merged or not active:
        return module.base_layer
    if not hasattr(type(module), "get_merged_weights"):
        checks.heads.adapters(name, module, active)
    return module


def active_adapters(module: Any) -> list[str]:
    """Returns the active adapters of this layer."""
    here = module._get_available_adapters()
    return [adapter for adapter in _names(module.active_adapter) if adapter in here]


def _names(active: str | list[str]) -> list[str]:
    return [active] if isinstance(active, str) else list(active)


def unchanged(module: Any, name: str) -> None:
    """Raises where this module does more than its class."""
    own = vars(module)
    hook, forward = own.get("_hf_hook"), own.get("forward")
    if hook is not None:  # accelerate's, which replaces forward
        for part in getattr(hook, "hooks", (hook,)):
            if type(part).__name__ != "AlignDevicesHook" or part.offload:
                checks.heads.offloaded(name, module, part)
        forward = own.get("_old_forward")
    if forward is not None and getattr(forward, "__func__", None) is not type(module).forward:
        sharded = hasattr(module._parameters.get("weight"), "placements")
        around = ("transformers.distributed.", "torchtitan.protocols.") if sharded else ("torchtitan.protocols.",)
        if not getattr(forward, _OURS, False) and not _origin(forward).startswith(around):
            checks.heads.replaced(name, module)
    for kind in _HOOKS:
        for called in own.get(kind, {}).values():
            if not _origin(called).startswith(_MOVING):
                checks.heads.hooked(name, module, called)


def _origin(hook: Any) -> str:
    """Returns the module in which a hook is defined."""
    while isinstance(hook, functools.partial):
        hook = hook.func
    return str(getattr(hook, "__module__", None) or type(hook).__module__)
