"""Modules of losses of preferences and rewards."""

import dataclasses
from dataclasses import dataclass

from compiled_loss import checks
from compiled_loss.functional import kto, kto_evaluation, preference, preference_evaluation, reward
from compiled_loss.functional.preference_terms import Divergence, Kind
from compiled_loss.nn.base import Loss, loss_module
from compiled_loss.nn.heads import AnswersHeadOptions


@dataclass(kw_only=True, eq=False, repr=False)
class PreferenceOptions:
    """The keywords that preference losses of log-probabilities and of a head share."""

    kind: Kind = "sigmoid"
    """"sigmoid", "robust", "hinge", "ipo", "exo", "nca", "bco", "sppo", "apo_zero", "apo_down" or "orpo"."""
    beta: float = 0.1
    """Multiplies the scores of answers, > 0."""
    label_smoothing: float = 0.0
    """The probability that a label is wrong, for "sigmoid", "robust" and "exo"."""
    margin: float = 0.0
    """The margin by which the chosen answer is to win, >= 0."""
    length_normalised: bool = False
    """True if an answer's log-ratio is the mean over its tokens, instead of the sum."""
    f_divergence: Divergence = "reverse_kl"
    """"reverse_kl", "forward_kl", "js" or "alpha"."""
    alpha: float = 0.5
    """Parameter of the divergence "alpha"."""
    sft_coefficient: float = 0.0
    """Multiplies the chosen answers' negative log-likelihood, >= 0."""


class _Preference(PreferenceOptions, Loss):
    def __post_init__(self) -> None:
        names = [f.name for f in dataclasses.fields(PreferenceOptions)]
        preference_evaluation.checked_numbers(**{name: getattr(self, name) for name in names})


@dataclass(kw_only=True, eq=False, repr=False)
class KTOOptions:
    """The keywords that losses of single answers share."""

    kind: kto_evaluation.Kind = "kto"
    """"kto" or "apo_zero_unpaired"."""
    beta: float = 0.1
    """Multiplies the log-ratios of answers, > 0."""
    desirable_weight: float = 1.0
    """Multiplies the losses of desirable answers, >= 0."""
    undesirable_weight: float = 1.0
    """Multiplies the losses of undesirable answers, >= 0."""


class _KTO(KTOOptions, Loss):
    def __post_init__(self) -> None:
        names = [f.name for f in dataclasses.fields(KTOOptions)]
        kto_evaluation.checked_numbers(**{name: getattr(self, name) for name in names})


@dataclass(kw_only=True, eq=False, repr=False)
class BradleyTerryOptions:
    """The keywords that `BradleyTerryLoss` and its config keep."""

    center_coefficient: float = 0.0
    """Multiplies the squared sum of a pair's rewards, >= 0."""


@loss_module(preference.preference_loss)
@dataclass(kw_only=True, eq=False, repr=False)
class PreferenceLoss(_Preference):
    """:func:`compiled_loss.preference_loss` with its keywords kept.

    Example:
        >>> import torch
        >>> from compiled_loss import nn
        >>> simpo = nn.PreferenceLoss(beta=2.0, margin=0.5, length_normalised=True)
        >>> simpo(torch.tensor([[-1.0, -1.0], [-3.0, -3.0]])).loss
        tensor(0.0298)

    """


@loss_module(preference.linear_preference_loss)
@dataclass(kw_only=True, eq=False, repr=False)
class LinearPreferenceLoss(AnswersHeadOptions, _Preference):
    """:func:`compiled_loss.linear_preference_loss` with its keywords kept; both heads come with each call.

    Example:
        >>> import torch
        >>> from compiled_loss import nn
        >>> loss = nn.LinearPreferenceLoss(kind="hinge")
        >>> loss(torch.zeros(2, 1, 8), torch.zeros(4, 8), torch.tensor([[1], [2]])).loss
        tensor(1.)

    """


@loss_module(kto.kto_loss)
@dataclass(kw_only=True, eq=False, repr=False)
class KTOLoss(_KTO):
    """:func:`compiled_loss.kto_loss` with its keywords kept.

    Example:
        >>> import torch
        >>> from compiled_loss import nn
        >>> loss = nn.KTOLoss(desirable_weight=2.0)
        >>> loss(torch.zeros(2, 3), torch.tensor([True, False]), kl=torch.tensor(0.0)).loss
        tensor(0.7500)

    """


@loss_module(kto.linear_kto_loss)
@dataclass(kw_only=True, eq=False, repr=False)
class LinearKTOLoss(AnswersHeadOptions, _KTO):
    """:func:`compiled_loss.linear_kto_loss` with its keywords kept; both heads come with each call.

    Example:
        >>> import torch
        >>> from compiled_loss import nn
        >>> loss = nn.LinearKTOLoss(kind="apo_zero_unpaired", beta=1.0)
        >>> loss(torch.zeros(1, 1, 8), torch.zeros(4, 8), torch.tensor([[1]]), torch.tensor([True])).loss
        tensor(0.8000)

    """


@loss_module(reward.bradley_terry_loss)
@dataclass(kw_only=True, eq=False, repr=False)
class BradleyTerryLoss(BradleyTerryOptions, Loss):
    """:func:`compiled_loss.bradley_terry_loss` with its keywords kept.

    Example:
        >>> import torch
        >>> from compiled_loss import nn
        >>> nn.BradleyTerryLoss(center_coefficient=0.1)(torch.tensor([2.0]), torch.tensor([1.0])).loss
        tensor(1.2133)

    """

    def __post_init__(self) -> None:
        checks.policy.at_least_zero("center_coefficient", self.center_coefficient)
