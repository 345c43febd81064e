"""Logits of a few classes of each token, from a head whose other rows are not read.

N tokens, K classes of each, H width, V vocabulary. A pass does 2 N K H operations and no GEMM over V. It gathers one
block of rows of the weight, [rows, K, H], at a time. Only the inputs are kept between forward and backward. Backward
creates dW in fp32.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from compiled_loss import checks
from compiled_loss.engine.collectives import all_reduced
from compiled_loss.engine.gradients import Gradients, Needs
from compiled_loss.engine.math.statistics import statistics_dtype
from compiled_loss.engine.operators import composite, is_compiling, none, operator, unpack
from compiled_loss.engine.transforms import traced, without_autocast

_BLOCK = 1 << 24  # gathered numbers at a time: 64 MiB in fp32


class Gathered(NamedTuple):
    """Hidden states, a head, and the classes whose logits each token asks for."""

    hidden: Tensor  # [N, H]
    weight: Tensor  # [V, H]
    bias: Tensor | None  # [V]
    ids: Tensor  # [N, K], counted from a rank's first class; the logit of a class that it does not have is 0
    active: Tensor  # [N] bool: the hidden states of all other tokens are not used


class _Options(NamedTuple):
    group: str | None
    rounds: bool  # as `_Way` says


class _Way(NamedTuple):
    rounded: bool  # whether h . w is rounded to the dtype of h, as a GEMM rounds it
    compiled: bool  # whether the operator hides the loop from a compiler


def gathered_logits(gathered: Gathered, group: str | None, *, rounded: bool) -> Tensor:
    """Returns the logits of each token's classes, [N, K], in the dtype of statistics, differentiable.

    Over a group: NOTE [Ranks].
    """
    if traced():
        return _plain(gathered, rounded=rounded)
    with without_autocast(gathered.hidden.device):
        (logits,) = _applied(gathered, _Options(group, rounded))
    return logits


def _plain(gathered: Gathered, *, rounded: bool) -> Tensor:
    """Computes the gathered logits by ordinary autograd, which holds [N, K, H]."""
    dtype = statistics_dtype(gathered.hidden.dtype)
    ours = _ours(gathered)
    ids = torch.where(ours, gathered.ids, 0)
    hidden = torch.where(gathered.active.unsqueeze(-1), gathered.hidden, 0.0).to(dtype)
    logits = (gathered.weight[ids].to(dtype) * hidden.unsqueeze(1)).sum(-1)
    if rounded:
        logits = logits.to(gathered.hidden.dtype).to(dtype)
    if gathered.bias is not None:
        logits = logits + gathered.bias[ids].to(dtype)
    return torch.where(ours, logits, 0.0)


def _ours(gathered: Gathered) -> Tensor:
    return (gathered.ids >= 0) & (gathered.ids < gathered.weight.shape[0]) & gathered.active.unsqueeze(-1)


class _Block(NamedTuple):
    rows: slice
    ids: Tensor  # [rows, K], 0 for a class that the rank does not have
    states: Tensor  # [rows, H]


def _blocks(gathered: Gathered, ours: Tensor) -> Iterator[_Block]:
    hidden, ids = gathered.hidden, gathered.ids
    dtype, size = statistics_dtype(hidden.dtype), max(1, ids.shape[1] * hidden.shape[1])
    step = max(1, _BLOCK // size)
    for start in range(0, hidden.shape[0] if gathered.weight.shape[0] else 0, step):
        rows = slice(start, start + step)
        states = torch.where(gathered.active[rows].unsqueeze(-1), hidden[rows], 0.0)
        yield _Block(rows, torch.where(ours[rows], ids[rows], 0), states.to(dtype))


def _like(gathered: Gathered, _way: _Way) -> list[Tensor]:
    return [gathered.hidden.new_empty(gathered.ids.shape, dtype=statistics_dtype(gathered.hidden.dtype))]


def _operations(gathered: Gathered, *_rest: Any) -> int:
    tokens, classes = gathered.ids  # type: ignore[misc]  # shapes for tensors
    return 2 * int(tokens) * int(classes) * int(gathered.hidden[1])


@operator("gather_logits", Gathered, _Way, like=_like, operations=_operations)
def _gather(gathered: Gathered, way: _Way) -> list[Tensor]:
    """Returns the logits of a rank's own classes, and 0 for all other classes."""
    (logits,) = _like(gathered, way)
    logits.zero_()
    ours = _ours(gathered)
    for rows, ids, states in _blocks(gathered, ours):
        weight = gathered.weight[ids].to(states.dtype)
        found = torch.bmm(weight, states.unsqueeze(-1)).squeeze(-1)
        if way.rounded:
            found = found.to(gathered.hidden.dtype).to(found.dtype)
        if gathered.bias is not None:
            found += gathered.bias[ids]
        logits[rows] = torch.where(ours[rows], found, 0.0)
    return [logits]


class _Upstream(NamedTuple):
    g: Tensor  # [N, K]


def _gradients_like(gathered: Gathered, _upstream: _Upstream, needs: Needs, _way: _Way) -> list[Tensor]:
    return (
        Gradients.empty(*gathered[:3], needs)
        ._replace(d_bias=torch.empty_like(gathered.bias) if gathered.bias is not None and needs.needs_bias else None)
        .present()
    )


@operator(
    "gather_logits_gradients",
    Gathered,
    _Upstream,
    Needs,
    _Way,
    like=_gradients_like,
    operations=lambda gathered, _upstream, needs, _way: (
        (needs.needs_hidden + needs.needs_weight) * _operations(gathered)
    ),
)
def _gradients(gathered: Gathered, upstream: _Upstream, needs: Needs, _way: _Way) -> list[Tensor]:
    """Returns the gradients that are needed. That of the hidden states is the rank's part of a sum over ranks."""
    hidden, weight, bias, _, _ = gathered
    wide = statistics_dtype(hidden.dtype)
    found = Gradients.empty(hidden, weight, bias, needs, weight_dtype=wide)
    for d in found.present():
        d.zero_()
    ours = _ours(gathered)
    g = torch.where(ours, upstream.g, 0.0)
    for rows, ids, states in _blocks(gathered, ours):
        if found.d_hidden is not None:
            found.d_hidden[rows] = torch.bmm(g[rows].unsqueeze(1), weight[ids].to(wide)).squeeze(1)
        if found.d_weight is not None:
            products = g[rows].unsqueeze(-1) * states.unsqueeze(1)
            found.d_weight.index_add_(0, ids.reshape(-1), products.flatten(0, 1))
        if found.d_bias is not None:
            found.d_bias.index_add_(0, ids.reshape(-1), g[rows].reshape(-1))
    if found.d_bias is not None and bias is not None:
        found = found._replace(d_bias=found.d_bias.to(bias.dtype))
    return found.with_weight_in(weight.dtype).present()


class _GatheredLogits(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *args: Any) -> Tensor:
        gathered, (group, rounded) = unpack(args, Gathered)
        ctx.save_for_backward(*gathered)
        (logits,) = _gather(gathered, _Way(rounded, is_compiling()))
        return all_reduced([logits], "sum", group)[0]

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        checks.first_derivative()
        gathered, _ = unpack(ctx.saved_tensors, Gathered)
        wanted, _ = unpack(ctx.needs_input_grad, Gathered)
        needs = Needs(wanted.hidden, wanted.weight, wanted.bias)
        with without_autocast(g.device):  # backward may be called under autocast
            found = _gradients(gathered, _Upstream(g), needs, _Way(False, is_compiling()))
        hidden, weight, bias = Gradients.pop_from(found, needs, gathered.bias)
        return *none(Gathered)._replace(hidden=hidden, weight=weight, bias=bias), None, None


@composite("gathered_logits", Gathered, _Options)
def _applied(gathered: Gathered, options: _Options) -> tuple[Tensor]:
    """Returns the logits."""
    return (_GatheredLogits.apply(*gathered, *options),)
