"""Kernels of a function of tensors that Inductor writes once, for any number of rows.

NOTE [Kernels]
We trace a body ourselves, and Inductor compiles it, without Dynamo and AOTAutograd. These are not needed: only the
layout of its operands has to be guarded, nothing is differentiated, and the body writes its inputs only at its end. It
is compiled once for each combination of dtypes, strides and number of columns. The number of rows is a symbol. Fewer
rows than MIN_ROWS have kernels of their own, for which Inductor splits reductions over columns. Inductor's assumptions
about the number of rows, such as that 32 bits count the elements, are checked. If one does not hold, the body is
compiled again.

By default Inductor writes out an expression that reads more than four tensors and is used twice. That would be a second
chunk, in fp32. Here it computes the expression again. Mostly that is in the same kernel, which then computes it once.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
from torch import Tensor

from compiled_loss.engine.transforms import without_autocast
from compiled_loss.planner.plan import MIN_ROWS

Kernel = Callable[[list[Tensor]], Any]
_READS = 1 << 10  # more tensors than any expression reads


def symbolic_rows(rows: int) -> tuple[Any, Any, Any, Any]:
    """Returns a symbolic number of rows, as (its environment, a mode of fake tensors, its symbol, it as a size)."""
    from torch._dynamo.source import ConstantSource
    from torch._subclasses.fake_tensor import FakeTensorMode
    from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv

    env, source = ShapeEnv(), ConstantSource("rows")
    symbol = env.create_symbol(rows, source=source, dynamic_dim=DimDynamic.DYNAMIC, constraint_dim=None)
    return env, FakeTensorMode(shape_env=env), symbol, env.create_symintnode(symbol, hint=rows, source=source)


class Compiled:
    """A function compiled for one layout of its operands; the operands marked by `rows` share their first dimension."""

    def __init__(self, function: Callable[..., Any], rows: Sequence[bool]) -> None:
        self._function, self._rows = function, rows
        self._kernels: list[tuple[bool, list[Any], Any, Kernel]] = []  # whether for few rows; guards on a symbol
        self._of: dict[int, Kernel] = {}

    def __call__(self, *operands: Tensor) -> None:
        """Runs the function on operands of that layout."""
        rows = operands[0].shape[0]
        kernel = self._of.get(rows)
        if kernel is None:
            kernel = self._of[rows] = self._for(rows, operands)
        kernel(list(operands))

    def _for(self, rows: int, operands: Sequence[Tensor]) -> Kernel:
        for few, guards, symbol, kernel in self._kernels:
            if few == (rows < MIN_ROWS) and all(bool(guard.subs(symbol, rows)) for guard in guards):
                return kernel
        return self._compile(rows, operands)

    def _compile(self, rows: int, operands: Sequence[Tensor]) -> Kernel:
        from torch._inductor import config
        from torch._inductor.compile_fx import compile_fx_inner
        from torch._inductor.decomposition import select_decomp_table
        from torch.fx.experimental.proxy_tensor import make_fx
        from torch.fx.traceback import preserve_node_meta

        env, fake, symbol, count = symbolic_rows(max(2, rows))
        tracing = torch._guards.tracing(torch._guards.TracingContext(fake))
        with torch.inference_mode(False), torch.no_grad(), without_autocast(operands[0].device), tracing:
            with fake:
                fakes = [
                    torch.empty_strided(
                        (count, *v.shape[1:]) if of_rows else v.shape, v.stride(), dtype=v.dtype, device=v.device
                    )
                    for v, of_rows in zip(operands, self._rows, strict=True)
                ]
                with preserve_node_meta():  # by which kernels are named
                    graph = make_fx(self._function, select_decomp_table(), tracing_mode="fake")(*fakes)
            with config.patch(realize_reads_threshold=_READS):
                kernel = cast(Kernel, compile_fx_inner(graph, fakes, is_inference=True))
        self._kernels.append((rows < MIN_ROWS, [guard.expr for guard in env.guards], symbol, kernel))
        return kernel
