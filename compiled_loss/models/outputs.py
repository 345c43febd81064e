"""Access to a model and to its output: the head, the last hidden states, the weight of an auxiliary loss."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F

from compiled_loss import checks
from compiled_loss.models.output_head import OutputHead, output_head


def head(model: Any) -> tuple[Any, str]:
    """Returns the model's head, and its name in errors.

    It is the result of `get_output_embeddings()`, the Module called lm_head, or the one with lm_head in its name.
    """
    model = inner(model)
    found = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    if found is not None:
        return found, "model.get_output_embeddings()"
    named: dict[str, Any] = {}
    for name, module in model.named_modules() if isinstance(model, nn.Module) else ():
        last = name.split(".")[-1]
        if last == "lm_head":
            return module, f"model.{name}"
        if "lm_head" in last and not any(name.startswith(f"{outer}.") for outer in named):
            named[name] = module
    checks.heads.one_head(model, list(named))
    return next((module, f"model.{name}") for name, module in named.items())


def head_weight(model: Any, hidden_states: Any) -> OutputHead:
    """Returns the weight and bias of the model's head. Raises where it is more than these, or was never loaded."""
    module, name = head(model)
    found = output_head(module, name)
    checks.heads.loaded(name, module, found.weight, hidden_states)
    return found


def head_logits(model: Any, hidden_states: Tensor) -> Tensor:
    """Returns the logits of the model's head; if it cannot be called, those of its weight and bias."""
    module, name = head(model)
    if isinstance(module, (nn.Embedding, nn.ModuleList, nn.ModuleDict, nn.ParameterDict)) or not callable(module):
        return F.linear(hidden_states, *output_head(module, name))
    logits: Tensor = module(hidden_states)
    return logits


def inner(model: Any) -> Any:
    """Returns the model inside of DistributedDataParallel, or the model itself."""
    return model.module if isinstance(model, nn.parallel.DistributedDataParallel) else model


def field(output: Any, name: str) -> Any:
    """Returns an entry of a model's output; None where there is none."""
    return output.get(name) if isinstance(output, dict) else getattr(output, name, None)


def last_hidden_states(output: Any) -> Any:
    """Returns the hidden states of the last layer that is present; hidden states that are no sequence as they are."""
    states = field(output, "hidden_states")
    if isinstance(states, (list, tuple)):
        return next((layer for layer in reversed(states) if layer is not None), None)
    return states


def mtp_factor(model: Any, output: Any) -> Any:
    """Returns the weight of multi-token prediction; None for none.

    It is taken from the output, from the model's `mtp_config`, or from the model, in this order.
    """
    model = inner(model)
    given = field(output, "mtp_loss_scaling_factor")
    if given is None:
        given = field(getattr(model, "mtp_config", None), "loss_scaling_factor")
    if given is None:
        given = getattr(model, "mtp_loss_scaling_factor", None)
    asked: Any = getattr(model, "get_mtp_loss_scaling_factor", None)
    return asked() if given is None and asked is not None else given
