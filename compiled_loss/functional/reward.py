"""The loss of a reward model. P pairs of answers, all [P]."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from compiled_loss import checks
from compiled_loss.engine.math.statistics import statistics_dtype
from compiled_loss.functional.preference_evaluation import mean, total


class RewardMetrics(NamedTuple):
    """Metrics for logging: means over a rank's pairs. Each is [], detached.

    `reward_chosen`, `reward_rejected`: of the answers.
    `reward_margin`: their difference.
    `accuracy`: the fraction of pairs whose chosen answer has the greater reward.
    """

    reward_chosen: Tensor
    reward_rejected: Tensor
    reward_margin: Tensor
    accuracy: Tensor


class RewardLoss(NamedTuple):
    """The result of a reward model's loss.

    `loss`: a scalar.
    `metrics`: what to log.
    """

    loss: Tensor
    metrics: RewardMetrics


def bradley_terry_loss(
    chosen_rewards: Tensor,  # [P]
    rejected_rewards: Tensor,  # [P]
    *,
    mask: Tensor | None = None,  # [P]
    pair_margins: Tensor | None = None,  # [P]
    center_coefficient: float = 0.0,
    pair_weights: Tensor | None = None,  # [P]
) -> RewardLoss:
    r"""Computes the negative log-likelihood of preferences under the Bradley-Terry model.

    A pair's loss is -log sigmoid(c - r - margin) + center_coefficient (c + r)^2, of the rewards c and r of its chosen
    and of its rejected answer. The second term keeps rewards near 0, which the first leaves open.

    Args:
        chosen_rewards: of the chosen answers [P], floating.
        rejected_rewards: of the rejected answers [P], floating.
        mask: which pairs count; broadcasts to `chosen_rewards`; bool, or numbers of which 0 does not count.
        pair_margins: by how much a chosen answer is better [P], as in Llama 2.
        center_coefficient: >= 0.
        pair_weights: how much each pair weighs [P]. Unless given, the loss is the mean over pairs.

    Returns:
        :class:`RewardLoss`, fp32 (fp64 for fp64 inputs). All are tensors: nothing waits for a device.

    Memory:
        A few [P].

    Raises:
        ValueError: a shape, device or number is wrong.
        TypeError: a dtype is wrong.

    Source:
        Bradley & Terry, 1952, doi:10.2307/2334029; Touvron et al., 2023, arXiv:2307.09288 (margin); Eisenstein et al.,
        2023, arXiv:2312.09244 (centre).

    Example:
        >>> import torch
        >>> from compiled_loss import bradley_terry_loss
        >>> chosen, rejected = torch.tensor([1.0, 0.5], requires_grad=True), torch.tensor([-1.0, 1.0])
        >>> found = bradley_terry_loss(chosen, rejected)
        >>> found.loss.backward()
        >>> found.loss.detach(), chosen.grad, found.metrics.accuracy
        (tensor(0.5505), tensor([-0.0596, -0.3112]), tensor(0.5000))

    """
    checks.preference.rewards(chosen_rewards, rejected_rewards)
    pairs, device = chosen_rewards.shape[0], chosen_rewards.device
    checks.preference.of_each("pair_margins", pair_margins, pairs, "pair", device)
    checks.preference.of_each("pair_weights", pair_weights, pairs, "pair", device)
    coefficient = checks.policy.at_least_zero("center_coefficient", center_coefficient)
    mask = checks.policy.broadcast("mask", mask, chosen_rewards.shape, device)
    dtype = statistics_dtype(torch.promote_types(chosen_rewards.dtype, rejected_rewards.dtype))
    there = torch.ones_like(chosen_rewards, dtype=torch.bool) if mask is None else mask != 0
    chosen, rejected = (torch.where(there, v.to(dtype), 0.0) for v in (chosen_rewards, rejected_rewards))
    differences = chosen - rejected
    logits = differences if pair_margins is None else differences - torch.where(there, pair_margins.to(dtype), 0.0)
    losses = -logsigmoid(logits) + coefficient * (chosen + rejected).square()
    metrics = RewardMetrics(
        mean(chosen, there),
        mean(rejected, there),
        mean(differences, there),
        mean((differences > 0).to(dtype), there),
    )
    return RewardLoss(total(losses, there, pair_weights), metrics)
