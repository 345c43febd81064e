"""Losses of logits with a probability of each class: one pass forward, one back for each gradient that is wanted."""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import torch
from torch import Tensor

from compiled_loss import checks
from compiled_loss.engine import execution, gemm
from compiled_loss.engine.execution import Execution
from compiled_loss.engine.math import probability_bodies
from compiled_loss.engine.math.problem import Head
from compiled_loss.engine.math.statistics import statistics_dtype
from compiled_loss.engine.operators import composite, none, unpack
from compiled_loss.engine.transforms import without_autocast
from compiled_loss.planner.chunking import is_compiled


class Given(NamedTuple):
    """Logits that exist already, the parameters of their transform, and probabilities of the classes."""

    logits: Tensor  # [..., V], two dimensions or more, any strides
    class_weights: Tensor | None  # [V]
    scales: Tensor | None
    smoothing: Tensor | None  # [2], see probability_bodies
    probabilities: Tensor  # like the logits

    @property
    def rest(self) -> tuple[Tensor | None, ...]:
        """The operands of bodies that have no rows."""
        return *Head(None, self.class_weights, self.scales), self.smoothing


class _Rows(NamedTuple):
    """Results of forward for each row that backward needs."""

    maximum: Tensor
    log_sum: Tensor
    mass: Tensor


def statistics(given: Given, group: str | None, compile: bool | str) -> tuple[Tensor, Tensor]:
    """Returns each row's loss and log-sum-exp, differentiable with respect to logits and probabilities."""
    loss, lse = _statistics(given, Execution(group, is_compiled(given.logits.device, compile)))
    return loss, lse


def plain_statistics(given: Given) -> tuple[Tensor, Tensor]:
    """Computes the statistics by ordinary autograd, for functorch's transforms: any derivative, no memory promise."""
    operands = (None, *given.rest, given.probabilities)
    maximum, log_sum, _, loss = probability_bodies.fold_beside_probabilities(given.logits, *operands)
    return loss, maximum + log_sum


class _Probabilities(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *args: Any) -> tuple[Tensor, Tensor]:
        given, (group, compiled) = unpack(args, Given)
        logits, probabilities = given.logits, given.probabilities
        dtype = statistics_dtype(logits.dtype)
        maximum, log_sum, mass, loss = execution.given(
            probability_bodies.fold_beside_probabilities,
            logits,
            (None, probabilities),
            given.rest,
            lambda: [logits.new_empty(logits.shape[:-1], dtype=dtype) for _ in range(4)],
            compiled=compiled,
            group=group,
        )
        ctx.save_for_backward(*given, *_Rows(maximum, log_sum, mass))
        ctx.set_materialize_grads(False)
        ctx.moved = not (logits.is_contiguous() and probabilities.is_contiguous())
        ctx.compiled = compiled
        return loss, maximum + log_sum

    @staticmethod
    def backward(ctx: Any, g_loss: Tensor | None, g_lse: Tensor | None) -> tuple[Tensor | None, ...]:
        checks.first_derivative()
        given, (maximum, log_sum, mass), _ = unpack(ctx.saved_tensors, Given, _Rows)
        wanted, _ = unpack(ctx.needs_input_grad, Given)
        logits, probabilities = given.logits, given.probabilities
        d = d_probabilities = None
        with without_autocast(logits.device):  # backward may be called under autocast
            loss, lse = (torch.zeros_like(mass) if g is None else g.to(mass.dtype) for g in (g_loss, g_lse))
            if ctx.moved:  # see logits.py
                loss, lse = gemm.opaque_copy(loss, []), gemm.opaque_copy(lse, [])
            # An opaque copy: otherwise the partitioner finds forward's expressions here, and may keep one of [N, V].
            maximum = gemm.opaque_copy(maximum, [loss])
            rows: tuple[Tensor | None, ...] = (None, probabilities, maximum, log_sum)
            if wanted.logits:
                body = probability_bodies.gradient_beside_probabilities
                like = functools.partial(torch.empty_like, logits)
                (d,) = execution.given(
                    body, logits, (*rows, mass, loss, lse), given.rest, lambda: [like()], compiled=ctx.compiled
                )
            if wanted.probabilities:
                body = probability_bodies.gradient_of_probabilities
                like = functools.partial(torch.empty_like, probabilities)
                (d_probabilities,) = execution.given(
                    body, logits, (*rows, loss), given.rest, lambda: [like()], compiled=ctx.compiled
                )
        return *none(Given)._replace(logits=d, probabilities=d_probabilities), None, None


@composite("probability_logits_statistics", Given, Execution)
def _statistics(given: Given, options: Execution) -> tuple[Tensor, Tensor]:
    """Returns each row's loss and log-sum-exp."""
    return _Probabilities.apply(*given, *options)  # type: ignore[no-any-return]
