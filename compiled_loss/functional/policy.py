"""Policy-gradient losses, as functions of log-probabilities and fused with the linear head that gives them.

Tokens have any leading shape [...]; sequences are the rows of [B, S], or the segments that `segment_ids` gives to
packed tokens. H width, V vocabulary. Log-probabilities, KL and entropies are in nats.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from compiled_loss import checks
from compiled_loss.dispatch.keywords import Keywords
from compiled_loss.dispatch.linear import check_tokens, computed_dtype, linear_call
from compiled_loss.dispatch.support import row_statistics
from compiled_loss.distributed import dtensor
from compiled_loss.distributed.vocab_shard import VocabShard
from compiled_loss.engine.math.statistics import Wanted, statistics_dtype
from compiled_loss.functional.policy_evaluation import Policy, PolicyLoss
from compiled_loss.functional.policy_terms import inputs_of, token_loss
from compiled_loss.functional.statistics import of_tokens
from compiled_loss.planner.chunking import Chunking

Kind = Literal["clip", "cispo", "cispo_two_sided", "sapo", "gmpo", "reinforce"]
Importance = Literal["token", "sequence"]
KL = Literal["k1", "k2", "k3", "k1_straight_through", "k3_straight_through"]


def policy_loss(
    logprob: Tensor,  # [...]
    old_logprob: Tensor,  # [...]
    advantages: Tensor,  # [...]
    *,
    entropy: Tensor | None = None,  # [...]
    mask: Tensor | None = None,
    token_weights: Tensor | None = None,
    kind: Kind = "clip",
    importance: Importance = "token",
    clip_low: float = 0.2,
    clip_high: float = 0.2,
    dual_clip: float | None = None,
    temperature_positive: float = 1.0,
    temperature_negative: float = 1.05,
    reference_logprob: Tensor | None = None,  # [...]
    kl: KL = "k3",
    kl_coefficient: float = 0.0,
    correction: Tensor | None = None,  # [...]
    entropy_coefficient: float = 0.0,
    entropy_weights: Tensor | None = None,
    segment_ids: Tensor | None = None,  # [...]
) -> PolicyLoss:
    r"""Computes a policy-gradient loss of given log-probabilities: r = exp(logprob - old_logprob), with advantages A.

    Log-ratios above 80 count as 80, so that no ratio is infinite.

    =================  ==========================================  ==================================================
    kind               a token's loss                              used by
    =================  ==========================================  ==================================================
    "clip"             -min(r A, clip(r, 1 - low, 1 + high) A)     PPO, GRPO, DAPO, Dr. GRPO; GSPO by "sequence"
    "cispo"            -sg(min(r, high)) A logprob                 MiniMax-M1 as TRL and Liger read it
    "cispo_two_sided"  -sg(clip(r, 1 - low, 1 + high)) A logprob   the same as verl reads it
    "sapo"             -sigmoid(t (r - 1)) 4 / t A                 SAPO; t by the sign of A
    "gmpo"             -exp(mean of min(log r, high)) A            GMPO; max(log r, -low) where A < 0; by "sequence"
    "reinforce"        -A logprob                                  REINFORCE, GPG, RLOO
    =================  ==========================================  ==================================================

    Args:
        logprob: log-probabilities of the tokens that were sampled [...], fp32.
        old_logprob: the same under the policy that sampled them [...]; `logprob.detach()` where it is this one.
        advantages: [...], or [B, 1] for one a sequence.
        entropy: of the policy at each token [...], for the bonus.
        mask: which tokens count; broadcasts to `logprob`; bool, or numbers of which 0 does not count.
        token_weights: how much each token weighs, of :func:`make_token_weights`; broadcasts to `logprob`. Unless given,
            the loss is the mean over the tokens that count.
        kind: see above.
        importance: "token", or "sequence" for the geometric mean of a sequence's ratios, whose gradient at a token is
            the token's own (GSPO).
        clip_low, clip_high: bounds of the ratio, >= 0; of "cispo", `clip_high` is the bound itself; of "gmpo", both are
            of each token's log-ratio.
        dual_clip: of "clip", bounds the loss by -dual_clip A where A < 0; > 1, or None.
        temperature_positive, temperature_negative: of "sapo", > 0.
        reference_logprob: the same tokens under a reference policy [...]. With it the loss adds `kl_coefficient` times
            an estimate of KL(policy || reference).
        kl: with d = reference_logprob - logprob: "k1" is -d, "k2" d^2 / 2, "k3" exp(d) - 1 - d; "..._straight_through"
            has the value of one and the gradient of "k2", which is that of the KL itself.
        kl_coefficient: >= 0.
        correction: multiplies each token's policy term [...], such as a truncated ratio between trainer and sampler.
        entropy_coefficient: multiplies the entropy's mean, which is subtracted; >= 0.
        entropy_weights: how much each token's entropy weighs; like `token_weights` unless given.
        segment_ids: which sequence each token is of [...], int64 from 0 to the number of tokens - 1 where tokens count,
            for packed tokens and `importance="sequence"`.

    Returns:
        :class:`PolicyLoss`. All are tensors: nothing waits for a device.

    Memory:
        A few [...].

    Raises:
        ValueError: a shape, device, number or name is wrong, or an argument lacks one it needs.
        TypeError: a dtype is wrong.

    Source:
        Schulman et al., 2017, arXiv:1707.06347; Shao et al., 2024, arXiv:2402.03300 (GRPO); Yu et al., 2025,
        arXiv:2503.14476 (DAPO); Zheng et al., 2025, arXiv:2507.18071 (GSPO); MiniMax, 2025, arXiv:2506.13585 (CISPO);
        Ye et al., 2020, arXiv:1912.09729 (dual clip); Zhao et al., 2025, arXiv:2507.20673 (GMPO); Schulman, 2020,
        joschu.net/blog/kl-approx.html (k1, k2, k3).

    Example:
        >>> import torch
        >>> from compiled_loss import policy_loss
        >>> logprob = torch.tensor([-0.5, -1.0, -2.0], requires_grad=True)
        >>> found = policy_loss(logprob, torch.tensor([-0.5, -1.5, -1.9]), torch.tensor([1.0, 1.0, -1.0]))
        >>> found.loss.backward()
        >>> found.loss.detach(), logprob.grad, found.metrics.clipped_high
        (tensor(-0.4317), tensor([-0.3333,  0.0000,  0.3016]), tensor(0.3333))

    """
    checks.policy.of_tokens("logprob", logprob, logprob.shape, logprob.device, floating=True)
    logprob = logprob.to(statistics_dtype(logprob.dtype))
    policy = Policy.of(
        logprob.shape,
        logprob.device,
        old_logprob=old_logprob,
        advantages=advantages,
        token_weights=token_weights,
        kind=kind,
        importance=importance,
        clip_low=clip_low,
        clip_high=clip_high,
        dual_clip=dual_clip,
        temperature_positive=temperature_positive,
        temperature_negative=temperature_negative,
        reference_logprob=reference_logprob,
        kl=kl,
        kl_coefficient=kl_coefficient,
        correction=correction,
        entropy_coefficient=entropy_coefficient,
        entropy_weights=entropy_weights,
    )
    if entropy is not None:
        checks.policy.of_tokens("entropy", entropy, logprob.shape, logprob.device)
    mask = checks.policy.broadcast("mask", mask, logprob.shape, logprob.device)
    checks.policy.segments(segment_ids, logprob.shape, logprob.device, mask)
    if policy.terms.entropy:
        checks.policy.needed("entropy", entropy, "entropy_coefficient is not 0")
    counts = torch.ones_like(logprob, dtype=torch.bool) if mask is None else mask != 0
    return policy.loss(logprob, entropy, counts, segment_ids)


def linear_policy_loss(
    hidden: Tensor,  # [..., H]
    weight: Tensor,  # [V, H]
    labels: Tensor,  # [...]
    old_logprob: Tensor,  # [...]
    advantages: Tensor,  # [...]
    *,
    bias: Tensor | None = None,  # [V]
    mask: Tensor | None = None,
    token_weights: Tensor | None = None,
    ignore_index: int = -100,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    temperature: float | Tensor = 1.0,
    kind: Kind = "clip",
    importance: Importance = "token",
    clip_low: float = 0.2,
    clip_high: float = 0.2,
    dual_clip: float | None = None,
    temperature_positive: float = 1.0,
    temperature_negative: float = 1.05,
    reference_logprob: Tensor | None = None,  # [...]
    kl: KL = "k3",
    kl_coefficient: float = 0.0,
    correction: Tensor | None = None,  # [...]
    entropy_coefficient: float = 0.0,
    entropy_weights: Tensor | None = None,
    segment_ids: Tensor | None = None,  # [...]
    kept_ids: Tensor | None = None,  # [..., K]
    vocab_shard: VocabShard | None = None,
    chunking: Chunking = Chunking(),
) -> PolicyLoss:
    r"""Computes :func:`policy_loss` of a linear head, without ever holding the logits.

    With `importance="token"` the gradient is formed while a chunk's logits are alive: three GEMMs, and everything of
    the loss in the one kernel that a chunk has anyway. "sequence" needs all log-probabilities of a sequence first:
    the vocab strategy, four GEMMs.

    Args:
        hidden, weight, labels, bias, ignore_index, softcap, logit_scale, vocab_shard, chunking: see
            :func:`linear_cross_entropy`. `labels` are the tokens that were sampled: labels[..., t] is predicted by
            hidden[..., t], and there is no `shift`.
        temperature: divides the logits, > 0. Give the sampler's temperature; otherwise the ratios are biased. A tensor
            that broadcasts to the labels, such as [B, 1], gives one to each sequence or token.
        old_logprob, advantages, mask, token_weights, kind, importance, clip_low, clip_high, dual_clip,
            temperature_positive, temperature_negative, reference_logprob, kl, kl_coefficient, correction,
            entropy_coefficient, entropy_weights, segment_ids: see :func:`policy_loss`. The numbers may change from call
            to call; in compiled code a Python number compiles once more, at its first change. The entropy is computed
            where its coefficient is not 0.
        kept_ids: the classes that the sampler kept for each token (top-k, top-p, min-p), as
            :func:`linear_token_statistics` takes them: log-probabilities and entropy are over them and the label alone,
            and no GEMM over V is done. Those of the sampler and of a reference have to be over the same.

    Returns:
        :class:`PolicyLoss`. The log-probabilities are those that a later call takes as `old_logprob`.

    Memory:
        As :func:`linear_cross_entropy`, and a few [...].

    Raises:
        ValueError: a shape, device, number or name is wrong, or an argument lacks one it needs.
        TypeError: a dtype is wrong.

    Example:
        >>> import torch
        >>> from compiled_loss import linear_policy_loss
        >>> hidden = torch.tensor([[2.0, 0.0], [0.0, 1.0]], requires_grad=True)
        >>> weight = torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.0, 0.0]])
        >>> old_logprob, advantages = torch.tensor([-0.2, -1.6]), torch.tensor([1.0, -0.5])
        >>> found = linear_policy_loss(hidden, weight, torch.tensor([0, 2]), old_logprob, advantages)
        >>> found.loss.backward()
        >>> found.loss.detach(), found.metrics.ratio_mean
        (tensor(-0.2182), tensor(1.0055))

    """
    keywords = Keywords(
        bias=bias,
        mask=mask,
        ignore_index=ignore_index,
        softcap=softcap,
        logit_scale=logit_scale,
        temperature=temperature,
        vocab_shard=vocab_shard,
        chunking=chunking,
        kept_ids=kept_ids,
        mask_weighs=False,
    )
    part, _ = check_tokens(hidden, weight, labels, keywords)
    if part.token_mesh_dims and token_weights is None:
        checks.policy.needed("token_weights", None, "tokens are sharded over ranks: make_token_weights(num_tokens=...)")
    policy = Policy.of(
        labels.shape,
        labels.device,
        old_logprob=old_logprob,
        advantages=advantages,
        token_weights=token_weights,
        kind=kind,
        importance=importance,
        clip_low=clip_low,
        clip_high=clip_high,
        dual_clip=dual_clip,
        temperature_positive=temperature_positive,
        temperature_negative=temperature_negative,
        reference_logprob=reference_logprob,
        kl=kl,
        kl_coefficient=kl_coefficient,
        correction=correction,
        entropy_coefficient=entropy_coefficient,
        entropy_weights=entropy_weights,
    )
    checks.policy.segments(segment_ids, labels.shape, labels.device)
    if importance == "sequence" or kept_ids is not None:
        call = linear_call(hidden, weight, labels, keywords, statistics=True)
        statistics = of_tokens(row_statistics(call, Wanted(entropy=policy.terms.entropy)), call.tokens)
        own = policy._replace(rows=policy.rows.map(lambda v: dtensor.rows(v, call.vocabulary)))
        segments = None if segment_ids is None else dtensor.rows(segment_ids, call.vocabulary)
        entropy = statistics.entropy if policy.terms.entropy else None
        return own.loss(statistics.logprob, entropy, call.tokens.active, segments)
    outer: Tensor | None = None
    if entropy_weights is None:
        policy, outer = policy.without_weights()
    elif computed_dtype(hidden, weight) == torch.float16:
        policy, outer = policy.with_relative_weights()
    keywords = keywords._replace(
        token_weights=outer,
        reduction="mean" if token_weights is None else "sum",
        token_loss=token_loss(policy.terms),
        inputs=inputs_of(policy.rows, policy.numbers),
    )
    call = linear_call(hidden, weight, labels, keywords)
    loss, found = call.loss_and_statistics(entropy=policy.terms.entropy)
    counts, statistics = call.tokens.active, of_tokens(found.map(Tensor.detach), call.tokens)
    inputs = list(call.keywords.inputs)  # a rank's
    rows = policy.rows.map(lambda _: torch.where(counts, inputs.pop(0), 0.0))
    entropy = statistics.entropy if policy.terms.entropy else None
    metrics = policy._replace(rows=rows).metrics(statistics.logprob, rows.old_logprob, counts, entropy)
    return PolicyLoss(loss, metrics, statistics.logprob)
