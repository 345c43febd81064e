"""The comparison of a model's logits with those of its head, as closely as its dtypes allow.

NOTE [How far logits may be apart]
Let u be the unit roundoff of the GEMM's dtype, with 2 u = eps. The rounding of inputs and of partial sums is an error
of independent parts, u |h_i w_i| each. Its scale is their root of squares, s = |h o w|. Twice eps s bounds it with near
certainty over a million logits. Sums in fp32 add at most 2 eps32 sqrt(H) s. Both sides round their result, eps |z|
together. A softcap adds four roundings, and a scale one. Even a scale of 1.02 or a softcap of 50 shows in the largest
logits of bf16.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from compiled_loss.engine.transforms import without_autocast
from compiled_loss.huggingface import checks
from compiled_loss.huggingface.families import Transform
from compiled_loss.models.output_head import OutputHead

_ROWS = 16
_CLASSES = 8192  # at a time
_LOW = (torch.bfloat16, torch.float16)


@torch.no_grad()
def compare(logits: Tensor, hidden: Tensor, head: OutputHead, transform: Transform) -> None:
    """Raises where the model's logits, of its last K positions, are not those from which the loss is computed."""
    checks.same_shape((*hidden.shape[:2], head.weight.shape[0]), logits)
    theirs, hidden = logits.to(hidden.device).flatten(0, 1), hidden[:, -logits.shape[1] :].flatten(0, 1)
    rows = torch.linspace(0, len(theirs) - 1, min(_ROWS, len(theirs)), device=theirs.device).long()
    theirs, hidden = theirs[rows], hidden[rows]
    dtype = _dtype(theirs, head.weight)
    with without_autocast(hidden.device):
        seen = _Seen.of(theirs, hidden, head, transform, dtype)
        if not seen.agree and dtype not in _LOW:
            # Under autocast the model may convert the product to fp32 before its softcap. Then most logits are equal to
            # the last bit.
            others = (_Seen.of(theirs, hidden, head, transform, low) for low in _LOW)
            seen = next((other for other in others if other.agree and other.alike > 0.5), seen)
    if not seen.agree:
        checks.other_logits(*transform, seen.off)


class _Seen(NamedTuple):
    agree: bool
    alike: float  # the fraction that is equal except for fp32 rounding
    off: float  # the largest difference

    @staticmethod
    def of(theirs: Tensor, hidden: Tensor, head: OutputHead, transform: Transform, dtype: torch.dtype) -> _Seen:
        agree, alike, off = True, 0, 0.0
        for difference, bound, size in _differences(theirs, hidden, head, transform, dtype):
            agree &= bool((difference <= bound).all())
            alike += int((difference <= 8 * torch.finfo(torch.float32).eps * size).sum())
            off = max(off, float(difference.nan_to_num(math.inf).max()))
        return _Seen(agree, alike / theirs.numel(), off)


def _differences(
    theirs: Tensor, hidden: Tensor, head: OutputHead, transform: Transform, dtype: torch.dtype
) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Yields, for some classes at a time, the differences of the logits, their bounds, and the sizes of the logits."""
    exact = torch.promote_types(dtype, torch.float32)
    eps, sums = _eps(dtype), 2 * torch.finfo(exact).eps * math.sqrt(hidden.shape[-1])
    roundings = 1 + 2 * (transform.softcap is not None) + (transform.temperature != 1)
    squares = hidden.to(exact).square()
    for first in range(0, head.weight.shape[0], _CLASSES):
        classes = slice(first, first + _CLASSES)
        weight = head.weight[classes]
        bias = None if head.bias is None else head.bias[classes].to(dtype)
        product = F.linear(hidden.to(dtype), weight.to(dtype), bias).to(exact)
        spread = F.linear(squares, weight.to(exact).square()).sqrt() / abs(transform.temperature)
        own = product
        if transform.softcap is not None:
            own = transform.softcap * torch.tanh(own / transform.softcap)
        own = own / transform.temperature
        difference = (own - theirs[:, classes].to(exact)).abs()
        bound = (2 * eps + sums) * spread + roundings * eps * own.abs() + torch.finfo(dtype).tiny
        tells = product.isfinite()  # products of a model that diverged tell nothing
        yield torch.where(tells, difference, 0), torch.where(tells, bound, 0), own.abs()


def _dtype(logits: Tensor, weight: Tensor) -> torch.dtype:
    """Returns the dtype that the product was rounded to: the coarsest that holds the logits, or the weight's."""
    for low in _LOW:
        if (logits.to(low).to(logits.dtype) == logits).all():
            return low
    return max((logits.dtype, weight.dtype), key=lambda dtype: torch.finfo(dtype).eps)


def _eps(dtype: torch.dtype) -> float:
    """Returns the rounding of a GEMM of this dtype; fp32 may be TF32."""
    own = torch.finfo(dtype).eps
    if dtype != torch.float32:
        return own
    try:
        return {"highest": own, "high": 2**-10, "medium": 2**-7}[torch.get_float32_matmul_precision()]
    except RuntimeError:  # it is set for each backend separately
        return 2**-10
