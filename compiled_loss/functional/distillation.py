"""Knowledge distillation: divergences of a student's distribution from its teacher's, on logits and on heads.

N tokens (any leading shape), H width, H' the teacher's, V vocabulary, C tokens per chunk. Losses are in nats.

NOTE [Divergences]
With p = softmax of the teacher's z and q = softmax of the student's, where each side has its own softcap c and scale s,

    z = c tanh(s logits / c) / T        or without a softcap        z = s logits / T

and with one temperature T for both:

    forward_kl       sum(p (log p - log q))                           Hinton et al. 2015, up to the teacher's entropy
    reverse_kl       sum(q (log q - log p))                           Gu et al. 2023, MiniLLM
    jsd              w KL(p || m) + (1 - w) KL(q || m), m = w p + (1 - w) q    Agarwal et al. 2023, GKD, equation 1
    total_variation  sum(|p - q|) / 2 = 1 - alpha                     alpha = sum(min(p, q))
    acceptance       -log(alpha)                                      Samarin et al. 2026, LK losses, arXiv 2602.23881
    lk               l forward_kl + (1 - l) total_variation           the same, l = exp(-lk_decay alpha), detached

alpha is the rate at which speculative decoding accepts the student's tokens. An alpha below the dtype's least normal
number, 1.2e-38 in fp32, counts as that number: the loss is then 87.3, and its gradient falls to 0. Where alpha stays
that small, begin with "lk". Each token has its own l in "lk".

A mapping {name: weight} stands for the weighted sum of several divergences, in one pass over the logits. A token's loss
is (1 - a) T^2 divergence + a cross-entropy(student, label), where a is the `hard_label_weight`. The cross-entropy is of
the student's z at temperature 1. T^2 keeps the gradient's size as T changes (Hinton et al., section 2.1);
`temperature_squared=False` leaves it out.

NOTE [Cached teacher]
`teacher_topk` is a teacher of which only the top was kept: values [..., k], the largest of log_softmax(teacher_logits /
T), and indices [..., k], int64, the classes of the values. An entry whose probability is 0, such as -inf or -1e9, is
padding, and its index may be any number. If a class is listed twice, such as a sampled token that was appended to the
top, its largest value counts.

The mass of all other classes is 1 minus the probability of the values. It is compared with the student's mass on these
classes as if they were one class (engine/math/top_divergences.py, NOTE [Tail]). The loss is at most that of the whole
teacher, and equal to it where k is V. Its gradient keeps the student's proportions in the tail. The mass at a
temperature other than the cache's cannot be known, so make the cache at the temperature of the loss.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

from torch import Tensor

from compiled_loss import checks
from compiled_loss.dispatch import distillation as dispatch
from compiled_loss.dispatch.keywords import UNCHUNKED, Keywords
from compiled_loss.dispatch.teachers import Head, Stored
from compiled_loss.distributed.vocab_shard import VocabShard
from compiled_loss.planner.chunking import Chunking


def distillation(
    student_logits: Tensor,  # [..., V]
    teacher_logits: Tensor | None,  # [..., V]
    labels: Tensor,  # [...]
    *,
    teacher_topk: tuple[Tensor, Tensor] | None = None,  # [..., k] each
    teacher_probabilities: Tensor | None = None,  # [..., V]
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
    fp32_upcast: bool = True,
    reduction: str = "mean",
    num_label_tokens: int | Tensor | None = None,
    class_dim: int = -1,
    vocab_shard: VocabShard | None = None,
    chunk_size: int = 0,
    compile: bool | Literal["auto"] = "auto",
) -> Tensor:
    r"""Computes the divergence of a student's logits from a teacher's, over the tokens that count.

    With D the divergence, z the student's logits / T (NOTE [Divergences]), lse = logsumexp(T z) and w = valid * mask *
    token_weights, each token's loss is

        w ((1 - hard_label_weight) T^2 D(p, q) + hard_label_weight (lse - T z_y))

    Args:
        student_logits: [..., V], any strides; fp32, bf16, fp16 or fp64. Never written.
        teacher_logits: the same shape, any of these dtypes, or None beside `teacher_topk` and `teacher_probabilities`.
            Never written; gets no gradient.
        labels: [...], int64. Only which of them are `ignore_index` matters, unless `hard_label_weight` is given.
        teacher_topk: (values, indices), [..., k] each: log-probabilities at the loss's temperature, floating, and their
            classes, int64; see NOTE [Cached teacher]. Gets no gradient.
        teacher_probabilities: [..., V] like the student's logits, any floating dtype: p itself, at the temperature that
            it was made with. Zeros are right. It should sum to 1, which is not looked at. Gets no gradient.
        mask: broadcasts to the tokens, [...]; bool, int or float. 0 ignores a token, fractions weigh it.
        token_weights: broadcasts to the tokens; differentiable.
        divergence: "forward_kl", "reverse_kl", "jsd", "total_variation", "acceptance" or "lk", defined in
            NOTE [Divergences]; or a dict of weights by name, each >= 0, a number or a tensor of one element. Tensors
            may change from call to call, and nothing is compiled again. An infinite divergence times 0 is NaN.
        jsd_weight: the teacher's weight in the mixture of "jsd", between 0 and 1.
        lk_decay: how fast "lk" turns from KL to total variation as alpha grows, >= 0.
        temperature: divides both logits, > 0; a number, or a tensor without gradient that broadcasts to the labels, for
            tokens that have temperatures of their own.
        temperature_squared: whether the divergence is multiplied by T^2.
        softcap: bound of the student's logits (Gemma 2, section 2), > 0. None for none, and for logits that a model
            has bounded already.
        logit_scale: multiplies the student's logits before the softcap, > 0; 1 for logits that a model has scaled.
        teacher_softcap, teacher_logit_scale: the same of the teacher's logits; None for none and for 1. Beside
            `teacher_topk` and `teacher_probabilities` both have to be None.
        hard_label_weight: from 0 to 1, the part of the labels' own cross-entropy, in the same pass.
        ignore_index: label of tokens to ignore.
        shift: both logits [..., t] belong to labels[..., t + shift]; the mask and weights are the label's; the last
            `shift` positions are ignored.
        fp32_upcast: accepted and ignored. Losses are fp32, and gradients have the logits' dtype, either way.
        reduction: "mean" divides by the sum of w; "sum"; "none".
        num_label_tokens: divides a "sum"; an int or a one-element tensor, never synchronised.
        class_dim: the dimension of both logits that is V, and of `teacher_topk` that is k; see :func:`cross_entropy`.
        vocab_shard: for a vocabulary over ranks, the classes that this rank's plain logits of both have:
            :class:`VocabShard`. Not needed for DTensors. All other arguments are identical on the group's ranks.
        chunk_size: accepted and ignored, an int >= 0. Elsewhere it bounds temporaries of [N, V]; here there are none.
        compile: whether an eager call runs its elementwise work as a compiled kernel; "auto" does on accelerators.
            Under torch.compile it is compiled in any case.

    Returns:
        A scalar, or for "none" the shape of `labels` with 0 where ignored; fp32 (fp64 for fp64 logits). 0, attached to
        the graph, where no token counts.

    Memory:
        Keeps nothing of [N, V] beyond the two logits: one pass forward, one back, which creates the gradient. With
        `teacher_topk` forward copies the student's logits, and lets the copy go.

    Raises:
        ValueError: a shape, device, number or name is wrong, or, in eager CPU code with `hard_label_weight`, a label is
            out of range, or `teacher_topk` is no part of a distribution; elsewhere a token whose label or indices are
            out of range gives NaN.
            Ranks that share a vocabulary have different labels (elsewhere the loss and all gradients are NaN).
        TypeError: a dtype is wrong.

    Source:
        NeMo Automodel's KDLoss for names and meaning; its defects are not kept.

    Example:
        >>> import torch
        >>> from compiled_loss import distillation
        >>> student = torch.tensor([[2.0, 0.0, 0.0], [0.0, 1.0, 0.0]])
        >>> teacher = torch.tensor([[1.0, 0.0, 0.0], [0.0, 1.0, 0.0]])
        >>> distillation(student, teacher, torch.tensor([0, 1]), reduction="none")
        tensor([0.1120, 0.0000])

    """
    checks.targets.kept_for_callers(fp32_upcast, chunk_size)
    options = dispatch.Options(
        divergence,
        jsd_weight,
        lk_decay,
        temperature_squared,
        hard_label_weight,
        teacher_softcap,
        teacher_logit_scale,
    )
    keywords = Keywords(
        chunking=UNCHUNKED,
        mask=mask,
        token_weights=token_weights,
        ignore_index=ignore_index,
        softcap=softcap,
        logit_scale=logit_scale,
        temperature=temperature,
        shift=shift,
        reduction=reduction,
        num_label_tokens=num_label_tokens,
        vocab_shard=vocab_shard,
        compile=compile,
    )
    stored = Stored(teacher_topk, teacher_probabilities)
    given = (student_logits, teacher_logits, labels, stored)
    return dispatch.of_logits(*given, options, keywords, class_dim=class_dim)[0]


def linear_distillation(
    student_hidden: Tensor,  # [..., H]
    student_weight: Tensor,  # [V, H]
    teacher_hidden: Tensor | None,  # [..., H']
    teacher_weight: Tensor | None,  # [V, H']
    labels: Tensor,  # [...]
    *,
    bias: Tensor | None = None,  # [V]
    teacher_bias: Tensor | None = None,  # [V]
    teacher_topk: tuple[Tensor, Tensor] | None = None,  # [..., k] each
    teacher_probabilities: Tensor | None = None,  # [..., V]
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
    vocab_shard: VocabShard | None = None,
    chunking: Chunking = Chunking(),
) -> Tensor:
    r"""Computes `distillation` of two heads, without ever holding the student's or the teacher's logits.

    Every keyword means what it means in :func:`distillation`. A bias comes before the scale and the softcap.

    Args:
        student_hidden: [..., H]; fp32, bf16, fp16 or fp64.
        student_weight: [V, H], in its dtype; under autocast both are cast, once.
        teacher_hidden: [..., H']; the width may differ. Gets no gradient. None beside `teacher_topk` and
            `teacher_probabilities`.
        teacher_weight: [V, H'], in its dtype. Gets no gradient. None likewise.
        bias: [V] of the student, any floating dtype; gets its gradient.
        teacher_bias: [V], any floating dtype. Gets no gradient. None likewise.
        labels, teacher_topk, teacher_probabilities, mask, token_weights, divergence, jsd_weight, lk_decay, temperature,
            temperature_squared, softcap, logit_scale, teacher_softcap, teacher_logit_scale, hard_label_weight,
            ignore_index, shift, reduction, num_label_tokens: see :func:`distillation`.
        vocab_shard: for a vocabulary over ranks, the classes that this rank's plain weights and biases of both have:
            :class:`VocabShard`. Not needed for DTensors. Hidden states and all other arguments are identical on the
            group's ranks, and each gets the student's whole gradient.
        chunking: tokens per chunk; the vocabulary is not chunked here. `memory_budget` is for both logits of a chunk.

    Returns:
        A scalar, or for "none" the shape of `labels` with 0 where ignored; fp32 (fp64 for fp64 inputs).

    Memory:
        Creates no [N, V] tensor. Beyond the inputs: dH [N, H], dW [V, H] and one chunk of both logits, 2 [C, V], or of
        the student's alone where the teacher is no head; dH and dW from forward on. 6 N H V + 2 N H' V operations.
        reduction="none" goes through the chunks again in backward, 8 N H V + 4 N H' V, and keeps O(N) until then.
        Under functorch transforms the logits are held.

    Raises:
        ValueError: a shape, device, number or name is wrong; `chunking.strategy` is "vocab"; in eager CPU code, see
            :func:`distillation`.
        TypeError: a dtype is wrong.
        RuntimeError: a second derivative is asked for, outside functorch transforms.

    Source:
        As :func:`distillation`; the chunk loop is that of :func:`linear_cross_entropy`.

    Example:
        >>> import torch
        >>> from compiled_loss import linear_distillation
        >>> hidden, weight = torch.eye(2, requires_grad=True), torch.tensor([[2.0, 0.0], [0.0, 1.0], [0.0, 0.0]])
        >>> teacher = torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.0, 0.0]])
        >>> loss = linear_distillation(hidden, weight, torch.eye(2), teacher, torch.tensor([0, 1]), reduction="sum")
        >>> loss.detach()
        tensor(0.1120)

    """
    options = dispatch.Options(
        divergence,
        jsd_weight,
        lk_decay,
        temperature_squared,
        hard_label_weight,
        teacher_softcap,
        teacher_logit_scale,
    )
    keywords = Keywords(
        bias=bias,
        mask=mask,
        token_weights=token_weights,
        ignore_index=ignore_index,
        softcap=softcap,
        logit_scale=logit_scale,
        temperature=temperature,
        shift=shift,
        reduction=reduction,
        num_label_tokens=num_label_tokens,
        vocab_shard=vocab_shard,
        chunking=chunking,
    )
    student, teacher = Head(student_hidden, student_weight), Head(teacher_hidden, teacher_weight, teacher_bias)
    stored = Stored(teacher_topk, teacher_probabilities)
    return dispatch.of_heads(student, teacher, labels, stored, options, keywords)[0]
