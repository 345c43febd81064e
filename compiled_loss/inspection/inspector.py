"""The entry of an inspection: what to inspect, for which device, in which process."""

from __future__ import annotations

import dataclasses
import functools
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from compiled_loss.inspection import call, errors
from compiled_loss.inspection.call import Request
from compiled_loss.inspection.process import Child, Progress, child_for
from compiled_loss.inspection.record import Inspection, Measured
from compiled_loss.inspection.targets import TARGETS, Target

_NEEDS_TIMING = ("max_autotune", "max_autotune_gemm", "force_shape_pad", "autotune_at_compile_time")


def inspect(
    fn: Callable[..., Any],
    *inputs: Any,
    device: str = "cuda:sm_90",
    backward: bool = True,
    dynamic: bool | None = None,
    options: dict[str, Any] | None = None,
    assemble: bool | Sequence[str] = True,
    first_only: bool = False,
    measure: bool = True,
    loss: str | Sequence[str] | None = None,
    dump: str | Path | None = None,
    progress: Progress | None = None,
) -> Inspection:
    """Reports what `torch.compile` makes of `fn(*inputs)` and its backward, for a GPU that need not be there.

    Args:
        fn: any function or Module; it travels to a child process, by name where it can be imported, else by value.
        inputs: its arguments. A tensor stands for its shape, stride, dtype and requires_grad (its data are not read,
            but for the range of integers), so that `device="meta"` serves; so does text: "bf16[8192,4096]:grad",
            "int64[8192]:0..131071".
        device: "cuda:sm_80", "cuda:sm_90", "cuda:sm_100" or "hip:gfx942", on any Linux machine; "cpu"; or "cuda", the
            GPU that is there.
        backward: also differentiate every result that requires grad, with respect to every input and parameter that
            does.
        dynamic: as torch.compile takes it.
        options: Inductor's, as torch.compile takes them.
        assemble: make machine code of every kernel, for `device` or for the targets named; all of one vendor. A GPU's
            kernels only.
        first_only: assemble the configuration that Inductor would try first, not all of them.
        measure: run it as well where `device` is "cpu" or "cuda", and set `measured`.
        loss: names of functions, Modules or their attributes that make up the loss of a model, its head included; None
            for the usual ones ("lm_head", "embed_out", "cross_entropy", "ForCausalLMLoss"). Ours are known.
        dump: a folder to write graphs, host code, kernels, machine code and an index page to.
        progress: called with one line of text at each step.

    Returns:
        A frozen `Inspection`.

    Memory:
        None on the device for a target: its tensors have no data. The child process takes about 1 GiB of the host's.

    Raises:
        InspectionError: that says what to change, where the device is unknown, something is missing (a C++ compiler,
            triton), `fn` cannot be sent, raises or gives nothing to differentiate, or the child process ends.
        ValueError: for text that describes no tensor.

    Example:
        >>> from compiled_loss.inspection import inspect
        >>> import torch
        >>> found = inspect(torch.logsumexp, "f32[64,1000]:grad", 1, device="cpu", measure=False)
        >>> found.saved_bytes, len(found.breaks)  # backward needs the input and the result, nothing else
        (0, 0)

    """
    real = device in ("cpu", "cuda")
    if not real and device not in TARGETS:
        errors.device(device, list(TARGETS))
    fn = getattr(fn, "_torchdynamo_orig_callable", getattr(fn, "_orig_mod", fn))  # compiled already
    timed = sorted(k for k, v in (options or {}).items() if v and k in _NEEDS_TIMING)
    if timed and device != "cpu":
        errors.timing(timed)
    inputs = tuple(call.TensorSpec.parse(v) if isinstance(v, str) else v for v in inputs)
    target = _present_gpu() if device == "cuda" else TARGETS.get(device)
    request = Request(
        call=call.pack(fn, inputs),
        name=_name(fn),
        device=device if target is None else target.name,
        backward=backward,
        dynamic=dynamic,
        options=options,
        assemble=_targets(assemble, target),
        first_only=first_only,
        dump=None if dump is None else str(Path(dump).absolute()),
        inputs=tuple(_describe(v) for v in inputs),
        loss=None if loss is None else (loss,) if isinstance(loss, str) else tuple(loss),
    )
    child = child_for(target, _file_of(fn))
    found = Inspection.from_json(child.ask("examine", request, request.name, progress))
    if real and measure:
        if progress is not None:
            progress(f"running on {device}")
        found = dataclasses.replace(found, measured=_measured(dataclasses.replace(request, device=device)))
    if dump is not None:
        from compiled_loss.inspection.dump import dump as write

        write(found, Path(dump))
    return found


def _measured(request: Request) -> Measured:
    child = Child(None)
    try:
        return Measured(**child.ask("measure", request, request.name))
    finally:
        child.close()


def _targets(assemble: bool | Sequence[str], target: Target | None) -> tuple[Target, ...]:
    if isinstance(assemble, bool):
        return (target,) if assemble and target is not None else ()
    for name in assemble:
        if name not in TARGETS:
            errors.device(name, list(TARGETS))
    named = tuple(TARGETS[name] for name in assemble)
    if any(target is None or t.backend != target.backend for t in named):
        errors.targets(list(assemble), "cpu" if target is None else target.name)
    return named


def _present_gpu() -> Target:
    """Returns the real GPU, asked of another process, because this one's CUDA state is the caller's."""
    child = Child(None)
    try:
        properties = child.ask("properties", None, "cuda")
    finally:
        child.close()
    if isinstance(properties, str):
        errors.gpu(properties)
    return Target(**properties)


def _file_of(fn: Callable[..., Any]) -> str | None:
    """Returns the file of the function's module."""
    while isinstance(fn, functools.partial):
        fn = fn.func
    file = getattr(sys.modules.get(getattr(fn, "__module__", "")), "__file__", None)
    return file if file and os.path.exists(file) else None


def _name(fn: Callable[..., Any]) -> str:
    return getattr(fn, "__name__", type(fn).__name__)


def _describe(value: Any) -> str:
    if isinstance(value, Tensor):
        return str(call.TensorSpec.of(value))
    return str(value) if isinstance(value, call.TensorSpec) else repr(value)
