"""From a linear head's arguments to row statistics and losses: what every loss on `hidden` and `weight` shares.

N tokens, H width, V vocabulary. Checks come first, then autocast, then the plan; the engine sees [N, H] and [N].
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from compiled_loss import checks, reduction
from compiled_loss.checks import numbers
from compiled_loss.distributed import dtensor
from compiled_loss.distributed.vocab_shard import VocabShard, Vocabulary
from compiled_loss.engine import logits as logits_walk
from compiled_loss.engine import token_chunks, vocab_chunks
from compiled_loss.engine.compaction import Compaction
from compiled_loss.engine.gradients import Needs
from compiled_loss.engine.math.bodies import Head
from compiled_loss.engine.math.statistics import Coefficients, RowStatistics, combine, masked, statistics_dtype
from compiled_loss.engine.transforms import autocast_dtype, traced, without_autocast
from compiled_loss.planner.chunking import Chunking
from compiled_loss.planner.cost import Strategy
from compiled_loss.planner.plan import Lengths, lengths


class LinearHead(NamedTuple):
    """Checked arguments, a rank's own, after autocast: [N, H], [V, H], the rest of the head, the tokens [...]."""

    hidden: Tensor
    weight: Tensor
    head: Head
    tokens: reduction.Tokens
    vocabulary: Vocabulary

    @property
    def vocab(self) -> int:
        """V, of all ranks."""
        return self.vocabulary.size

    @property
    def labels(self) -> Tensor:
        """[N], counted from the rank's first class."""
        return self.vocabulary.labels(self.tokens.looked_at.reshape(-1))

    def statistics(self, chunking: Chunking, *, total: bool, entropy: bool, what: str) -> RowStatistics:
        """Masked statistics [...], differentiable; `what` names what a token walk with gradients could not give."""
        checks.instance("chunking", chunking, Chunking)
        compact = reduction.compacted(self.tokens.active, chunking)
        head = self if compact is None else self._gathered(compact)
        rows = head._statistics(chunking, total=total, entropy=entropy, what=what)
        factor = self._factor(compact, rows.nll)
        return self._back(rows, compact, factor)

    def loss(self, coefficients: Coefficients, reduction_: str, chunking: Chunking) -> Tensor:
        """The loss of coefficients [...], on the walk that suits it."""
        return self._loss_and_rows(coefficients, reduction_, chunking, with_statistics=False)[0]

    def loss_and_statistics(
        self, coefficients: Coefficients, reduction_: str, chunking: Chunking
    ) -> tuple[Tensor, RowStatistics]:
        """The loss, and masked statistics [...] from the same pass."""
        loss, rows = self._loss_and_rows(coefficients, reduction_, chunking, with_statistics=True)
        assert rows is not None
        return loss, rows

    def _loss_and_rows(
        self, coefficients: Coefficients, reduction_: str, chunking: Chunking, *, with_statistics: bool
    ) -> tuple[Tensor, RowStatistics | None]:
        checks.instance("chunking", chunking, Chunking)
        coefficients = coefficients.map(lambda c: c.reshape(-1))
        compact = reduction.compacted(self.tokens.active, chunking)
        head = self
        if compact is not None:
            head, coefficients = self._gathered(compact), coefficients.map(compact.gathered)
        loss, rows = head._loss(coefficients, reduction_, chunking, with_statistics=with_statistics)
        if compact is not None and reduction_ == "none":
            loss = compact.scattered(loss)
        factor = self._factor(compact, loss)
        if reduction_ == "none":
            loss = loss.reshape(self.tokens.labels.shape)
        return (
            loss if factor is None else loss * factor,
            None if rows is None else self._back(rows, compact, factor),
        )

    def _gathered(self, compact: Compaction) -> LinearHead:
        """Of the tokens that count."""
        tokens = self.tokens.map(lambda v: compact.gathered(v.reshape(-1)))
        return self._replace(hidden=compact.gathered(self.hidden), tokens=tokens)

    def _factor(self, compact: Compaction | None, after: Tensor) -> Tensor | None:
        """Of all results: NaN where tokens are not what was promised."""
        factor = None if compact is None else compact.fits
        if self.vocabulary.group is not None:
            factor = after.new_ones(()) if factor is None else factor.to(after.dtype)
            factor = self.vocabulary.agreed(factor, self.tokens.labels, after)
        return factor

    def _back(self, rows: RowStatistics, compact: Compaction | None, factor: Tensor | None) -> RowStatistics:
        """Statistics [...] of those of the rows."""
        if compact is not None:
            rows = rows.map(compact.scattered)
        rows = rows.map(lambda v: v.reshape(self.tokens.labels.shape))
        if factor is not None:
            rows = rows.map(lambda v: v * factor.to(v.dtype) if v.is_floating_point() else v)
        return rows

    def _statistics(self, chunking: Chunking, *, total: bool, entropy: bool, what: str) -> RowStatistics:
        """Masked statistics of all rows that there are, [N]."""
        hidden, weight, head, tokens, vocabulary = self
        if traced():
            hidden = torch.where(tokens.active.reshape(-1, 1), hidden, 0.0)
            rows = logits_walk.plain_statistics(hidden @ weight.t(), self.labels, head, total=total, entropy=entropy)
        else:
            differentiable = any(self._needs())
            if differentiable and chunking.strategy == "tokens":
                checks.chunking.tokens_strategy(what)
            if differentiable and chunking.strategy == "auto" and chunking.chunk_size is not None:
                checks.chunking.chunk_size_counts_tokens(chunking.chunk_size)
            strategy, how = self._chunked(chunking, ("vocab",) if differentiable else ("tokens", "vocab"))
            chunked = vocab_chunks if strategy == "vocab" else token_chunks
            parts = (hidden, weight, self.labels, head, how, vocabulary.group)
            with without_autocast(hidden.device):
                rows = chunked.statistics(*parts, total=total, entropy=entropy)
        return masked(rows, tokens.active.reshape(-1))

    def _loss(
        self, coefficients: Coefficients, reduction_: str, chunking: Chunking, *, with_statistics: bool
    ) -> tuple[Tensor, RowStatistics | None]:
        """The loss of coefficients [N], and if wanted masked statistics [N], of all rows that there are."""
        needs = self._needs()
        if reduction_ != "none" and any(needs) and not traced():
            strategy, how = self._chunked(chunking, ("tokens", "vocab"))
            if strategy == "tokens":
                hidden, weight, head, tokens, vocabulary = self
                parts = (hidden, weight, self.labels, head, how, vocabulary.group)
                of_tokens = (coefficients, tokens.active.reshape(-1), needs)
                with without_autocast(hidden.device):
                    return token_chunks.weighted_sum(*parts, *of_tokens, with_statistics=with_statistics)
        total = coefficients.total is not None
        rows = self._statistics(chunking, total=total, entropy=with_statistics, what="reduction='none' with a gradient")
        return reduction.reduced(combine(rows, coefficients), reduction_), rows if with_statistics else None

    def _needs(self) -> Needs:
        """Whose gradients autograd may ask for."""
        enabled = torch.is_grad_enabled()
        bias = self.head.bias
        return Needs(
            enabled and self.hidden.requires_grad,
            enabled and self.weight.requires_grad,
            enabled and bias is not None and bias.requires_grad,
        )

    def _chunked(self, chunking: Chunking, strategies: tuple[Strategy, ...]) -> tuple[Strategy, Lengths]:
        """What is chunked, and how."""
        share, ranks = self.vocabulary.share, self.vocabulary.ranks
        return lengths(self.hidden, share, chunking, ranks=ranks, strategies=strategies)


def linear_head(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    bias: Tensor | None,
    mask: Tensor | None,
    token_weights: Tensor | None = None,
    class_weights: Tensor | None = None,
    ignore_index: int,
    softcap: float | None,
    temperature: float,
    shift: int,
    vocab_shard: VocabShard | None,
) -> LinearHead:
    """Check, honour autocast (casting once, outside the chunk loop) and flatten."""
    checks.linear_weight(weight, bias)
    hidden, weight, bias, vocabulary = dtensor.head(hidden, weight, bias, vocab_shard)
    checks.head(hidden, weight, bias, vocabulary.size)
    labels, mask, token_weights = dtensor.tokens(labels, mask, token_weights, vocabulary)
    checks.tokens(labels, mask, token_weights, "hidden", hidden, weight)
    checks.class_weights(class_weights, vocabulary.size, hidden.device)
    softcap, temperature = checks.transform(softcap, temperature)
    hidden, weight = cast(hidden, weight)
    vocabulary.compare(labels)
    tokens = reduction.tokens(
        labels, mask, token_weights, ignore_index=ignore_index, shift=shift, vocab=vocabulary.size, dtype=hidden.dtype
    )
    head = transform(hidden, bias, vocabulary.own(class_weights), softcap, temperature)
    return LinearHead(hidden.reshape(-1, hidden.shape[-1]), weight, head, tokens, vocabulary)


def cast(hidden: Tensor, weight: Tensor, names: tuple[str, str] = ("hidden", "weight")) -> tuple[Tensor, Tensor]:
    """In the dtype of their product: autocast's where it is on, once and not once a chunk, else the one they share."""
    dtype = autocast_dtype(hidden.device)
    if dtype is not None:
        hidden, weight = (v if v.dtype == torch.float64 else v.to(dtype) for v in (hidden, weight))
    checks.same_dtype(hidden, weight, names)
    return hidden, weight


def transform(
    source: Tensor, bias: Tensor | None, class_weights: Tensor | None, softcap: float | None, temperature: float
) -> Head:
    """The engine's `Head`, its scalars as tensors of the statistics' dtype."""
    # Products with a number, not torch.full: of a number that changes from step to step Inductor makes an input only
    # where it meets a tensor in arithmetic, and recompiles for every value elsewhere.
    one = torch.ones((), dtype=statistics_dtype(source.dtype), device=source.device)
    return Head(
        bias,
        class_weights,
        None if softcap is None else one * softcap,
        None if numbers.known(temperature, 1) else one / temperature,
    )
