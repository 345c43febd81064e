"""ListMLE with the name and arguments of NeMo Automodel."""

from __future__ import annotations

import torch
from torch import Tensor

from compiled_loss import checks


def listmle_loss(
    logits: Tensor,  # [..., V]
    target_probs: Tensor,  # [..., V]
    topk: int,
) -> Tensor:
    """Computes the negative log-likelihood of a teacher's order of its `topk` most likely classes (Plackett-Luce).

    With z the student's logits at these classes, the teacher's best first, each token's loss is the sum over k of
    log(sum of exp(z[j]) over j >= k) - z[k].

    Args:
        logits: the student's, [..., V], of any floating dtype.
        target_probs: the teacher's probabilities [..., V], or what orders its classes as they do.
        topk: how many classes are ranked, from 1 to V.

    Returns:
        The mean over the tokens, a scalar in fp32 (fp64 for fp64 logits); 0 where there are none.

    Memory:
        O(N topk), and the gradient of the logits [N, V]. `list_mle` in `examples/recipes.py` takes hidden states and
        the head's weight, and creates nothing of [N, V].

    Raises:
        ValueError: a shape is wrong, or `topk` out of range.
        TypeError: a dtype is wrong.

    Source:
        Xia et al. (2008), Listwise approach to learning to rank; NeMo Automodel's function of this name.

    Example:
        >>> import torch
        >>> from compiled_loss import listmle_loss
        >>> listmle_loss(torch.zeros(2, 4), torch.tensor([[0.1, 0.2, 0.3, 0.4]]).expand(2, 4), topk=3)
        tensor(1.7918)

    """
    checks.targets.ranked(logits, target_probs, topk)
    z = logits.gather(-1, target_probs.topk(topk, dim=-1).indices)
    z = z if z.dtype == torch.float64 else z.float()
    losses = z.flip(-1).logcumsumexp(-1).sum(-1) - z.sum(-1)
    return losses.sum() / max(losses.numel(), 1)
