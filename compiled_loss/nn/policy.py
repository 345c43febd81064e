"""Modules of policy losses."""

import dataclasses
from dataclasses import dataclass

from compiled_loss.functional.policy import KL, Importance, Kind, linear_policy_loss, policy_loss
from compiled_loss.functional.policy_evaluation import checked_numbers
from compiled_loss.nn.base import Loss, loss_module
from compiled_loss.nn.heads import HeadOptions


@dataclass(kw_only=True, eq=False, repr=False)
class PolicyOptions:
    """The keywords that policy losses of log-probabilities and of a head share."""

    kind: Kind = "clip"
    """"clip", "cispo", "cispo_two_sided", "sapo", "gmpo" or "reinforce"."""
    importance: Importance = "token"
    """"token" or "sequence"."""
    clip_low: float = 0.2
    """The distance of the ratio's lower bound from 1, >= 0."""
    clip_high: float = 0.2
    """The distance of the ratio's upper bound from 1, >= 0; for "cispo" the bound itself."""
    dual_clip: float | None = None
    """Bounds the loss of tokens with a negative advantage, > 1; None for none."""
    temperature_positive: float = 1.0
    """Temperature of "sapo" where the advantage is positive, > 0."""
    temperature_negative: float = 1.05
    """Temperature of "sapo" where it is not, > 0."""
    kl: KL = "k3"
    """"k1", "k2", "k3", "k1_straight_through" or "k3_straight_through"."""
    kl_coefficient: float = 0.0
    """Multiplies the estimate of the KL to the reference, >= 0."""
    entropy_coefficient: float = 0.0
    """Multiplies the entropy, which is subtracted, >= 0."""


class _Policy(PolicyOptions, Loss):
    def __post_init__(self) -> None:
        checked_numbers(**{f.name: getattr(self, f.name) for f in dataclasses.fields(PolicyOptions)})


@loss_module(policy_loss)
@dataclass(kw_only=True, eq=False, repr=False)
class PolicyLoss(_Policy):
    """:func:`compiled_loss.policy_loss` with its keywords kept.

    Example:
        >>> import torch
        >>> from compiled_loss import nn
        >>> loss = nn.PolicyLoss(clip_high=0.28)
        >>> loss(torch.tensor([-0.5, -1.0]), torch.tensor([-0.5, -1.5]), torch.tensor([1.0, 1.0])).loss
        tensor(-1.1400)

    """


@loss_module(linear_policy_loss)
@dataclass(kw_only=True, eq=False, repr=False)
class LinearPolicyLoss(HeadOptions, _Policy):
    """:func:`compiled_loss.linear_policy_loss` with its keywords kept; weight and bias come with each call.

    Example:
        >>> import torch
        >>> from compiled_loss import nn
        >>> loss = nn.LinearPolicyLoss(kind="reinforce")
        >>> loss(torch.zeros(1, 8), torch.zeros(4, 8), torch.tensor([1]), torch.zeros(1), torch.ones(1)).loss
        tensor(1.3863)

    """
