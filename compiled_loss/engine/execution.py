"""How a body runs on a chunk that the loop has computed: as a kernel that Inductor wrote once, or eagerly.

NOTE [Execution]
A walk's pass is a plain loop over chunks, in eager code as it stands and under `torch.compile` behind one operator. The
compiler sees the operator and never the loop, so that it cannot undo it: memory is what the loop allocates, and neither
graphs nor compile time depend on the number of chunks. What the compiler is asked for is the body, the elementwise
mathematics of a chunk, which reads logits and writes their gradient over them.

- compiled: Inductor's kernels of the body. Compiled at the first call for each combination of device, dtype and
            options, for any number of rows from two on.
- eager:    the body in plain torch, a block of rows at a time so that fp32 temporaries stay small.
"""

from __future__ import annotations

import functools
import types
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

Output = tuple[Tensor, ...]
Body = Callable[..., Output]

LOOPS = False  # True runs linear cross-entropy in token_loop and vocab_loop, instead of nested regions
_BLOCK = 1 << 20  # logits of a block in eager code: 4 MiB a temporary in fp32


def is_compiled(device: torch.device, compile: bool | str) -> bool:
    """Whether bodies are compiled; `compile` is `Chunking`'s, which speaks of eager calls alone."""
    if torch.compiler.is_compiling() or compile != "auto":
        return torch.compiler.is_compiling() or bool(compile)
    return device.type not in ("cpu", "meta")


def run(
    body: Body,
    z: Tensor,
    rows: Sequence[Tensor | None],
    rest: Sequence[Tensor | None],
    out: Sequence[Tensor | None],
    *,
    compiled: bool,
    group: str | None = None,
) -> None:
    """Write what the body returns of logits z [rows, columns] to `out`, in which None is for what nobody wants.

    The body is called with z, the first of `rows`, all of `rest` and the other `rows`, which have a row for each of
    z's. What it returns is new, so that z may be among `out`.
    """
    if compiled and z.shape[0] > 1:
        operands = _in_order(rows, rest)
        present = tuple([v is not None for v in (*operands, None, *out)])
        kernel = _compiled(body, out[0] is z, z.device.type, z.dtype, present, group)
        if not kernel.known:  # any number of rows at once, not one and then any other
            kernel.known = True
            for v in (z, *rows, *out):
                if v is not None:
                    torch._dynamo.maybe_mark_dynamic(v, 0)
        kernel(z, operands, [v for v in out if v is not z], **_over(group))
    elif group is not None:  # whole, or ranks with fewer columns would reduce less often than others
        _write(out, body(z, None, *_in_order(rows, rest), group=group))
    else:
        step = max(1, _BLOCK // max(1, z.shape[1]))
        for i in range(0, max(1, z.shape[0]), step):
            block = slice(i, i + step)
            operands = _in_order(_of(block, rows), rest)
            _write(_of(block, out), body(z[block], None, *operands))


def _over(group: str | None) -> dict[str, str]:
    return {} if group is None else {"group": group}


def _in_order(rows: Sequence[Tensor | None], rest: Sequence[Tensor | None]) -> tuple[Tensor | None, ...]:
    return rows[0], *rest, *rows[1:]


def _of(block: slice, rows: Sequence[Tensor | None]) -> list[Tensor | None]:
    return [None if v is None else v[block] for v in rows]


def _write(out: Sequence[Tensor | None], values: Output) -> Output:
    """Copy each value to its place, and return the values that have none."""
    for place, value in zip(out, values, strict=False):
        if place is not None:
            place.copy_(value)
    return tuple([v for place, v in zip(out, values, strict=False) if place is None]) + values[len(out) :]


class _Kernel:
    """A body compiled for one combination of options."""

    def __init__(self, function: Callable[..., Output]) -> None:
        self.function = torch.compile(function, fullgraph=True)
        self.known = False

    def __call__(self, *args: Any, **keywords: Any) -> Output:
        return self.function(*args, **keywords)


@functools.cache
def _compiled(body: Body, overwrite: bool, *_options: object) -> _Kernel:
    """Dynamo counts recompilations by code object, so each combination of options gets its own."""

    def chunk(z: Tensor, operands: Sequence[Tensor | None], out: Sequence[Tensor | None], **over: str) -> Output:
        return _write([z, *out] if overwrite else out, body(z, None, *operands, **over))

    code = chunk.__code__.replace(co_name=body.__name__)
    own = types.FunctionType(code, chunk.__globals__, body.__name__, None, chunk.__closure__)
    return _Kernel(own)
