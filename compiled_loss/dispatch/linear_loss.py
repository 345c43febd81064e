"""The loss and statistics of a linear head, from checked arguments: the choice of an engine, and its operands.

N tokens, H width, V vocabulary. The engine sees [N, H] and [N].
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from compiled_loss import checks, reduction
from compiled_loss.dispatch.keywords import Keywords
from compiled_loss.distributed.vocab_shard import Vocabulary
from compiled_loss.engine import logits as logits_pass
from compiled_loss.engine import token_chunks, token_statistics, vocab_chunks
from compiled_loss.engine.compaction import Compaction
from compiled_loss.engine.gradients import Needs
from compiled_loss.engine.math import row_losses
from compiled_loss.engine.math.bodies import transformed
from compiled_loss.engine.math.coefficients import Classes, Coefficients, Divisor, combine
from compiled_loss.engine.math.problem import Head, Problem
from compiled_loss.engine.math.row_losses import Named
from compiled_loss.engine.math.statistics import RowStatistics, Wanted, masked, of_rows, statistics_dtype
from compiled_loss.engine.top import Top
from compiled_loss.engine.top import top as top_of
from compiled_loss.engine.transforms import traced, without_autocast
from compiled_loss.planner.cost import Strategy
from compiled_loss.planner.plan import Lengths


class LinearCall(NamedTuple):
    """Checked arguments of this rank, cast: hidden [N, H], weight [V, H], the rest of the head, the tokens [...]."""

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
        """Returns the loss."""
        return self._loss_and_rows(with_statistics=False, with_entropy=False)[0]

    def loss_and_statistics(self, *, entropy: bool = True) -> tuple[Tensor, RowStatistics]:
        """Returns the loss, and masked statistics, [...], from the same pass."""
        loss, rows = self._loss_and_rows(with_statistics=True, with_entropy=entropy)
        assert rows is not None
        return loss, rows

    def statistics(self, wanted: Wanted) -> RowStatistics:
        """Returns masked statistics, [...], differentiable."""
        return self.statistics_and_top(wanted, 0)[0]

    def statistics_and_top(self, wanted: Wanted, k: int) -> tuple[RowStatistics, Top | None]:
        """Returns the statistics, and the k largest logits, [..., k], from the same pass; None for k = 0."""
        compact, shape = reduction.compacted(self.tokens.active, self.keywords.chunking), self.tokens.labels.shape
        rows, top = self._gathered(compact)._statistics(wanted, k)
        if top is not None:
            parts = top if compact is None else map(compact.scattered, top)
            top = Top(*[v.reshape(*shape, k) for v in parts])
        return self._back(rows, compact, self.factor(compact, rows.nll)), top

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
        factor = self.factor(compact, loss)
        if keywords.reduction == "none":
            loss = (loss if compact is None else compact.scattered(loss)).reshape(self.tokens.labels.shape)
        return (
            loss if factor is None else loss * factor,
            None if rows is None else self._back(rows, compact, factor),
        )

    def _gathered(self, compact: Compaction | None) -> LinearCall:
        """Returns the same call for the tokens that count, [N]."""
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
        """Returns the inputs of the user's loss: [N, ...], or numbers, []."""
        dims, dtype = self.tokens.labels.dim(), statistics_dtype(self.hidden.dtype)
        found = []
        for value in self.keywords.inputs:
            if isinstance(value, Tensor) and value.dim():
                rows = value.reshape(-1, *value.shape[dims:])
                found.append(rows if compact is None else compact.gathered(rows))
            else:  # a product, not torch.full: keywords.py, `scales`
                found.append(torch.ones((), dtype=dtype, device=self.hidden.device) * value)
        return tuple(found)

    def factor(self, compact: Compaction | None, after: Tensor) -> Tensor | None:
        """Returns a factor of all results; it is NaN where more tokens count than was promised, or ranks disagree."""
        factor = None if compact is None else compact.fits
        if self.vocabulary.group is not None:
            factor = after.new_ones(()) if factor is None else factor.to(after.dtype)
            factor = self.vocabulary.nan_unless_equal(factor, self.tokens.labels, after)
        return factor

    def _back(self, rows: RowStatistics, compact: Compaction | None, factor: Tensor | None) -> RowStatistics:
        """Returns the statistics of tokens [...] from those of the rows."""
        if compact is not None:
            rows = rows.map(compact.scattered)
        rows = rows.map(lambda v: v.reshape(self.tokens.labels.shape))
        if factor is not None:
            rows = rows.map(lambda v: v * factor.to(v.dtype) if v.is_floating_point() else v)
        return rows

    def _engine(self) -> tuple[Problem, Classes]:
        """Returns the engine's operands; labels are counted from the rank's first class."""
        labels, start = self.vocabulary.labels(self.tokens.labels), self.vocabulary.start
        problem = Problem.of(self.hidden, self.weight, self.head, labels, self.inverse_temperature)
        return problem, self.tokens.classes.counted_from(start)

    def _statistics(self, wanted: Wanted, k: int = 0) -> tuple[RowStatistics, Top | None]:
        """Returns masked statistics of all rows that there are, [N]."""
        (problem, classes), active = self._engine(), self.tokens.active
        if traced():
            hidden = torch.where(active.unsqueeze(1), self.hidden, 0.0)
            logits = hidden @ self.weight.t()
            inverse = self.inverse_temperature
            rows = logits_pass.plain_statistics(logits, problem.labels, self.head, inverse, wanted)
            top = top_of(logits.detach(), self.head.bias, problem.labels, None, k) if k else None
        else:
            asked = token_statistics.Asked(*wanted, self.vocabulary.group, k)
            with without_autocast(self.hidden.device):
                if self.strategy == "vocab":
                    rows, top = vocab_chunks.statistics(problem, classes, asked, self.lengths)
                else:
                    rows, top = token_statistics.statistics(problem, asked, self.lengths)
        return masked(rows, active), top

    def _loss(
        self, coefficients: Coefficients, divisor: Divisor, *, with_statistics: bool, with_entropy: bool
    ) -> tuple[Tensor, RowStatistics | None]:
        """Returns the loss of coefficients [N], and if wanted masked statistics [N], of all rows that there are."""
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
        rows, _ = self._statistics(wanted)
        if own is None:
            losses = combine(rows, coefficients, problem.labels, classes)
        else:
            losses = self._evaluated(own, rows, coefficients.label_weight(problem.labels, classes, rows.nll.dtype))
        if scalar:
            losses = divisor.divide(self.tokens.active, losses.sum())
        return losses, rows if with_statistics else None

    def _plain_logits_loss(self, coefficients: Coefficients, divisor: Divisor) -> Tensor:
        """Computes a loss of logits under functorch's transforms; it holds all logits."""
        (problem, classes), own = self._engine(), self.keywords.token_loss
        assert own is not None
        logits = torch.where(self.tokens.active.unsqueeze(1), self.hidden, 0.0) @ self.weight.t()
        z, _ = transformed(logits, self.head, self.inverse_temperature)
        with without_autocast(self.hidden.device):
            losses = own(z, *self._clean_inputs())
        checks.functions.result("logits_loss", losses, z.shape[:1])
        active, weight = self.tokens.active, coefficients.label_weight(problem.labels, classes, z.dtype)
        losses = torch.where(active, losses.to(z.dtype), 0.0) * weight
        total = divisor.divide(active, losses.sum())
        return total

    def _clean_inputs(self) -> list[Tensor]:
        """Returns the inputs of the user's loss, 0 where a token does not count."""
        active = self.tokens.active
        return [
            torch.where(active.view(-1, *[1] * (v.dim() - 1)), v, 0.0) if v.dim() and v.is_floating_point() else v
            for v in self.keywords.inputs
        ]

    def _row_loss(self, coefficients: Coefficients) -> tuple[Named, token_chunks.Inputs]:
        """Returns the `RowLoss` that the token strategy sums, and its operands."""
        if self.keywords.token_loss is None:
            of = row_losses.cross_entropy(coefficients, gradients=torch.is_grad_enabled())
            return of, token_chunks.Inputs([], coefficients.present())
        assert self.token_loss is not None
        numbers = [v for v in self.keywords.inputs if not v.dim()]
        return self.token_loss, token_chunks.Inputs(
            numbers, [*coefficients.present(), *[v for v in self.keywords.inputs if v.dim()]]
        )

    def _evaluated(self, own: Callable[..., Tensor], rows: RowStatistics, weight: Tensor) -> Tensor:
        """Returns the user's loss of all rows, [N], 0 for rows that do not count, whatever their inputs hold."""
        active, inputs = self.tokens.active, self._clean_inputs()
        statistics = of_rows(rows, self.tokens.labels, self.vocabulary.size)
        with without_autocast(self.hidden.device):
            losses = own(statistics, *inputs)
        checks.functions.result("token_loss", losses, rows.nll.shape)
        return torch.where(active, losses.to(weight.dtype), 0.0) * weight
