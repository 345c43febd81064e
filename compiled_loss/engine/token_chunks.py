"""The token walk: rows streamed, their gradient formed while their logits are alive.

N tokens, H width, V vocabulary, C rows a chunk. Three GEMMs where both gradients are wanted, 6 N H V operations, all in
forward; scalar losses only, since the upstream gradient of each row is needed before it exists: it comes as
`Coefficients`. Keeps dH, dW and O(N) between forward and backward; creates no [N, V] tensor, one [C, V].
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from compiled_loss import checks
from compiled_loss.engine import bodies, gemm, hosts
from compiled_loss.engine.bodies import Head
from compiled_loss.engine.parts import part, parts, planned
from compiled_loss.engine.plan import Plan
from compiled_loss.engine.statistics import (
    IGNORED,
    Coefficients,
    RowStatistics,
    finish,
    initial_state,
    masked,
    statistics_dtype,
    unit_scale,
)


class Wanted(NamedTuple):
    """Whose gradients to form."""

    hidden: bool
    weight: bool
    bias: bool


def statistics(
    hidden: Tensor,  # [N, H]
    weight: Tensor,  # [V, H]
    labels: Tensor,  # [N]
    head: Head,
    plan: Plan,
    group: str | None,
    *,
    total: bool,
    entropy: bool,
) -> RowStatistics:
    """The statistics of NOTE [Relative statistics], without gradients: one GEMM, 2 N H V operations."""
    run = hosts.choose(hidden.device, plan.compile)
    head = head.packed()
    plan = planned(plan, hidden, labels)
    state = initial_state(hidden, (hidden.shape[0],), total=total, entropy=entropy)
    outputs = [
        run(bodies.fold, states, weight, rows[0], *head, *rows[1:])
        for states, rows in parts(plan, hidden, labels, *state)
    ]
    return finish(state.replaced([gemm.join(rows, []) for rows in zip(*outputs, strict=True)]).merged(group))


def weighted_sum(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    head: Head,
    plan: Plan,
    group: str | None,
    coefficients: Coefficients,
    active: Tensor,  # [N] bool
    wanted: Wanted,
    *,
    with_statistics: bool,
) -> tuple[Tensor, RowStatistics | None]:
    """sum(combine(statistics, coefficients)), differentiable, and if wanted the masked statistics, detached."""
    how = (plan, group, wanted, with_statistics)
    loss, *rest = _TokenChunks.apply(hidden, weight, *head[:4], labels, *coefficients, active, *how)
    return loss, RowStatistics(*rest).map(Tensor.detach) if with_statistics else None


def form_gradients(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    plan: Plan,
    group: str | None,
    wanted: Wanted,
    fenced: Tensor,
    active: Tensor | None,  # [N] bool; None where `fenced` are labels
    rest: Iterable[Tensor | None],
    chunk: Callable[..., bodies.Output],
) -> tuple[list[Tensor | None], list[Tensor]]:
    """dH, dW and db, and what else `chunk` returns after its logits' gradient.

    It is called with a host and its rows of hidden, `fenced` and the rest. `fenced` is the result of a computation
    that every chunk reads: NOTE [Order]. Rows that are not `active` have a gradient of 0, whatever they hold.
    """
    run = hosts.choose(hidden.device, plan.compile)
    d_hidden = torch.empty_like(hidden) if wanted.hidden else None
    d_weight = torch.empty_like(weight, dtype=plan.accumulate_dtype) if wanted.weight else None
    d_bias = None if bias is None or not wanted.bias else torch.empty_like(bias, dtype=statistics_dtype(hidden.dtype))
    outputs: list[list[Tensor]] = []
    formed: list[Tensor] = []
    last, apart = plan.count - 1, plan.alone(plan.count - 1, hidden.shape[0])
    for i, (states, rows) in enumerate(parts(plan, hidden, *rest, alone=apart)):
        start, host = i * plan.chunk, hosts.of_chunk(run, plan.alone(i, hidden.shape[0]))
        fenced_rows = part(fenced, start, states.shape[0], copied=plan.copied and not (apart and i == last))
        states = gemm.taking_turns(states, group, formed)
        d, *others = chunk(host, states, fenced_rows, *rows)
        outputs.append(others)
        gemm.add_gradients_(fenced, d_hidden, d_weight, d_bias, d, states, weight, active, start, 0, None, others)
        del d  # or eager code holds two chunks
        formed = [v for v in (d_hidden, d_weight, d_bias) if v is not None]
    return [d_hidden, d_weight, d_bias], [gemm.join(rows, formed) for rows in zip(*outputs, strict=True)]


def scaled_gradients(
    gradients: list[Tensor | None], factor: Tensor, dtypes: list[torch.dtype | None]
) -> list[Tensor | None]:
    """Each gradient times the upstream one, in its input's dtype."""
    return [
        None if d is None or dtype is None else gemm.scaled(d, factor, dtype)
        for d, dtype in zip(gradients, dtypes, strict=True)
    ]


class _TokenChunks(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        class_weights: Tensor | None,
        softcap: Tensor | None,
        inverse_temperature: Tensor | None,
        labels: Tensor,
        nll: Tensor,
        lse: Tensor | None,
        total: Tensor | None,
        square: Tensor | None,
        active: Tensor,
        plan: Plan,
        group: str | None,
        wanted: Wanted,
        with_statistics: bool,
    ) -> tuple[Tensor | None, ...]:
        head = Head(bias, class_weights, softcap, inverse_temperature).packed()
        coefficients = scaled = Coefficients(nll, lse, total, square)
        scale = unit_scale(hidden.dtype, *coefficients)
        if scale is not None:
            scaled = coefficients.map(lambda c: c / scale)

        labels = torch.where(active, labels, IGNORED)  # a new tensor, to be fenced: NOTE [Order]
        differentiable = any(ctx.needs_input_grad[7:11])
        body = bodies.statistics_and_gradient if differentiable else bodies.fold_and_gradient
        if with_statistics:
            body = bodies.all_statistics_and_gradient

        def chunk(run: hosts.Host, states: Tensor, labels: Tensor, *rows: Tensor | None) -> bodies.Output:
            d, loss, _, *rest = run(body, states, weight, labels, *head, *rows, group=group)
            return d, loss, *(() if body is bodies.fold_and_gradient else rest)

        plan = planned(plan, hidden, *scaled)
        gradients, (losses, *rest) = form_gradients(
            hidden, weight, bias, plan, group, wanted, labels, None, scaled, chunk
        )
        loss = torch.where(active, losses, 0.0).sum()
        if scale is not None:
            loss = loss * scale
        statistics: tuple[Tensor | None, ...] = (None,) * 5
        if rest:
            statistics = masked(RowStatistics.of(rest, total=total is not None, entropy=with_statistics), active)
        ctx.dtypes = [None if v is None else v.dtype for v in (hidden, weight, bias)]
        ctx.save_for_backward(*gradients, scale, *(statistics[:3] if differentiable else (None, None, None)))
        ctx.set_materialize_grads(False)
        return loss, *(statistics if with_statistics else (None,) * 5)

    @staticmethod
    def backward(ctx: Any, g: Tensor | None, *_statistics: None) -> tuple[Tensor | None, ...]:
        checks.first_derivative()
        if g is None:
            return (None,) * 16
        *gradients, scale, nll, lse, total = ctx.saved_tensors
        factor = g if scale is None else g * scale
        dense = scaled_gradients(gradients, factor, ctx.dtypes)
        statistics = (nll, lse, total, None if lse is None else lse.square())
        rows = [g * v if wants else None for v, wants in zip(statistics, ctx.needs_input_grad[7:11], strict=True)]
        return *dense, *(None,) * 4, *rows, *(None,) * 5
