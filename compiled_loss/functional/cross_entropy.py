"""Cross-entropy on logits and on a linear head.

N tokens (any leading shape), H width, V vocabulary, C tokens or columns a chunk. Losses are in nats.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

from torch import Tensor

from compiled_loss import checks
from compiled_loss.dispatch.keywords import UNCHUNKED, Keywords
from compiled_loss.dispatch.linear import linear_call
from compiled_loss.dispatch.logits import logits_call
from compiled_loss.dispatch.probabilities import probability_cross_entropy
from compiled_loss.distributed.vocab_shard import VocabShard
from compiled_loss.engine.math.statistics import TokenStatistics
from compiled_loss.functional.statistics import of_tokens
from compiled_loss.planner.chunking import Chunking


class LossAndStatistics(NamedTuple):
    """A loss, with the statistics of each token from the same pass, detached."""

    loss: Tensor
    statistics: TokenStatistics


def cross_entropy(
    logits: Tensor,  # [..., V]
    labels: Tensor,  # [...] or [..., V]
    *,
    mask: Tensor | None = None,
    token_weights: Tensor | None = None,
    class_weights: Tensor | None = None,  # [V]
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    temperature: float | Tensor = 1.0,
    shift: int = 0,
    reduction: str = "mean",
    num_label_tokens: int | Tensor | None = None,
    class_dim: int = -1,
    vocab_shard: VocabShard | None = None,
    compile: bool | Literal["auto"] = "auto",
) -> Tensor:
    r"""Computes the cross-entropy of logits [..., V], with the semantics of `torch.nn.functional.cross_entropy`.

    With z = softcap tanh(logit_scale logits / softcap) / temperature, lse = logsumexp(z), e = label_smoothing,
    c = class_weights, and w the token's weight, valid * mask * token_weights, each token's loss is

        w (c_y (1 - e) (lse - z_y) + e / V sum_v c_v (lse - z_v)  +  z_loss lse^2)

    and with p_v in place of a label y

        w (sum_v c_v ((1 - e) p_v + e / V) (lse - z_v)  +  z_loss lse^2)

    Args:
        logits: [..., V], any strides; fp32, bf16, fp16 or fp64. Never written.
        labels: [...], int64, from 0 to V - 1 or `ignore_index`. Or a probability of each class: of any floating dtype,
            shaped like `logits`, used as they are and not normalised, differentiable.
        mask: broadcasts to the tokens, [...]; bool, int or float. 0 ignores a token, fractions weigh it.
        token_weights: broadcasts to the tokens; differentiable.
        class_weights: [V], any floating dtype, without gradient.
        ignore_index: label of tokens to ignore. Beside probabilities it means nothing, and has to be negative.
        label_smoothing: from 0 to 1.
        z_loss: weight of lse squared (PaLM, section 5), >= 0.
        softcap: bound of the scaled logits (Gemma 2, section 2), > 0; None for none.
        logit_scale: multiplies the logits before the softcap (Cohere's; the reciprocal of Granite's), > 0.
        temperature: divides the logits, > 0; a number, or a tensor without gradient that broadcasts to the labels, for
            tokens that have temperatures of their own.
        shift: logits[..., t] predict labels[..., t + shift]; the mask and weights are the label's; the last `shift`
            positions are ignored. 1 for a causal model's unshifted labels.
        reduction: "mean" divides the cross-entropy by the sum of w c_y, of probabilities by the sum of w, and the
            z-loss by the sum of w; "sum"; "none".
        num_label_tokens: divides a "sum"; an int or a one-element tensor, never synchronised.
        class_dim: the dimension of `logits`, and of probabilities, that is V; 1 for [N, V, d1, ...] and labels
            [N, d1, ...]. It is never guessed. No copy is made, and gradients lie as the logits do.
        vocab_shard: for a vocabulary over ranks, the classes that this rank's plain `logits` have: :class:`VocabShard`.
            Not needed for a DTensor. Probabilities are sharded as the logits are. All other arguments are identical on
            the group's ranks; `class_weights` are those of the whole vocabulary.
        compile: whether an eager call runs its elementwise work as a compiled kernel; "auto" does on accelerators.
            Under torch.compile it is compiled in any case.

    Returns:
        A scalar, or for "none" the shape of the tokens with 0 where ignored; fp32 (fp64 for fp64 logits). Where the
        divisor is 0 the loss is 0, attached to the graph, with zero gradients.

    Memory:
        Keeps nothing of [N, V] beyond logits and probabilities: one pass forward, one back for each gradient that is
        wanted, which creates it. Beside probabilities `shift` makes one more tensor of [N, V] in backward.
        Over ranks logits stay where they are: two collectives of O(N), beside probabilities three, and one of 48 bytes
        forward, none back.

    Raises:
        ValueError: a shape, device, number or name is wrong, or, in eager CPU code, a label is out of range; elsewhere
            that token's loss and gradient are NaN.
            Ranks that share a vocabulary have different labels (elsewhere the loss and all gradients are NaN).
            Beside probabilities they compare the weights w.
        TypeError: a dtype is wrong.

    Example:
        >>> import torch
        >>> from compiled_loss import cross_entropy
        >>> logits = torch.tensor([[2.0, 0.0, 0.0], [0.0, 1.0, 0.0], [0.0, 0.0, 0.0]])
        >>> cross_entropy(logits, torch.tensor([0, 2, -100]))
        tensor(0.8955)
        >>> cross_entropy(logits, torch.tensor([0, 2, -100]), reduction="none")
        tensor([0.2395, 1.5514, 0.0000])
        >>> cross_entropy(logits.t(), torch.tensor([0, 2, -100]), class_dim=0)
        tensor(0.8955)
        >>> cross_entropy(logits, torch.eye(3), mask=torch.tensor([1, 0, 0]))
        tensor(0.2395)

    """
    keywords = Keywords(
        chunking=UNCHUNKED,
        mask=mask,
        token_weights=token_weights,
        class_weights=class_weights,
        ignore_index=ignore_index,
        label_smoothing=label_smoothing,
        z_loss=z_loss,
        softcap=softcap,
        logit_scale=logit_scale,
        temperature=temperature,
        shift=shift,
        reduction=reduction,
        num_label_tokens=num_label_tokens,
        vocab_shard=vocab_shard,
        compile=compile,
    )
    return cross_entropy_call(logits, labels, keywords, class_dim)


def cross_entropy_call(logits: Tensor, labels: Tensor, keywords: Keywords, class_dim: int) -> Tensor:
    """Returns the cross-entropy with labels, or with probabilities."""
    checks.tensor("logits", logits)
    checks.tensor("labels", labels)
    if labels.is_floating_point() and labels.dim() == logits.dim():
        return probability_cross_entropy(logits, labels, keywords, class_dim)
    return logits_call(logits, labels, keywords, class_dim).loss()


def linear_cross_entropy(
    hidden: Tensor,  # [..., H]
    weight: Tensor,  # [V, H]
    labels: Tensor,  # [...]
    *,
    bias: Tensor | None = None,  # [V]
    mask: Tensor | None = None,
    token_weights: Tensor | None = None,
    class_weights: Tensor | None = None,  # [V]
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    temperature: float | Tensor = 1.0,
    shift: int = 0,
    reduction: str = "mean",
    num_label_tokens: int | Tensor | None = None,
    vocab_shard: VocabShard | None = None,
    chunking: Chunking = Chunking(),
) -> Tensor:
    r"""Computes `cross_entropy(hidden @ weight.T + bias, labels, ...)` without ever holding the logits.

    Every keyword means what it means in :func:`cross_entropy`; the bias comes before the softcap.

    Args:
        hidden: hidden states [..., H]; fp32, bf16, fp16 or fp64.
        weight: the head's weight [V, H], in the dtype of `hidden`; under autocast both are cast, once.
        labels: [...], int64, from 0 to V - 1 or `ignore_index`.
        bias: [V], any floating dtype.
        mask, token_weights, class_weights, ignore_index, label_smoothing, z_loss, softcap, logit_scale,
            temperature, shift, reduction, num_label_tokens: see :func:`cross_entropy`.
        vocab_shard: for a vocabulary over ranks, the classes that this rank's plain `weight` and `bias` have:
            :class:`VocabShard`. Not needed for a DTensor. A DTensor of fully_shard is no vocabulary over ranks, because
            its ranks have different tokens: gather it first, by unshard() of its module. Hidden states and all other
            arguments are identical on the group's ranks, and each rank gets their whole gradients; a DTensor of hidden
            states may be sharded over tokens.
        chunking: how the loss is computed in chunks; see :class:`Chunking`. It does not change the result beyond
            rounding. But if more tokens count than `max_label_tokens`, eager CPU code raises and other code gives NaN.

    Returns:
        A scalar, or for "none" the shape of `labels`; fp32 (fp64 for fp64 inputs).

    Memory:
        Creates no [N, V] tensor. Beyond the inputs: dH [N, H], dW [V, H] and one chunk of logits, [C, V] or [N, C].
        The token strategy holds dH and dW from forward on, the vocab strategy O(N) until backward. Without gradients,
        one chunk. Eager code without `Chunking(compile=True)` adds a few blocks of 4 MiB. A second eager backward of
        the token strategy forms dH and dW again. Under non-reentrant checkpointing the token strategy runs twice. With
        a vocabulary over ranks V is the rank's own part. The vocab strategy makes two collectives of O(N) forward, the
        token strategy two of O(C) per chunk, each one of 48 bytes more; backward makes one of [N, H], unless the hidden
        states are a DTensor.
        Under functorch transforms the logits are held: at N = 4096, V = 65536, H = 256 in fp32 a peak of 1092 MiB was
        measured for torch.compile(torch.func.grad(...)), 4352 MiB for eager grad, 132 MiB for the token strategy.

    Raises:
        ValueError: a shape, device, number or name is wrong, `strategy="tokens"` with `reduction="none"` where a
            gradient is wanted, or, in eager CPU code, a label is out of range; elsewhere its token's loss and gradients
            are NaN.
            Ranks that share a vocabulary have different labels (elsewhere the loss and all gradients are NaN).
        TypeError: a dtype is wrong.
        RuntimeError: a second derivative is asked for, outside functorch transforms.

    Example:
        >>> import torch
        >>> from compiled_loss import linear_cross_entropy
        >>> hidden = torch.tensor([[2.0, 0.0], [0.0, 1.0]], requires_grad=True)
        >>> weight = torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.0, 0.0]])
        >>> loss = linear_cross_entropy(hidden, weight, torch.tensor([0, 2]))
        >>> loss.backward()
        >>> loss.detach(), hidden.grad
        (tensor(0.8955), tensor([[-0.1065,  0.0533],
                [ 0.1060,  0.2881]]))

    """
    keywords = Keywords(
        bias=bias,
        mask=mask,
        token_weights=token_weights,
        class_weights=class_weights,
        ignore_index=ignore_index,
        label_smoothing=label_smoothing,
        z_loss=z_loss,
        softcap=softcap,
        logit_scale=logit_scale,
        temperature=temperature,
        shift=shift,
        reduction=reduction,
        num_label_tokens=num_label_tokens,
        vocab_shard=vocab_shard,
        chunking=chunking,
    )
    return linear_call(hidden, weight, labels, keywords).loss()


def linear_cross_entropy_with_statistics(
    hidden: Tensor,  # [..., H]
    weight: Tensor,  # [V, H]
    labels: Tensor,  # [...]
    *,
    bias: Tensor | None = None,  # [V]
    mask: Tensor | None = None,
    token_weights: Tensor | None = None,
    class_weights: Tensor | None = None,  # [V]
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    temperature: float | Tensor = 1.0,
    shift: int = 0,
    reduction: str = "mean",
    num_label_tokens: int | Tensor | None = None,
    vocab_shard: VocabShard | None = None,
    chunking: Chunking = Chunking(),
) -> LossAndStatistics:
    r"""Computes `linear_cross_entropy`, and the statistics of each token in the same pass, without another GEMM.

    Args, Memory, Raises: see :func:`linear_cross_entropy`.

    Returns:
        :class:`LossAndStatistics`: the loss, and detached :class:`TokenStatistics` shaped like `labels`, on the loss's
        own set of tokens.

    Example:
        >>> import torch
        >>> from compiled_loss import linear_cross_entropy_with_statistics
        >>> hidden = torch.tensor([[2.0, 0.0], [0.0, 1.0]])
        >>> weight = torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.0, 0.0]])
        >>> loss, statistics = linear_cross_entropy_with_statistics(hidden, weight, torch.tensor([0, 2]))
        >>> loss, statistics.correct
        (tensor(0.8955), tensor([ True, False]))

    """
    keywords = Keywords(
        bias=bias,
        mask=mask,
        token_weights=token_weights,
        class_weights=class_weights,
        ignore_index=ignore_index,
        label_smoothing=label_smoothing,
        z_loss=z_loss,
        softcap=softcap,
        logit_scale=logit_scale,
        temperature=temperature,
        shift=shift,
        reduction=reduction,
        num_label_tokens=num_label_tokens,
        vocab_shard=vocab_shard,
        chunking=chunking,
    )
    linear = linear_call(hidden, weight, labels, keywords)
    loss, rows = linear.loss_and_statistics()
    return LossAndStatistics(loss, of_tokens(rows.map(Tensor.detach), linear.tokens))
