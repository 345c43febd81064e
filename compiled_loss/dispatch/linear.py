"""From a linear head's arguments to its loss: what every loss of `hidden`, `weight` and `labels` shares.

N tokens, H width, V vocabulary. `linear_call` goes one way: options, tensors as they came, the plan; then a rank's own,
tokens, the cast. Nothing is computed before the last check. The engine sees [N, H] and [N].
"""

from __future__ import annotations

from collections.abc import Callable
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
from compiled_loss.engine.math import row_losses
from compiled_loss.engine.math.bodies import transformed
from compiled_loss.engine.math.problem import Head, Problem
from compiled_loss.engine.math.row_losses import Named
from compiled_loss.engine.math.statistics import (
    Classes,
    Coefficients,
    Divisor,
    RowStatistics,
    Wanted,
    combine,
    masked,
    of_rows,
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
    inverse_temperature: Tensor | None  # [...]
    tokens: reduction.Tokens
    vocabulary: Vocabulary
    keywords: Keywords
    needs: Needs
    strategy: Strategy
    lengths: Lengths
    token_loss: Named | None  # the user's own, where it has a name

    def loss(self) -> Tensor:
        """The loss."""
        return self._loss_and_rows(with_statistics=False, with_entropy=False)[0]

    def loss_and_statistics(self, *, entropy: bool = True) -> tuple[Tensor, RowStatistics]:
        """The loss, and masked statistics [...] from the same pass."""
        loss, rows = self._loss_and_rows(with_statistics=True, with_entropy=entropy)
        assert rows is not None
        return loss, rows

    def statistics(self, wanted: Wanted) -> RowStatistics:
        """Masked statistics [...], differentiable."""
        compact = reduction.compacted(self.tokens.active, self.keywords.chunking)
        rows = self._gathered(compact)._statistics(wanted)
        return self._back(rows, compact, self._factor(compact, rows.nll))

    def _loss_and_rows(self, *, with_statistics: bool, with_entropy: bool) -> tuple[Tensor, RowStatistics | None]:
        keywords, dtype = self.keywords, statistics_dtype(self.hidden.dtype)
        terms = reduction.Terms(keywords.class_weights, keywords.label_smoothing, keywords.z_loss)
        coefficients, divisor = reduction.normalised(
            self.tokens, terms, keywords.reduction, keywords.num_label_tokens, dtype
        )
        coefficients = coefficients.map(lambda c: c.reshape(-1))
        compact = reduction.compacted(self.tokens.active, keywords.chunking)
        if compact is not None:
            coefficients = coefficients.map(compact.gathered)
        loss, rows = self._gathered(compact)._loss(
            coefficients, divisor, with_statistics=with_statistics, with_entropy=with_entropy
        )
        factor = self._factor(compact, loss)
        if keywords.reduction == "none":
            loss = (loss if compact is None else compact.scattered(loss)).reshape(self.tokens.labels.shape)
        return (
            loss if factor is None else loss * factor,
            None if rows is None else self._back(rows, compact, factor),
        )

    def _gathered(self, compact: Compaction | None) -> LinearCall:
        """Of the tokens that count, [N]."""
        inverse = self.inverse_temperature
        inverse = None if inverse is None else inverse.reshape(-1)
        flat = self._replace(tokens=self.tokens.map(lambda v: v.reshape(-1)), inverse_temperature=inverse)
        if compact is not None:
            inverse = None if inverse is None else compact.gathered(inverse)
            flat = flat._replace(
                hidden=compact.gathered(self.hidden), tokens=flat.tokens.gathered(compact), inverse_temperature=inverse
            )
        if self.keywords.inputs:
            flat = flat._replace(keywords=self.keywords._replace(inputs=self._inputs(compact)))
        return flat

    def _inputs(self, compact: Compaction | None) -> tuple[Tensor, ...]:
        """Those of the user's loss: [N, ...], or numbers, []."""
        dims, dtype = self.tokens.labels.dim(), statistics_dtype(self.hidden.dtype)
        found = []
        for value in self.keywords.inputs:
            if isinstance(value, Tensor) and value.dim():
                rows = value.reshape(-1, *value.shape[dims:])
                found.append(rows if compact is None else compact.gathered(rows))
            else:  # a product, not torch.full: keywords.py, `scales`
                found.append(torch.ones((), dtype=dtype, device=self.hidden.device) * value)
        return tuple(found)

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
        problem = Problem.of(self.hidden, self.weight, self.head, labels, self.inverse_temperature)
        return problem, self.tokens.classes.counted_from(start)

    def _statistics(self, wanted: Wanted) -> RowStatistics:
        """Masked statistics of all rows that there are, [N]."""
        (problem, classes), active = self._engine(), self.tokens.active
        if traced():
            hidden = torch.where(active.unsqueeze(1), self.hidden, 0.0)
            logits = hidden @ self.weight.t()
            inverse = self.inverse_temperature
            rows = logits_pass.plain_statistics(logits, problem.labels, self.head, inverse, wanted)
        else:
            asked = token_chunks.Asked(*wanted, self.vocabulary.group)
            with without_autocast(self.hidden.device):
                if self.strategy == "vocab":
                    rows = vocab_chunks.statistics(problem, classes, asked, self.lengths)
                else:
                    rows = token_chunks.statistics(problem, asked, self.lengths)
        return masked(rows, active)

    def _loss(
        self, coefficients: Coefficients, divisor: Divisor, *, with_statistics: bool, with_entropy: bool
    ) -> tuple[Tensor, RowStatistics | None]:
        """The loss of coefficients [N], and if wanted masked statistics [N], of all rows that there are."""
        (problem, classes), group = self._engine(), self.vocabulary.group
        scalar, own = self.keywords.reduction != "none", self.keywords.token_loss
        if ((scalar and any(self.needs)) or self.keywords.of_logits) and not traced():
            with without_autocast(self.hidden.device):
                if self.strategy == "tokens":
                    return token_chunks.summed(
                        problem,
                        classes,
                        *self._row_loss(coefficients),
                        divisor,
                        self.needs,
                        self.lengths,
                        group,
                        with_statistics=with_statistics,
                        with_entropy=with_entropy,
                    )
                if own is None:
                    return vocab_chunks.weighted_sum(
                        problem,
                        classes,
                        coefficients,
                        divisor,
                        self.lengths,
                        group,
                        with_statistics=with_statistics,
                    )
        if self.keywords.of_logits:
            return self._plain_logits_loss(coefficients, divisor), None
        wanted = Wanted(total=coefficients.total is not None, entropy=with_entropy)
        if own is not None:
            every = Wanted(*(True,) * len(Wanted._fields))
            wanted = wanted.union(every if self.token_loss is None else row_losses.uses(self.token_loss))
        rows = self._statistics(wanted)
        if own is None:
            losses = combine(rows, coefficients, problem.labels, classes)
        else:
            losses = self._evaluated(own, rows, coefficients.label_weight(problem.labels, classes, rows.nll.dtype))
        if scalar:
            (losses,) = divisor.divide(self.tokens.active, losses.sum())
        return losses, rows if with_statistics else None

    def _plain_logits_loss(self, coefficients: Coefficients, divisor: Divisor) -> Tensor:
        """A loss of logits under functorch's transforms, which holds them."""
        (problem, classes), own = self._engine(), self.keywords.token_loss
        assert own is not None
        logits = torch.where(self.tokens.active.unsqueeze(1), self.hidden, 0.0) @ self.weight.t()
        z, _ = transformed(logits, self.head, self.inverse_temperature)
        with without_autocast(self.hidden.device):
            losses = own(z, *self._clean_inputs())
        checks.functions.result("logits_loss", losses, z.shape[:1])
        active, weight = self.tokens.active, coefficients.label_weight(problem.labels, classes, z.dtype)
        losses = torch.where(active, losses.to(z.dtype), 0.0) * weight
        (total,) = divisor.divide(active, losses.sum())
        return total

    def _clean_inputs(self) -> list[Tensor]:
        """The inputs of the user's loss, 0 where a token does not count."""
        active = self.tokens.active
        return [
            torch.where(active.view(-1, *[1] * (v.dim() - 1)), v, 0.0) if v.dim() and v.is_floating_point() else v
            for v in self.keywords.inputs
        ]

    def _row_loss(self, coefficients: Coefficients) -> tuple[Named, token_chunks.Inputs]:
        """What the token strategy sums, and its operands."""
        if self.keywords.token_loss is None:
            of = row_losses.cross_entropy(coefficients, gradients=torch.is_grad_enabled())
            return of, token_chunks.Inputs([], coefficients.present())
        assert self.token_loss is not None
        numbers = [v for v in self.keywords.inputs if not v.dim()]
        return self.token_loss, token_chunks.Inputs(
            numbers, [*coefficients.present(), *[v for v in self.keywords.inputs if v.dim()]]
        )

    def _evaluated(self, own: Callable[..., Tensor], rows: RowStatistics, weight: Tensor) -> Tensor:
        """The user's loss of all rows, [N], 0 for those that do not count, whose inputs may hold anything."""
        active, inputs = self.tokens.active, self._clean_inputs()
        statistics = of_rows(rows, self.tokens.labels, self.vocabulary.size)
        with without_autocast(self.hidden.device):
            losses = own(statistics, *inputs)
        checks.functions.result("token_loss", losses, rows.nll.shape)
        return torch.where(active, losses.to(weight.dtype), 0.0) * weight


def linear_call(
    hidden: Tensor, weight: Tensor, labels: Tensor | None, keywords: Keywords, *, statistics: bool = False
) -> LinearCall:
    """Check, plan, take a rank's own, and cast: once, outside the chunk loop. Then ask it for what is wanted.

    `statistics` says that they are to be differentiable. Without labels every token has one, the first class.
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
    """As `check_head`, and of the hidden states a rank has; raise unless labels fit them."""
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


def _strategies(
    keywords: Keywords, needs: Needs, *, statistics: bool, token_loss: Named | None
) -> tuple[Strategy, ...]:
    """Those that can do what is asked, the best first."""
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
