"""Dispatch from a linear head's arguments to a `LinearCall`, shared by all losses of `hidden`, `weight` and `labels`.

H width, V vocabulary. `linear_call` goes one way: it checks options, then tensors as they were given, and plans. Then
it takes a rank's own tensors and tokens, and casts. Nothing is computed before the last check.
"""

from __future__ import annotations

from math import prod

import torch
from torch import Tensor

from compiled_loss import checks
from compiled_loss.dispatch.keywords import Keywords
from compiled_loss.dispatch.linear_loss import LinearCall
from compiled_loss.distributed import dtensor
from compiled_loss.distributed.vocab_shard import Vocabulary
from compiled_loss.engine.gradients import Needs
from compiled_loss.engine.math.problem import Head
from compiled_loss.engine.math.row_losses import Named
from compiled_loss.engine.transforms import autocast_dtype, traced
from compiled_loss.planner.cost import Strategy
from compiled_loss.planner.plan import lengths


def linear_call(
    hidden: Tensor, weight: Tensor, labels: Tensor | None, keywords: Keywords, *, statistics: bool = False
) -> LinearCall:
    """Checks, plans, takes a rank's own tensors, and casts: once, outside of the chunk loop.

    Its result is then asked for a loss or for statistics. `statistics` says that the statistics are to be
    differentiable. If there are no labels, every token has the first class as its label.
    """
    keywords = keywords.checked()
    bias, chunking = keywords.bias, keywords.chunking
    part, shape = check_tokens(hidden, weight, labels, keywords)
    keywords.check_tensors(shape[:-1], part, hidden.device)
    dtype = computed_dtype(hidden, weight)
    enabled = torch.is_grad_enabled()
    needs = Needs(*[enabled and v is not None and v.requires_grad for v in (hidden, weight, bias)])
    token_loss = keywords.named(len(shape) - 1, dtype, hidden.device, part.size)
    tokens = prod(shape[:-1])
    rows = chunking.rows(tokens)
    strategy, how = lengths(
        tokens if rows is None else rows,
        shape[-1],
        part.share,
        dtype,
        hidden.device,
        chunking,
        ranks=part.ranks,
        strategies=_strategies(keywords, needs, statistics=statistics, token_loss=token_loss),
    )
    if labels is None:
        labels = torch.zeros(shape[:-1], dtype=torch.int64, device=hidden.device)
    labels, keywords = keywords.own(labels, part)
    part.check_equal(labels)
    counted = keywords.tokens(labels, part.size, dtype)
    hidden, weight, bias = dtensor.own_head(hidden, weight, bias, part)
    hidden, weight = hidden.to(dtype), weight.to(dtype)
    head = Head(bias, part.own(keywords.class_weights), keywords.scales(hidden))
    hidden = hidden.reshape(-1, shape[-1])
    inverse = keywords.inverse_temperature(counted, dtype)
    return LinearCall(hidden, weight, head, inverse, counted, part, keywords, needs, strategy, how, token_loss)


def check_tokens(
    hidden: Tensor, weight: Tensor, labels: Tensor | None, keywords: Keywords
) -> tuple[Vocabulary, torch.Size]:
    """Returns the rank's part of the vocabulary, and the shape of its hidden states.

    Raises an error unless hidden states and a head fit each other, and labels fit them.
    """
    part = check_head(hidden, weight, keywords)
    shape = dtensor.own_shape(hidden, part)
    if labels is not None:
        checks.tensor("labels", labels)
        dtensor.check_rows("labels", labels)
        checks.tokens(dtensor.own_shape(labels, part), labels, "hidden", shape, hidden.device, weight)
    if keywords.of_logits:
        checks.functions.whole_rows(part.group, keywords.chunking.strategy, keywords.reduction)
    return part, shape


def check_head(
    hidden: Tensor, weight: Tensor, keywords: Keywords, names: tuple[str, str] = ("hidden", "weight")
) -> Vocabulary:
    """Returns the rank's part of the vocabulary. Raises an error unless hidden states and a head fit each other."""
    checks.linear_weight(weight, keywords.bias, names[1])
    part = dtensor.head_layout(hidden, weight, keywords.bias, keywords.vocab_shard, names)
    checks.head(hidden, weight, part.size, names)
    if keywords.bias is not None:
        checks.vocabulary_vector("bias", keywords.bias, dtensor.classes_of(keywords.bias, part), hidden.device)
    computed_dtype(hidden, weight, names)
    return part


def computed_dtype(hidden: Tensor, weight: Tensor, names: tuple[str, str] = ("hidden", "weight")) -> torch.dtype:
    """Returns the dtype of hidden @ weight.T: autocast's where it is on, else the dtype of both.

    Raises an error if they differ.
    """
    autocast = autocast_dtype(hidden.device)
    mine, theirs = (v.dtype if autocast is None or v.dtype == torch.float64 else autocast for v in (hidden, weight))
    checks.same_dtype(mine, theirs, names)
    return mine


def _strategies(
    keywords: Keywords, needs: Needs, *, statistics: bool, token_loss: Named | None
) -> tuple[Strategy, ...]:
    """Returns the strategies that can do what is asked, the best first."""
    chunking, unnamed = keywords.chunking, keywords.token_loss is not None and token_loss is None
    if keywords.of_logits:
        if unnamed and not traced():
            checks.functions.closes_over("logits_loss")
        return ("tokens",)
    if not any(needs) or traced() or not (statistics or unnamed or keywords.reduction == "none"):
        return ("tokens", "vocab")
    if chunking.strategy == "tokens":
        if unnamed and keywords.reduction != "none":
            checks.functions.closes_over()
        checks.chunking.tokens_strategy(
            "differentiable statistics" if statistics else "reduction='none' with a gradient"
        )
    if chunking.strategy == "auto" and chunking.chunk_size is not None:
        checks.chunking.chunk_size_counts_tokens(chunking.chunk_size)
    return ("vocab",)
