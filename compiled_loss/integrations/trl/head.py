"""The forward from which TRL's trainers get log-probabilities and entropies, without logits.

NOTE [Where TRL takes log-probabilities]
The SFT, DPO, KTO, GRPO and RLOO trainers give their models a forward that answers `fused_lm_head=True` with a
`FusedCausalLMOutput`: log-probabilities of the labels, entropies and more, one number per token. Everything else that
they do is arithmetic on these. So that forward is replaced, and nothing else. The new one runs the model's own forward
with its logits deferred, so the transform of the logits is the model's own code, and so is its auxiliary loss.

The options that TRL gave to its head (temperature, outputs) are read from the closure of its forward. This is the same
for every trainer, and for those that inherit from one.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import types
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from compiled_loss.engine.math.statistics import TokenStatistics
from compiled_loss.functional.statistics import linear_token_statistics
from compiled_loss.integrations.transformers.deferred import DeferredLogits
from compiled_loss.integrations.transformers.deferring import deferring
from compiled_loss.integrations.trl import checks
from compiled_loss.planner.chunking import Chunking

_STATISTICS = {  # our statistics by the names of TRL's outputs
    "log_probs": "logprob",
    "entropy": "entropy",
    "log_sum_sq_probs": "log_sum_sq_probs",
    "mean_logits": "mean_logit",
    "is_top1": "first_argmax",
}


def fuse(model: Any, autocast: Callable[[], Any], chunking: Chunking) -> None:
    """Replaces the fused head that TRL gave to a model; the whole of a call runs in autocast()."""
    checks.not_fused(model)
    if (ours := _ours(model)) is not None:  # Accelerate has put autocast around it
        ours.chunking, ours.active = chunking, True
    else:
        model.forward = FusedHead(model, autocast, chunking).method(model)


def unfuse(model: Any) -> None:
    """Gives TRL's forward back. If Accelerate has put autocast around ours, ours passes calls on."""
    if (ours := _ours(model)) is not None:
        ours.active = False
        if getattr(model.forward, "__func__", None) is ours.forward:
            model.forward = ours.replaced


def _ours(model: Any) -> FusedHead | None:
    """Returns the head that answers, if it is ours: a later trainer puts TRL's on top of an earlier one."""
    for forward in _forwards(model):
        if isinstance(found := getattr(forward, "head", None), FusedHead):
            return found
        if _is_of_trl(forward):
            return None
    return None


def _forwards(model: Any) -> list[Any]:
    """Returns the forwards on the instance: the last one, and the one that Accelerate put autocast around."""
    own = vars(model)
    return [getattr(forward, "__func__", forward) for forward in (own.get("forward"), own.get("_original_forward"))]


def _is_of_trl(forward: Any) -> bool:
    return inspect.isfunction(forward) and forward.__code__.co_name == "_fused_forward"


def _asked(model: Any) -> dict[str, Any]:
    """Returns the options that TRL gave to its head."""
    for forward in _forwards(model):
        if _is_of_trl(forward):
            return dict(inspect.getclosurevars(forward).nonlocals)
    return {}


class FusedHead:
    """A forward that answers `fused_lm_head=True`, in the place of TRL's."""

    def __init__(self, model: Any, autocast: Callable[[], Any], chunking: Chunking) -> None:
        asked = _asked(model)
        checks.asked(model, asked, ("temperature", "cast_lm_head_to_fp32", "outputs"))
        self.replaced = model.forward  # TRL's, or the one that Accelerate put around it
        self.temperature: float = asked["temperature"]
        self.in_fp32: bool = asked["cast_lm_head_to_fp32"]
        self.outputs = {"log_probs", *asked["outputs"]}
        self.autocast, self.chunking = autocast, chunking
        self.active = True

    def method(self, model: Any) -> Callable[..., Any]:
        """Returns the model's new forward."""

        @functools.wraps(type(model).forward)  # generate reads the signature
        def forward(model: Any, *args: Any, fused_lm_head: bool = False, **kwargs: Any) -> Any:
            if fused_lm_head and self.active:
                checks.original(model, self.replaced)
                return self._answer(model, *args, **kwargs)
            return self.replaced(*args, fused_lm_head=fused_lm_head, **kwargs)

        forward.head = self  # type: ignore[attr-defined]
        self.forward = forward
        return types.MethodType(forward, model)

    def _answer(
        self,
        model: Any,
        *args: Any,
        labels: Tensor | None = None,
        shift_labels: Tensor | None = None,
        num_items_in_batch: int | Tensor | None = None,
        **kwargs: Any,
    ) -> Any:
        from trl.trainer.utils import FusedCausalLMOutput

        config = model.config.get_text_config()
        if getattr(config, "output_router_logits", False):
            kwargs.setdefault("output_router_logits", True)
        with self.autocast(), deferring(model):
            outputs = self.replaced(*args, **kwargs | {"use_cache": False})
            logits = outputs.logits
            if shift_labels is None:
                assert labels is not None  # one of both is given
                logits, shift_labels = logits[:, :-1], labels[:, 1:]
            shift_labels = shift_labels.to(logits.device)
            mask = shift_labels != -100
            found = self._statistics(logits, shift_labels, mask)
        count = mask.sum().clamp(min=1) if num_items_in_batch is None else num_items_in_batch
        loss, aux_loss = -found["log_probs"].sum() / count, None
        if kwargs.get("output_router_logits"):
            aux_loss = checks.aux_loss(model, outputs)
            loss = loss + getattr(config, "router_aux_loss_coef", 0.0) * aux_loss
        return FusedCausalLMOutput(loss=loss, label_mask=mask, aux_loss=aux_loss, **found)

    def _statistics(self, logits: DeferredLogits, labels: Tensor, mask: Tensor) -> dict[str, Tensor]:
        """Returns the statistics by the names of TRL's outputs, 0 where the label is -100."""
        compact = compacts(self.chunking)
        if compact:
            logits, labels = logits[mask], labels[mask]

        def of_tokens(hidden: Tensor, weight: Tensor, **head: Any) -> TokenStatistics:
            return linear_token_statistics(
                hidden.float() if self.in_fp32 else hidden,
                weight,
                labels,
                temperature=self.temperature,
                wanted=[_STATISTICS[name] for name in self.outputs],
                chunking=self.chunking,
                **head,
            )

        with torch.autocast(labels.device.type, enabled=False) if self.in_fp32 else contextlib.nullcontext():
            found = logits.apply(of_tokens)
        by_name = {name: getattr(found, _STATISTICS[name]) for name in self.outputs}
        if "is_top1" in by_name:
            by_name["is_top1"] = by_name["is_top1"] == labels
        for name in {"log_sum_sq_probs", "mean_logits"} & self.outputs:
            by_name[name] = by_name[name].detach()
        if compact:
            by_name = {name: value.new_zeros(mask.shape).masked_scatter(mask, value) for name, value in by_name.items()}
        return by_name


def compacts(chunking: Chunking) -> bool:
    """Returns True if tokens that count are copied together, as TRL does; a user's bound on their number avoids it."""
    return chunking.max_label_tokens is None and not torch.compiler.is_compiling()
