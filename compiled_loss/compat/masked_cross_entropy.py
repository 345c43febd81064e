"""Cross-entropy with the name, mask and defaults of NeMo Automodel's Module."""

from __future__ import annotations

from typing import Literal

from torch import Tensor

from compiled_loss import checks
from compiled_loss.dispatch.keywords import UNCHUNKED, Keywords
from compiled_loss.distributed.vocab_shard import VocabShard
from compiled_loss.functional.cross_entropy import cross_entropy_call


def masked_cross_entropy(
    logits: Tensor,  # [..., V]
    labels: Tensor,  # [...]
    mask: Tensor | None = None,
    *,
    fp32_upcast: bool = True,
    ignore_index: int = -100,
    reduction: str = "sum",
    num_label_tokens: int | Tensor | None = None,
    token_weights: Tensor | None = None,
    class_dim: int = -1,
    vocab_shard: VocabShard | None = None,
    compile: bool | Literal["auto"] = "auto",
) -> Tensor:
    """Computes `cross_entropy` with a mask that only says which tokens count, and "sum" as the default.

    Args:
        logits: [..., V], any strides; fp32, bf16, fp16 or fp64. Never written.
        labels: [...], int64, from 0 to V - 1 or `ignore_index`, or probabilities like `logits`. Never written.
        mask: broadcasts to `labels`; a token counts where it is not 0. Fractions do not weigh: that is what
            :func:`cross_entropy` does.
        fp32_upcast: accepted and ignored. Losses are fp32, and gradients have the logits' dtype, either way.
        ignore_index: label of tokens to ignore.
        reduction: "sum", "mean" over the tokens that count, or "none".
        num_label_tokens: divides a "sum"; an int or a one-element tensor, never synchronised.
        token_weights: broadcasts to the tokens; differentiable; see :func:`cross_entropy`.
        class_dim: the dimension of `logits` that is V; see :func:`cross_entropy`.
        vocab_shard: see :func:`cross_entropy`.
        compile: whether an eager call runs its elementwise work as a compiled kernel; "auto" does on accelerators.
            Under torch.compile it is compiled in any case.

    Returns:
        A scalar, or for "none" the shape of `labels` with 0 where ignored; fp32 (fp64 for fp64 logits). 0, attached to
        the graph, where no token counts.

    Memory:
        Keeps nothing of [N, V] beyond the logits: one pass forward, one back, which creates the gradient.

    Raises:
        ValueError: a shape, device, number or name is wrong, or, in eager CPU code, a label is out of range; elsewhere
            that token's loss and gradient are NaN.
            Ranks that share a vocabulary have different labels (elsewhere the loss and all gradients are NaN).
        TypeError: a dtype is wrong.

    Source:
        NeMo Automodel's MaskedCrossEntropy for names and defaults.

    Example:
        >>> import torch
        >>> from compiled_loss import masked_cross_entropy
        >>> masked_cross_entropy(torch.zeros(2, 3, 4), torch.ones(2, 3, dtype=torch.int64), torch.tensor([1, 1, 0]))
        tensor(5.5452)

    """
    checks.flag("fp32_upcast", fp32_upcast)
    keywords = Keywords(
        chunking=UNCHUNKED,
        mask=mask,
        mask_weighs=False,
        token_weights=token_weights,
        ignore_index=ignore_index,
        reduction=reduction,
        num_label_tokens=num_label_tokens,
        vocab_shard=vocab_shard,
        compile=compile,
    )
    return cross_entropy_call(logits, labels, keywords, class_dim)
