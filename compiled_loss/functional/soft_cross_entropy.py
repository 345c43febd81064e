"""Cross-entropy with soft targets: whole distributions instead of labels, as EAGLE-3 trains its draft.

N tokens (any leading shape), H width, H' the teacher's, V vocabulary, C tokens a chunk. Losses are in nats.
"""

from __future__ import annotations

from typing import Literal

from torch import Tensor

from compiled_loss.dispatch import soft_cross_entropy as dispatch
from compiled_loss.dispatch.keywords import UNCHUNKED, Keywords
from compiled_loss.dispatch.teachers import Head
from compiled_loss.distributed.vocab_shard import VocabShard
from compiled_loss.planner.chunking import Chunking


def masked_soft_cross_entropy(
    logits: Tensor,  # [..., V]
    target_probs: Tensor,  # [..., V]
    position_mask: Tensor,  # [..., 1] or [...]
    *,
    token_weights: Tensor | None = None,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    temperature: float | Tensor = 1.0,
    reduction: str = "mean",
    num_label_tokens: int | Tensor | None = None,
    vocab_shard: VocabShard | None = None,
    compile: bool | Literal["auto"] = "auto",
) -> Tensor:
    r"""Computes the soft-target cross-entropy over the positions of a mask, by default its mean.

    With z = softcap tanh(logit_scale logits / softcap) / temperature, or z = logit_scale logits / temperature without a
    softcap, log q = z - logsumexp(z), and w the position's weight, position_mask * token_weights, each position's loss
    is

        w sum_v(-p_v log q_v)

    Args:
        logits: draft logits [..., V], such as [B, S, V], any strides; fp32, bf16, fp16 or fp64. Never written.
        target_probs: the same shape; any floating dtype, used as it is: not normalised. Gets its gradient.
        position_mask: the shape of the logits with 1 for V, or without its last dimension; no other, and nothing
            broadcasts. Bool, or numbers: 0 ignores a position, fractions weigh it.
        token_weights: broadcasts to the positions, [...]; differentiable.
        softcap: bound of the logits (Gemma 2, section 2), > 0. None for none, and for logits that a model has bounded
            already.
        logit_scale: multiplies the logits before the softcap, > 0.
        temperature: divides the logits, > 0; a number, or a tensor without gradient that broadcasts to the positions.
            The loss is not multiplied by its square.
        reduction: "mean" divides by the sum of w, or by `num_label_tokens` where it is given; "sum"; "none".
        num_label_tokens: divides the sum; an int or a one-element tensor, never synchronised.
        vocab_shard: for a vocabulary over ranks, the classes that this rank's plain `logits` and `target_probs` have:
            :class:`VocabShard`. Not needed for DTensors. The weights w are identical on the group's ranks, which
            compare them and nothing else.
        compile: whether an eager call runs its elementwise work as a compiled kernel; "auto" does on accelerators.
            Under torch.compile it is compiled in any case.

    Returns:
        A scalar, or for "none" the shape of the positions, [...], with 0 where ignored; fp32 (fp64 for fp64 logits).
        Where the divisor is 0 the loss is 0, attached to the graph.

    Memory:
        Keeps nothing of [N, V] beyond the inputs: one pass forward, one back for each gradient that is wanted.

    Raises:
        ValueError: a shape, device, number or name is wrong.
        TypeError: a dtype is wrong.

    Source:
        Li et al. 2025, EAGLE-3; the normalisation is that of NeMo Automodel's function of this name, by the number of
        valid positions and not by batch times sequence.

    Example:
        >>> import torch
        >>> from compiled_loss import masked_soft_cross_entropy
        >>> logits = torch.tensor([[[2.0, 0.0], [0.0, 0.0], [9.0, 0.0]]])
        >>> target = torch.full((1, 3, 2), 0.5)
        >>> masked_soft_cross_entropy(logits, target, torch.tensor([[[1], [1], [0]]]))
        tensor(0.9100)

    """
    keywords = Keywords(
        chunking=UNCHUNKED,
        token_weights=token_weights,
        softcap=softcap,
        logit_scale=logit_scale,
        temperature=temperature,
        reduction="sum" if reduction == "mean" and num_label_tokens is not None else reduction,
        num_label_tokens=num_label_tokens,
        vocab_shard=vocab_shard,
        compile=compile,
    )
    return dispatch.of_logits(logits, target_probs, position_mask, keywords)


def linear_soft_cross_entropy(
    hidden: Tensor,  # [..., H]
    weight: Tensor,  # [V, H]
    position_mask: Tensor,  # [..., 1] or [...]
    *,
    target_probs: Tensor | None = None,  # [..., V]
    teacher_hidden: Tensor | None = None,  # [..., H']
    teacher_weight: Tensor | None = None,  # [V', H']
    draft_to_target: Tensor | None = None,  # [V]
    bias: Tensor | None = None,  # [V]
    teacher_bias: Tensor | None = None,  # [V']
    token_weights: Tensor | None = None,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    teacher_softcap: float | None = None,
    teacher_logit_scale: float | None = None,
    temperature: float | Tensor = 1.0,
    reduction: str = "mean",
    num_label_tokens: int | Tensor | None = None,
    vocab_shard: VocabShard | None = None,
    chunking: Chunking = Chunking(),
) -> Tensor:
    r"""Computes `masked_soft_cross_entropy` of a draft head, without ever holding its logits or its teacher's.

    The draft's logits are `hidden @ weight.T + bias`. The teacher's z is made of its own bias, scale and softcap, and
    of the same temperature; its softmax is the target.

    Args:
        hidden: the draft's hidden states [..., H]; fp32, bf16, fp16 or fp64.
        weight: its head [V, H], in the dtype of `hidden`; under autocast both are cast, once.
        position_mask: [..., 1] or [...], see :func:`masked_soft_cross_entropy`.
        target_probs: [..., V], without gradient. Give this, or a teacher's head.
        teacher_hidden: [..., H'], the width may differ. Gets no gradient.
        teacher_weight: [V', H'], in its dtype; V' is V unless `draft_to_target` is given. Gets no gradient.
        draft_to_target: int64 [V], the teacher's row of each draft token, where the draft's vocabulary is a part of
            the teacher's. The teacher's distribution is the softmax over these rows alone.
        bias: [V] of the draft, any floating dtype; gets its gradient.
        teacher_bias: [V'], a number for each row of `teacher_weight`, any floating dtype. Gets no gradient.
        teacher_softcap, teacher_logit_scale: `softcap` and `logit_scale` of the teacher's logits; None for none and for
            1. Beside `target_probs` these and `teacher_bias` have to be None.
        token_weights, softcap, logit_scale, reduction, num_label_tokens: see :func:`masked_soft_cross_entropy`.
        temperature: divides both logits, > 0; a number, or a tensor without gradient that broadcasts to the positions.
            The loss is not multiplied by its square.
        vocab_shard: which classes plain `weight`, `bias`, `target_probs`, `teacher_weight` and `teacher_bias` have,
            where each rank has some: :class:`VocabShard`. DTensors say so themselves; all else is alike on the group's
            ranks, the gradient of `hidden` complete on each. `draft_to_target` is the whole draft's, its
            `teacher_weight` and `teacher_bias` whole on every rank.
        chunking: tokens a chunk; the vocabulary is not chunked here. `memory_budget` is for all logits of a chunk.

    Returns:
        A scalar, or for "none" the shape of the positions, [...], with 0 where ignored; fp32 (fp64 for fp64 inputs).

    Memory:
        Creates no [N, V] tensor. Beyond the inputs: dH [N, H], dW [V, H], and one chunk of logits [C, V], with a
        teacher's head two; with `draft_to_target` also the chosen rows, [V, H']. dH and dW from forward on.
        reduction="none" goes through the chunks again in backward, and keeps O(N) until then.

    Raises:
        ValueError: a shape, device, number or name is wrong, not exactly one form of target is given, or
            `chunking.strategy` is "vocab".
        TypeError: a dtype is wrong.
        RuntimeError: a second derivative is asked for, outside functorch transforms.

    Source:
        Li et al. 2025, EAGLE-3, whose draft predicts a part of the vocabulary.

    Example:
        >>> import torch
        >>> from compiled_loss import linear_soft_cross_entropy
        >>> hidden, weight = torch.eye(2, requires_grad=True), torch.tensor([[2.0, 0.0], [0.0, 0.0]])
        >>> teacher = torch.tensor([[0.0, 0.0], [9.0, 9.0], [0.0, 0.0]])
        >>> loss = linear_soft_cross_entropy(
        ...     hidden,
        ...     weight,
        ...     torch.ones(2, 1),
        ...     teacher_hidden=torch.eye(2),
        ...     teacher_weight=teacher,
        ...     draft_to_target=torch.tensor([0, 2]),
        ... )
        >>> loss.detach()
        tensor(0.9100)

    """
    keywords = Keywords(
        bias=bias,
        token_weights=token_weights,
        softcap=softcap,
        logit_scale=logit_scale,
        temperature=temperature,
        reduction="sum" if reduction == "mean" and num_label_tokens is not None else reduction,
        num_label_tokens=num_label_tokens,
        vocab_shard=vocab_shard,
        chunking=chunking,
    )
    teacher = dispatch.Teacher(Head(teacher_hidden, teacher_weight, teacher_bias), teacher_softcap, teacher_logit_scale)
    return dispatch.of_heads(hidden, weight, position_mask, target_probs, teacher, draft_to_target, keywords)
