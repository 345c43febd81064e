"""The terms of preference losses: scores of answers, and losses of a pair's two scores. P pairs; all is [P].

A loss compares scores. A score is the answer's log-ratio to the reference, or a divergence's function of it.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Literal, NamedTuple, get_args

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

Kind = Literal["sigmoid", "robust", "hinge", "ipo", "exo", "nca", "bco", "sppo", "apo_zero", "apo_down", "orpo"]
Divergence = Literal["reverse_kl", "forward_kl", "js", "alpha"]
KINDS, DIVERGENCES = get_args(Kind), get_args(Divergence)
MARGINED = ("sigmoid", "robust", "hinge", "exo")  # losses of beta (score difference) - margin
SMOOTHED = ("sigmoid", "robust", "exo")
SCORED = (*MARGINED, "ipo")  # losses that a divergence defines
LARGEST_EXPONENT = 80.0  # exp is finite in fp32


class Numbers(NamedTuple):
    """The options that are numbers. A number is not used by a kind that does not have it."""

    beta: Any
    label_smoothing: Any
    margin: Any
    alpha: Any
    sft_coefficient: Any


def scores(divergence: str, log_ratios: Tensor, alpha: Any) -> Tensor:
    """Returns f'(exp(log_ratios)) of the divergence's f, without a constant that cancels between two answers."""
    if divergence == "reverse_kl":
        return log_ratios
    if divergence == "js":
        return math.log(2) + logsigmoid(log_ratios)
    if divergence == "forward_kl":
        return -(-log_ratios).clamp(max=LARGEST_EXPONENT).expm1()
    power = torch.ones((), dtype=log_ratios.dtype, device=log_ratios.device) * alpha - 1
    powers = (power * log_ratios).clamp(max=LARGEST_EXPONENT).expm1() / torch.where(power == 0, 1.0, power)
    return torch.where(power == 0, log_ratios, powers)  # the limit


def pair_losses(kind: str, chosen: Tensor, rejected: Tensor, margins: Tensor, by: Numbers) -> Tensor:
    """Returns the loss of each pair, given its two scores."""
    logits = by.beta * (chosen - rejected) - margins
    return _LOSSES[kind](_Pairs(chosen, rejected, logits, by.beta, by.label_smoothing))


class _Pairs(NamedTuple):
    chosen: Tensor  # [P] each
    rejected: Tensor
    logits: Tensor
    beta: Tensor  # [] each
    smoothing: Tensor


def _sigmoid(p: _Pairs) -> Tensor:
    return -(1 - p.smoothing) * logsigmoid(p.logits) - p.smoothing * logsigmoid(-p.logits)


def _robust(p: _Pairs) -> Tensor:
    right, wrong = (1 - p.smoothing) * logsigmoid(p.logits), p.smoothing * logsigmoid(-p.logits)
    return (wrong - right) / (1 - 2 * p.smoothing)


def _hinge(p: _Pairs) -> Tensor:
    return (1 - p.logits).relu()


def _ipo(p: _Pairs) -> Tensor:
    return (p.chosen - p.rejected - 1 / (2 * p.beta)).square()


def _exo(p: _Pairs) -> Tensor:
    right = p.logits.sigmoid() * (logsigmoid(p.logits) - (-p.smoothing).log1p())
    return right + (-p.logits).sigmoid() * (logsigmoid(-p.logits) - p.smoothing.log())


def _nca(p: _Pairs) -> Tensor:
    chosen, rejected = p.beta * p.chosen, p.beta * p.rejected
    return -logsigmoid(chosen) - (logsigmoid(-chosen) + logsigmoid(-rejected)) / 2


def _bco(p: _Pairs) -> Tensor:
    return -logsigmoid(p.beta * p.chosen) - logsigmoid(-p.beta * p.rejected)


def _sppo(p: _Pairs) -> Tensor:
    return (p.chosen - 1 / (2 * p.beta)).square() + (p.rejected + 1 / (2 * p.beta)).square()


def _apo_zero(p: _Pairs) -> Tensor:
    return (-p.beta * p.chosen).sigmoid() + (p.beta * p.rejected).sigmoid()


def _apo_down(p: _Pairs) -> Tensor:
    return (p.beta * p.chosen).sigmoid() + (p.beta * (p.rejected - p.chosen)).sigmoid()


def _orpo(p: _Pairs) -> Tensor:
    return -p.beta * logsigmoid(_log_odds(p.chosen) - _log_odds(p.rejected))


def _log_odds(logprob: Tensor) -> Tensor:
    """Returns log(p / (1 - p)), given log p <= 0."""
    logprob = logprob.clamp(max=-torch.finfo(logprob.dtype).tiny)  # an answer of no tokens has 0
    near_one = logprob > -math.log(2)
    # Each branch gets arguments that it can take: otherwise the gradient of the branch not taken would be NaN.
    above = (-torch.where(near_one, logprob, -1.0).expm1()).log()
    below = (-torch.where(near_one, -1.0, logprob).exp()).log1p()
    return logprob - torch.where(near_one, above, below)


_LOSSES: dict[str, Callable[[_Pairs], Tensor]] = {
    "sigmoid": _sigmoid,
    "robust": _robust,
    "hinge": _hinge,
    "ipo": _ipo,
    "exo": _exo,
    "nca": _nca,
    "bco": _bco,
    "sppo": _sppo,
    "apo_zero": _apo_zero,
    "apo_down": _apo_down,
    "orpo": _orpo,
}
