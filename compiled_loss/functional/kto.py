"""Losses of answers that are judged each by itself, as functions of log-probabilities and fused with a linear head.

B answers are the rows of [B, S], or the segments that `segment_ids` gives to packed tokens [...]. H width, V
vocabulary.
"""

from __future__ import annotations

import torch
from torch import Tensor

from compiled_loss import checks
from compiled_loss.dispatch.keywords import Keywords
from compiled_loss.distributed.vocab_shard import VocabShard
from compiled_loss.engine.math.statistics import statistics_dtype
from compiled_loss.functional.answers import Reference, check_answers, linear_answers
from compiled_loss.functional.kto_evaluation import Kind, KTOLoss, Unpaired
from compiled_loss.functional.sequences import Sequences
from compiled_loss.planner.chunking import Chunking


def kto_loss(
    logprob: Tensor,  # [B, S] or [...]
    desirable: Tensor,  # [B]
    *,
    reference_logprob: Tensor | None = None,  # like `logprob`, or [B]
    kl: Tensor | None = None,  # [K] or []
    mask: Tensor | None = None,
    segment_ids: Tensor | None = None,  # [...]
    kind: Kind = "kto",
    beta: float = 0.1,
    desirable_weight: float = 1.0,
    undesirable_weight: float = 1.0,
    sequence_weights: Tensor | None = None,  # [B]
) -> KTOLoss:
    r"""Computes a loss of desirable and undesirable answers from the log-probabilities of their tokens.

    An answer's log-ratio d is the sum over its tokens of logprob - reference_logprob; z = max(0, mean(kl)) has no
    gradient.

    ====================  =====================  ======================  =========================
    kind                  a desirable answer's   an undesirable one's    used by
    ====================  =====================  ======================  =========================
    "kto"                 sigmoid(beta (z - d))  sigmoid(beta (d - z))   KTO
    "apo_zero_unpaired"   sigmoid(-beta d)       sigmoid(beta d)         APO-zero of single answers
    ====================  =====================  ======================  =========================

    Args:
        logprob: log-probabilities of the answers' tokens, fp32: [B, S], or packed [...] beside `segment_ids`.
        desirable: whether each answer is [B], bool.
        reference_logprob: the same under the reference policy, for each token, or for each answer [B]. No gradient goes
            to it.
        kl: of "kto", an estimate of KL(policy || reference). Give the log-ratios of answers after prompts that they do
            not belong to [K], whose mean is taken, or that mean [], for example averaged over ranks. A negative mean
            counts as 0.
        mask: which tokens count; broadcasts to `logprob`; bool, or numbers of which 0 does not count. An answer without
            a token does not count.
        segment_ids: which answer each token is of [...], int64, from 0 to B - 1 where tokens count.
        kind: see above.
        beta: > 0.
        desirable_weight, undesirable_weight: multiply the losses of answers that are, and that are not, >= 0.
        sequence_weights: how much each answer weighs besides [B]. Unless given, the loss is the mean over answers.

    Returns:
        :class:`KTOLoss`. All are tensors: nothing waits for a device.

    Memory:
        A few [...].

    Raises:
        ValueError: a shape, device, number or name is wrong, or an argument lacks one it needs.
        TypeError: a dtype is wrong.

    Source:
        Ethayarajh et al., 2024, arXiv:2402.01306 (KTO); D'Oosterlinck et al., 2024, arXiv:2408.06266 (APO).

    Example:
        >>> import torch
        >>> from compiled_loss import kto_loss
        >>> logprob = torch.tensor([[-1.0, -2.0], [-3.0, -1.5]], requires_grad=True)
        >>> desirable, kl = torch.tensor([True, False]), torch.tensor([0.4, 0.1])
        >>> found = kto_loss(logprob, desirable, reference_logprob=torch.tensor([-4.0, -4.0]), kl=kl)
        >>> found.loss.backward()
        >>> found.loss.detach(), logprob.grad, found.metrics.kl
        (tensor(0.4813), tensor([[-0.0125, -0.0125],
                [ 0.0125,  0.0125]]), tensor(0.2500))

    """
    checks.policy.of_tokens("logprob", logprob, logprob.shape, logprob.device, floating=True)
    shape, device = logprob.shape, logprob.device
    answers = checks.preference.answers(desirable, "logprob", shape, segment_ids, device)
    checks.preference.reference_logprob(reference_logprob, shape, answers, device)
    unpaired = Unpaired.of(
        desirable,
        kl,
        sequence_weights,
        kind=kind,
        beta=beta,
        desirable_weight=desirable_weight,
        undesirable_weight=undesirable_weight,
    )
    mask = checks.policy.broadcast("mask", mask, shape, device)
    counts = torch.ones_like(logprob, dtype=torch.bool) if mask is None else mask != 0
    if segment_ids is not None:
        checks.policy.segments_in_range(segment_ids, counts, answers, "the number of answers")
    logprob = logprob.to(statistics_dtype(logprob.dtype))
    return unpaired.loss(logprob, reference_logprob, counts, Sequences(answers, segment_ids))


def linear_kto_loss(
    hidden: Tensor,  # [..., H]
    weight: Tensor,  # [V, H]
    labels: Tensor,  # [...]
    desirable: Tensor,  # [B]
    *,
    bias: Tensor | None = None,  # [V]
    mask: Tensor | None = None,
    reference_logprob: Tensor | None = None,  # [...] or [B]
    reference_hidden: Tensor | None = None,  # [..., H']
    reference_weight: Tensor | None = None,  # [V, H']
    reference_bias: Tensor | None = None,  # [V]
    kl: Tensor | None = None,  # [K] or []
    segment_ids: Tensor | None = None,  # [...]
    ignore_index: int = -100,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    temperature: float | Tensor = 1.0,
    shift: int = 0,
    kind: Kind = "kto",
    beta: float = 0.1,
    desirable_weight: float = 1.0,
    undesirable_weight: float = 1.0,
    sequence_weights: Tensor | None = None,  # [B]
    vocab_shard: VocabShard | None = None,
    chunking: Chunking = Chunking(),
) -> KTOLoss:
    r"""Computes :func:`kto_loss` of a linear head, without ever holding the logits.

    Args:
        hidden, weight, bias, softcap, logit_scale, temperature, vocab_shard, chunking: see
            :func:`linear_cross_entropy`.
        labels: the answers' tokens [B, S], or packed [...]; `ignore_index` for prompts and padding.
        mask, ignore_index, shift, reference_logprob, reference_hidden, reference_weight, reference_bias: see
            :func:`linear_preference_loss`.
        desirable, kl, segment_ids, kind, beta, desirable_weight, undesirable_weight, sequence_weights: see
            :func:`kto_loss`. The numbers may change from call to call; in compiled code a Python number
            compiles once more, at its first change.

    Returns:
        :class:`KTOLoss`.

    Memory:
        As :func:`linear_token_statistics`, and a few [...].

    Raises:
        ValueError: a shape, device, number or name is wrong, an argument lacks one it needs, or `strategy="tokens"`
            where a gradient is wanted.
        TypeError: a dtype is wrong.

    Example:
        >>> import torch
        >>> from compiled_loss import linear_kto_loss
        >>> hidden = torch.tensor([[[2.0, 0.0]], [[0.0, 1.0]]], requires_grad=True)
        >>> weight = torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.0, 0.0]])
        >>> labels, desirable = torch.tensor([[0], [2]]), torch.tensor([True, False])
        >>> options = {"reference_hidden": torch.zeros(2, 1, 2), "kl": torch.tensor(0.1)}
        >>> found = linear_kto_loss(hidden, weight, labels, desirable, **options)
        >>> found.loss.backward()
        >>> found.loss.detach(), found.metrics.reward_desirable
        (tensor(0.4836), tensor(0.0859))

    """
    keywords = Keywords(
        bias=bias,
        mask=mask,
        ignore_index=ignore_index,
        softcap=softcap,
        logit_scale=logit_scale,
        temperature=temperature,
        shift=shift,
        vocab_shard=vocab_shard,
        chunking=chunking,
        mask_weighs=False,
    )
    check_answers(hidden, weight, labels, keywords)
    number = checks.preference.answers(desirable, "labels", labels.shape, segment_ids, labels.device)
    reference = Reference(reference_logprob, reference_hidden, reference_weight, reference_bias)
    reference.check(labels, weight, keywords, number, kind)
    unpaired = Unpaired.of(
        desirable,
        kl,
        sequence_weights,
        kind=kind,
        beta=beta,
        desirable_weight=desirable_weight,
        undesirable_weight=undesirable_weight,
    )
    answers = linear_answers(hidden, weight, labels, keywords, reference, segment_ids, number, "the number of answers")
    return unpaired.loss(*answers)
