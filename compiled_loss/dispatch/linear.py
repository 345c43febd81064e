"""From a linear head's arguments to its loss: what every loss of `hidden`, `weight` and `labels` shares.

N tokens, H width, V vocabulary. `linear_call` goes one way: options, tensors as they came, the plan; then a rank's own,
tokens, the cast. Nothing is computed before the last check. The engine sees [N, H] and [N].
"""

from __future__ import annotations

from math import prod
from typing import NamedTuple

import torch
from torch import Tensor

from compiled_loss import checks, reduction
from compiled_loss.dispatch.keywords import Keywords
from compiled_loss.distributed import dtensor
from compiled_loss.distributed.vocab_shard import Vocabulary
from compiled_loss.engine import logits as logits_pass
from compiled_loss.engine import token_chunks, vocab_chunks
from compiled_loss.engine.compaction import Compaction
from compiled_loss.engine.gradients import Needs
from compiled_loss.engine.math.bodies import Head, Problem
from compiled_loss.engine.math.statistics import (
    Classes,
    Coefficients,
    Divisor,
    RowStatistics,
    combine,
    masked,
    statistics_dtype,
)
from compiled_loss.engine.transforms import autocast_dtype, traced, without_autocast
from compiled_loss.planner.cost import Strategy
from compiled_loss.planner.plan import Lengths, lengths


class LinearCall(NamedTuple):
    """Checked arguments, a rank's own, after autocast: [N, H], [V, H], the rest of the head, the tokens [...]."""

    hidden: Tensor
    weight: Tensor
    head: Head
    tokens: reduction.Tokens
    vocabulary: Vocabulary
    keywords: Keywords
    needs: Needs
    strategy: Strategy
    lengths: Lengths

    def loss(self) -> Tensor:
        """The loss."""
        return self._loss_and_rows(with_statistics=False)[0]

    def loss_and_statistics(self) -> tuple[Tensor, RowStatistics]:
        """The loss, and masked statistics [...] from the same pass."""
        loss, rows = self._loss_and_rows(with_statistics=True)
        assert rows is not None
        return loss, rows

    def statistics(self) -> RowStatistics:
        """Masked statistics [...], differentiable."""
        compact = reduction.compacted(self.tokens.active, self.keywords.chunking)
        rows = self._gathered(compact)._statistics(total=False, entropy=True)
        return self._back(rows, compact, self._factor(compact, rows.nll))

    def _loss_and_rows(self, *, with_statistics: bool) -> tuple[Tensor, RowStatistics | None]:
        keywords, dtype = self.keywords, statistics_dtype(self.hidden.dtype)
        terms = reduction.Terms(keywords.class_weights, keywords.label_smoothing, keywords.z_loss)
        coefficients, divisor = reduction.normalised(
            self.tokens, terms, keywords.reduction, keywords.num_label_tokens, dtype
        )
        coefficients = coefficients.map(lambda c: c.reshape(-1))
        compact = reduction.compacted(self.tokens.active, keywords.chunking)
        if compact is not None:
            coefficients = coefficients.map(compact.gathered)
        loss, rows = self._gathered(compact)._loss(coefficients, divisor, with_statistics=with_statistics)
        factor = self._factor(compact, loss)
        if keywords.reduction == "none":
            loss = (loss if compact is None else compact.scattered(loss)).reshape(self.tokens.labels.shape)
        return (
            loss if factor is None else loss * factor,
            None if rows is None else self._back(rows, compact, factor),
        )

    def _gathered(self, compact: Compaction | None) -> LinearCall:
        """Of the tokens that count, [N]."""
        flat = self._replace(tokens=self.tokens.map(lambda v: v.reshape(-1)))
        if compact is None:
            return flat
        return flat._replace(hidden=compact.gathered(self.hidden), tokens=flat.tokens.gathered(compact))

    def _factor(self, compact: Compaction | None, after: Tensor) -> Tensor | None:
        """Of all results: NaN where tokens are not what was promised."""
        factor = None if compact is None else compact.fits
        if self.vocabulary.group is not None:
            factor = after.new_ones(()) if factor is None else factor.to(after.dtype)
            factor = self.vocabulary.nan_unless_equal(factor, self.tokens.labels, after)
        return factor

    def _back(self, rows: RowStatistics, compact: Compaction | None, factor: Tensor | None) -> RowStatistics:
        """Statistics [...] of those of the rows."""
        if compact is not None:
            rows = rows.map(compact.scattered)
        rows = rows.map(lambda v: v.reshape(self.tokens.labels.shape))
        if factor is not None:
            rows = rows.map(lambda v: v * factor.to(v.dtype) if v.is_floating_point() else v)
        return rows

    def _engine(self) -> tuple[Problem, Classes]:
        """What the engine is given: labels are counted from the rank's first class."""
        labels, start = self.vocabulary.labels(self.tokens.labels), self.vocabulary.start
        return Problem.of(self.hidden, self.weight, self.head, labels), self.tokens.classes.counted_from(start)

    def _statistics(self, *, total: bool, entropy: bool) -> RowStatistics:
        """Masked statistics of all rows that there are, [N]."""
        (problem, classes), active = self._engine(), self.tokens.active
        if traced():
            hidden = torch.where(active.unsqueeze(1), self.hidden, 0.0)
            logits = hidden @ self.weight.t()
            rows = logits_pass.plain_statistics(logits, problem.labels, self.head, total=total, entropy=entropy)
        else:
            asked = token_chunks.Asked(total, entropy, self.vocabulary.group)
            with without_autocast(self.hidden.device):
                if self.strategy == "vocab":
                    rows = vocab_chunks.statistics(problem, classes, asked, self.lengths)
                else:
                    rows = token_chunks.statistics(problem, asked, self.lengths)
        return masked(rows, active)

    def _loss(
        self, coefficients: Coefficients, divisor: Divisor, *, with_statistics: bool
    ) -> tuple[Tensor, RowStatistics | None]:
        """The loss of coefficients [N], and if wanted masked statistics [N], of all rows that there are."""
        (problem, classes), group = self._engine(), self.vocabulary.group
        scalar = self.keywords.reduction != "none"
        if scalar and any(self.needs) and not traced():
            with without_autocast(self.hidden.device):
                parts = (problem, classes, coefficients, divisor)
                if self.strategy == "vocab":
                    return vocab_chunks.weighted_sum(*parts, self.lengths, group, with_statistics=with_statistics)
                return token_chunks.weighted_sum(
                    *parts, self.needs, self.lengths, group, with_statistics=with_statistics
                )
        rows = self._statistics(total=coefficients.total is not None, entropy=with_statistics)
        loss = combine(rows, coefficients, problem.labels, classes)
        if scalar:
            (loss,) = divisor.divide(self.tokens.active, loss.sum())
        return loss, rows if with_statistics else None


def linear_call(
    hidden: Tensor, weight: Tensor, labels: Tensor, keywords: Keywords, *, statistics: bool = False
) -> LinearCall:
    """Check, plan, take a rank's own, and cast: once, outside the chunk loop. Then ask it for what is wanted.

    `statistics` says that they are to be differentiable.
    """
    keywords = keywords.checked()
    bias, chunking = keywords.bias, keywords.chunking
    part = check_head(hidden, weight, keywords)
    shape = dtensor.own_shape(hidden, part)
    checks.tensor("labels", labels)
    dtensor.check_rows("labels", labels)
    checks.tokens(dtensor.own_shape(labels, part), labels, "hidden", shape, hidden.device, weight)
    keywords.check_tensors(shape[:-1], part, hidden.device)
    dtype = computed_dtype(hidden, weight)
    enabled = torch.is_grad_enabled()
    needs = Needs(*[enabled and v is not None and v.requires_grad for v in (hidden, weight, bias)])
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
        strategies=_strategies(keywords, needs, statistics=statistics),
    )
    labels, keywords = keywords.own(labels, part)
    part.check_equal(labels)
    counted = keywords.tokens(labels, part.size, dtype)
    hidden, weight, bias = dtensor.own_head(hidden, weight, bias, part)
    hidden, weight = hidden.to(dtype), weight.to(dtype)
    head = Head(bias, part.own(keywords.class_weights), keywords.scales(hidden))
    return LinearCall(hidden.reshape(-1, shape[-1]), weight, head, counted, part, keywords, needs, strategy, how)


def check_head(
    hidden: Tensor, weight: Tensor, keywords: Keywords, names: tuple[str, str] = ("hidden", "weight")
) -> Vocabulary:
    """A rank's part of the vocabulary; raise unless hidden states and a head fit each other."""
    checks.linear_weight(weight, keywords.bias, names[1])
    part = dtensor.head_layout(hidden, weight, keywords.bias, keywords.vocab_shard, names)
    checks.head(hidden, weight, part.size, names)
    if keywords.bias is not None:
        checks.vocabulary_vector("bias", keywords.bias, dtensor.classes_of(keywords.bias, part), hidden.device)
    computed_dtype(hidden, weight, names)
    return part


def computed_dtype(hidden: Tensor, weight: Tensor, names: tuple[str, str] = ("hidden", "weight")) -> torch.dtype:
    """That of their product: autocast's where it is on, else the one they share; raise where they share none."""
    autocast = autocast_dtype(hidden.device)
    mine, theirs = (v.dtype if autocast is None or v.dtype == torch.float64 else autocast for v in (hidden, weight))
    checks.same_dtype(mine, theirs, names)
    return mine


def _strategies(keywords: Keywords, needs: Needs, *, statistics: bool) -> tuple[Strategy, ...]:
    """Those that can do what is asked, the best first."""
    chunking = keywords.chunking
    if not any(needs) or not (statistics or keywords.reduction == "none") or traced():
        return ("tokens", "vocab")
    if chunking.strategy == "tokens":
        checks.chunking.tokens_strategy(
            "differentiable statistics" if statistics else "reduction='none' with a gradient"
        )
    if chunking.strategy == "auto" and chunking.chunk_size is not None:
        checks.chunking.chunk_size_counts_tokens(chunking.chunk_size)
    return ("vocab",)
