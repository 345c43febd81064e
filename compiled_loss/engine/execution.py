"""How the elementwise mathematics of a chunk runs: as a kernel that Inductor wrote once, or eagerly.

NOTE [Execution]
A chunked loss is a plain loop over chunks, in eager code as it stands and under `torch.compile` behind one operator a
pass. The compiler sees the operator and never the loop, so that it cannot undo it: memory is what the loop allocates,
and neither graphs nor compile time depend on the number of chunks. What the compiler is asked for is the body, the
elementwise mathematics of a chunk, which reads logits and writes their gradient over them.

- compiled: Inductor's kernels of the body. Compiled at the first call for each combination of device, dtype and
            options, for any number of rows from two on.
- eager:    the body in plain torch, a block of rows at a time so that fp32 temporaries stay small.
- traced:   logits that exist have no loop to hide: under `torch.compile` the body is a part of the caller's graph.
"""

from __future__ import annotations

import functools
import types
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

Output = tuple[Tensor, ...]
Body = Callable[..., Output]
Optional = Sequence[Tensor | None]

_BLOCK = 1 << 20  # logits of a block in eager code: 4 MiB a temporary in fp32


def is_compiled(device: torch.device, compile: bool | str) -> bool:
    """Whether bodies are compiled; `compile` is `Chunking`'s, which speaks of eager calls alone."""
    if torch.compiler.is_compiling() or compile != "auto":
        return torch.compiler.is_compiling() or bool(compile)
    return device.type not in ("cpu", "meta")


def given(
    body: Body,
    logits: Tensor,
    rows: Optional,
    rest: Optional,
    like: Callable[[], Sequence[Tensor]],
    *,
    compile: bool | str,
    group: str | None = None,
) -> Output:
    """What `run` writes of logits that exist, in new tensors; `like` makes them."""
    if torch.compiler.is_compiling():
        return body(logits, *_in_order(rows, rest), **_over(group))
    out = like()
    run(body, logits, rows, rest, out, compiled=is_compiled(logits.device, compile), group=group)
    return tuple(out)


def run(
    body: Body,
    z: Tensor,
    rows: Optional,
    rest: Optional,
    out: Optional,
    *,
    compiled: bool,
    group: str | None = None,
) -> None:
    """Write what the body returns of logits z [..., columns] to `out`, in which None is for what nobody wants.

    The body is called with z, the first of `rows`, all of `rest` and the other `rows`, which have a row for each of
    z's. What it returns is new, so that z may be among `out`.
    """
    if compiled and z.shape[0] > 1:
        operands = _in_order(rows, rest)
        present = tuple([v is not None for v in (*operands, None, *out)])
        kernel = _compiled(body, out[0] is z, z.device.type, z.dtype, z.dim(), present, group)
        if not kernel.known:  # any number of rows at once, not one and then any other
            kernel.known = True
            for v in (z, *rows, *out):
                if v is not None:
                    torch._dynamo.maybe_mark_dynamic(v, list(range(z.dim() - 1)))
        kernel.function(z, operands, [v for v in out if v is not z], **_over(group))
    elif group is not None:  # whole, or ranks with fewer columns would reduce less often than others
        _write(out, body(z, *_in_order(rows, rest), group=group))
    elif z.dim() > 2:  # not flattened: any strides, and no copy
        for i in range(z.shape[0]):
            run(body, z[i], _of(i, rows), rest, _of(i, out), compiled=compiled)
    else:
        step = max(1, _BLOCK // max(1, z.shape[1]))
        for i in range(0, max(1, z.shape[0]), step):
            block = slice(i, i + step)
            _write(_of(block, out), body(z[block], *_in_order(_of(block, rows), rest)))


def _over(group: str | None) -> dict[str, str]:
    return {} if group is None else {"group": group}


def _in_order(rows: Optional, rest: Optional) -> tuple[Tensor | None, ...]:
    return rows[0], *rest, *rows[1:]


def _of(block: int | slice, rows: Optional) -> list[Tensor | None]:
    return [None if v is None else v[block] for v in rows]


def _write(out: Optional, values: Output) -> Output:
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


@functools.cache
def _compiled(body: Body, overwrite: bool, *_options: object) -> _Kernel:
    """Dynamo counts recompilations by code object, so each combination of options gets its own."""

    def chunk(z: Tensor, operands: Optional, out: Optional, **over: str) -> Output:
        return _write([z, *out] if overwrite else out, body(z, *operands, **over))

    code = chunk.__code__.replace(co_name=body.__name__)
    return _Kernel(types.FunctionType(code, chunk.__globals__, body.__name__, None, chunk.__closure__))
