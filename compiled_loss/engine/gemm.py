"""GEMMs and sums that write where they are told, and the operators around them that keep the compiler honest.

Inductor functionalises `acc.addmm_(a, b)` into a new [V, H] per chunk plus a copy; an operator that declares what
it writes keeps one accumulator for the whole loop. What an operator here really writes is read by nothing but operators
here until the loop is over: Inductor 2.15 was seen to move an ordinary read of such a buffer behind the next write.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from compiled_loss.engine.statistics import looked_at

_BLOCK = 1 << 21  # elements of the temporary product where a device has no GEMM that adds into a wider dtype
_LEAST_WIDTH = 512  # columns of a GEMM that fill a GPU


def logits(source: Tensor, weight: Tensor | None) -> Tensor:
    """As they are, or of hidden states."""
    return source if weight is None else dense(source @ weight.t())


def dense(x: Tensor) -> Tensor:
    """A new tensor [rows, columns], no view, whose rows the compiler may not pad.

    Of 50257 classes it pads them in logits, but not in what leaves a graph, or in backward the other way round; and a
    gradient cannot be written over logits that lie otherwise.
    """
    return x.as_strided(x.shape, (x.shape[1], 1))


@torch.library.custom_op("compiled_loss::add_gradients_", mutates_args={"fenced", "d_hidden", "d_weight", "d_bias"})
def add_gradients_(
    fenced: Tensor,
    d_hidden: Tensor | None,  # [N, H]
    d_weight: Tensor | None,  # [V, H]
    d_bias: Tensor | None,  # [V], in the statistics' dtype
    d: Tensor,  # [rows, columns], the gradient of a chunk of logits
    hidden: Tensor,  # [rows, H]
    weight: Tensor,  # [columns, H]
    active: Tensor | None,  # [N] bool; None where `fenced` are labels, which know it
    row: int,
    column: int,
    scale: Tensor | None,
    after: Sequence[Tensor],
) -> None:
    """Where the chunk lies, from (row, column) on, dH += d @ weight, dW += d.T @ hidden and db += d.sum(0).

    Chunks come by rows or by columns: the first in a place writes it. `scale`, of a walk by columns, is dW's. Hidden
    states of rows that are not `active` are taken as 0: their d is 0, and 0 * NaN would be NaN in all of dW. The copy
    lies where dH is written next, or is one of a few columns at a time. One operator, since each that writes costs the
    compiler over 10 ms a chunk; and a kernel of Inductor's for the sums took 33 instructions a logit in sm_90 code.

    NOTE [Order]
    Nothing but memory makes the second chunk wait for the first, and the compiler is free not to: Inductor ran all the
    regions of a backward before its GEMMs and held every chunk's gradient, and the partitioner moves the token walk's
    dW GEMMs into backward with their [C, V] inputs where that is less to keep, as of a single chunk with N < H. So what
    reads `fenced` from here on, as every chunk does, comes after these GEMMs and after `after`, and the token walk's
    loss is joined after all of them. `after` is the chunk's other results, for the list in which a region returns them
    holds the gradient until the last is taken out, which Inductor may put off to the end. Chunks that reduce over ranks
    must do so in the same order on each, whose shapes may differ, or ranks wait for ever: they take turns.

    `fenced` is never really written. It is the result of a computation, not a clone: of a slice's clone the compiler
    reads the slice, and where the operator is unfolded from its storage's start (torch 2.11 to 2.15, silently).
    """
    counts = looked_at(fenced) if active is None else active  # a tensor less for the compiler to write out
    accumulate_gradients(d_hidden, d_weight, d_bias, d, hidden, weight, counts, row, column, scale)


def accumulate_gradients(
    d_hidden: Tensor | None,  # [N, H]
    d_weight: Tensor | None,  # [V, H]
    d_bias: Tensor | None,  # [V], in the statistics' dtype
    d: Tensor,  # [rows, columns], the gradient of a chunk of logits
    hidden: Tensor,  # [rows, H]
    weight: Tensor,  # [columns, H]
    counts: Tensor,  # [N] bool
    row: int,
    column: int,
    scale: Tensor | None,
) -> None:
    """Do what `add_gradients_` says, in plain code for a loop that the compiler does not see."""
    states = None if d_hidden is None else d_hidden.narrow(0, row, d.shape[0])
    if d_weight is not None:
        counts, zero = counts.narrow(0, row, d.shape[0]).unsqueeze(1), hidden.new_zeros(())
        free = states is not None and not column and states.dtype == hidden.dtype
        width = hidden.shape[1] if free else max(_LEAST_WIDTH, d.shape[1] // 16)  # a copy of a 16th of the chunk
        parts = d_weight.narrow(0, column, d.shape[1]).split(width, 1)
        for part, block in zip(parts, hidden.split(width, 1), strict=True):
            seen = torch.where(counts, block, zero, out=states if free else None)
            if scale is None:
                (_add_product if row else _mm_out)(part, d.t(), seen)
            else:
                _scaled_mm_out(part, d.t(), seen, scale)
    if states is not None:
        (_add_product if column else _mm_out)(states, d, weight)
    if d_bias is not None:
        _add_column_sums(d_bias.narrow(0, column, d.shape[1]), d, write=row == 0)


def _add_column_sums(out: Tensor, d: Tensor, *, write: bool) -> None:
    # For a wider sum torch first copies all it sums on a CPU.
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
    """Out = (a @ b) * scale, rounded once: a sum over tokens may be past fp16's range before it is scaled."""
    rows = max(1, _BLOCK // max(1, b.shape[1]))
    for block, part in zip(out.split(rows), a.split(rows), strict=True):
        block.copy_(_wide_product(part, b) * scale)


def _wide_product(a: Tensor, b: Tensor) -> Tensor:
    """A @ b in fp32."""
    if _adds_wide(a):
        return torch.mm(a, b, out_dtype=torch.float32)
    return a.float() @ b.float()


def _adds_wide(a: Tensor) -> bool:
    """Whether the device has GEMMs of 16-bit inputs and fp32 results."""
    return a.is_cuda and torch.version.hip is None


def _add_product(accumulator: Tensor, a: Tensor, b: Tensor) -> None:
    if accumulator.dtype == a.dtype:
        torch.addmm(accumulator, a, b, out=accumulator)  # torch counts its operations, and not addmm_'s
    elif _adds_wide(a) and accumulator.dtype == torch.float32:
        torch.ops.aten.addmm.dtype_out(accumulator, a, b, torch.float32, out=accumulator)
    else:
        rows = max(1, _BLOCK // max(1, b.shape[1]))
        for block, part in zip(accumulator.split(rows), a.split(rows), strict=True):
            block.add_(_wide_product(part, b) if a.dtype == torch.float16 else part @ b)


@torch.library.custom_op("compiled_loss::join", mutates_args=())
def join(parts: Sequence[Tensor], after: Sequence[Tensor]) -> Tensor:
    """Rows of all chunks in one tensor, once `after` is there: NOTE [Order].

    Opaque: Inductor reads all parts of a concatenation in the kernel that uses it, whose registers then spill and
    whose code depends on how many chunks there are.
    """
    return torch.cat(list(parts))


@join.register_fake
def _(parts: Sequence[Tensor], after: Sequence[Tensor]) -> Tensor:
    return torch.cat(list(parts))


@torch.library.custom_op("compiled_loss::fence_", mutates_args={"x"})
def fence_(x: Tensor) -> None:
    """Do nothing, opaquely: what made x and what reads it from here on are not one kernel."""


@torch.library.custom_op("compiled_loss::in_turn", mutates_args=())
def in_turn(x: Tensor, after: Sequence[Tensor]) -> Tensor:
    """A copy of x, made once `after` is there: NOTE [Order]."""
    return x.clone(memory_format=torch.contiguous_format)


@in_turn.register_fake
def _(x: Tensor, after: Sequence[Tensor]) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def taking_turns(x: Tensor, group: str | None, after: Sequence[Tensor]) -> Tensor:
    """A chunk of x where chunks reduce over a group: NOTE [Order]."""
    return x if group is None else in_turn(x, after)


def scaled(gradient: Tensor, factor: Tensor, dtype: torch.dtype) -> Tensor:
    """Gradient * factor in `dtype`, with one rounding; eager torch would first round the factor to gradient's dtype."""
    if torch.compiler.is_compiling():
        return (gradient * factor.to(torch.promote_types(gradient.dtype, torch.float32)).expand_as(gradient)).to(dtype)
    out = torch.empty_like(gradient, dtype=dtype)
    rows = max(1, _BLOCK // max(1, gradient[:1].numel()))
    for block, part in zip(out.split(rows), gradient.split(rows), strict=True):
        block.copy_(part.to(factor.dtype) * factor)
    return out


def scaled_(gradient: Tensor, factor: Tensor, dtype: torch.dtype) -> Tensor:
    """Return gradient * factor as `scaled` does, written over the gradient where the dtypes are the same.

    Autograd keeps the gradient and would refuse a second backward if it saw the write, so it does not see it.
    """
    if gradient.dtype != dtype:
        return scaled(gradient, factor, dtype)
    out = gradient.data
    for block in out.split(max(1, _BLOCK // max(1, out[:1].numel()))):
        block.copy_(block.to(factor.dtype) * factor)
    return out
