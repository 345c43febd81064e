"""Losses of logits beside a probability of each class: one pass forward, one back for each gradient that is wanted."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

from compiled_loss import checks
from compiled_loss.engine import execution, gemm
from compiled_loss.engine.math import probability_bodies
from compiled_loss.engine.math.bodies import Head
from compiled_loss.engine.math.statistics import statistics_dtype
from compiled_loss.engine.transforms import without_autocast


def statistics(
    logits: Tensor,  # [..., V], two dimensions or more, any strides
    target: Tensor,  # the same shape
    smoothing: Tensor | None,  # [2], see probability_bodies
    head: Head,
    group: str | None,
    compile: bool | str,
) -> tuple[Tensor, Tensor]:
    """Each row's loss and log-sum-exp, differentiable with respect to logits and target."""
    loss, lse = _Probabilities.apply(logits, target, smoothing, *head[:4], group, compile)
    return loss, lse


def plain_statistics(logits: Tensor, target: Tensor, smoothing: Tensor | None, head: Head) -> tuple[Tensor, Tensor]:
    """The same by ordinary autograd, for functorch's transforms: any order of derivative, no memory promise."""
    maximum, log_sum, _, loss = probability_bodies.fold_beside_probabilities(logits, None, *head, smoothing, target)
    return loss, maximum + log_sum


class _Probabilities(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        logits: Tensor,
        target: Tensor,
        smoothing: Tensor | None,
        bias: Tensor | None,
        class_weights: Tensor | None,
        softcap: Tensor | None,
        inverse_temperature: Tensor | None,
        group: str | None,
        compile: bool | str,
    ) -> tuple[Tensor, Tensor]:
        head = Head(bias, class_weights, softcap, inverse_temperature)
        dtype = statistics_dtype(logits.dtype)
        maximum, log_sum, mass, loss = execution.given(
            probability_bodies.fold_beside_probabilities,
            logits,
            (None, target),
            (*head, smoothing),
            lambda: [logits.new_empty(logits.shape[:-1], dtype=dtype) for _ in range(4)],
            compile=compile,
            group=group,
        )
        ctx.save_for_backward(logits, target, smoothing, *head[:4], maximum, log_sum, mass)
        ctx.set_materialize_grads(False)
        ctx.moved = not (logits.is_contiguous() and target.is_contiguous())
        ctx.compile = compile
        return loss, maximum + log_sum

    @staticmethod
    def backward(ctx: Any, g_loss: Tensor | None, g_lse: Tensor | None) -> tuple[Tensor | None, ...]:
        checks.first_derivative()
        logits, target, smoothing, *saved = ctx.saved_tensors
        head, (maximum, log_sum, mass) = Head(*saved[:4]), saved[4:]
        d = d_target = None
        with without_autocast(logits.device):  # whatever backward's caller is in
            loss, lse = (torch.zeros_like(mass) if g is None else g.to(mass.dtype) for g in (g_loss, g_lse))
            if ctx.moved:  # see logits.py
                loss, lse = gemm.opaque_copy(loss, []), gemm.opaque_copy(lse, [])
            # An opaque copy, for the partitioner finds the expressions of forward here, and may keep one of [N, V].
            maximum = gemm.opaque_copy(maximum, [loss])
            rows, rest = (None, target, maximum, log_sum), (*head, smoothing)
            given = functools.partial(execution.given, compile=ctx.compile)
            if ctx.needs_input_grad[0]:
                of_rows = (*rows, mass, loss, lse)
                body = probability_bodies.gradient_beside_probabilities
                (d,) = given(body, logits, of_rows, rest, lambda: [torch.empty_like(logits)])
            if ctx.needs_input_grad[1]:
                body = probability_bodies.gradient_of_probabilities
                (d_target,) = given(body, logits, (*rows, loss), rest, lambda: [torch.empty_like(target)])
        return d, d_target, *(None,) * 7
