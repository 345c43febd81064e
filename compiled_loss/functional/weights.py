"""Token weights: the normalisations of losses over tokens and sequences that trainers use, without synchronisation.

Tokens have any leading shape [...]; sequences are the rows of [B, S], or the segments that `segment_ids` gives to
packed tokens.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from compiled_loss import checks
from compiled_loss.functional.sequences import Sequences

Normalisation = Literal["token_mean", "sequence_mean", "sequence_sum", "fixed_length", "sum"]


def make_token_weights(
    mask: Tensor,  # [..., S]
    normalisation: Normalisation = "token_mean",
    *,
    segment_ids: Tensor | None = None,  # [..., S]
    num_tokens: int | Tensor | None = None,
    num_sequences: int | Tensor | None = None,
    length: int | None = None,
) -> Tensor:
    r"""Makes token weights with which a sum over tokens is the normalised loss.

    ================  ==============================  ===============================================
    normalisation     weight of a token that counts   who does so
    ================  ==============================  ===============================================
    "token_mean"      1 / tokens                      DAPO, BNPO; verl "token-mean"
    "sequence_mean"   1 / (sequences * its length)    GRPO, GSPO; verl "seq-mean-token-mean"
    "sequence_sum"    1 / sequences                   verl "seq-mean-token-sum"
    "fixed_length"    1 / (sequences * length)        Dr. GRPO; verl "seq-mean-token-sum-norm"
    "sum"             1
    ================  ==============================  ===============================================

    Args:
        mask: which tokens count [..., S], bool, or numbers of which 0 does not count.
        normalisation: one of the above.
        segment_ids: which sequence each token is of [..., S], int64 from 0 to the number of tokens - 1, for packed
            tokens; without them each row of the last dimension is a sequence.
        num_tokens: how many tokens count in all, over ranks and accumulated steps; those of `mask` unless given. A
            tensor [] is not read by the host.
        num_sequences: how many sequences there are in all; those of `mask` that have a token unless given.
        length: what "fixed_length" divides by, such as the longest completion that is allowed.

    Returns:
        [..., S], fp32, 0 where `mask` is, to be given as `token_weights` beside `reduction="sum"`.

    Memory:
        A few [..., S].

    Raises:
        ValueError: a name, shape or number is off, or "fixed_length" lacks its length.
        TypeError: a dtype is wrong.

    Example:
        >>> import torch
        >>> from compiled_loss import make_token_weights
        >>> make_token_weights(torch.tensor([[1, 1, 1, 0], [1, 0, 0, 0]]), "sequence_mean")
        tensor([[0.1667, 0.1667, 0.1667, 0.0000],
                [0.5000, 0.0000, 0.0000, 0.0000]])

    """
    checks.policy.normalisation(mask, normalisation, segment_ids, num_tokens, num_sequences, length)
    counts = (mask != 0).to(torch.float32)
    if normalisation == "sum":
        return counts
    if normalisation == "token_mean":
        return counts * _reciprocal(counts.sum() if num_tokens is None else num_tokens, counts)
    lengths = _sums_of_sequences(counts, segment_ids)
    if num_sequences is None:
        num_sequences = (counts * _reciprocal(lengths, counts)).sum()  # each sequence's add up to 1
    weights = counts * _reciprocal(num_sequences, counts)
    if normalisation == "sequence_mean":
        return weights * _reciprocal(lengths, counts)
    return weights if length is None else weights / length


def means_of_sequences(values: Tensor, mask: Tensor, segment_ids: Tensor | None) -> Tensor:
    """Returns at each token the mean over its sequence's tokens that count; all other values have to be 0."""
    lengths = _sums_of_sequences(mask.to(values.dtype), segment_ids)
    return _sums_of_sequences(values, segment_ids) * _reciprocal(lengths, values)


def _sums_of_sequences(values: Tensor, segment_ids: Tensor | None) -> Tensor:
    """Returns at each token the sum over its sequence."""
    if segment_ids is None:
        return values.sum(-1, keepdim=True).expand_as(values)
    sequences = Sequences(values.numel(), segment_ids)
    return sequences.at_tokens(sequences.sums(values))


def _reciprocal(value: int | Tensor, like: Tensor) -> Tensor:
    """Returns 1 / value, and 0 where the value is 0."""
    number = (
        torch.ones((), dtype=like.dtype, device=like.device) * value
    )  # keywords.py, `scales`, says why no as_tensor
    return torch.where(number > 0, 1 / number.clamp(min=1e-30), 0.0)
