"""Distillation and soft cross-entropy."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from compiled_loss.reference.tokens import aligned, over, token_logits, transformed, weighed


def distillation(
    student_logits: Tensor,
    teacher_logits: Tensor | None,
    labels: Tensor,
    *,
    teacher_topk: tuple[Tensor, Tensor] | None = None,
    teacher_probabilities: Tensor | None = None,
    mask: Tensor | None = None,
    token_weights: Tensor | None = None,
    divergence: str | Mapping[str, float | Tensor] = "forward_kl",
    jsd_weight: float = 0.5,
    lk_decay: float = 3.0,
    temperature: float | Tensor = 1.0,
    temperature_squared: bool = True,
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
    """Computes w ((1 - a) T^2 divergence(teacher, student) + a cross-entropy with the label).

    A cached teacher's distribution has one more class, all those that are not in its top.
    """
    z = transformed(student_logits, None, softcap, 1.0, logit_scale)
    scale = 1.0 if teacher_logit_scale is None else teacher_logit_scale
    log_p, log_q = distributions(
        over(z, temperature), teacher_logits, teacher_topk, teacher_probabilities, teacher_softcap, temperature, scale
    )
    weights = divergence if isinstance(divergence, Mapping) else {divergence: 1.0}
    rows = torch.zeros(labels.shape, dtype=z.dtype, device=z.device)
    for name, of_divergence in weights.items():
        rows = rows + of_divergence * _divergence(name, log_p, log_q, jsd_weight, lk_decay)
    valid = labels != ignore_index
    weight = torch.ones(labels.shape, dtype=z.dtype, device=z.device)
    for factor in (mask, token_weights):
        if factor is not None:
            weight = weight * factor.to(z.dtype).expand(labels.shape)
    if mask is not None:
        valid = valid & (mask != 0).expand(labels.shape)
    labels, weight = aligned(labels, shift, ignore_index), aligned(weight, shift, 0.0)
    valid = aligned(valid, shift, False)
    rows = (1 - hard_label_weight) * (temperature**2 if temperature_squared else 1) * rows
    if hard_label_weight:
        target = torch.where(valid, labels, 0).unsqueeze(-1)
        rows = rows - hard_label_weight * torch.log_softmax(z, dim=-1).gather(-1, target).squeeze(-1)
    return weighed(rows, weight, valid, reduction, num_label_tokens)


def distillation_statistics(
    student_logits: Tensor,
    teacher_logits: Tensor | None,
    *,
    teacher_topk: tuple[Tensor, Tensor] | None = None,
    teacher_probabilities: Tensor | None = None,
    temperature: float | Tensor = 1.0,
) -> dict[str, Tensor]:
    """Entropies and acceptance of each token, and with a cached teacher the masses of the classes that it lists."""
    stored = (teacher_topk, teacher_probabilities)
    log_p, log_q = distributions(over(student_logits, temperature), teacher_logits, *stored, None, temperature, 1.0)
    p, q = log_p.exp(), log_q.exp()
    found = {
        "student_entropy": -_times(q, log_q).sum(-1),
        "teacher_entropy": -_times(p, log_p).sum(-1),
        "acceptance": torch.minimum(p, q).sum(-1),
    }
    if teacher_topk is not None:
        k = teacher_topk[1].shape[-1]
        found |= {"student_mass": q[..., :k].sum(-1), "teacher_mass": p[..., :k].sum(-1)}
    return found


def distributions(
    z: Tensor,
    teacher_logits: Tensor | None,
    teacher_topk: tuple[Tensor, Tensor] | None,
    teacher_probabilities: Tensor | None,
    teacher_softcap: float | None,
    temperature: float | Tensor,
    teacher_logit_scale: float,
) -> tuple[Tensor, Tensor]:
    """Returns log-probabilities of the teacher and of the student, whose z is over the temperature."""
    log_q = torch.log_softmax(z, dim=-1)
    if teacher_topk is not None:
        return _topped(*teacher_topk, log_q)
    if teacher_probabilities is not None:
        return teacher_probabilities.detach().to(z.dtype).log(), log_q
    assert teacher_logits is not None
    teacher = transformed(teacher_logits.detach(), None, teacher_softcap, temperature, teacher_logit_scale)
    return torch.log_softmax(teacher.to(z.dtype), dim=-1), log_q


def _divergence(name: str, log_p: Tensor, log_q: Tensor, jsd_weight: float, lk_decay: float) -> Tensor:
    """Returns the divergence of each token's two distributions."""
    p, q = log_p.exp(), log_q.exp()
    if name == "forward_kl":
        return _times(p, log_p - log_q).sum(-1)
    if name == "reverse_kl":
        return _times(q, log_q - log_p).sum(-1)
    if name == "jsd":
        log_m = (jsd_weight * p + (1 - jsd_weight) * q).log()
        of_teacher, of_student = _times(p, log_p - log_m).sum(-1), _times(q, log_q - log_m).sum(-1)
        return jsd_weight * of_teacher + (1 - jsd_weight) * of_student
    total_variation = (p - q).abs().sum(-1) / 2
    if name == "total_variation":
        return total_variation
    alpha = torch.minimum(p, q).sum(-1)
    if name == "acceptance":
        return -alpha.clamp_min(torch.finfo(alpha.dtype).tiny).log()
    share = (-lk_decay * alpha.detach()).exp()
    return share * _times(p, log_p - log_q).sum(-1) + (1 - share) * total_variation


def _times(p: Tensor, x: Tensor) -> Tensor:
    """Returns the product, 0 where p is 0."""
    return p * torch.where(p == 0, 0.0, x)


def _topped(values: Tensor, indices: Tensor, log_q: Tensor) -> tuple[Tensor, Tensor]:
    """Returns log-probabilities of teacher and student over the top's classes and, if there are others, the rest."""
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
    temperature: float | Tensor = 1.0,
    reduction: str = "mean",
    num_label_tokens: int | Tensor | None = None,
) -> Tensor:
    """Computes w sum(-p log q), by default its sum over the positions divided by the sum of w."""
    log_q = torch.log_softmax(transformed(logits, None, softcap, temperature, logit_scale), dim=-1)
    mask = position_mask.reshape(log_q.shape[:-1])
    weight = mask.to(log_q.dtype)
    if token_weights is not None:
        weight = weight * token_weights.to(log_q.dtype).expand(mask.shape)
    rows = -(target_probs.to(log_q.dtype) * log_q).sum(-1)
    if num_label_tokens is not None and reduction == "mean":
        reduction = "sum"
    return weighed(rows, weight, mask != 0, reduction, num_label_tokens)


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
    temperature: float | Tensor = 1.0,
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
