"""Dispatch from logits that exist already to row statistics, shared by all losses of them.

N tokens (any leading shape), V vocabulary. Nothing is computed before the last check.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from compiled_loss import checks, reduction
from compiled_loss.dispatch.keywords import Keywords
from compiled_loss.dispatch.layout import check_class_dim, classes_last, merged
from compiled_loss.distributed import dtensor
from compiled_loss.distributed.vocab_shard import Vocabulary
from compiled_loss.engine import logits as logits_pass
from compiled_loss.engine.logits import Given
from compiled_loss.engine.math.coefficients import combine
from compiled_loss.engine.math.problem import Head
from compiled_loss.engine.math.statistics import RowStatistics, Wanted, masked, statistics_dtype
from compiled_loss.engine.transforms import traced, without_autocast


class LogitsCall(NamedTuple):
    """Checked arguments of this rank: logits [..., V], the parameters of their transform, and the tokens [...]."""

    logits: Tensor
    scales: Tensor | None
    inverse_temperature: Tensor | None  # [...]
    tokens: reduction.Tokens
    vocabulary: Vocabulary
    keywords: Keywords

    def loss(self) -> Tensor:
        """Returns the loss."""
        keywords, tokens, dtype = self.keywords, self.tokens, statistics_dtype(self.logits.dtype)
        terms = reduction.Terms(keywords.class_weights, keywords.label_smoothing, keywords.z_loss)
        coefficients, divisor = reduction.normalised(
            tokens, terms, keywords.reduction, keywords.num_label_tokens, dtype
        )
        rows = self._statistics(Wanted(total=coefficients.total is not None))
        loss = combine(rows, coefficients, tokens.labels, tokens.classes)
        if keywords.reduction != "none":
            loss = divisor.divide(tokens.active, loss.sum())
        return self.vocabulary.nan_unless_equal(loss, tokens.labels, loss)

    def statistics(self, wanted: Wanted) -> RowStatistics:
        """Returns masked statistics, [...], differentiable; NaN where ranks have different labels."""
        rows = self._statistics(wanted)
        if self.vocabulary.group is None:
            return rows
        factor = self.vocabulary.nan_unless_equal(rows.nll.new_ones(()), self.tokens.labels, rows.nll)
        return rows.map(lambda v: v * factor if v.is_floating_point() else v)

    def _statistics(self, wanted: Wanted) -> RowStatistics:
        logits, tokens, vocabulary = self.logits, self.tokens, self.vocabulary
        own = vocabulary.labels(tokens.labels)
        class_weights = vocabulary.own(self.keywords.class_weights)
        if traced():
            logits = torch.where(tokens.active.unsqueeze(-1), logits, 0.0)
            head = Head(None, class_weights, self.scales)
            inverse = self.inverse_temperature
            rows = logits_pass.plain_statistics(logits, own, head, inverse, wanted)
        else:
            (source,) = merged(logits)
            rows_of, inverse = source.shape[:-1], self.inverse_temperature
            inverse = None if inverse is None else inverse.reshape(rows_of)
            given = Given(source, class_weights, self.scales, own.reshape(rows_of), inverse)
            classes = tokens.classes.counted_from(vocabulary.start)
            with without_autocast(logits.device):
                rows = logits_pass.statistics(given, classes, wanted, vocabulary.group, self.keywords.compile)
        return masked(rows.map(lambda v: v.reshape(tokens.labels.shape)), tokens.active)


def logits_call(logits: Tensor, labels: Tensor, keywords: Keywords, class_dim: int) -> LogitsCall:
    """Checks the arguments and takes this rank's own. Its result is then asked for a loss or for statistics."""
    keywords = keywords.checked()
    dim = check_class_dim("logits", logits, class_dim)
    part = dtensor.logits_layout("logits", logits, dim, keywords.vocab_shard)
    checks.logits(logits, part.size)
    checks.tensor("labels", labels)
    dtensor.check_rows("labels", labels)
    rows = dtensor.own_rows(logits, part, dim)
    checks.class_labels(dtensor.own_shape(labels, part), labels, "logits", rows, logits, class_dim)
    keywords.check_tensors(rows, part, logits.device)
    labels, keywords = keywords.own(labels, part)
    part.check_equal(labels)
    tokens = keywords.tokens(labels, part.size, logits.dtype)
    own = classes_last("logits", dtensor.own(logits), class_dim)
    inverse = keywords.inverse_temperature(tokens, logits.dtype)
    return LogitsCall(own, keywords.scales(own), inverse, tokens, part, keywords)
