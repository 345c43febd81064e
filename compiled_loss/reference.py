"""The full-logits definition of every loss: the specification. Imports torch only, shares no code with the fast paths.

Written for the reader, in the order of the formulas; ordinary autograd, every [N, V] tensor held. Statistics and losses
in fp32, or fp64 for fp64 inputs. Arguments are those of the functions of the same names in `compiled_loss`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor


def token_logits(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    softcap: float | None = None,
    temperature: float = 1.0,
    logit_scale: float = 1.0,
) -> Tensor:
    """Z = softcap tanh(logit_scale (hidden @ weight.T + bias) / softcap) / temperature, [..., V]."""
    return transformed(hidden @ weight.transpose(0, 1), bias, softcap, temperature, logit_scale)


def transformed(
    logits: Tensor, bias: Tensor | None, softcap: float | None, temperature: float, logit_scale: float = 1.0
) -> Tensor:
    """Z of raw logits."""
    z = logits if logits.dtype == torch.float64 else logits.float()
    if bias is not None:
        z = z + bias.to(z.dtype)
    z = logit_scale * z
    if softcap is not None:
        z = softcap * torch.tanh(z / softcap)
    return z / temperature


def aligned(values: Tensor, shift: int, fill: float) -> Tensor:
    """values[..., t + shift] at position t."""
    if shift == 0:
        return values
    length = values.shape[-1]
    tail = torch.full_like(values[..., : min(shift, length)], fill)
    return torch.cat([values[..., min(shift, length) :], tail], dim=-1)


def cross_entropy(
    logits: Tensor,
    labels: Tensor,
    *,
    mask: Tensor | None = None,
    token_weights: Tensor | None = None,
    class_weights: Tensor | None = None,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    temperature: float = 1.0,
    shift: int = 0,
    reduction: str = "mean",
    num_label_tokens: int | Tensor | None = None,
    class_dim: int = -1,
) -> Tensor:
    """Masked, weighted cross-entropy plus z-loss."""
    logits = logits.movedim(class_dim, -1)
    z = transformed(logits, None, softcap, temperature, logit_scale)
    vocab = z.shape[-1]
    probabilities = None
    if labels.is_floating_point():
        probabilities = labels.movedim(class_dim, -1).to(z.dtype)
        labels = torch.zeros(z.shape[:-1], dtype=torch.int64, device=z.device)  # every position has a target
    valid = labels != ignore_index
    weight = torch.ones(labels.shape, dtype=z.dtype, device=z.device)
    for factor in (mask, token_weights):
        if factor is not None:
            weight = weight * factor.to(z.dtype).expand(labels.shape)
    if mask is not None:
        valid = valid & (mask != 0).expand(labels.shape)
    labels, weight = aligned(labels, shift, ignore_index), aligned(weight, shift, 0.0)
    valid = aligned(valid, shift, False)
    weight = torch.where(valid, weight, 0.0)
    target = torch.where(valid, labels, 0)
    out_of_range = (target < 0) | (target >= vocab)
    target = target.clamp(0, vocab - 1)

    classes = torch.ones(vocab, dtype=z.dtype, device=z.device) if class_weights is None else class_weights.to(z.dtype)
    log_p = torch.log_softmax(z, dim=-1)
    picked = log_p.gather(-1, target.unsqueeze(-1)).squeeze(-1)
    label_weight = classes[target]
    ce = -(1 - label_smoothing) * label_weight * picked
    if label_smoothing:  # or 0 * inf where a column is forbidden by -inf
        ce = ce - label_smoothing * (log_p * classes).sum(-1) / vocab
    if probabilities is not None:
        label_weight = torch.ones_like(weight)
        if shift:  # of the last positions, whose weight is 0, any
            probabilities = probabilities.roll(-shift, dims=-2)
        smoothed = (1 - label_smoothing) * probabilities + label_smoothing / vocab
        ce = -(log_p * smoothed * classes).sum(-1)
    ce = torch.where(out_of_range, float("nan"), ce)
    square = z_loss * torch.logsumexp(z, dim=-1) ** 2

    if reduction == "none":
        return torch.where(valid, weight * (ce + square), 0.0)
    ce_sum = torch.where(valid, weight * ce, 0.0).sum()
    square_sum = torch.where(valid, weight * square, 0.0).sum()
    if reduction == "sum":
        if num_label_tokens is None:
            return ce_sum + square_sum
        return _ratio(ce_sum + square_sum, torch.as_tensor(num_label_tokens, dtype=z.dtype, device=z.device))
    return _ratio(ce_sum, (weight * label_weight).sum()) + _ratio(square_sum, weight.sum())


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    bias: Tensor | None = None,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    temperature: float = 1.0,
    **keywords: object,
) -> Tensor:
    """`cross_entropy` of the head's logits."""
    z = token_logits(hidden, weight, bias, softcap, temperature, logit_scale)
    return cross_entropy(z, labels, **keywords)  # type: ignore[arg-type]


class Statistics(NamedTuple):
    """Those of each token."""

    logprob: Tensor
    logsumexp: Tensor
    entropy: Tensor
    correct: Tensor
    mean_logit: Tensor | None = None


def token_statistics(
    logits: Tensor,
    labels: Tensor,
    *,
    mask: Tensor | None = None,
    ignore_index: int = -100,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    temperature: float = 1.0,
    shift: int = 0,
    class_dim: int = -1,
) -> Statistics:
    """Log-probability, log-sum-exp, entropy and correctness of each token."""
    z = transformed(logits.movedim(class_dim, -1), None, softcap, temperature, logit_scale)
    valid = labels != ignore_index
    if mask is not None:
        valid = valid & (mask != 0).expand(labels.shape)
    labels, valid = aligned(labels, shift, ignore_index), aligned(valid, shift, False)
    target = torch.where(valid, labels, 0)
    log_p = torch.log_softmax(z, dim=-1)
    logprob = log_p.gather(-1, target.unsqueeze(-1)).squeeze(-1)
    entropy = -(log_p.exp() * log_p).sum(-1)
    correct = z.gather(-1, target.unsqueeze(-1)).squeeze(-1) == z.amax(-1)
    logprob, lse, entropy = (torch.where(valid, v, 0.0) for v in (logprob, torch.logsumexp(z, dim=-1), entropy))
    return Statistics(logprob, lse, entropy, correct & valid)


def linear_token_statistics(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    bias: Tensor | None = None,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    temperature: float = 1.0,
    **keywords: object,
) -> Statistics:
    """`token_statistics` of the head's logits."""
    z = token_logits(hidden, weight, bias, softcap, temperature, logit_scale)
    return token_statistics(z, labels, **keywords)  # type: ignore[arg-type]


def linear_token_loss(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    token_loss: Callable[..., Tensor],
    *inputs: Tensor | float,
    bias: Tensor | None = None,
    mask: Tensor | None = None,
    token_weights: Tensor | None = None,
    ignore_index: int = -100,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    temperature: float = 1.0,
    shift: int = 0,
    reduction: str = "mean",
    num_label_tokens: int | Tensor | None = None,
) -> Tensor:
    """`token_loss` of the tokens' statistics, the rows of `inputs` beside them, weighted like cross-entropy."""
    z = token_logits(hidden, weight, bias, softcap, temperature, logit_scale)
    more = {"mask": mask, "ignore_index": ignore_index, "shift": shift}
    statistics = token_statistics(z, labels, **more)  # type: ignore[arg-type]
    flat = [v.reshape(-1) for v in (*statistics[:4], z.mean(-1))]
    rows = [v.flatten(0, labels.dim() - 1) if isinstance(v, Tensor) and v.dim() else v for v in inputs]
    losses = token_loss(Statistics(*flat), *rows).reshape(labels.shape)
    counts = torch.ones(labels.shape, dtype=z.dtype, device=z.device)
    for factor in (mask, token_weights):
        if factor is not None:
            counts = counts * factor.to(z.dtype).expand(labels.shape)
    valid = (labels != ignore_index) & (True if mask is None else (mask != 0).expand(labels.shape))
    valid, counts = aligned(valid, shift, False), aligned(counts, shift, 0.0)
    return _weighed(losses, counts, valid, reduction, num_label_tokens)


def linear_logits_loss(
    hidden: Tensor,
    weight: Tensor,
    logits_loss: Callable[..., Tensor],
    *inputs: Tensor | float,
    bias: Tensor | None = None,
    mask: Tensor | None = None,
    token_weights: Tensor | None = None,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    temperature: float = 1.0,
    reduction: str = "mean",
    num_label_tokens: int | Tensor | None = None,
) -> Tensor:
    """`logits_loss` of all logits at once, weighted like cross-entropy."""
    z = token_logits(hidden, weight, bias, softcap, temperature, logit_scale)
    rows = [v.flatten(0, z.dim() - 2) if isinstance(v, Tensor) and v.dim() else v for v in inputs]
    losses = logits_loss(z.flatten(0, -2), *rows).reshape(z.shape[:-1])
    counts = torch.ones_like(losses)
    for factor in (mask, token_weights):
        if factor is not None:
            counts = counts * factor.to(z.dtype).expand(losses.shape)
    return _weighed(losses, counts, counts != 0, reduction, num_label_tokens)


def policy_loss(
    logprob: Tensor,  # [B, S]
    old_logprob: Tensor,
    advantages: Tensor,
    *,
    entropy: Tensor | None = None,
    mask: Tensor | None = None,
    token_weights: Tensor | None = None,
    kind: str = "clip",
    importance: str = "token",
    clip_low: float = 0.2,
    clip_high: float = 0.2,
    dual_clip: float | None = None,
    temperature_positive: float = 1.0,
    temperature_negative: float = 1.05,
    reference_logprob: Tensor | None = None,
    kl: str = "k3",
    kl_coefficient: float = 0.0,
    correction: Tensor | None = None,
    entropy_coefficient: float = 0.0,
    entropy_weights: Tensor | None = None,
) -> Tensor:
    """The loss of :class:`compiled_loss.PolicyLoss`, a token after the other."""
    total = logprob.new_zeros(())
    valid = torch.ones_like(logprob, dtype=torch.bool) if mask is None else mask != 0
    weights = valid.to(logprob.dtype) / valid.sum().clamp(min=1) if token_weights is None else token_weights
    bonus = weights if entropy_weights is None else entropy_weights
    for b, s in valid.nonzero().tolist():
        ratio = (logprob[b, s] - old_logprob[b, s]).exp()
        if importance == "sequence":
            mean = (logprob[b] - old_logprob[b])[valid[b]].mean().detach()
            ratio = (mean + logprob[b, s] - logprob[b, s].detach()).exp()
        advantage = advantages.expand(logprob.shape)[b, s]
        if kind == "clip":
            loss = -min(ratio * advantage, ratio.clamp(1 - clip_low, 1 + clip_high) * advantage)
            if dual_clip is not None and advantage < 0:
                loss = min(loss, -dual_clip * advantage)
        elif kind == "cispo":
            loss = -min(ratio.item(), clip_high) * advantage * logprob[b, s]
        elif kind == "cispo_two_sided":
            loss = -min(max(ratio.item(), 1 - clip_low), 1 + clip_high) * advantage * logprob[b, s]
        elif kind == "sapo":
            temperature = temperature_positive if advantage > 0 else temperature_negative
            loss = -torch.sigmoid(temperature * (ratio - 1)) * 4 / temperature * advantage
        else:
            loss = -logprob[b, s] * advantage
        if correction is not None:
            loss = loss * correction[b, s]
        if reference_logprob is not None:
            loss = loss + kl_coefficient * _kl(kl, logprob[b, s], reference_logprob[b, s])
        total = total + weights[b, s] * loss
        if entropy is not None:
            total = total - bonus[b, s] * entropy_coefficient * entropy[b, s]
    return total


def _kl(kl: str, logprob: Tensor, reference_logprob: Tensor) -> Tensor:
    difference = reference_logprob - logprob
    if kl == "k1":
        return -difference
    if kl == "k2":
        return difference**2 / 2
    if kl == "k3":
        return difference.exp() - 1 - difference
    value = _kl(kl.removesuffix("_straight_through"), logprob, reference_logprob).detach()
    gradient = difference**2 / 2
    return value + gradient - gradient.detach()


def distillation(
    student_logits: Tensor,
    teacher_logits: Tensor | None,
    labels: Tensor,
    *,
    teacher_topk: tuple[Tensor, Tensor] | None = None,
    mask: Tensor | None = None,
    token_weights: Tensor | None = None,
    divergence: str = "forward_kl",
    jsd_weight: float = 0.5,
    temperature: float = 1.0,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    teacher_softcap: float | None = None,
    teacher_logit_scale: float | None = None,
    hard_label_weight: float = 0.0,
    ignore_index: int = -100,
    shift: int = 0,
    reduction: str = "mean",
    num_label_tokens: int | Tensor | None = None,
) -> Tensor:
    """W ((1 - a) T^2 divergence(teacher, student) + a cross-entropy with the label).

    A cached teacher's distribution has one more class, all those that are not in its top.
    """
    z = transformed(student_logits, None, softcap, 1.0, logit_scale)
    log_q = torch.log_softmax(z / temperature, dim=-1)
    if teacher_topk is None:
        assert teacher_logits is not None
        scale = 1.0 if teacher_logit_scale is None else teacher_logit_scale
        teacher = transformed(teacher_logits.detach(), None, teacher_softcap, temperature, scale)
        log_p = torch.log_softmax(teacher.to(z.dtype), dim=-1)
    else:
        log_p, log_q = _topped(*teacher_topk, log_q)
    p, q = log_p.exp(), log_q.exp()
    if divergence == "forward_kl":
        rows = (p * (log_p - log_q)).sum(-1)
    elif divergence == "reverse_kl":
        rows = (q * (log_q - log_p)).sum(-1)
    else:
        log_m = (jsd_weight * p + (1 - jsd_weight) * q).log()
        rows = jsd_weight * (p * (log_p - log_m)).sum(-1) + (1 - jsd_weight) * (q * (log_q - log_m)).sum(-1)
    valid = labels != ignore_index
    weight = torch.ones(labels.shape, dtype=z.dtype, device=z.device)
    for factor in (mask, token_weights):
        if factor is not None:
            weight = weight * factor.to(z.dtype).expand(labels.shape)
    if mask is not None:
        valid = valid & (mask != 0).expand(labels.shape)
    labels, weight = aligned(labels, shift, ignore_index), aligned(weight, shift, 0.0)
    valid = aligned(valid, shift, False)
    rows = (1 - hard_label_weight) * temperature**2 * rows
    if hard_label_weight:
        target = torch.where(valid, labels, 0).unsqueeze(-1)
        rows = rows - hard_label_weight * torch.log_softmax(z, dim=-1).gather(-1, target).squeeze(-1)
    return _weighed(rows, weight, valid, reduction, num_label_tokens)


def _weighed(
    rows: Tensor, weight: Tensor, valid: Tensor, reduction: str, num_label_tokens: int | Tensor | None
) -> Tensor:
    """Rows times their weight, reduced: a mean divides by the sum of the weights."""
    weight = torch.where(valid, weight, 0.0)
    rows = torch.where(valid, weight * rows, 0.0)
    if reduction == "none":
        return rows
    if reduction == "mean":
        return _ratio(rows.sum(), weight.sum())
    return rows.sum() if num_label_tokens is None else _ratio(rows.sum(), torch.as_tensor(num_label_tokens))


def _topped(values: Tensor, indices: Tensor, log_q: Tensor) -> tuple[Tensor, Tensor]:
    """Log-probabilities of the teacher and of the student over the top's classes and, if there are others, the rest."""
    log_p, tops = values.detach().to(log_q.dtype), log_q.gather(-1, indices)
    if indices.shape[-1] < log_q.shape[-1]:
        left = (1 - log_p.exp().sum(-1, keepdim=True)).clamp_min(torch.finfo(log_p.dtype).eps)
        rest = log_q.scatter(-1, indices, float("-inf")).logsumexp(-1, keepdim=True)
        log_p, tops = torch.cat([log_p, left.log()], -1), torch.cat([tops, rest], -1)
    return torch.log_softmax(log_p, dim=-1), tops


def linear_distillation(
    student_hidden: Tensor,
    student_weight: Tensor,
    teacher_hidden: Tensor | None,
    teacher_weight: Tensor | None,
    labels: Tensor,
    *,
    bias: Tensor | None = None,
    teacher_bias: Tensor | None = None,
    **keywords: object,
) -> Tensor:
    """`distillation` of the heads' logits."""
    student, teacher = token_logits(student_hidden, student_weight, bias), None
    if teacher_hidden is not None and teacher_weight is not None:
        teacher = token_logits(teacher_hidden, teacher_weight, teacher_bias)
    return distillation(student, teacher, labels, **keywords)  # type: ignore[arg-type]


def masked_soft_cross_entropy(
    logits: Tensor,
    target_probs: Tensor,
    position_mask: Tensor,
    *,
    token_weights: Tensor | None = None,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    temperature: float = 1.0,
    reduction: str = "mean",
    num_label_tokens: int | Tensor | None = None,
) -> Tensor:
    """W sum(-p log q), by default the sum over the positions divided by that of w."""
    log_q = torch.log_softmax(transformed(logits, None, softcap, temperature, logit_scale), dim=-1)
    mask = position_mask.reshape(log_q.shape[:-1])
    weight = mask.to(log_q.dtype)
    if token_weights is not None:
        weight = weight * token_weights.to(log_q.dtype).expand(mask.shape)
    rows = -(target_probs.to(log_q.dtype) * log_q).sum(-1)
    if num_label_tokens is not None and reduction == "mean":
        reduction = "sum"
    return _weighed(rows, weight, mask != 0, reduction, num_label_tokens)


def linear_soft_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    position_mask: Tensor,
    *,
    target_probs: Tensor | None = None,
    teacher_hidden: Tensor | None = None,
    teacher_weight: Tensor | None = None,
    draft_to_target: Tensor | None = None,
    bias: Tensor | None = None,
    teacher_bias: Tensor | None = None,
    teacher_softcap: float | None = None,
    teacher_logit_scale: float | None = None,
    temperature: float = 1.0,
    **keywords: object,
) -> Tensor:
    """`masked_soft_cross_entropy` of the draft head's logits and its teacher's distribution."""
    if target_probs is None:
        assert teacher_hidden is not None and teacher_weight is not None
        rows, shift = teacher_weight.detach(), None if teacher_bias is None else teacher_bias.detach()
        if draft_to_target is not None:
            rows, shift = rows[draft_to_target], None if shift is None else shift[draft_to_target]
        scale = 1.0 if teacher_logit_scale is None else teacher_logit_scale
        z = token_logits(teacher_hidden.detach(), rows, shift, teacher_softcap, temperature, scale)
        target_probs = torch.softmax(z, dim=-1)
    logits = token_logits(hidden, weight, bias)
    return masked_soft_cross_entropy(logits, target_probs, position_mask, temperature=temperature, **keywords)  # type: ignore[arg-type]


def multi_token_targets(
    labels: Tensor,
    depth: int,
    *,
    ignore_index: int = -100,
    seq_idx: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
) -> Tensor:
    """Position by position, as it is defined."""
    rows = labels.reshape(-1, labels.shape[-1]).tolist()
    ids = None if seq_idx is None else seq_idx.reshape(-1, labels.shape[-1]).expand(len(rows), -1).tolist()
    bounds = [] if cu_seqlens is None else cu_seqlens.reshape(-1).tolist()

    def sequence(row: int, position: int) -> int | None:
        if ids is not None:
            return int(ids[row][position])
        if not bounds:
            return 0
        return next((i for i in range(len(bounds) - 1) if bounds[i] <= position < bounds[i + 1]), None)

    found = []
    for row, values in enumerate(rows):
        for t in range(len(values)):
            ahead = t + depth + 1
            inside = ahead < len(values) and sequence(row, t) is not None and sequence(row, t) == sequence(row, ahead)
            found.append(values[ahead] if inside else ignore_index)
    return torch.tensor(found, dtype=labels.dtype, device=labels.device).reshape(labels.shape)


def multi_token_prediction(
    hidden: list[Tensor],
    weight: Tensor,
    labels: Tensor,
    *,
    scaling_factor: float = 0.1,
    ignore_index: int = -100,
    seq_idx: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    targets: list[Tensor] | None = None,
    mask: Tensor | None = None,
    token_weights: Tensor | None = None,
    num_label_tokens: int | Tensor | None = None,
    bias: Tensor | None = None,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    temperature: float = 1.0,
) -> Tensor:
    """scaling_factor / D times the sum over the depths."""
    total = torch.zeros((), dtype=hidden[0].dtype)
    for k, states in enumerate(hidden):
        packing = {"ignore_index": ignore_index, "seq_idx": seq_idx, "cu_seqlens": cu_seqlens}
        target = multi_token_targets(labels, k, **packing) if targets is None else targets[k]  # type: ignore[arg-type]
        z = token_logits(states, weight, bias, softcap, temperature, logit_scale).reshape(*target.shape, -1)
        moved = torch.ones(labels.shape, dtype=z.dtype)
        for factor in (mask, token_weights):
            if factor is not None:
                moved = moved * factor.expand(labels.shape)
        moved = moved if targets is not None else aligned(moved, k + 1, 0.0)
        reduction = "mean" if num_label_tokens is None else "sum"
        total = total + cross_entropy(
            z, target, mask=moved, ignore_index=ignore_index, reduction=reduction, num_label_tokens=num_label_tokens
        )
    return scaling_factor / len(hidden) * total


def _ratio(total: Tensor, count: Tensor) -> Tensor:
    """Total / count, 0 where the count is 0."""
    return torch.where(count == 0, 0.0 * total, total / torch.where(count == 0, 1.0, count))
