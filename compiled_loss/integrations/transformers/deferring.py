"""Calls of a model that return deferred logits, whatever they are used for: NOTE [Deferred logits]."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from types import MethodType
from typing import Any

from torch import Tensor, nn

from compiled_loss.huggingface.families import innermost
from compiled_loss.integrations.transformers import checks
from compiled_loss.integrations.transformers.deferred import DeferredLogits
from compiled_loss.integrations.transformers.head_call import Asked, HeadCall, answer
from compiled_loss.models.output_head import leaves_head


@contextlib.contextmanager
def deferring(model: nn.Module) -> Iterator[None]:
    """Makes the model's logits :class:`DeferredLogits` in a block, for :meth:`DeferredLogits.apply` there.

    It works in training and evaluation, with gradients and without, for a model that is fused or not. It is for eager
    code.
    """
    head = checks.has_head(innermost(model))
    stood = head.__dict__.get("forward")
    calls: list[HeadCall] = []

    @leaves_head
    def forward(self: Any, hidden: Tensor, *, asked: Asked | None = None) -> Any:
        if asked is not None:
            return answer(self, hidden, asked)
        calls.append(HeadCall(type(self).__name__, self, hidden.shape[:-1]))
        return DeferredLogits.of(calls[-1], hidden)

    head.forward = MethodType(forward, head)
    try:
        yield
    finally:
        for call in calls:
            call.release()
        if stood is None:
            del head.forward
        else:
            head.forward = stood
