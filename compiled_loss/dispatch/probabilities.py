"""Cross-entropy of logits whose target is a probability of each class.

N positions (any leading shape), V vocabulary. Losses are in nats.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad

from compiled_loss import checks, reduction
from compiled_loss.checks import numbers
from compiled_loss.dispatch.layout import classes_last, merged
from compiled_loss.dispatch.linear import transform
from compiled_loss.distributed import dtensor
from compiled_loss.distributed.vocab_shard import VocabShard
from compiled_loss.engine import probability_logits
from compiled_loss.engine.transforms import traced, without_autocast


def probability_cross_entropy(
    logits: Tensor,  # [..., V]
    probabilities: Tensor,  # [..., V]
    *,
    mask: Tensor | None,
    token_weights: Tensor | None,
    class_weights: Tensor | None,  # [V]
    ignore_index: int,
    label_smoothing: float,
    z_loss: float,
    softcap: float | None,
    temperature: float,
    shift: int,
    reduction_: str,
    num_label_tokens: int | Tensor | None,
    class_dim: int,
    vocab_shard: VocabShard | None,
    compile: bool | str,
) -> Tensor:
    """What `cross_entropy` gives of floating labels: sum_v c_v ((1 - e) p_v + e / V) (lse - z_v) at each position."""
    checks.targets.no_ignore_index(ignore_index)
    logits = classes_last("logits", logits, class_dim)
    probabilities = classes_last("labels", probabilities, class_dim)
    logits, vocabulary = dtensor.logits("logits", logits, vocab_shard)
    checks.logits(logits, vocabulary.size)
    probabilities = dtensor.beside("labels", probabilities, "logits", vocabulary, -1)
    checks.targets.same_logits("labels", probabilities, "logits", logits)
    positions = torch.zeros(logits.shape[:-1], dtype=torch.int64, device=logits.device)  # all of them count
    _, mask, token_weights = dtensor.tokens(positions, mask, token_weights, vocabulary)
    checks.weights(positions, mask, token_weights)
    checks.sharding.spread(reduction_, vocabulary.spread)
    class_weights = dtensor.whole(class_weights)
    checks.class_weights(class_weights, vocabulary.size, logits.device)
    softcap, temperature = checks.transform(softcap, temperature)
    label_smoothing, z_loss = checks.terms(label_smoothing, z_loss)
    checks.reduction(reduction_)
    num_label_tokens = checks.count(dtensor.whole(num_label_tokens), reduction_, logits.device)
    _, weight, active, _ = reduction.tokens(
        positions, mask, token_weights, ignore_index=-100, shift=shift, vocab=None, dtype=logits.dtype
    )
    compared = weight.detach()
    vocabulary.compare(compared)

    head = transform(logits, None, vocabulary.own(class_weights), softcap, temperature)
    smoothing = None
    if not numbers.known(label_smoothing, 0):
        one = torch.ones((), dtype=weight.dtype, device=weight.device)  # products with a number: see `transform`
        smoothing = torch.stack([one * (1 - label_smoothing), one * (label_smoothing / vocabulary.size)])
    shift = min(shift, logits.shape[-2]) if shift else 0
    if shift:
        logits, probabilities = logits[..., : logits.shape[-2] - shift, :], probabilities[..., shift:, :]
    shape = logits.shape[:-1]
    if traced():
        counts = active[..., : shape[-1]].unsqueeze(-1) if shape else active.unsqueeze(-1)
        logits, probabilities = torch.where(counts, logits, 0.0), torch.where(counts, probabilities, 0.0)
        loss, lse = probability_logits.plain_statistics(logits, probabilities, smoothing, head)
    else:
        with without_autocast(logits.device):
            source, target = merged(logits, probabilities)
            loss, lse = probability_logits.statistics(source, target, smoothing, head, vocabulary.group, compile)
    loss, lse = loss.reshape(shape), lse.reshape(shape)
    if shift:
        loss, lse = pad(loss, (0, shift)), pad(lse, (0, shift))
    loss, lse = torch.where(active, loss, 0.0), torch.where(active, lse, 0.0)
    rows = loss if numbers.known(z_loss, 0) else loss + z_loss * lse.square()
    losses = reduction.divided(weight, weight, reduction_, num_label_tokens) * rows
    total = reduction.reduced(losses, reduction_)
    return vocabulary.agreed(total, compared, total)
