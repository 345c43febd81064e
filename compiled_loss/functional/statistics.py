"""Statistics of given tokens under logits: log-probability, log-sum-exp, entropy, correctness, and more.

N tokens (any leading shape), H width, V vocabulary, C columns per chunk. All in nats.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Literal

import torch
from torch import Tensor

from compiled_loss import checks, reduction
from compiled_loss.dispatch import support
from compiled_loss.dispatch.keywords import UNCHUNKED, Keywords
from compiled_loss.dispatch.linear import linear_call
from compiled_loss.dispatch.logits import logits_call
from compiled_loss.distributed.vocab_shard import VocabShard
from compiled_loss.engine.math.statistics import NAMES, RowStatistics, TokenStatistics, Wanted, of_rows
from compiled_loss.engine.math.statistics import wanted as wanted_of_rows
from compiled_loss.planner.chunking import Chunking

WANTED = ("logprob", "logsumexp", "entropy", "correct")  # by default


def of_tokens(rows: RowStatistics, tokens: reduction.Tokens, wanted: Collection[str] = NAMES) -> TokenStatistics:
    """Returns rows' statistics as a user sees them.

    Where the label is no class they are NaN and False. Statistics that are not wanted are None.
    """
    classes, labels = tokens.classes, tokens.labels
    nan_if_invalid = classes.nan_if_invalid(labels, rows.nll.dtype)
    rows = rows.map(lambda v: v * nan_if_invalid if v.is_floating_point() else v)
    found = of_rows(rows, torch.where(tokens.active, labels, 0), classes.last - classes.first)
    found = found._replace(correct=found.correct & ~rows.nll.isnan())
    return TokenStatistics(*[v if name in wanted else None for name, v in found._asdict().items()])  # type: ignore[arg-type]


def _of_rows(names: Collection[str]) -> Wanted:
    checks.statistics_wanted(names, NAMES)
    return wanted_of_rows({name: name in names for name in NAMES})


def token_statistics(
    logits: Tensor,  # [..., V]
    labels: Tensor,  # [...]
    *,
    mask: Tensor | None = None,
    ignore_index: int = -100,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    temperature: float | Tensor = 1.0,
    shift: int = 0,
    class_dim: int = -1,
    wanted: Collection[str] = WANTED,
    vocab_shard: VocabShard | None = None,
    compile: bool | Literal["auto"] = "auto",
) -> TokenStatistics:
    r"""Computes statistics of tokens under softmax(z), z = softcap tanh(logit_scale logits / softcap) / temperature.

    Args:
        logits: [..., V], any strides; fp32, bf16, fp16 or fp64. Never written.
        labels: the tokens whose statistics are computed [...], int64, from 0 to V - 1 or `ignore_index`.
        mask: which tokens count; broadcasts to `labels`; bool, int or float, 0 ignores.
        ignore_index: label of tokens to ignore.
        softcap: bound of the scaled logits, > 0; None for none.
        logit_scale: multiplies the logits before the softcap, > 0.
        temperature: divides the logits, > 0; a number, or a tensor without gradient that broadcasts to the labels, for
            tokens that have temperatures of their own.
        shift: logits[..., t] predict labels[..., t + shift]; the last `shift` positions are ignored.
        class_dim: the dimension of `logits` that is V; see :func:`cross_entropy`.
        wanted: names of the statistics to return; the others are None. `entropy`, `mean_logit`, `log_sum_sq_probs` and
            `first_argmax` cost nothing unless they are named; the others are computed in any case.
        vocab_shard: see :func:`cross_entropy`.
        compile: whether an eager call runs its elementwise work as a compiled kernel; "auto" does on accelerators.
            Under torch.compile it is compiled in any case.

    Returns:
        :class:`TokenStatistics`, all but `correct` and `first_argmax` differentiable.

    Memory:
        Keeps nothing of [N, V] beyond the logits: one pass forward, one back, which creates the gradient.

    Raises:
        ValueError: a shape, device or number is wrong, or, in eager CPU code, a label is out of range; elsewhere that
            token's numbers are NaN and its `correct` False.
            Ranks that share a vocabulary have different labels (elsewhere the loss and all gradients are NaN).
        TypeError: a dtype is wrong.

    Example:
        >>> import torch
        >>> from compiled_loss import token_statistics
        >>> logits = torch.tensor([[1.0, 0.0, 0.0], [0.0, 2.0, 0.0]])
        >>> statistics = token_statistics(logits, torch.tensor([0, 2]))
        >>> statistics.logprob
        tensor([-0.5514, -2.2395])
        >>> statistics.entropy
        tensor([0.9753, 0.6656])
        >>> statistics.correct
        tensor([ True, False])

    """
    keywords = Keywords(
        chunking=UNCHUNKED,
        mask=mask,
        ignore_index=ignore_index,
        softcap=softcap,
        logit_scale=logit_scale,
        temperature=temperature,
        shift=shift,
        vocab_shard=vocab_shard,
        compile=compile,
    )
    asked = _of_rows(wanted)
    call = logits_call(logits, labels, keywords, class_dim)
    checks.argmax_wanted(asked.argmax, call.vocabulary.size)
    rows = call.statistics(asked)
    return of_tokens(rows, call.tokens, wanted)


def linear_token_statistics(
    hidden: Tensor,  # [..., H]
    weight: Tensor,  # [V, H]
    labels: Tensor,  # [...]
    *,
    bias: Tensor | None = None,  # [V]
    mask: Tensor | None = None,
    ignore_index: int = -100,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    temperature: float | Tensor = 1.0,
    shift: int = 0,
    wanted: Collection[str] = WANTED,
    ids: Tensor | None = None,  # [..., K] or [K]
    top_k: int | None = None,
    kept_ids: Tensor | None = None,  # [..., K]
    vocab_shard: VocabShard | None = None,
    chunking: Chunking = Chunking(),
) -> TokenStatistics:
    r"""Computes statistics of each token under softmax(z), without holding the logits.

    z = softcap tanh(logit_scale (hidden @ weight.T + bias) / softcap) / temperature.

    Args:
        hidden: hidden states [..., H]; fp32, bf16, fp16 or fp64.
        weight: the head's weight [V, H], in the dtype of `hidden` (under autocast in any).
        labels: the tokens whose statistics are computed [...], int64, from 0 to V - 1 or `ignore_index`.
        bias: added to the logits [V], any floating dtype.
        mask: which tokens count; broadcasts to `labels`; bool, int or float, 0 ignores.
        ignore_index: label of tokens to ignore.
        softcap: bound of the scaled logits, > 0; None for none.
        logit_scale: multiplies the logits before the softcap, > 0.
        temperature: divides the logits, > 0; a number, or a tensor without gradient that broadcasts to the labels, for
            tokens that have temperatures of their own.
        shift: hidden[..., t] predicts labels[..., t + shift]; the last `shift` positions are ignored.
        wanted: names of the statistics to return; the others are None. `entropy`, `mean_logit`, `log_sum_sq_probs` and
            `first_argmax` cost nothing unless they are named; the others are computed in any case.
        ids: int64, classes whose log-probabilities are wanted as well, K of each token or the same K of all; a negative
            one is padding, of log-probability -inf.
        top_k: how many of the most probable classes are wanted as well, from 1 to V.
        kept_ids: int64, the classes that a sampler kept for each token, in any order, negative ones padding. All
            statistics are then those of the softmax over them and the label, renormalised, and no GEMM over V is done.
            `mean_logit` is not among them.
        vocab_shard: see :func:`linear_cross_entropy`.
        chunking: see :class:`Chunking`. Gradients need the vocab strategy.

    Returns:
        :class:`TokenStatistics`. All have gradients but `correct`, `first_argmax` and `top_k`, which is detached; for
        gradients of its classes give them as `ids`.

    Memory:
        Creates no [N, V] tensor: a chunk of logits, and O(N) kept for backward, which runs in chunks as well.
        Under functorch transforms the logits are materialised. `ids` and `kept_ids` gather rows of the weight, 64 MiB
        at a time, and form their own dW in fp32.

    Raises:
        ValueError: a shape, device or number is wrong, `strategy="tokens"` where a gradient is wanted, or, in eager CPU
            code, a label is out of range; elsewhere that token's numbers are NaN and its `correct` False.
            Ranks that share a vocabulary have different labels (elsewhere the loss and all gradients are NaN).
        TypeError: a dtype is wrong.

    Example:
        >>> import torch
        >>> from compiled_loss import linear_token_statistics
        >>> hidden = torch.tensor([[1.0, 0.0], [0.0, 2.0]])
        >>> weight = torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.0, 0.0]])
        >>> statistics = linear_token_statistics(hidden, weight, torch.tensor([0, 2]))
        >>> statistics.logprob
        tensor([-0.5514, -2.2395])
        >>> statistics.entropy
        tensor([0.9753, 0.6656])
        >>> statistics.correct
        tensor([ True, False])

    """
    keywords = Keywords(
        bias=bias,
        mask=mask,
        ignore_index=ignore_index,
        softcap=softcap,
        logit_scale=logit_scale,
        temperature=temperature,
        shift=shift,
        ids=ids,
        kept_ids=kept_ids,
        top_k=top_k,
        vocab_shard=vocab_shard,
        chunking=chunking,
    )
    asked = _of_rows(wanted)
    checks.ids.over_kept(kept_ids, wanted, top_k)
    call = linear_call(hidden, weight, labels, keywords, statistics=True)
    checks.argmax_wanted(asked.argmax, call.vocabulary.size)
    top = None
    if top_k is None:
        rows = support.row_statistics(call, asked)
    else:
        rows, top = call.statistics_and_top(asked, top_k)
    found = of_tokens(rows, call.tokens, wanted)
    if ids is None and top is None:
        return found
    return TokenStatistics(  # not _replace: Dynamo 2.11 returns nothing from it
        found.logprob,
        found.logsumexp,
        found.entropy,
        found.correct,
        found.mean_logit,
        found.log_sum_sq_probs,
        found.first_argmax,
        None if ids is None else support.logprobs(call, rows),
        None if top is None else support.top_k(call, rows, top),
    )
