"""Statistics of a few classes of each token: log-probabilities of given classes, or all statistics over kept ones.

N tokens (any leading shape), K classes of each, V vocabulary. See engine/gathered_head.py.

NOTE [Kept classes]
A sampler that keeps the top of a distribution draws from the renormalised top. Its log-probabilities are over the
classes that it kept. A trainer that takes log-probabilities over all V classes has biased importance ratios. So here
the kept classes of a token and its label are the whole support: z - log sum(exp(z)) over them. A negative id is
padding. A class that is listed twice counts once.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from compiled_loss import checks, reduction
from compiled_loss.dispatch.linear_loss import LinearCall
from compiled_loss.engine.gathered_head import Gathered, gathered_logits
from compiled_loss.engine.logits import plain_statistics
from compiled_loss.engine.math.bodies import transformed
from compiled_loss.engine.math.problem import Head
from compiled_loss.engine.math.statistics import RowStatistics, TopK, Wanted, masked
from compiled_loss.engine.top import Top
from compiled_loss.engine.transforms import without_autocast


def row_statistics(call: LinearCall, wanted: Wanted) -> RowStatistics:
    """Returns masked statistics, [...], differentiable, over all classes or over those that are kept."""
    if call.keywords.kept_ids is None:
        return call.statistics(wanted)
    kept = _once(_rows("kept_ids", call.keywords.kept_ids, call))
    shape, active = call.tokens.labels.shape, call.tokens.active.reshape(-1)
    labels = call.tokens.labels.reshape(-1, 1)
    chosen = _Chosen.of(call, torch.cat([torch.where(kept == labels, -1, kept), labels], -1), rounded=False)
    z = torch.where(chosen.there, chosen.z, -math.inf)
    with without_autocast(z.device):
        last = torch.full_like(labels[:, 0], z.shape[1] - 1)
        rows = plain_statistics(z, last, Head(None, None, None), None, wanted._replace(argmax=False))
    if wanted.argmax:
        first = torch.where(z == z.amax(-1, keepdim=True), chosen.ids, call.vocabulary.size).amin(-1)
        rows = rows._replace(argmax=first - labels[:, 0])
    compact = reduction.compacted(call.tokens.active, call.keywords.chunking)
    factor = call.factor(compact, z)
    own = chosen.nan if factor is None else chosen.nan * factor
    rows = rows.map(lambda v: v * own if v.is_floating_point() else v)
    return masked(rows, active).map(lambda v: v.reshape(shape))


def logprobs(call: LinearCall, rows: RowStatistics) -> Tensor:
    """Returns log-probabilities of the requested classes, [..., K]: -inf for padding, 0 where a token is ignored."""
    tokens = call.tokens
    assert call.keywords.ids is not None
    ids = _rows("ids", call.keywords.ids, call)
    chosen = _Chosen.of(call, ids, rounded=call.keywords.kept_ids is None)
    found = torch.where(chosen.there, chosen.z - rows.lse.reshape(-1, 1), -math.inf) * chosen.nan.unsqueeze(-1)
    found = torch.where(tokens.active.reshape(-1, 1), found, 0.0)
    return found.reshape(*tokens.labels.shape, ids.shape[-1])


def _rows(name: str, ids: Tensor, call: LinearCall) -> Tensor:
    """Returns the ids [N, K] of each token, from the ids of each or of all."""
    active = call.tokens.active.reshape(-1)
    shape = (active.shape[0], ids.shape[-1])
    ids = ids.expand(shape) if ids.dim() == 1 else ids.reshape(shape)
    checks.ids.classes(name, ids, active, call.vocabulary.size)
    call.vocabulary.check_equal(ids)
    return ids


def _once(ids: Tensor) -> Tensor:
    """Returns the ids sorted, each class once, with -1 instead of a repetition."""
    if ids.shape[-1] < 2:
        return ids
    ids, _ = ids.sort(-1)
    return torch.cat([ids[:, :1], torch.where(ids[:, 1:] == ids[:, :-1], -1, ids[:, 1:])], -1)


def top_k(call: LinearCall, rows: RowStatistics, top: Top) -> TopK:
    """Returns the most probable classes of each token."""
    tokens, inverse = call.tokens, call.inverse_temperature
    z, _ = transformed(top.logits, Head(None, None, call.head.scales), inverse)
    active = tokens.active.unsqueeze(-1)
    logprob = torch.where(active, z - rows.lse.detach().unsqueeze(-1), 0.0)
    return TopK(logprob, torch.where(active, top.behind + tokens.labels.unsqueeze(-1), 0))


class _Chosen(NamedTuple):
    """Some classes of each token."""

    ids: Tensor  # [N, K]
    there: Tensor  # [N, K] bool, False for padding
    z: Tensor  # [N, K]
    nan: Tensor  # [N], NaN where an id is no class, or ranks have different ids; else 1

    @staticmethod
    def of(call: LinearCall, ids: Tensor, *, rounded: bool) -> _Chosen:
        """Makes it from ids [N, K], counted from the first of all classes; `rounded` if a GEMM made other logits."""
        head, vocabulary = call.head, call.vocabulary
        active = call.tokens.active.reshape(-1)
        own = vocabulary.labels(ids)  # padding stays no class of the rank, wherever the rank's classes start
        gathered = Gathered(call.hidden, call.weight, head.bias, torch.where(ids < 0, -1, own), active)
        inverse = call.inverse_temperature
        inverse = None if inverse is None else inverse.reshape(-1)
        raw = gathered_logits(gathered, vocabulary.group, rounded=rounded)
        z, _ = transformed(raw, Head(None, None, head.scales), inverse)
        outside = (ids >= vocabulary.size).any(-1) & active
        nan = vocabulary.nan_unless_equal(z.new_ones(z.shape[:1]), ids, z)
        return _Chosen(ids, ids >= 0, z, nan.masked_fill(outside, math.nan))
