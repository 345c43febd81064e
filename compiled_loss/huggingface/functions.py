"""Losses of logits that models of `transformers` call as their `loss_function`, and a function that sets them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from compiled_loss import checks as arguments
from compiled_loss.functional.cross_entropy import cross_entropy
from compiled_loss.huggingface import checks, families
from compiled_loss.huggingface.callers import caller


def causal_lm_loss(
    logits: Tensor,  # [B, S, V]
    labels: Tensor | None,  # [B, S]
    vocab_size: int,
    num_items_in_batch: int | Tensor | None = None,
    ignore_index: int = -100,
    shift_labels: Tensor | None = None,  # [B, S]
    **kwargs: Any,
) -> Tensor:
    """The loss that causal models of `transformers` call with their logits: see :func:`set_loss_function`.

    It shifts the labels. Of a model whose labels are aligned to its logits it raises, where it can see that one calls
    it, which is in eager code: :func:`set_loss_function` knows.

    Args:
        logits: [B, S, V], in the model's dtype: no fp32 copy is made of them.
        labels: [B, S], int64, not shifted: position t predicts label t + 1. Not looked at beside `shift_labels`.
        vocab_size: V.
        num_items_in_batch: divides the sum of the tokens' losses, over all microbatches of a step; None for the mean
            of this one. An int or a one-element tensor.
        ignore_index: label of tokens to ignore.
        shift_labels: [B, S], int64, already aligned to the logits.
        kwargs: not looked at: models pass on all keywords of their forward that they do not know.

    Returns:
        A scalar, fp32 (fp64 for fp64 logits, which `transformers` rounds to fp32). 0 where no label counts, which
        gives NaN there.

    Memory:
        That of :func:`compiled_loss.cross_entropy`: the logits, and in backward their gradient.

    Raises:
        ValueError: the last dimension of the logits is not `vocab_size`, the model that calls it has aligned labels, or
            as in cross_entropy.
        TypeError: a dtype is wrong.

    Source:
        `ForCausalLMLoss` of transformers 5.23, whose signature and meaning this is.

    Example:
        >>> import torch
        >>> from compiled_loss.huggingface import causal_lm_loss
        >>> labels = torch.tensor([[0, 3, 1, -100]])
        >>> causal_lm_loss(torch.zeros(1, 4, 5), labels, vocab_size=5, num_items_in_batch=4)
        tensor(0.8047)

    """
    if shift_labels is None and not torch.compiler.is_compiling():
        checks.shifts(families.shift(caller("forward", "loss_function")))
    targets = labels if shift_labels is None else shift_labels
    return _of_logits(logits, targets, vocab_size, num_items_in_batch, ignore_index, int(shift_labels is None))


def aligned_lm_loss(
    logits: Tensor,  # [B, S, V]
    labels: Tensor | None,  # [B, S]
    vocab_size: int,
    num_items_in_batch: int | Tensor | None = None,
    ignore_index: int = -100,
    **kwargs: Any,
) -> Tensor:
    """`causal_lm_loss` for models whose labels are aligned to their logits: T5Gemma, Dia, masked language models.

    Args:
        logits: [B, S, V].
        labels: [B, S], int64: position t predicts label t.
        vocab_size, num_items_in_batch, ignore_index, kwargs: see :func:`causal_lm_loss`.

    Returns, Memory, Raises: see :func:`causal_lm_loss`.

    Source:
        `ForMaskedLMLoss` of transformers 5.23, whose signature and meaning this is.

    Example:
        >>> import torch
        >>> from compiled_loss.huggingface import aligned_lm_loss
        >>> labels = torch.tensor([[0, 3, 1, -100]])
        >>> aligned_lm_loss(torch.zeros(1, 4, 5), labels, vocab_size=5, num_items_in_batch=4)
        tensor(1.2071)

    """
    return _of_logits(logits, labels, vocab_size, num_items_in_batch, ignore_index, 0)


def set_loss_function(model: Any) -> None:
    """Makes `causal_lm_loss` the loss of a model of `transformers`, or `aligned_lm_loss` where its labels are aligned.

    Assigning `model.loss_function` does the same for most models, and nothing, without a word, for a wrapper of PEFT or
    of data parallelism, and for a model that computes its loss itself. This finds the model inside, and reads its
    class's forward. What a model adds to the loss, it goes on adding. A Trainer with a `label_smoothing_factor` calls
    no model's loss, but one of its own.

    Args:
        model: a model of `transformers`, also inside of PEFT, `torch.compile`, data parallelism or DeepSpeed.

    Raises:
        ValueError: the model never calls its loss_function, takes its loss from another model inside, or has a
            loss_function of another meaning.
        TypeError: there is no model of `transformers`, or the source of its class cannot be read.

    Example:
        >>> from types import SimpleNamespace
        >>> import torch
        >>> from compiled_loss.huggingface import causal_lm_loss, set_loss_function
        >>> class Model(torch.nn.Module):  # as those of transformers
        ...     loss_function = None
        ...     def forward(self, hidden, labels):
        ...         return SimpleNamespace(loss=self.loss_function(hidden, labels, vocab_size=8))
        >>> model = Model()
        >>> set_loss_function(torch.nn.DataParallel(model))
        >>> model.loss_function is causal_lm_loss
        True

    """
    inner = families.innermost(model)
    checks.takes_loss_function(inner)
    own = families.own_loss(inner)
    parts = tuple(text for _, text in own.others)
    checks.calls_loss_function(inner, own.calls, parts)
    checks.whole_loss(inner, own.elsewhere, parts)
    inner.loss_function = causal_lm_loss if families.shift(inner) else aligned_lm_loss


def reduced(
    loss: Any, inputs: Any, labels: Any, count: int | Tensor | None, ignore_index: int, shift: int, **keywords: Any
) -> Tensor:
    """Returns a loss of ours with labels and count on the model's device, and with the reduction of `transformers`."""
    arguments.tensor("labels", labels)
    device = inputs[0].device
    return loss(  # type: ignore[no-any-return]
        *inputs,
        labels.to(device),
        ignore_index=ignore_index,
        shift=shift,
        reduction="mean" if count is None else "sum",
        num_label_tokens=count.to(device) if isinstance(count, Tensor) else count,
        **keywords,
    )


def _of_logits(
    logits: Any, labels: Any, vocab_size: int, count: int | Tensor | None, ignore_index: int, shift: int
) -> Tensor:
    arguments.tensor("logits", logits)
    arguments.logits(logits, logits.shape[-1] if logits.dim() else 0)
    checks.vocab_size(vocab_size, logits)
    return reduced(cross_entropy, (logits,), labels, count, ignore_index, shift)
