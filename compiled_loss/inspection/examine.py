"""One inspection, in the child: compile the call, run it on fake tensors, and put together what was seen."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from compiled_loss.engine import execution
from compiled_loss.inspection import attention, errors
from compiled_loss.inspection.attribution import Attribution
from compiled_loss.inspection.call import Request, unpack
from compiled_loss.inspection.compiler import Compiler
from compiled_loss.inspection.modules import forget_gradients, leaves
from compiled_loss.inspection.record import Inspection, Kernel, Pass, Saved
from compiled_loss.inspection.recorder import Recorder


def examine(request: Request, recorder: Recorder, progress: Callable[[str], None]) -> Inspection:
    """Inspects one call on the recorder's device, which this process takes for real or fakes."""
    start = time.monotonic()
    torch.compiler.reset()
    execution.forget()
    recorder.asked = 0
    attribution = Attribution(request.loss)
    compiler = Compiler(recorder, attribution, progress)
    with recorder, compiler.installed():
        fn, inputs = unpack(request.call, recorder.device, data=False)
        compiled = torch.compile(fn, dynamic=request.dynamic, options=request.options)
        _run(request, recorder, compiled, inputs)  # compiles
        gc.collect()  # what the compiler left in cycles
        progress("running on fake tensors")
        for _ in range(3):
            there = recorder.memory.keys()
            forward, backward, saved, parameters = _run(request, recorder, compiled, inputs)
            if there <= recorder.memory.keys():  # else a thread of the compiler's let go of something meanwhile
                break
    del compiled, inputs, fn
    kernels = _assembled(request, compiler, (forward, backward), progress)
    return Inspection(
        name=request.name,
        device=request.device,
        torch=torch.__version__,
        triton=_triton_version(),
        inputs=request.inputs,
        forward=forward,
        backward=backward,
        saved=saved,
        kernels=kernels,
        graphs=tuple(compiler.graphs),
        breaks=tuple(compiler.breaks),
        guards=tuple(compiler.guards),
        parameters=parameters,
        loss=attribution.found,
        notes=attention.notes(request.device, [kernel.name for kernel in kernels if kernel.kind == "attention"]),
        seconds=time.monotonic() - start,
    )


def _run(
    request: Request, recorder: Recorder, compiled: Callable[..., Any], inputs: Sequence[Any]
) -> tuple[Pass, Pass | None, tuple[Saved, ...], tuple[int, ...]]:
    memory = recorder.memory
    before, base = memory.keys(), memory.live
    with recorder.record(base) as passes:
        result = compiled(*inputs)
    results = [v for v in tree_leaves(result) if isinstance(v, Tensor)]
    own = {v.untyped_storage()._cdata for v in results}
    saved = tuple(memory.saved(key) for key in sorted(memory.keys() - before - own))
    backward: Pass | None = None
    parameters: tuple[int, ...] = ()
    if request.backward:
        outputs = [v for v in results if v.requires_grad]
        if not outputs:
            errors.gradient(request.name)
        upstream = [torch.ones_like(v) for v in outputs]
        base += sum(v.untyped_storage().nbytes() for v in upstream)
        wanted = leaves(outputs)
        given = {id(v) for v in tree_leaves(inputs)}
        parameters = tuple(v.untyped_storage().nbytes() for v in wanted if id(v) not in given)
        with recorder.record(base) as more:
            torch.autograd.backward(outputs, upstream)
        backward = more[0]
        forget_gradients(wanted)
        del upstream, outputs, wanted
    return passes[0], backward, saved, parameters


def _assembled(
    request: Request, compiler: Compiler, passes: Sequence[Pass | None], progress: Callable[[str], None]
) -> tuple[Kernel, ...]:
    """Returns every kernel that was launched, with the resources of its machine code."""
    from compiled_loss.inspection.assembler import assemble

    launched = {launch.kernel: launch.kind for p in passes if p is not None for launch in p.launches}
    kernels = []
    for i, (name, kind) in enumerate(launched.items()):
        made = compiler.kernels.get(name)
        kernel = Kernel(name=name, kind=kind, source="" if made is None else made.source)
        if made is not None and made.is_triton and request.assemble:
            progress(f"assembling kernel {i + 1} of {len(launched)}")
            keep = None if request.dump is None else Path(request.dump)
            found = [
                configuration
                for target in request.assemble
                for configuration in assemble(name, made.source, target, first_only=request.first_only, keep=keep)
            ]
            kernel = replace(kernel, configurations=tuple(found))
        kernels.append(kernel)
    return tuple(kernels)


def _triton_version() -> str:
    try:
        import triton
    except ImportError:
        return ""
    return str(triton.__version__)
