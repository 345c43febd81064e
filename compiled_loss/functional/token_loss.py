"""Losses of the user's own on a linear head, in chunks.

N tokens (any leading shape), H width, V vocabulary, C tokens of a chunk.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from compiled_loss.dispatch.keywords import Keywords
from compiled_loss.dispatch.linear import linear_call
from compiled_loss.distributed.vocab_shard import VocabShard
from compiled_loss.planner.chunking import Chunking


def linear_token_loss(
    hidden: Tensor,  # [..., H]
    weight: Tensor,  # [V, H]
    labels: Tensor,  # [...]
    token_loss: Callable[..., Tensor],
    *inputs: Tensor | float,  # [..., *]
    bias: Tensor | None = None,  # [V]
    mask: Tensor | None = None,
    token_weights: Tensor | None = None,
    ignore_index: int = -100,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    temperature: float | Tensor = 1.0,
    shift: int = 0,
    reduction: str = "mean",
    num_label_tokens: int | Tensor | None = None,
    vocab_shard: VocabShard | None = None,
    chunking: Chunking = Chunking(),
) -> Tensor:
    r"""Reduces `token_loss(statistics, *inputs)` over tokens, without ever holding the logits.

    The statistics are those of z = softcap tanh(logit_scale (hidden @ weight.T + bias) / softcap) / temperature. The
    gradient of the loss is formed while a chunk's logits are there, by the derivative of `token_loss`.

    Args:
        hidden: hidden states [..., H]; fp32, bf16, fp16 or fp64.
        weight: the head's weight [V, H], in the dtype of `hidden`; under autocast both are cast, once.
        labels: [...], int64, from 0 to V - 1 or `ignore_index`.
        token_loss: a function of :class:`TokenStatistics`, [C] each, and of `inputs`, [C, ...] each, that returns the
            losses [C], in nats or any unit. It is traced once and differentiated; so it is made of torch operations on
            its arguments, does not branch on their values, and a token's loss depends on that token alone. Statistics
            that it does not read are not computed.
        inputs: further arguments of it: tensors `[..., *]` with a value for each token of `hidden`, in any dtype, or
            numbers, Python's or tensors [] without gradient. Per-token inputs may require gradients. Input t is
            given with the statistics of `hidden[..., t]`, whatever `shift` is. Give a small factor, such as 1 / tokens,
            as `token_weights` or `num_label_tokens`: in fp16 gradients it would underflow elsewhere.
        bias: added to the logits [V], any floating dtype.
        mask, token_weights, ignore_index, softcap, logit_scale, temperature, shift, reduction, num_label_tokens: see
            :func:`cross_entropy`. "mean" divides by the sum of the tokens' weights.
        vocab_shard: see :func:`linear_cross_entropy`.
        chunking: see :class:`Chunking`. Under torch.compile the token strategy takes functions that close over nothing;
            for others, and for `reduction="none"` with a gradient, "auto" takes the vocab strategy.

    Returns:
        A scalar, or for "none" the shape of `labels`; fp32 (fp64 for fp64 inputs).

    Memory:
        As :func:`linear_cross_entropy`. Under functorch transforms the logits are held.

    Raises:
        ValueError: a shape, device, number or name is wrong; `token_loss` cannot be traced, writes to its arguments, is
            random, reads a tensor that is not an argument, returns another shape or mixes tokens; `strategy="tokens"`
            with what only the other can do; or, in eager CPU code, a label is out of range; elsewhere its token's loss
            and gradients are NaN.
        TypeError: a dtype is wrong, or `token_loss` cannot be called.
        RuntimeError: a second derivative is asked for, outside functorch transforms.

    Example:
        A clipped policy gradient:

        >>> import torch
        >>> from compiled_loss import linear_token_loss
        >>> def clipped(statistics, old_logprob, advantage, clip):
        ...     ratio = (statistics.logprob - old_logprob).exp()
        ...     return -torch.minimum(ratio * advantage, ratio.clamp(1 - clip, 1 + clip) * advantage)
        >>> hidden = torch.tensor([[2.0, 0.0], [0.0, 1.0]], requires_grad=True)
        >>> weight = torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.0, 0.0]])
        >>> old_logprob, advantage = torch.tensor([-0.2, -1.6]), torch.tensor([1.0, -0.5])
        >>> loss = linear_token_loss(hidden, weight, torch.tensor([0, 2]), clipped, old_logprob, advantage, 0.2)
        >>> loss.backward()
        >>> loss.detach(), hidden.grad
        (tensor(-0.2182), tensor([[-0.1024,  0.0512],
                [-0.0556, -0.1512]]))

    """
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
        token_loss=token_loss,
        inputs=inputs,
    )
    return linear_call(hidden, weight, labels, keywords).loss()


def linear_logits_loss(
    hidden: Tensor,  # [..., H]
    weight: Tensor,  # [V, H]
    logits_loss: Callable[..., Tensor],
    *inputs: Tensor | float,  # [..., *]
    bias: Tensor | None = None,  # [V]
    mask: Tensor | None = None,
    token_weights: Tensor | None = None,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    temperature: float | Tensor = 1.0,
    reduction: str = "mean",
    num_label_tokens: int | Tensor | None = None,
    chunking: Chunking = Chunking(),
) -> Tensor:
    r"""Reduces `logits_loss(logits, *inputs)` over tokens, with one chunk of logits [C, V] at a time.

    For what :func:`linear_token_loss` cannot say: anything that a row of logits gives. The token strategy alone, three
    GEMMs; whether a chunk needs more than one kernel, and more than one [C, V], is up to the function.

    Args:
        hidden: hidden states [..., H]; fp32, bf16, fp16 or fp64.
        weight: the head's weight [V, H], in the dtype of `hidden`; under autocast both are cast, once. All of the
            vocabulary: a rank's part is refused.
        logits_loss: a function of z = softcap tanh(logit_scale (hidden @ weight.T + bias) / softcap) / temperature,
            [C, V] in fp32 (fp64 for fp64 inputs), and of `inputs`, [C, ...] each, that returns the losses [C]. What it
            may do is what a `token_loss` may do. Under torch.compile it closes over nothing.
        inputs: see :func:`linear_token_loss`; labels are one.
        bias, mask, token_weights, softcap, logit_scale, temperature, num_label_tokens: see :func:`cross_entropy`.
        reduction: "mean" or "sum".
        chunking: see :class:`Chunking`; not the vocab strategy.

    Returns:
        A scalar; fp32 (fp64 for fp64 inputs).

    Memory:
        As :func:`linear_cross_entropy` in the token strategy, and what the function needs beside its logits.

    Raises:
        ValueError: a shape, device, number or name is wrong, or `logits_loss` does what it must not, see
            :func:`linear_token_loss`.
        TypeError: a dtype is wrong, or `logits_loss` cannot be called.
        RuntimeError: a second derivative is asked for, outside functorch transforms.

    Example:
        The margin by which a label beats the best other class:

        >>> import torch
        >>> from compiled_loss import linear_logits_loss
        >>> def margin(logits, label):
        ...     is_label = torch.arange(logits.shape[1]) == label.unsqueeze(1)
        ...     best = logits.masked_fill(is_label, -torch.inf).amax(1)
        ...     return torch.relu(1 + best - torch.where(is_label, logits, 0.0).sum(1))
        >>> hidden = torch.tensor([[2.0, 0.0], [0.0, 1.0]], requires_grad=True)
        >>> weight = torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.0, 0.0]])
        >>> loss = linear_logits_loss(hidden, weight, margin, torch.tensor([0, 2]))
        >>> loss.backward()
        >>> loss.detach(), hidden.grad
        (tensor(1.), tensor([[0.0000, 0.0000],
                [0.0000, 0.5000]]))

    """
    keywords = Keywords(
        bias=bias,
        mask=mask,
        token_weights=token_weights,
        softcap=softcap,
        logit_scale=logit_scale,
        temperature=temperature,
        reduction=reduction,
        num_label_tokens=num_label_tokens,
        chunking=chunking,
        token_loss=logits_loss,
        inputs=inputs,
        of_logits=True,
    )
    return linear_call(hidden, weight, None, keywords).loss()
