"""A model whose forward computes its loss without logits."""

from __future__ import annotations

import contextlib
import functools
import inspect
from collections.abc import Callable, Collection
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn

from compiled_loss import checks as arguments
from compiled_loss.functional.statistics import WANTED
from compiled_loss.huggingface.callers import caller
from compiled_loss.huggingface.families import innermost
from compiled_loss.integrations.transformers import checks
from compiled_loss.integrations.transformers.deferred import DeferredLogits
from compiled_loss.integrations.transformers.head_call import HEAD, Asked, HeadCall, answer
from compiled_loss.models.adapters import head_classes
from compiled_loss.models.output_head import leaves_head
from compiled_loss.planner.chunking import Chunking

_NAME = "_compiled_loss_fused_head"  # of the attribute that a fused model and its head have


class FusedHead:
    """What a fused model and its head share."""

    def __init__(self, model: nn.Module, head: nn.Module, chunking: Chunking, statistics: Collection[str]) -> None:
        self.model_name = type(model).__name__
        self.head = head
        self.chunking = chunking
        self.statistics = tuple(statistics)
        self.placed: dict[str, Any] = {}  # the forwards of both, and
        self.stood: dict[str, Any] = {}  # those on the instances that they replace
        self.off = False
        self.calls: list[HeadCall] | None = None  # of the head, in the training step that runs

    def original(self, name: str, module: Any, *args: Any, **kwargs: Any) -> Any:
        """What a forward was before."""
        if name in self.stood:
            return self.stood[name](*args, **kwargs)
        return type(module).forward(module, *args, **kwargs)


def fuse_head(model: nn.Module, *, chunking: Chunking = Chunking(), statistics: Collection[str] = ()) -> None:
    """..."""
    arguments.instance("chunking", chunking, Chunking)
    arguments.statistics_wanted(statistics, WANTED)
    inner = innermost(model)
    if _fused(inner) is not None:
        checks.fused_already(inner)
    parameters = list(inspect.signature(type(inner).forward).parameters)[1:]
    checks.takes_labels(inner, parameters)
    head = checks.has_head(inner)
    with contextlib.suppress(ValueError):  # a weight that is not here now may be when it is used
        head_classes(head, HEAD)
    fused = FusedHead(inner, head, chunking, statistics)
    _replace("model", inner, fused, _model_forward(type(inner).forward, parameters.index("labels")))
    _replace("head", head, fused, _head_forward)


def unfuse_head(model: nn.Module) -> None:
    """Give a model the forward back that it had before :func:`fuse_head`.

    Raises:
        ValueError: it is not fused.

    """
    inner: Any = innermost(model)
    fused = _fused(inner)
    if fused is None:
        checks.not_fused(inner)
    else:
        _restore("model", inner, fused)
        _restore("head", fused.head, fused)


def _fused(module: Any) -> FusedHead | None:
    fused: FusedHead | None = module.__dict__.get(_NAME)
    return fused


def _replace(name: str, module: Any, fused: FusedHead, forward: Callable[..., Any]) -> None:
    if "forward" in module.__dict__:
        fused.stood[name] = module.forward
    fused.placed[name] = forward
    setattr(module, _NAME, fused)
    module.forward = MethodType(forward, module)  # which a copy of the module binds to itself


def _restore(name: str, module: Any, fused: FusedHead) -> None:
    if getattr(module.forward, "__func__", None) is not fused.placed[name]:
        fused.off = True  # another has wrapped it since: there it passes on
        return
    delattr(module, _NAME)
    del module.forward
    if name in fused.stood:
        module.forward = fused.stood[name]


def _model_forward(forward: Callable[..., Any], before_labels: int) -> Callable[..., Any]:
    """A forward for models with this one, and so many parameters before labels."""

    @functools.wraps(forward)
    def fused_forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        fused: FusedHead = getattr(self, _NAME)
        labels = kwargs.get("labels", args[before_labels] if len(args) > before_labels else None)
        smoothed = labels is None and _label_smoothing()
        if fused.off or not self.training or not torch.is_grad_enabled() or (labels is None and not smoothed):
            return fused.original("model", self, *args, **kwargs)
        calls: list[HeadCall] = []
        fused.calls = calls
        try:
            output = fused.original("model", self, *args, **kwargs)
            if not smoothed:
                checks.loss_of_logits(self, len(calls) > 0, any(call.asked for call in calls))
            return output
        finally:
            fused.calls = None
            if not smoothed:
                for call in calls:
                    call.release()

    return fused_forward


def _label_smoothing() -> bool:
    """Whether the Trainer calls, and computes the loss of the output. Compiled code does not see who calls."""
    if torch.compiler.is_compiling():
        return False
    trainer = caller("compute_loss", "label_smoother")
    return trainer is not None and trainer.label_smoother is not None and trainer.compute_loss_func is None


@leaves_head
def _head_forward(self: Any, hidden: Tensor, *args: Any, asked: Asked | None = None, **kwargs: Any) -> Any:
    """Deferred logits in a training step, and what is asked of them; logits elsewhere."""
    fused: FusedHead = getattr(self, _NAME)
    if asked is not None:
        return answer(self, hidden, asked)
    if fused.calls is None:
        return fused.original("head", self, hidden, *args, **kwargs)
    call = HeadCall(fused.model_name, self, hidden.shape[:-1], chunking=fused.chunking, statistics=fused.statistics)
    fused.calls.append(call)
    return DeferredLogits.of(call, hidden)
