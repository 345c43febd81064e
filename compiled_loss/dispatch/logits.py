"""From the arguments of logits that exist to row statistics: what all losses of them share.

N tokens (any leading shape), V vocabulary.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from compiled_loss import checks, reduction
from compiled_loss.dispatch.layout import classes_last, merged
from compiled_loss.dispatch.linear import transform
from compiled_loss.distributed import dtensor
from compiled_loss.distributed.vocab_shard import VocabShard, Vocabulary
from compiled_loss.engine import logits as logits_walk
from compiled_loss.engine.math.bodies import Head
from compiled_loss.engine.math.statistics import RowStatistics, masked
from compiled_loss.engine.transforms import traced, without_autocast


class Logits(NamedTuple):
    """Checked arguments, a rank's own: [..., V], the head, the tokens [...]."""

    logits: Tensor
    head: Head
    tokens: reduction.Tokens
    vocabulary: Vocabulary
    class_weights: Tensor | None  # [V], of all ranks
    labels: Tensor  # as they came: what ranks compare

    def statistics(self, *, total: bool, entropy: bool, compile: bool | str) -> RowStatistics:
        """Masked statistics [...], differentiable."""
        logits, head, tokens, vocabulary, *_ = self
        own = vocabulary.labels(tokens.looked_at)
        if traced():
            logits = torch.where(tokens.active.unsqueeze(-1), logits, 0.0)
            rows = logits_walk.plain_statistics(logits, own, head, total=total, entropy=entropy)
        else:
            (source,) = merged(logits)
            with without_autocast(logits.device):
                own = own.reshape(source.shape[:-1])
                rows = logits_walk.statistics(
                    source, own, head, vocabulary.group, total=total, entropy=entropy, compile=compile
                )
        return masked(rows.map(lambda v: v.reshape(tokens.labels.shape)), tokens.active)

    def agreed(self, value: Tensor, after: Tensor) -> Tensor:
        """The value, NaN where ranks of one vocabulary have other labels."""
        return self.vocabulary.agreed(value, self.labels, after)

    def agreed_statistics(self, rows: RowStatistics) -> RowStatistics:
        """The statistics, NaN where ranks have other labels."""
        if self.vocabulary.group is None:
            return rows
        factor = self.agreed(rows.nll.new_ones(()), rows.nll)
        return rows.map(lambda v: v * factor if v.is_floating_point() else v)


def given_logits(
    logits: Tensor,
    labels: Tensor,
    *,
    mask: Tensor | None,
    token_weights: Tensor | None = None,
    class_weights: Tensor | None = None,
    ignore_index: int,
    softcap: float | None,
    temperature: float,
    shift: int,
    class_dim: int,
    vocab_shard: VocabShard | None,
) -> Logits:
    """Check, and take a rank's own."""
    given = logits
    logits = classes_last("logits", logits, class_dim)
    logits, vocabulary = dtensor.logits("logits", logits, vocab_shard)
    checks.logits(logits, vocabulary.size)
    labels, mask, token_weights = dtensor.tokens(labels, mask, token_weights, vocabulary)
    checks.class_labels(labels, "logits", logits, given, class_dim)
    checks.weights(labels, mask, token_weights)
    class_weights = dtensor.whole(class_weights)
    checks.class_weights(class_weights, vocabulary.size, logits.device)
    softcap, temperature = checks.transform(softcap, temperature)
    vocabulary.compare(labels)
    tokens = reduction.tokens(
        labels, mask, token_weights, ignore_index=ignore_index, shift=shift, vocab=vocabulary.size, dtype=logits.dtype
    )
    head = transform(logits, None, vocabulary.own(class_weights), softcap, temperature)
    return Logits(logits, head, tokens, vocabulary, class_weights, labels)
