"""GEMMs and sums that write into given tensors: plain code for loops that the compiler does not see."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from compiled_loss.checks import numbers
from compiled_loss.engine.operators import is_compiling

_BLOCK = 1 << 21  # elements of the temporary product where a device has no GEMM that adds into a wider dtype
_LEAST_WIDTH = 512  # columns of a GEMM that fill a GPU
_CLASSES, _FEW_ROWS = 512, 1024  # of fp32 GEMMs on a CPU: 512 rows of 320 by 50257 take 136 ms by 512, 183 at once


def logits(hidden: Tensor, weight: Tensor, *, out: Tensor) -> Tensor:
    """Computes out = hidden @ weight.T, on a CPU a few classes at a time where that takes less time."""
    rows, classes = out.shape
    if out.device.type != "cpu" or out.dtype != torch.float32 or rows > _FEW_ROWS or classes <= 4 * rows:
        return torch.mm(hidden, weight.t(), out=out)
    for i in range(0, classes, _CLASSES):
        torch.mm(hidden, weight[i : i + _CLASSES].t(), out=out[:, i : i + _CLASSES])
    return out


def rows_of(value: Tensor, start: int, count: int) -> Tensor:
    """Returns value[start : start + count], which is `value` itself if it has no other rows: a view takes time, too."""
    return value if count == value.shape[0] else value.narrow(0, start, count)


class Counted(NamedTuple):
    """The rows that count, and the number as which all others' hidden states are taken."""

    active: Tensor  # [N, 1] bool
    zero: Tensor  # []

    @staticmethod
    def of(active: Tensor, hidden: Tensor) -> Counted | None:
        """Makes it once for all chunks, from `active`, [N]; None if all rows are known to count."""
        if numbers.can_read_values(active) and bool(active.all()):
            return None
        return Counted(active.unsqueeze(1), hidden.new_zeros(()))


def accumulate_gradients(
    d_hidden: Tensor | None,  # [N, H]
    d_weight: Tensor | None,  # [V, H]
    d_bias: Tensor | None,  # [V], in the statistics' dtype
    d: Tensor,  # [rows, columns], the gradient of a chunk of logits
    hidden: Tensor,  # [rows, H]
    weight: Tensor,  # [columns, H]
    counted: Counted | None,
    row: int,
    column: int,
    scale: Tensor | None,
) -> None:
    """Adds a chunk's gradients from (row, column) on: dH += d @ weight, dW += d.T @ hidden and db += d.sum(0).

    Chunks are either of rows or of columns. The first chunk in a place writes instead of adding. `scale`, which
    multiplies dW, is given only with chunks of columns. Hidden states of rows that do not count are taken as 0: their d
    is 0, and 0 * NaN would be NaN in all of dW. Unless all rows count, this takes a copy of the hidden states. It is
    written where dH is written next, or made for a few columns at a time.
    """
    states = None if d_hidden is None else rows_of(d_hidden, row, d.shape[0])
    if d_weight is not None:
        place = rows_of(d_weight, column, d.shape[1])
        if counted is None:
            _add_to_weight(place, d, hidden, scale, write=not row)
        elif states is not None and not column and states.dtype == hidden.dtype:
            seen = torch.where(rows_of(counted.active, row, d.shape[0]), hidden, counted.zero, out=states)
            _add_to_weight(place, d, seen, scale, write=not row)
        else:
            active = rows_of(counted.active, row, d.shape[0])
            width = max(_LEAST_WIDTH, d.shape[1] // 16)  # a copy of a 16th of the chunk
            for part, block in zip(place.split(width, 1), hidden.split(width, 1), strict=True):
                _add_to_weight(part, d, torch.where(active, block, counted.zero), scale, write=not row)
    if states is not None:
        (_add_product if column else _mm_out)(states, d, weight)
    if d_bias is not None:
        _add_column_sums(rows_of(d_bias, column, d.shape[1]), d, write=not row)


def _add_to_weight(out: Tensor, d: Tensor, hidden: Tensor, scale: Tensor | None, *, write: bool) -> None:
    if scale is not None:
        _scaled_mm_out(out, d.t(), hidden, scale)
    else:
        (_mm_out if write else _add_product)(out, d.t(), hidden)


def _add_column_sums(out: Tensor, d: Tensor, *, write: bool) -> None:
    # For a sum in a wider dtype torch first copies the whole input on a CPU.
    copied = d.dtype != out.dtype and d.device.type == "cpu"
    columns = max(1, _BLOCK // max(1, d.shape[0]) if copied else d.shape[1])
    for block, part in zip(out.split(columns), d.split(columns, 1), strict=True):
        if write:
            torch.sum(part, 0, dtype=out.dtype, out=block)
        else:
            block.add_(part.sum(0, dtype=out.dtype))


def _mm_out(out: Tensor, a: Tensor, b: Tensor) -> None:
    if out.dtype == a.dtype:
        torch.mm(a, b, out=out)
    else:
        out.zero_()
        _add_product(out, a, b)


def _scaled_mm_out(out: Tensor, a: Tensor, b: Tensor, scale: Tensor) -> None:
    """Computes out = (a @ b) * scale with one rounding: a sum over tokens may exceed fp16's range before the scale."""
    rows = max(1, _BLOCK // max(1, b.shape[1]))
    for block, part in zip(out.split(rows), a.split(rows), strict=True):
        block.copy_(_wide_product(part, b) * scale)


def _wide_product(a: Tensor, b: Tensor) -> Tensor:
    """Returns a @ b in fp32."""
    if _adds_wide(a):
        return torch.mm(a, b, out_dtype=torch.float32)
    return a.float() @ b.float()


def _adds_wide(a: Tensor) -> bool:
    """Returns True if the device has GEMMs of 16-bit inputs and fp32 results."""
    return a.is_cuda and torch.version.hip is None


def _add_product(accumulator: Tensor, a: Tensor, b: Tensor) -> None:
    if accumulator.dtype == a.dtype:
        torch.addmm(accumulator, a, b, out=accumulator)  # torch counts the operations of addmm, but not of addmm_
    elif _adds_wide(a) and accumulator.dtype == torch.float32:
        torch.ops.aten.addmm.dtype_out(accumulator, a, b, torch.float32, out=accumulator)
    else:
        rows = max(1, _BLOCK // max(1, b.shape[1]))
        for block, part in zip(accumulator.split(rows), a.split(rows), strict=True):
            block.add_(_wide_product(part, b) if a.dtype == torch.float16 else part @ b)


@torch.library.custom_op("compiled_loss::opaque_copy", mutates_args=())
def opaque_copy(x: Tensor, after: Sequence[Tensor]) -> Tensor:
    """Returns a copy of x that is made once `after` has been computed; the compiler does not look through it."""
    return x.clone(memory_format=torch.contiguous_format)


@opaque_copy.register_fake
def _(x: Tensor, after: Sequence[Tensor]) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def scaled(gradient: Tensor, factor: Tensor, dtype: torch.dtype) -> Tensor:
    """Returns gradient * factor in `dtype`, with one rounding.

    Eager torch would first round the factor to the gradient's dtype.
    """
    if is_compiling():
        return (gradient * factor.to(torch.promote_types(gradient.dtype, torch.float32)).expand_as(gradient)).to(dtype)
    out = torch.empty_like(gradient, dtype=dtype)
    rows = max(1, _BLOCK // max(1, gradient[:1].numel()))
    for block, part in zip(out.split(rows), gradient.split(rows), strict=True):
        block.copy_(part.to(factor.dtype) * factor)
    return out


def scaled_(gradient: Tensor, factor: Tensor, dtype: torch.dtype) -> Tensor:
    """Returns gradient * factor as `scaled` does, written over the gradient if the dtypes are the same.

    Autograd keeps the gradient and would refuse a second backward if it saw the write, so the write is hidden from it.
    """
    if gradient.dtype != dtype:
        return scaled(gradient, factor, dtype)
    out = gradient.data
    if out.dtype == factor.dtype:
        return torch.mul(out, factor, out=out)
    for block in out.split(max(1, _BLOCK // max(1, out[:1].numel()))):
        block.copy_(block.to(factor.dtype) * factor)
    return out
