"""The results of an inspection: plain frozen data, with a JSON round trip and no torch.

Bytes are those of tensors, operations are floating-point operations of GEMMs, convolutions and attention (a
multiplication and an addition are two), seconds are seconds.
"""

from __future__ import annotations

import dataclasses
import json
import types
import typing
from collections import Counter
from dataclasses import dataclass
from typing import Any, Literal

from compiled_loss.inspection.network import NETWORKS, Collective
from compiled_loss.inspection.targets import GPUS, Gpu

Kind = Literal["pointwise", "reduction", "gemm", "attention", "collective", "copy", "transfer", "sync", "other"]


@dataclass(frozen=True, kw_only=True)
class Configuration:
    """One way to run a kernel, assembled. On a GPU Inductor tries them all and keeps the fastest.

    `registers` are per thread, `spills` are bytes per thread, and `shared` is bytes per block.
    """

    target: str
    options: str
    registers: int
    spills: int
    shared: int


@dataclass(frozen=True, kw_only=True)
class Kernel:
    """A generated kernel, or an operator of a library. `source` is empty for kernels that were not generated."""

    name: str
    kind: Kind
    source: str
    configurations: tuple[Configuration, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Launch:
    """One launch, in order. `live_bytes` is the most that was alive over the inputs since the launch before.

    Each operand counts once and whole, whatever a cache or a second pass makes of it. `scratch_bytes` is at most what a
    kernel of a library takes for itself; it is not seen, and not in `live_bytes`. `of_loss` is True if the launch is
    the loss's, and `loss_bytes` is the number of live bytes that the loss wrote.
    """

    kernel: str
    kind: Kind
    read_bytes: int
    written_bytes: int
    live_bytes: int
    operations: int = 0
    dtype: str = ""
    shapes: str = ""
    collective: Collective | None = None
    scratch_bytes: int = 0
    of_loss: bool = False
    loss_bytes: int = 0

    def seconds(self, gpu: Gpu) -> float:
        """Returns the least seconds that this takes: by its operations or by its bytes, whichever is more."""
        moving = (self.read_bytes + self.written_bytes) / gpu.bytes_per_second
        return max(self.operations / gpu.rate(self.dtype), moving) if self.operations else moving


@dataclass(frozen=True, kw_only=True)
class Pass:
    """Forward or backward. `peak_bytes` is over the inputs, and includes what forward keeps."""

    launches: tuple[Launch, ...]
    peak_bytes: int

    @property
    def kernels(self) -> dict[str, int]:
        """The number of runs of each generated kernel or operator."""
        return dict(Counter(launch.kernel for launch in self.launches))

    @property
    def gemms(self) -> tuple[Launch, ...]:
        """Launches that are GEMMs."""
        return tuple(launch for launch in self.launches if launch.kind == "gemm")

    @property
    def attention(self) -> tuple[Launch, ...]:
        """Launches that are a library's kernel of fused attention."""
        return tuple(launch for launch in self.launches if launch.kind == "attention")

    @property
    def collectives(self) -> tuple[Collective, ...]:
        """The collectives between ranks, in order."""
        return tuple(launch.collective for launch in self.launches if launch.collective is not None)

    @property
    def operations(self) -> int:
        """Operations of all launches."""
        return sum(launch.operations for launch in self.launches)

    @property
    def moved_bytes(self) -> int:
        """Bytes read and written by all launches."""
        return sum(launch.read_bytes + launch.written_bytes for launch in self.launches)


@dataclass(frozen=True, kw_only=True)
class Graph:
    """One graph that Inductor compiled: its nodes, and the host code that it became.

    `operator` is the operator that compiled it inside its own implementation, or empty for the function's own graphs.
    """

    direction: Literal["forward", "backward"]
    operator: str
    nodes: str
    wrapper: str


@dataclass(frozen=True, kw_only=True)
class Break:
    """A place where Dynamo stopped tracing and went on in Python."""

    reason: str
    location: str


@dataclass(frozen=True, kw_only=True)
class Guard:
    """A condition that must hold, or the function is compiled again."""

    kind: str
    code: str
    location: str


@dataclass(frozen=True, kw_only=True)
class Saved:
    """A tensor that stays alive between forward and backward and is neither input nor result."""

    shape: tuple[int, ...]
    dtype: str
    size: int
    origin: str
    location: str
    of_loss: bool = False


@dataclass(frozen=True, kw_only=True)
class Measured:
    """A real run on the device itself. `seconds` is the median of several, forward and backward."""

    peak_bytes: int
    seconds: float


@dataclass(frozen=True, kw_only=True)
class Inspection:
    """The report on what the compiler made of a function.

    `parameters` are the bytes of each tensor that backward reaches and that is no input. `loss` are the names by which
    its loss was found, and empty if it was not found. `notes` tell facts that are not known.
    """

    name: str
    device: str
    torch: str
    triton: str
    inputs: tuple[str, ...]
    forward: Pass
    backward: Pass | None
    saved: tuple[Saved, ...]
    kernels: tuple[Kernel, ...]
    graphs: tuple[Graph, ...]
    breaks: tuple[Break, ...]
    guards: tuple[Guard, ...]
    seconds: float
    measured: Measured | None = None
    parameters: tuple[int, ...] = ()
    loss: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()

    @property
    def passes(self) -> tuple[Pass, ...]:
        """Forward, and backward where there is one."""
        return (self.forward,) if self.backward is None else (self.forward, self.backward)

    @property
    def peak_bytes(self) -> int:
        """The most that was alive over the inputs."""
        return max(p.peak_bytes for p in self.passes)

    @property
    def highest_bytes(self) -> int:
        """The most that may be alive over the inputs, with what kernels of libraries take for themselves."""
        return max((v.live_bytes + v.scratch_bytes for p in self.passes for v in p.launches), default=self.peak_bytes)

    @property
    def saved_bytes(self) -> int:
        """Bytes kept between forward and backward."""
        return sum(tensor.size for tensor in self.saved)

    @property
    def operations(self) -> int:
        """Operations of both passes."""
        return sum(p.operations for p in self.passes)

    @property
    def launches(self) -> int:
        """Launches of both passes."""
        return sum(len(p.launches) for p in self.passes)

    @property
    def loss_peak_bytes(self) -> int:
        """Bytes alive at the peak that the loss wrote."""
        highest = max((v for p in self.passes for v in p.launches), key=lambda v: v.live_bytes, default=None)
        return highest.loss_bytes if highest is not None else 0

    @property
    def loss_saved_bytes(self) -> int:
        """Bytes of the loss that are kept between forward and backward."""
        return sum(tensor.size for tensor in self.saved if tensor.of_loss)

    def roofline_seconds(self, gpu: str | None = None, *, of_loss: bool = False) -> float | None:
        """Returns the sum of the least seconds of each launch, on `gpu` of `targets.GPUS` or the first of the device's.

        It is None if no such GPU is known: a CPU's rates are not in a table. `of_loss` takes the loss's launches only.
        """
        if gpu is None:
            named = [g for g in GPUS.values() if g.target == self.device]
            if not named:
                return None
            chosen = named[0]
        else:
            chosen = GPUS[gpu]
        return sum(v.seconds(chosen) for p in self.passes for v in p.launches if v.of_loss or not of_loss)

    @property
    def sent_bytes(self) -> float:
        """The least bytes that a rank sends in the collectives of both passes, as `network.py` counts them."""
        return sum(one.sent_bytes or 0 for p in self.passes for one in p.collectives)

    def communication_seconds(self, *, spread: bool = False) -> float | None:
        """Returns the sum of the least seconds of each collective, one after the other, in the model of `network.py`.

        The ranks are on as few nodes as hold a group's ranks, or with `spread` on as many as there are ranks. It is
        None if the device's network or a kind of collective is not in the model.
        """
        network = NETWORKS.get(self.device)
        if network is None:
            return None
        found = [one.seconds(network, one.ranks if spread else None) for p in self.passes for one in p.collectives]
        return None if None in found else sum(seconds for seconds in found if seconds is not None)

    def kernel(self, name: str) -> Kernel:
        """Returns the kernel of that name."""
        return next(k for k in self.kernels if k.name == name)

    def to_json(self) -> str:
        """Writes the object as JSON, from which `from_json` makes an equal one."""
        return json.dumps(dataclasses.asdict(self), indent=1)

    @staticmethod
    def from_json(text: str) -> Inspection:
        """Makes the object from the text that `to_json` returned."""
        found: Inspection = _read(Inspection, json.loads(text))
        return found


def _read(kind: Any, value: Any) -> Any:
    """Returns `value`, which is of JSON, as the annotated type."""
    if dataclasses.is_dataclass(kind):
        hints = typing.get_type_hints(kind)
        return kind(**{name: _read(hints[name], part) for name, part in value.items()})  # type: ignore[operator]
    origin, parts = typing.get_origin(kind), typing.get_args(kind)
    if origin is tuple:
        return tuple(_read(parts[0], part) for part in value)
    if origin in (typing.Union, types.UnionType):
        return None if value is None else _read(parts[0], value)
    return value
