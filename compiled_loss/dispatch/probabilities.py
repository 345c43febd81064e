"""Cross-entropy of logits whose target is a probability of each class.

N positions (any leading shape), V vocabulary. Losses are in nats. Nothing is computed before the last check.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad

from compiled_loss import checks, reduction
from compiled_loss.checks import numbers
from compiled_loss.dispatch.keywords import Keywords
from compiled_loss.dispatch.layout import check_class_dim, classes_last, merged
from compiled_loss.distributed import dtensor
from compiled_loss.engine import probability_logits
from compiled_loss.engine.math.statistics import statistics_dtype
from compiled_loss.engine.probability_logits import Given
from compiled_loss.engine.transforms import traced, without_autocast


def probability_cross_entropy(
    logits: Tensor,  # [..., V]
    probabilities: Tensor,  # [..., V]
    keywords: Keywords,
    class_dim: int,
) -> Tensor:
    """Returns the cross-entropy with floating labels: sum_v c_v ((1 - e) p_v + e / V) (lse - z_v) at each position."""
    checks.targets.no_ignore_index(keywords.ignore_index)
    keywords = keywords.checked()
    checks.temperatures.one(keywords.token_temperature, "labels are probabilities")
    dim = check_class_dim("logits", logits, class_dim)
    check_class_dim("labels", probabilities, class_dim)
    part = dtensor.logits_layout("logits", logits, dim, keywords.vocab_shard)
    checks.logits(logits, part.size)
    dtensor.check_beside("labels", probabilities, "logits", part, dim)
    own, expected = (dtensor.own_logits_shape(v, part, dim) for v in (probabilities, logits))
    checks.targets.same_logits("labels", probabilities, "logits", own, expected, logits.device)
    rows = dtensor.own_rows(logits, part, dim)
    keywords.check_tensors(rows, part, logits.device)
    logits, probabilities = (
        classes_last(name, dtensor.own(value), class_dim)
        for name, value in (("logits", logits), ("labels", probabilities))
    )
    positions = torch.zeros(rows, dtype=torch.int64, device=logits.device)  # all of them count
    _, keywords = keywords.own(positions, part)
    tokens = keywords._replace(ignore_index=-100).tokens(positions, None, logits.dtype)
    active, dtype = tokens.active, statistics_dtype(logits.dtype)
    weight = tokens.weights(dtype)
    compared = weight.detach()
    part.check_equal(compared)
    smoothing = None
    if not numbers.known(keywords.label_smoothing, 0):
        one = torch.ones((), dtype=dtype, device=logits.device)  # products with a number: see `keywords.scales`
        smoothing = torch.stack([one * (1 - keywords.label_smoothing), one * (keywords.label_smoothing / part.size)])
    shift = min(keywords.shift, logits.shape[-2]) if keywords.shift else 0
    if shift:
        logits, probabilities = logits[..., : logits.shape[-2] - shift, :], probabilities[..., shift:, :]
    shape, class_weights, scales = logits.shape[:-1], part.own(keywords.class_weights), keywords.scales(logits)
    if traced():
        counts = active[..., : shape[-1]].unsqueeze(-1) if shape else active.unsqueeze(-1)
        logits, probabilities = torch.where(counts, logits, 0.0), torch.where(counts, probabilities, 0.0)
        given = Given(logits, class_weights, scales, smoothing, probabilities)
        loss, lse = probability_logits.plain_statistics(given)
    else:
        with without_autocast(logits.device):
            source, target = merged(logits, probabilities)
            given = Given(source, class_weights, scales, smoothing, target)
            loss, lse = probability_logits.statistics(given, part.group, keywords.compile)
    loss, lse = loss.reshape(shape), lse.reshape(shape)
    if shift:
        loss, lse = pad(loss, (0, shift)), pad(lse, (0, shift))
    loss, lse = torch.where(active, loss, 0.0), torch.where(active, lse, 0.0)
    each = loss if numbers.known(keywords.z_loss, 0) else loss + keywords.z_loss * lse.square()
    losses = reduction.divided(weight, weight, keywords.reduction, keywords.num_label_tokens) * each
    total = losses if keywords.reduction == "none" else losses.sum()
    return part.nan_unless_equal(total, compared, total)
