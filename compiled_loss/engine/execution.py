"""Execution of a chunk's elementwise mathematics: by a kernel that Inductor wrote once, or eagerly.

NOTE [Execution]
A chunked loss is a plain loop over chunks. Eager code runs the loop as it stands; under `torch.compile` there is one
operator per pass, with the loop inside. The compiler sees the operator and never the loop, so it cannot undo the loop.
Memory is what the loop allocates. Neither the number of graphs nor the compile time depends on the number of chunks.
Only the body is compiled: the elementwise mathematics of a chunk, which reads logits and writes their gradient over
them.

- compiled: Inductor's kernels of the body, NOTE [Kernels].
- eager:    the body in plain torch, a block of rows at a time so that fp32 temporaries stay small.
- traced:   logits that exist have no loop to hide: under `torch.compile` the body is a part of the caller's graph.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from compiled_loss.engine.kernels import Compiled
from compiled_loss.engine.operators import is_compiling

Output = tuple[Tensor, ...]
Body = Callable[..., Output]
Optional = Sequence[Tensor | None]
Known = str | bool | tuple[str | bool | int, ...] | None

_BLOCK = 1 << 19  # the least number of logits per block in eager code: an fp32 temporary has 2 MiB


class Execution(NamedTuple):
    """The ranks and the kind of execution of a loss of logits that exist."""

    group: str | None  # the ranks that share the vocabulary
    compiled: bool  # whether eager code runs compiled bodies


def given(
    body: Body,
    logits: Tensor,
    rows: Optional,
    rest: Optional,
    like: Callable[[], Sequence[Tensor]],
    *,
    compiled: bool,
    **known: Known,
) -> Output:
    """Returns a body's results for logits that exist already, in new tensors; `like` makes the tensors."""
    if is_compiling():
        return body(logits, *_in_order(rows, rest), **_present(known))
    out = like()
    run(body, logits, rows, rest, out, compiled=compiled, **known)
    return tuple(out)


def run(
    body: Body,
    z: Tensor,
    rows: Optional,
    rest: Optional,
    out: Optional,
    *,
    compiled: bool,
    **known: Known,
) -> None:
    """Writes a body's results for logits z, [..., columns], into `out`, in which None stands for a result not wanted.

    The body is called with z, the first of `rows`, all of `rest`, and the other `rows`, in this order. The tensors of
    `rows` have a row for each row of z. `known` are constants of the kernel, such as a `group` of ranks, and are passed
    as keywords. The results of a body are new tensors, so z may be among `out`.
    """
    if is_compiling() or (known.get("group") is not None and not (compiled and z.dim() == 2)):
        # All rows at once: ranks whose columns have another number or layout would otherwise reduce more or less often,
        # and the compiler makes its own blocks.
        _write(out, body(z, *_in_order(rows, rest), **_present(known)))
    elif z.dim() > 2:  # not flattened: any strides, and no copy
        for i in range(z.shape[0]):
            run(body, z[i], _of(i, rows), rest, _of(i, out), compiled=compiled, **known)
    elif compiled and z.shape[0]:
        _compiled(body, z, rows, rest, out, _present(known))
    elif z.shape[0] <= (step := _rows_per_block(z)):
        _write(out, body(z, *_in_order(rows, rest), **_present(known)))
    else:
        for i in range(0, z.shape[0], step):
            block = slice(i, i + step)
            _write(_of(block, out), body(z[block], *_in_order(_of(block, rows), rest), **_present(known)))


def _rows_per_block(z: Tensor) -> int:
    block_size = max(_BLOCK, z.numel() >> 7)  # a temporary is small, or small compared with the chunk
    return max(1, block_size // max(1, z.shape[1]))


def _present(known: dict[str, Known]) -> dict[str, Known]:
    return {name: value for name, value in known.items() if value is not None}


def _in_order(rows: Optional, rest: Optional) -> tuple[Tensor | None, ...]:
    return rows[0], *rest, *rows[1:]


def _of(block: int | slice, rows: Optional) -> list[Tensor | None]:
    return [None if v is None else v[block] for v in rows]


def _write(out: Optional, values: Output) -> Output:
    """Copies each value to its place, and returns the values that have no place."""
    for place, value in zip(out, values, strict=False):
        if place is not None:
            place.copy_(value)
    return tuple([v for place, v in zip(out, values, strict=False) if place is None]) + values[len(out) :]


_KERNELS: dict[tuple[object, ...], Compiled] = {}


def forget() -> None:
    """Makes all bodies compile anew when they are next called; `torch.compiler.reset()` does not reach them."""
    _KERNELS.clear()


def _compiled(body: Body, z: Tensor, rows: Optional, rest: Optional, out: Optional, known: dict[str, Known]) -> None:
    """Does what `run` does, by the kernel for operands of this layout."""
    overwrite = out[0] is z
    operands = (z, *rows, *rest, *(out[1:] if overwrite else out))
    layout = tuple([None if v is None else (v.dtype, v.shape[1:], v.stride()) for v in operands])
    about = (z.device, torch.get_num_threads())  # the kernel is written for both
    key = (body, overwrite, len(rows), len(rest), len(out), about, layout, tuple(known.items()))
    kernel = _KERNELS.get(key)
    if kernel is None:
        kernel = _KERNELS[key] = _kernel(body, operands, len(rows), len(rest), overwrite=overwrite, known=known)
    kernel(*[v for v in operands if v is not None])


def _kernel(
    body: Body, operands: Optional, rows: int, rest: int, *, overwrite: bool, known: dict[str, Known]
) -> Compiled:
    there = [v is not None for v in operands]

    def chunk(*tensors: Tensor) -> Output:
        left = list(tensors)
        z, *others = [left.pop(0) if one else None for one in there]
        of_rows, scalars, out = others[:rows], others[rows : rows + rest], others[rows + rest :]
        values = body(z, *_in_order(of_rows, scalars), **known)
        return _write([z, *out] if overwrite else out, values)

    chunk.__name__ = body.__name__
    of_rows = [not rows < i <= rows + rest for i, one in enumerate(there) if one]
    return Compiled(chunk, of_rows)
