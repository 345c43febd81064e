"""Losses of pairs of answers, as functions of log-probabilities and fused with the linear head that gives them.

P pairs are 2 P sequences: the rows of [2 P, S], or the segments that `segment_ids` gives to packed tokens [...]. The
chosen answers come first, and the rejected one of pair i is sequence P + i. H width, V vocabulary.
"""

from __future__ import annotations

import torch
from torch import Tensor

from compiled_loss import checks
from compiled_loss.dispatch.keywords import Keywords
from compiled_loss.distributed.vocab_shard import VocabShard
from compiled_loss.engine.math.statistics import statistics_dtype
from compiled_loss.functional.answers import Reference, check_answers, linear_answers
from compiled_loss.functional.preference_evaluation import Preference, PreferenceLoss
from compiled_loss.functional.preference_terms import Divergence, Kind
from compiled_loss.functional.sequences import Sequences
from compiled_loss.planner.chunking import Chunking


def preference_loss(
    logprob: Tensor,  # [2 P, S] or [...]
    *,
    reference_logprob: Tensor | None = None,  # like `logprob`, or [2 P]
    mask: Tensor | None = None,
    segment_ids: Tensor | None = None,  # [...]
    num_pairs: int | None = None,
    kind: Kind = "sigmoid",
    beta: float = 0.1,
    label_smoothing: float = 0.0,
    margin: float = 0.0,
    pair_margins: Tensor | None = None,  # [P]
    length_normalised: bool = False,
    f_divergence: Divergence = "reverse_kl",
    alpha: float = 0.5,
    sft_coefficient: float = 0.0,
    num_chosen_tokens: int | Tensor | None = None,
    pair_weights: Tensor | None = None,  # [P]
) -> PreferenceLoss:
    r"""Computes a loss of pairs of answers from the log-probabilities of their tokens.

    An answer's log-ratio is the sum over its tokens of logprob - reference_logprob, or of logprob where there is no
    reference; c and r are the scores of the chosen and of the rejected answer, their log-ratios unless `f_divergence`
    is another; x = beta (c - r) - margin, L the log-sigmoid, e = label_smoothing.

    ===========  ====================================================  ====================================
    kind         a pair's loss                                         used by
    ===========  ====================================================  ====================================
    "sigmoid"    -(1 - e) L(x) - e L(-x)                               DPO; cDPO by e; see below
    "robust"     (-(1 - e) L(x) + e L(-x)) / (1 - 2 e)                 robust DPO
    "hinge"      max(0, 1 - x)                                         SLiC-HF, RSO
    "ipo"        (c - r - 1 / (2 beta))^2                              IPO
    "exo"        KL of (sigmoid(x), sigmoid(-x)) from (1 - e, e)       EXO
    "nca"        -L(beta c) - (L(-beta c) + L(-beta r)) / 2            NCA
    "bco"        -L(beta c) - L(-beta r)                               BCO, without its moving average
    "sppo"       (c - 1 / (2 beta))^2 + (r + 1 / (2 beta))^2           SPPO, of hard preferences
    "apo_zero"   sigmoid(-beta c) + sigmoid(beta r)                    APO-zero
    "apo_down"   sigmoid(beta c) + sigmoid(beta (r - c))               APO-down
    "orpo"       -beta L(log odds(c) - log odds(r))                    ORPO
    ===========  ====================================================  ====================================

    ===========  =======================================================================================
    method       how to say it
    ===========  =======================================================================================
    DPO          kind="sigmoid", beta=0.1, reference_logprob=...
    RPO          the same with sft_coefficient=1.0
    CPO          kind="sigmoid", no reference, sft_coefficient=1.0
    SimPO        kind="sigmoid", no reference, length_normalised=True, beta=2.0, margin=gamma
    AlphaPO      as SimPO, with f_divergence="alpha", alpha=1 - its alpha
    ORPO         kind="orpo", no reference, length_normalised=True, sft_coefficient=1.0, beta=its lambda
    IPO          kind="ipo", reference_logprob=..., length_normalised=True as its authors ran it
    f-DPO        kind="sigmoid", reference_logprob=..., f_divergence=...
    ===========  =======================================================================================

    Args:
        logprob: log-probabilities of the answers' tokens, fp32: [2 P, S], or packed [...] beside `segment_ids`.
        reference_logprob: the same under the reference policy, for each token, or for each answer [2 P]. No gradient
            goes to it.
        mask: which tokens count; broadcasts to `logprob`; bool, or numbers of which 0 does not count. A pair without
            a token does not count.
        segment_ids: which answer each token is of [...], int64, from 0 to 2 num_pairs - 1 where tokens count.
        num_pairs: P, beside `segment_ids` and nowhere else.
        kind: see above.
        beta: > 0.
        label_smoothing: the probability that a label is wrong: of "sigmoid" from 0 to 1, of "robust" below 0.5, of
            "exo" between 0 and 1; of the others 0.
        margin: of "sigmoid", "robust", "hinge" and "exo", >= 0.
        pair_margins: added to `margin`, for each pair [P].
        length_normalised: whether a log-ratio is the mean over the answer's tokens, and not the sum.
        f_divergence: scores are f'(exp(log-ratio)) of "reverse_kl", log t; "forward_kl", 1 - 1 / t; "js",
            log(2 t / (1 + t)); "alpha", (t^(alpha - 1) - 1) / (alpha - 1). Exponents are at most 80. Of "sigmoid",
            "robust", "hinge", "exo" and "ipo".
        alpha: of "alpha"; 1 is its limit, "reverse_kl".
        sft_coefficient: multiplies the mean negative log-likelihood of the chosen answers' tokens, which is added,
            >= 0.
        num_chosen_tokens: what that mean divides by, such as the count over ranks and accumulated steps; those of this
            call unless given. A tensor [] is not read by the host.
        pair_weights: how much each pair weighs [P]. Unless given, the loss is the mean over pairs.

    Returns:
        :class:`PreferenceLoss`. All are tensors: nothing waits for a device.

    Memory:
        A few [...].

    Raises:
        ValueError: a shape, device, number or name is wrong, or options do not go together.
        TypeError: a dtype is wrong.

    Source:
        Rafailov et al., 2023, arXiv:2305.18290 (DPO); Mitchell, 2023, ericmitchell.ai/cdpo.pdf; Chowdhury et al., 2024,
        arXiv:2403.00409 (robust); Zhao et al., 2023, arXiv:2305.10425 (SLiC-HF); Azar et al., 2023, arXiv:2310.12036
        (IPO); Ji et al., 2024, arXiv:2402.00856 (EXO); Chen et al., 2024, arXiv:2402.05369 (NCA); Jung et al., 2024,
        arXiv:2404.04656 (BCO); Wu et al., 2024, arXiv:2405.00675 (SPPO); D'Oosterlinck et al., 2024, arXiv:2408.06266
        (APO); Hong et al., 2024, arXiv:2403.07691 (ORPO); Meng et al., 2024, arXiv:2405.14734 (SimPO); Xu et al., 2024,
        arXiv:2401.08417 (CPO); Pang et al., 2024, arXiv:2404.19733 (RPO); Wang et al., 2023, arXiv:2309.16240 (f-DPO).

    Example:
        >>> import torch
        >>> from compiled_loss import preference_loss
        >>> logprob = torch.tensor([[-1.0, -2.0], [-3.0, -1.5]], requires_grad=True)  # one pair
        >>> found = preference_loss(logprob, reference_logprob=torch.full((2, 2), -2.0))
        >>> found.loss.backward()
        >>> found.loss.detach(), logprob.grad, found.metrics.reward_margin
        (tensor(0.6210), tensor([[-0.0463, -0.0463],
                [ 0.0463,  0.0463]]), tensor(0.1500))

    """
    checks.policy.of_tokens("logprob", logprob, logprob.shape, logprob.device, floating=True)
    shape, device = logprob.shape, logprob.device
    pairs = checks.preference.pairs("logprob", shape, segment_ids, num_pairs, device)
    checks.preference.one_reference(reference_logprob, None, None, None, kind)
    checks.preference.reference_logprob(reference_logprob, shape, 2 * pairs, device)
    preference = Preference.of(
        pairs,
        device,
        kind=kind,
        beta=beta,
        label_smoothing=label_smoothing,
        margin=margin,
        pair_margins=pair_margins,
        length_normalised=length_normalised,
        f_divergence=f_divergence,
        alpha=alpha,
        sft_coefficient=sft_coefficient,
        num_chosen_tokens=num_chosen_tokens,
        pair_weights=pair_weights,
    )
    mask = checks.policy.broadcast("mask", mask, shape, device)
    counts = torch.ones_like(logprob, dtype=torch.bool) if mask is None else mask != 0
    if segment_ids is not None:
        checks.policy.segments_in_range(segment_ids, counts, 2 * pairs, "2 num_pairs")
    logprob = logprob.to(statistics_dtype(logprob.dtype))
    return preference.loss(logprob, reference_logprob, counts, Sequences(2 * pairs, segment_ids))


def linear_preference_loss(
    hidden: Tensor,  # [..., H]
    weight: Tensor,  # [V, H]
    labels: Tensor,  # [...]
    *,
    bias: Tensor | None = None,  # [V]
    mask: Tensor | None = None,
    reference_logprob: Tensor | None = None,  # [...] or [2 P]
    reference_hidden: Tensor | None = None,  # [..., H']
    reference_weight: Tensor | None = None,  # [V, H']
    reference_bias: Tensor | None = None,  # [V]
    segment_ids: Tensor | None = None,  # [...]
    num_pairs: int | None = None,
    ignore_index: int = -100,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    temperature: float | Tensor = 1.0,
    shift: int = 0,
    kind: Kind = "sigmoid",
    beta: float = 0.1,
    label_smoothing: float = 0.0,
    margin: float = 0.0,
    pair_margins: Tensor | None = None,  # [P]
    length_normalised: bool = False,
    f_divergence: Divergence = "reverse_kl",
    alpha: float = 0.5,
    sft_coefficient: float = 0.0,
    num_chosen_tokens: int | Tensor | None = None,
    pair_weights: Tensor | None = None,  # [P]
    vocab_shard: VocabShard | None = None,
    chunking: Chunking = Chunking(),
) -> PreferenceLoss:
    r"""Computes :func:`preference_loss` of a linear head, without ever holding the logits.

    The log-probabilities of an answer's tokens are needed before its gradient is: the vocab strategy, four GEMMs, and
    one more for a reference that is given by its hidden states.

    Args:
        hidden, weight, bias, softcap, logit_scale, temperature, vocab_shard, chunking: see
            :func:`linear_cross_entropy`.
        labels: the answers' tokens [2 P, S], or packed [...]; `ignore_index` for prompts and padding.
        mask, ignore_index, shift: see :func:`linear_token_statistics`. `mask` and `segment_ids` are of labels, and are
            shifted with them.
        reference_logprob: see :func:`preference_loss`; those of tokens are in the places of `hidden`, as is the
            `logprob` that is returned.
        reference_hidden: hidden states of the reference [..., H'], instead of `reference_logprob`; no gradient goes to
            them.
        reference_weight, reference_bias: the reference's head [V, H'] and [V]; `weight` and `bias` unless given.
            Softcap, scale and temperature are those of the policy.
        segment_ids, num_pairs, kind, beta, label_smoothing, margin, pair_margins, length_normalised, f_divergence,
            alpha, sft_coefficient, num_chosen_tokens, pair_weights: see :func:`preference_loss`. The numbers may change
            from call to call; in compiled code a Python number compiles once more, at its first change.

    Returns:
        :class:`PreferenceLoss`.

    Memory:
        As :func:`linear_token_statistics`, and a few [...].

    Raises:
        ValueError: a shape, device, number or name is wrong, options do not go together, or `strategy="tokens"` where a
            gradient is wanted.
        TypeError: a dtype is wrong.

    Example:
        >>> import torch
        >>> from compiled_loss import linear_preference_loss
        >>> hidden = torch.tensor([[[2.0, 0.0]], [[0.0, 1.0]]], requires_grad=True)  # one pair of one token
        >>> weight = torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.0, 0.0]])
        >>> labels = torch.tensor([[0], [2]])
        >>> found = linear_preference_loss(hidden, weight, labels, reference_hidden=torch.zeros(2, 1, 2))
        >>> found.loss.backward()
        >>> found.loss.detach(), found.metrics.accuracy, found.sequence_logprob
        (tensor(0.6297), tensor(1.), tensor([-0.2395, -1.5514]))

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
    pairs = checks.preference.pairs("labels", labels.shape, segment_ids, num_pairs, labels.device)
    reference = Reference(reference_logprob, reference_hidden, reference_weight, reference_bias)
    reference.check(labels, weight, keywords, 2 * pairs, kind)
    preference = Preference.of(
        pairs,
        labels.device,
        kind=kind,
        beta=beta,
        label_smoothing=label_smoothing,
        margin=margin,
        pair_margins=pair_margins,
        length_normalised=length_normalised,
        f_divergence=f_divergence,
        alpha=alpha,
        sft_coefficient=sft_coefficient,
        num_chosen_tokens=num_chosen_tokens,
        pair_weights=pair_weights,
    )
    answers = linear_answers(hidden, weight, labels, keywords, reference, segment_ids, 2 * pairs, "2 num_pairs")
    return preference.loss(*answers)
