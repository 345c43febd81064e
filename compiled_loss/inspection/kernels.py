"""Generated kernels: where the host code would launch one, it is recorded."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from compiled_loss.inspection.record import Kind
from compiled_loss.inspection.recorder import Recorder

_TRITON_KINDS: dict[str, Kind] = {
    "poi": "pointwise",
    "for": "pointwise",
    "red": "reduction",
    "per": "reduction",
    "tem": "gemm",
}


@dataclass
class GeneratedKernel:
    """A kernel's source; `arguments` are the names of its parameters, by which reads and writes are distinguished."""

    name: str
    kind: Kind
    source: str
    arguments: tuple[str, ...]
    is_triton: bool

    def run(self, recorder: Recorder, values: Sequence[Any]) -> None:
        """Records one launch, unless it is the host's."""
        tensors = [(n, v) for n, v in zip(self.arguments, values, strict=False) if isinstance(v, Tensor)]
        if all(v.device.type != recorder.device.type for _, v in tensors):
            return
        reads = [v for n, v in tensors if self._uses(n, "load", not n.startswith("out_"))]
        writes = [v for n, v in tensors if self._uses(n, "store|atomic", not n.startswith("in_ptr"))]
        recorder.launch(self.name, self.kind, reads, writes)

    def _uses(self, argument: str, how: str, otherwise: bool) -> bool:
        """Returns True if the source loads or stores an argument; `otherwise` if the source is not Triton's."""
        return bool(re.search(rf"\b(?:{how})\w*\({argument}\b", self.source)) if self.is_triton else otherwise


class Kernels:
    """A replacement of Inductor's AsyncCompile in the host code; it calls `name` with each kernel."""

    def __init__(self, recorder: Recorder, name: Callable[[str, GeneratedKernel], None]) -> None:
        self._recorder = recorder
        self._name = name

    def triton(self, name: str, source: str, device_str: str = "cuda") -> Runner:
        """Returns a generated Triton kernel, which can be called on the recorder."""
        short = re.match(r"triton_([a-z]+)_", name)
        kind = _TRITON_KINDS.get(short[1], "other") if short else "other"
        if kind == "gemm" and "SPARSE_Q_BLOCK_SIZE" in source:  # the template of FlexAttention
            kind = "attention"
        parameters = re.search(rf"^def {re.escape(name)}\((.*?)\):", source, re.M | re.S)
        arguments = tuple(p.split(":")[0].strip() for p in parameters[1].split(",")) if parameters else ()
        return Runner(self._recorder, GeneratedKernel(name, kind, source, arguments, is_triton=True))

    def cpp_pybinding(self, argument_types: list[str], source: str) -> Runner:
        """Returns a generated C++ kernel, which can be called on the recorder."""
        kind: Kind = "reduction" if "_acc" in source else "pointwise"
        parameters = re.search(r'extern "C"\s+(?:\w+\s+)?void\s+\w+\((.*?)\)', source, re.S)
        arguments = tuple(re.findall(r"(\w+)\s*(?:,|$)", parameters[1])) if parameters else ()
        return Runner(self._recorder, GeneratedKernel("", kind, source, arguments, is_triton=False))

    def wait(self, scope: dict[str, Any]) -> None:
        """Reports the kernels at the end of the definitions: the name of each kernel is known only now."""
        for name, value in scope.items():
            if isinstance(value, Runner):
                self._name(name, value.kernel)


class Runner:
    """A kernel, where the host code expects one."""

    def __init__(self, recorder: Recorder, kernel: GeneratedKernel) -> None:
        self.kernel = kernel
        self._recorder = recorder

    def __call__(self, *values: Any, **keywords: Any) -> None:
        self.kernel.run(self._recorder, values)

    run = __call__
