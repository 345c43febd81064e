"""A layer between Inductor and the device: it keeps what Inductor generates, and runs the host code on a `Recorder`.

It patches torch for the life of the process, which is a child's (`child.py`).
"""

from __future__ import annotations

import hashlib
import operator
import os
import re
import sys
import traceback
import types
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, Literal
from unittest import mock

import torch
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

from compiled_loss.inspection import modules
from compiled_loss.inspection.attribution import MARK, Attribution
from compiled_loss.inspection.kernels import GeneratedKernel, Kernels
from compiled_loss.inspection.record import Break, Graph, Guard
from compiled_loss.inspection.recorder import Recorder

_LIBRARIES = (os.path.dirname(torch.__file__), os.path.dirname(os.path.dirname(__file__)))


def _stop(lowering: Any) -> None:
    generated = lowering.codegen()
    wrapper = generated[0] if isinstance(generated, tuple) else generated
    raise _Generated(str(getattr(wrapper, "value", wrapper)), lowering.constants)


def _copy_constant(lowering: Any, name: str, device: torch.device | None) -> str:
    """Names the device's copy of a constant, which Inductor makes as it compiles; it is on "meta", not on a device."""
    if device is None or lowering.constants[name].device == device:
        return name
    copy = f"{name}_{device.type}{device.index or 0}"
    with _disable_current_modes():
        lowering.constants[copy] = lowering.constants[name].to("meta")
    return copy


def _traced(call: Callable[..., Any]) -> Callable[..., Any]:
    """Returns a call that traces as before, except that a number which it brings to the device is unknown from then on.

    No device holds the number.
    """

    def traced(mode: Any, func: Any, pre_dispatch: bool, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
        if not any(isinstance(v, torch.device) and v.type == "cuda" for v in (*args, *kwargs.values())):
            return call(mode, func, pre_dispatch, args, kwargs)
        with mock.patch("torch.fx.experimental.proxy_tensor.CONSTANT_NUMEL_LIMIT", -1):
            return call(mode, func, pre_dispatch, args, kwargs)

    return traced


class _Generated(Exception):  # noqa: N818
    """Raised in the place where Inductor would load its code."""

    def __init__(self, source: str, constants: dict[str, Tensor]) -> None:
        super().__init__("host code")
        self.source = source
        self.constants = constants


_VALUE_GUARDS = (
    "EQUALS_MATCH",
    "CONSTANT_MATCH",
    "BOOL_MATCH",
    "NONE_MATCH",
    "SEQUENCE_LENGTH",
    "DICT_KEYS",
    "GRAD_MODE",
)


class Compiler:
    """Inductor, with its code kept and its launches recorded."""

    def __init__(self, recorder: Recorder, attribution: Attribution, progress: Callable[[str], None]) -> None:
        self.recorder = recorder
        self.attribution = attribution
        self.graphs: list[Graph] = []
        self.breaks: list[Break] = []
        self.guards: list[Guard] = []
        self.kernels: dict[str, GeneratedKernel] = {}
        self._progress = progress
        self._modules: dict[str, types.ModuleType] = {}
        self._inner: Callable[..., Any]

    @contextmanager
    def installed(self) -> Iterator[None]:
        """Replaces Inductor's last step, wherever torch.compile is called from, and listens to Dynamo's guards."""
        from torch._dynamo.guards import CheckFunctionManager
        from torch._functorch import config as functorch_config
        from torch._inductor import compile_fx as inductor
        from torch._inductor import config
        from torch._inductor.graph import GraphLowering
        from torch.fx.experimental import proxy_tensor

        build_guards = CheckFunctionManager.__init__
        compile_fx, self._inner = inductor.compile_fx, inductor.compile_fx_inner

        def listen(manager: Any, code: Any, output: Any, *positional: Any, **keywords: Any) -> None:
            build_guards(manager, code, output, *positional, **keywords)
            self._keep_guards(output)

        def compile_and_keep(gm: Any, example_inputs: Sequence[Any], *positional: Any, **keywords: Any) -> Any:
            self._keep_break(gm)
            self._progress(f"graph {len(self.graphs) + 1} traced")
            return compile_fx(gm, example_inputs, *positional, **{**keywords, "inner_compile": self._compile_inner})

        with ExitStack() as stack:
            stack.enter_context(mock.patch.object(CheckFunctionManager, "__init__", listen))
            stack.enter_context(mock.patch.object(GraphLowering, "_compile_to_module", _stop))
            stack.enter_context(mock.patch.object(GraphLowering, "constant_name", _copy_constant))
            stack.enter_context(mock.patch.object(inductor, "compile_fx", compile_and_keep))
            stack.enter_context(mock.patch.object(inductor, "compile_fx_inner", self._compile_inner))  # our bodies
            stack.enter_context(mock.patch.object(proxy_tensor, "proxy_call", _traced(proxy_tensor.proxy_call)))
            stack.enter_context(mock.patch.object(torch.utils, "swap_tensors", modules.swap))
            stack.enter_context(mock.patch.object(torch.nn.init, "_no_grad_trunc_normal_", modules.draw))
            stack.enter_context(self.attribution.marking())
            stack.enter_context(modules.started(self.recorder))
            # These would compute on the device: constants, a number's copy, and timing of padded GEMMs.
            stack.enter_context(config.patch(joint_graph_constant_folding=False, shape_padding=False))
            stack.enter_context(config.patch(fx_graph_cache=False))
            stack.enter_context(
                functorch_config.patch(enable_autograd_cache=False, graphsafe_rng_functionalization=False)
            )
            yield

    def _compile_inner(self, gm: torch.fx.GraphModule, example_inputs: Sequence[Any], **keywords: Any) -> Any:
        """Runs Inductor's `compile_fx_inner` up to the host code; returns a function that runs it on the recorder."""
        nodes = gm.print_readable(print_output=False)
        outputs = next(n for n in gm.graph.nodes if n.op == "output").args[0]
        origins = [self._origin(n) for n in outputs] if isinstance(outputs, (list, tuple)) else []
        try:
            self._inner(gm, example_inputs, **keywords)
        except Exception as error:
            generated = getattr(error, "inner_exception", error)
            if not isinstance(generated, _Generated):
                raise
            source, constants = generated.source, generated.constants
        else:
            return gm.forward  # a graph with nothing to compute
        direction: Literal["forward", "backward"] = "backward" if keywords.get("is_backward") else "forward"
        inside = self.recorder.inside[-1] if self.recorder.inside else ""
        self.graphs.append(Graph(direction=direction, operator=inside, nodes=nodes, wrapper=MARK.sub("", source)))
        self._progress(f"{direction} graph {sum(g.direction == direction for g in self.graphs)} generated")

        def run(arguments: list[Any]) -> Any:
            with self.recorder.attributing():
                results = self._module(source, constants).call(arguments)
            for value, origin in zip(results, origins, strict=False):
                if isinstance(value, Tensor) and origin is not None:
                    self.recorder.memory.name(value, *origin)
            return results

        run._boxed_call = True  # type: ignore[attr-defined]
        return run

    def _origin(self, node: Any) -> tuple[str, str, bool] | None:
        """Returns a graph output's operator, the program's line that asked for it, and whether it is the loss's."""
        if not isinstance(node, torch.fx.Node) or node.op == "placeholder":
            return None
        made = node.meta.get("original_aten", node.target)
        if made is operator.getitem and isinstance(node.args[0], torch.fx.Node):  # one of several results
            made = node.args[0].args[0] if node.args[0].args else node.args[0].target
        frames = re.findall(r'File "(.+?)", line (\d+)', node.meta.get("stack_trace") or "")
        line = _innermost([(name, int(line)) for name, line in frames])
        return f"{node.name} = {made}", line, self.attribution.holds(node)

    def _keep_break(self, gm: Any) -> None:
        reason = getattr(gm, "compile_subgraph_reason", None)
        if reason is not None and reason.graph_break:
            self.breaks.append(Break(reason=reason.reason, location=_user_line(reason.user_stack)))

    def _keep_guards(self, output: Any) -> None:
        """Keeps the guards on what a caller may change from call to call: tensors, numbers, sizes.

        Guards on Modules and globals are not kept.
        """
        if self.recorder.inside:
            return
        for guard in sorted(output.guards):
            kind = guard.create_fn_name()
            codes = [c for c in guard.code_list or () if not c.startswith(("hasattr", "___check_type_id"))]
            if kind == "TENSOR_MATCH":
                codes = [_tensor_guard(guard, output)]
            elif kind != "SHAPE_ENV" and (kind not in _VALUE_GUARDS or not guard.name.startswith("L[")):
                continue
            for code in codes:
                found = Guard(kind=kind, code=code, location=_user_line(guard.user_stack or ()))
                if found not in self.guards:
                    self.guards.append(found)

    def _module(self, source: str, constants: dict[str, Tensor]) -> Any:
        """Returns the host code as a module whose kernels are recorded instead of launched."""
        key = hashlib.sha256(source.encode()).hexdigest()
        if key not in self._modules:
            module = types.ModuleType(f"compiled_loss_wrapper_{key[:8]}")
            sys.modules[module.__name__] = module
            code = re.sub(r"^async_compile = AsyncCompile\(\)$", "", source, flags=re.M)
            module.__dict__["async_compile"] = Kernels(self.recorder, self.name)
            exec(compile(code, module.__name__, "exec"), module.__dict__)
            module.__dict__.update(self._overrides())
            for name, value in constants.items():
                device = self.recorder.device if value.is_meta else value.device
                module.__dict__[name] = torch.empty_like(value, device=device)
            self._modules[key] = module
        return self._modules[key]

    def _overrides(self) -> dict[str, Any]:
        def empty(shape: Sequence[int], stride: Sequence[int], dtype: torch.dtype) -> Tensor:
            return torch.empty_strided(shape, stride, dtype=dtype, device=self.recorder.device)

        def empty_cpu(shape: Sequence[int], stride: Sequence[int], dtype: torch.dtype) -> Tensor:
            return torch.empty_strided(shape, stride, dtype=dtype)

        def view(base: Tensor, shape: Sequence[int], stride: Sequence[int], offset: int = 0) -> Tensor:
            return torch.as_strided(base, shape, stride, base.storage_offset() + offset)

        def nothing(*arguments: Any) -> None: ...

        def same(value: Any) -> Any:
            return value

        return dict(
            empty_strided_cuda=empty,
            empty_strided_cpu=empty_cpu,
            empty_strided_cpu_pinned=empty_cpu,
            reinterpret_tensor=view,
            assert_size_stride=nothing,
            assert_alignment=nothing,
            copy_if_misaligned=same,
            get_raw_stream=lambda device: 0,
            of_loss=self.recorder.attribute,
        )

    def name(self, name: str, kernel: GeneratedKernel) -> None:
        """Keeps a kernel under a unique name, because each graph numbers its kernels from 0."""
        unique, i = name, 1
        while unique in self.kernels and self.kernels[unique].source != kernel.source:
            i += 1
            unique = f"{name}#{i}"
        kernel.name = unique
        self.kernels[unique] = kernel


def _tensor_guard(guard: Any, output: Any) -> str:
    """Returns the facts that are compared of a tensor, as text; a size that may change is a symbol."""
    tensor = guard.obj_weakref() if guard.obj_weakref is not None else None
    if not isinstance(tensor, Tensor):
        return f"{guard.name} is a tensor"
    sizes = output.input_source_to_sizes_strides.get(guard.originating_source, {"size": tensor.shape})["size"]
    dtype = str(tensor.dtype).removeprefix("torch.")
    return f"{guard.name} is {dtype}[{', '.join(map(str, sizes))}], requires_grad={tensor.requires_grad}"


def _user_line(stack: Iterable[traceback.FrameSummary]) -> str:
    return _innermost([(frame.filename, frame.lineno or 0) for frame in stack])


def _innermost(frames: Sequence[tuple[str, int]]) -> str:
    """Returns file:line of the innermost frame outside of torch and this library, or else of the innermost of all."""
    own = [frame for frame in frames if not frame[0].startswith(_LIBRARIES)]
    if not frames:
        return ""
    name, line = (own or frames)[-1]
    relative = os.path.relpath(name)
    return f"{name if relative.startswith('..') else relative}:{line}"
