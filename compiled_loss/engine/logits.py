"""Row statistics of logits that exist already: one pass forward, one back, nothing of [N, V] kept beyond the logits."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from compiled_loss import checks
from compiled_loss.engine import execution, gemm
from compiled_loss.engine.math import bodies
from compiled_loss.engine.math.bodies import Head, Upstream
from compiled_loss.engine.math.statistics import RowStatistics, State, finish, initial_state
from compiled_loss.engine.transforms import without_autocast


def statistics(
    logits: Tensor,  # [..., V], two dimensions or more, any strides
    labels: Tensor,  # [...]
    head: Head,
    group: str | None,
    *,
    total: bool,
    entropy: bool,
    compile: bool | str,
) -> RowStatistics:
    """The statistics of NOTE [Relative statistics], all but `correct` differentiable with respect to the logits."""
    return RowStatistics(*_Logits.apply(logits, *head[:4], labels, group, total, entropy, compile))


def plain_statistics(logits: Tensor, labels: Tensor, head: Head, *, total: bool, entropy: bool) -> RowStatistics:
    """The same by ordinary autograd, for functorch's transforms: any order of derivative, no memory promise."""
    state = initial_state(logits, labels.shape, total=total, entropy=entropy)
    return finish(state.replaced(bodies.fold(logits, labels, *head, *state)))


class _Logits(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        logits: Tensor,
        bias: Tensor | None,
        class_weights: Tensor | None,
        softcap: Tensor | None,
        inverse_temperature: Tensor | None,
        labels: Tensor,
        group: str | None,
        total: bool,
        entropy: bool,
        compile: bool | str,
    ) -> tuple[Tensor | None, ...]:
        head = Head(bias, class_weights, softcap, inverse_temperature)
        state = initial_state(logits, labels.shape, total=total, entropy=entropy)
        found = execution.given(
            bodies.fold, logits, (labels, *state), head, lambda: state.map(torch.empty_like).present(), compile=compile
        )
        state = state.replaced(found).merged(group)
        result = finish(state)
        ctx.save_for_backward(logits, *head[:4], labels, *state)
        ctx.set_materialize_grads(False)
        ctx.moved, ctx.compile = not logits.is_contiguous(), compile
        return tuple(result)

    @staticmethod
    def backward(
        ctx: Any,
        g_nll: Tensor | None,
        g_lse: Tensor | None,
        g_total: Tensor | None,
        g_entropy: Tensor | None,
        _correct: None,
    ) -> tuple[Tensor | None, ...]:
        checks.first_derivative()
        logits, *saved = ctx.saved_tensors
        with without_autocast(logits.device):  # whatever backward's caller is in
            head, labels, state = Head(*saved[:4]), saved[4], State(*saved[5:])
            upstream = Upstream.of(state, g_nll, g_lse, g_total, g_entropy)
            if ctx.moved:  # or Inductor writes a long expression out twice, in its layout and in theirs
                upstream = upstream.map(lambda v: gemm.opaque_copy(v, []))
            rows = (labels, state.maximum, *upstream)
            (d,) = execution.given(
                bodies.gradient, logits, rows, head, lambda: [torch.empty_like(logits)], compile=ctx.compile
            )
            return d, *(None,) * 9
