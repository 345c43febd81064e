"""Losses of preferences and rewards, one pair or answer after another."""

from __future__ import annotations

import torch
from torch import Tensor


def preference_loss(
    logprob: Tensor,  # [2 P, S]
    *,
    reference_logprob: Tensor | None = None,  # [2 P, S]
    mask: Tensor | None = None,
    kind: str = "sigmoid",
    beta: float = 0.1,
    label_smoothing: float = 0.0,
    margin: float = 0.0,
    pair_margins: Tensor | None = None,
    length_normalised: bool = False,
    f_divergence: str = "reverse_kl",
    alpha: float = 0.5,
    sft_coefficient: float = 0.0,
    num_chosen_tokens: int | None = None,
    pair_weights: Tensor | None = None,
) -> Tensor:
    """Computes the loss of :class:`compiled_loss.PreferenceLoss`."""
    valid = _valid(logprob, mask)
    losses, likelihoods, tokens = [], [], 0
    pairs = len(logprob) // 2
    for i in range(pairs):
        lengths = [int(valid[j].sum()) for j in (i, pairs + i)]
        if not sum(lengths):
            continue
        ratios = []
        for j, length in zip((i, pairs + i), lengths, strict=True):
            ratio = _log_ratio(logprob, reference_logprob, valid, j)
            ratios.append(ratio / max(length, 1) if length_normalised else ratio)
        c, r = (_score(f_divergence, ratio, alpha) for ratio in ratios)
        shift = margin if pair_margins is None else margin + pair_margins[i]
        loss = _of_pair(kind, c, r, beta, label_smoothing, shift)
        losses.append(loss if pair_weights is None else pair_weights[i] * loss)
        likelihoods.append(logprob[i][valid[i]].sum())
        tokens += lengths[0]
    zero = torch.zeros((), dtype=logprob.dtype)
    number = max(len(losses), 1) if pair_weights is None else 1
    divisor = max(tokens if num_chosen_tokens is None else num_chosen_tokens, 1)
    return sum(losses, zero) / number - sft_coefficient * sum(likelihoods, zero) / divisor


def kto_loss(
    logprob: Tensor,  # [B, S]
    desirable: Tensor,  # [B]
    *,
    reference_logprob: Tensor | None = None,  # [B, S]
    kl: Tensor | None = None,
    mask: Tensor | None = None,
    kind: str = "kto",
    beta: float = 0.1,
    desirable_weight: float = 1.0,
    undesirable_weight: float = 1.0,
    sequence_weights: Tensor | None = None,
) -> Tensor:
    """Computes the loss of :class:`compiled_loss.KTOLoss`."""
    valid, losses = _valid(logprob, mask), []
    baseline = max(float(kl.mean()), 0.0) if kind == "kto" and kl is not None else 0.0
    for b in range(len(logprob)):
        if not valid[b].any():
            continue
        ratio = _log_ratio(logprob, reference_logprob, valid, b)
        if desirable[b]:
            loss = desirable_weight * (1 - torch.sigmoid(beta * (ratio - baseline)))
        else:
            loss = undesirable_weight * (1 - torch.sigmoid(beta * (baseline - ratio)))
        losses.append(loss if sequence_weights is None else sequence_weights[b] * loss)
    number = max(len(losses), 1) if sequence_weights is None else 1
    return sum(losses, torch.zeros((), dtype=logprob.dtype)) / number


def bradley_terry_loss(
    chosen_rewards: Tensor,  # [P]
    rejected_rewards: Tensor,  # [P]
    *,
    mask: Tensor | None = None,
    pair_margins: Tensor | None = None,
    center_coefficient: float = 0.0,
    pair_weights: Tensor | None = None,
) -> Tensor:
    """Computes the loss of :class:`compiled_loss.RewardLoss`."""
    losses = []
    for i in _valid(chosen_rewards, mask).nonzero().flatten().tolist():
        c, r = chosen_rewards[i], rejected_rewards[i]
        wins = c - r - (0 if pair_margins is None else pair_margins[i])
        loss = (1 + (-wins).exp()).log() + center_coefficient * (c + r) ** 2
        losses.append(loss if pair_weights is None else pair_weights[i] * loss)
    number = max(len(losses), 1) if pair_weights is None else 1
    return sum(losses, torch.zeros((), dtype=chosen_rewards.dtype)) / number


def _valid(values: Tensor, mask: Tensor | None) -> Tensor:
    everything = torch.ones_like(values, dtype=torch.bool)
    return everything if mask is None else (mask != 0) & everything


def _log_ratio(logprob: Tensor, reference_logprob: Tensor | None, valid: Tensor, i: int) -> Tensor:
    own = logprob[i][valid[i]].sum()
    return own if reference_logprob is None else own - reference_logprob[i][valid[i]].sum()


def _score(f_divergence: str, ratio: Tensor, alpha: float) -> Tensor:
    t = ratio.exp()
    if f_divergence == "forward_kl":
        return 1 - 1 / t
    if f_divergence == "js":
        return (2 * t / (1 + t)).log()
    if f_divergence == "alpha" and alpha != 1:
        return (t ** (alpha - 1) - 1) / (alpha - 1)
    return ratio


def _of_pair(kind: str, c: Tensor, r: Tensor, beta: float, e: float, margin: float | Tensor) -> Tensor:
    x = beta * (c - r) - margin
    win, lose = torch.sigmoid(x), torch.sigmoid(-x)
    chosen_good, chosen_bad = torch.sigmoid(beta * c), torch.sigmoid(-beta * c)
    rejected_good, rejected_bad = torch.sigmoid(beta * r), torch.sigmoid(-beta * r)
    odds_ratio = c.exp() / (1 - c.exp()) / (r.exp() / (1 - r.exp()))
    losses: dict[str, Tensor] = {
        "sigmoid": -(1 - e) * win.log() - e * lose.log(),
        "robust": (-(1 - e) * win.log() + e * lose.log()) / (1 - 2 * e),
        "hinge": torch.relu(1 - x),
        "ipo": (c - r - 1 / (2 * beta)) ** 2,
        "exo": win * (win / (1 - e)).log() + lose * (lose / e).log(),
        "nca": -chosen_good.log() - 0.5 * chosen_bad.log() - 0.5 * rejected_bad.log(),
        "bco": -chosen_good.log() - rejected_bad.log(),
        "sppo": (c - 1 / (2 * beta)) ** 2 + (r + 1 / (2 * beta)) ** 2,
        "apo_zero": 1 - chosen_good + rejected_good,
        "apo_down": chosen_good + 1 - torch.sigmoid(beta * (c - r)),
        "orpo": -beta * torch.sigmoid(odds_ratio.log()).log(),
    }
    return losses[kind]
