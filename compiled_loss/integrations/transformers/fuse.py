"""Models whose forward computes its loss without logits."""

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
from compiled_loss.models.adapters import base_weight
from compiled_loss.models.output_head import leaves_head
from compiled_loss.planner.chunking import Chunking

_NAME = "_compiled_loss_fused_head"  # the name of an attribute of a fused model and its head


class FusedHead:
    """The state that a fused model and its head share."""

    def __init__(self, model: nn.Module, head: nn.Module, chunking: Chunking, statistics: Collection[str]) -> None:
        self.model_name = type(model).__name__
        self.head = head
        self.chunking = chunking
        self.statistics = tuple(statistics)
        self.placed: dict[str, Any] = {}  # the new forwards of both
        self.stood: dict[str, Any] = {}  # the forwards on the instances that they replace
        self.off = False
        self.calls: list[HeadCall] | None = None  # calls of the head in the running training step

    def original(self, name: str, module: Any, *args: Any, **kwargs: Any) -> Any:
        """Calls the forward that was there before."""
        if name in self.stood:
            return self.stood[name](*args, **kwargs)
        return type(module).forward(module, *args, **kwargs)


def fuse_head(model: nn.Module, *, chunking: Chunking = Chunking(), statistics: Collection[str] = ()) -> None:
    r"""Makes a model of `transformers` compute its own loss without logits, in training.

    The head gives :class:`DeferredLogits`. The model's forward runs as it is, `labels`, `num_items_in_batch`, auxiliary
    losses and all, and its cross-entropy is :func:`compiled_loss.linear_cross_entropy` of hidden states and head. So
    `output.loss` and all gradients are the model's own, but for fewer roundings, and `output.logits` explains itself
    where it is touched. A batch whose labels are all ignored has the loss 0, as all our losses, where torch's mean is
    NaN.

    In training means: in `train()`, with gradients enabled, called with `labels`, or by a Trainer that smooths them
    itself. Elsewhere, as in evaluation and generation, nothing changes.

    The Trainer takes the model as it is. So does `torch.compile(model, fullgraph=True)`, before or after, and so do
    DistributedDataParallel, FSDP2 and ZeRO-3: a head that they gather for its forward alone is called a second time,
    for the loss. PEFT's LoRA, modules_to_save and trainable tokens on the head are part of the loss. What puts another
    head in the model's place comes first: `get_peft_model`, `resize_token_embeddings`. `state_dict`, `save_pretrained`
    and copies are as before; a pickle of the whole model, as `torch.save(model)` makes, wants `unfuse_head` first. A
    model is trained by one thread at a time.

    Args:
        model: of `transformers`, or any whose forward takes `labels` and whose `get_output_embeddings()` returns the
            Linear that gives its logits; also inside of PEFT, `torch.compile` or data parallelism. It is changed in
            place: a forward is put on the instance of the model, and on that of its head.
        chunking: see :class:`compiled_loss.Chunking`. On a CPU a model that is not compiled takes half as long with
            `Chunking(compile=True)`.
        statistics: names of :class:`compiled_loss.TokenStatistics`, of "logprob", "logsumexp", "entropy" and "correct",
            that the same pass leaves in `output.logits.statistics`: [B, S], detached, in nats, where the label that
            the loss took for a position is not ignored, else 0. Of a loss of some positions, [N] of these.

    Memory:
        That of :func:`compiled_loss.linear_cross_entropy`: nothing of [B, S, V]. With LoRA the head is copied in each
        call.

    Raises:
        TypeError: the model has no such head, or it is more than its weight; in training, its forward does to its
            logits what cannot be done to hidden states.
        RuntimeError: in training, its loss is not of its head's logits.
        ValueError: it is fused already; in training, the head's weight is not here, or a hook changes its output.

    Example:
        >>> import torch
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> from compiled_loss.integrations.transformers import fuse_head, unfuse_head
        >>> sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
        >>> model = LlamaForCausalLM(LlamaConfig(vocab_size=32, **sizes)).train()
        >>> ids = torch.tensor([[1, 5, 9, 3]])
        >>> expected = model(input_ids=ids, labels=ids).loss
        >>> fuse_head(model, statistics=("entropy",))
        >>> output = model(input_ids=ids, labels=ids)
        >>> torch.allclose(output.loss, expected), output.logits
        (True, DeferredLogits of LlamaForCausalLM)
        >>> output.logits.statistics.entropy.shape
        torch.Size([1, 4])
        >>> unfuse_head(model)

    """
    arguments.instance("chunking", chunking, Chunking)
    arguments.statistics_wanted(statistics, WANTED)
    inner = innermost(model)
    before = _fused(inner)
    if before is not None and not before.off:
        checks.fused_already(inner)
    parameters = list(inspect.signature(type(inner).forward).parameters)[1:]
    checks.takes_labels(inner, parameters)
    head = checks.has_head(inner)
    if _fused(head) not in (None, before):
        checks.shared_head(inner)
    with contextlib.suppress(ValueError):  # a weight that is not here now may be when it is used
        base_weight(head, HEAD)
    fused = FusedHead(inner, head, chunking, statistics)
    if before is None:
        _replace("model", inner, fused, _model_forward(type(inner).forward, parameters.index("labels")))
    else:  # code that has wrapped the forward since looks this up
        fused.placed["model"], fused.stood = before.placed["model"], before.stood
        setattr(inner, _NAME, fused)
    if _fused(head) is None:
        _replace("head", head, fused, _head_forward)
    else:
        fused.placed["head"] = _head_forward
        setattr(head, _NAME, fused)


def unfuse_head(model: nn.Module) -> None:
    """Gives a model the forward back that it had before :func:`fuse_head`.

    Nothing is left on the instances. Where another has wrapped the forward since, as Accelerate does for autocast, it
    keeps ours inside, which does nothing from now on.

    Args:
        model: the model, or what is around it now.

    Raises:
        ValueError: it is not fused.

    Example: see :func:`fuse_head`.

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
    """Returns a forward for models with this one, in which so many parameters come before labels."""

    @functools.wraps(forward)
    def fused_forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        fused: FusedHead = getattr(self, _NAME)
        labels = kwargs.get("labels", args[before_labels] if len(args) > before_labels else None)
        smoothed = labels is None and _label_smoothing()
        plain = fused.off or not self.training or not torch.is_grad_enabled() or (labels is None and not smoothed)
        calls: list[HeadCall] = []
        around, fused.calls = fused.calls, None if plain else calls  # a hook may call the model within a call
        try:
            output = fused.original("model", self, *args, **kwargs)
            if not plain and not smoothed:
                checks.loss_of_logits(self, len(calls) > 0, any(call.asked for call in calls))
            return output
        finally:
            fused.calls = around
            for call in calls:
                call.leave() if smoothed else call.release()

    fused_forward.__signature__ = inspect.signature(forward)  # type: ignore[attr-defined]
    del fused_forward.__wrapped__  # by which Accelerate would unwrap it
    return fused_forward


def _label_smoothing() -> bool:
    """Returns True if the Trainer calls, and computes the loss of the output. Compiled code does not see who calls."""
    if torch.compiler.is_compiling():
        return False
    trainer = caller("compute_loss", "label_smoother")
    return trainer is not None and trainer.label_smoother is not None and trainer.compute_loss_func is None


@leaves_head
def _head_forward(self: Any, hidden: Tensor, *args: Any, asked: Asked | None = None, **kwargs: Any) -> Any:
    """Returns deferred logits in a training step, and the answer to what is asked of them; logits elsewhere."""
    fused: FusedHead = getattr(self, _NAME)
    if asked is not None:
        return answer(self, hidden, asked)
    if fused.calls is None:
        return fused.original("head", self, hidden, *args, **kwargs)
    if args or kwargs:
        checks.head_arguments(self, kwargs)
    call = HeadCall(fused.model_name, self, hidden.shape[:-1], chunking=fused.chunking, statistics=fused.statistics)
    fused.calls.append(call)
    return DeferredLogits.of(call, hidden)
