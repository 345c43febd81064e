"""A fake device's memory and its stream of launches.

NOTE [Recording]
The generated host code is run for real, on tensors without data. Every tensor's storage is counted when it first
appears and again when Python and autograd let it go, so buffer reuse, in-place writes, saved tensors and donated
buffers need no model: they are what the runtime does. What a kernel or an operator does is written down instead of
done. Operators that are written in Python are run as well, on the same tensors, so that what they launch is seen.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch._guards import TracingContext
from torch._library.custom_ops import OPDEFS
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from compiled_loss.inspection.network import Collective
from compiled_loss.inspection.record import Kind, Launch, Pass, Saved

_PRIMITIVES = ("prims", "rngprims")
_GEMMS = ("mm", "addmm", "bmm", "baddbmm", "scaled_mm")
_COMPOSITES = ("linear", "matmul", "einsum", "tensordot")  # arrive whole in an operator, whose autograd is its own
_NO_LAUNCH = ("empty", "new_empty", "lift_fresh", "sym_", "is_", "_reinterpret", "set_", "resize_", "_has_", "detach")
_COPIES = ("cat", "clone", "constant_pad_nd", "copy", "index_put", "index_select", "slice_scatter", "stack", "to_copy")
_FILLS = ("fill", "full", "full_like", "ones", "ones_like", "zero", "zeros", "zeros_like", "arange")
_REDUCTIONS: tuple[str, ...] = (
    "all",
    "amax",
    "amin",
    "any",
    "argmax",
    "argmin",
    "dot",
    "log_softmax",
    "logsumexp",
    "max",
    "mean",
    "min",
)
_REDUCTIONS += ("mv", "norm", "linalg_vector_norm", "prod", "softmax", "std", "sum", "var", "var_mean")


class Memory:
    """Bytes alive on a device. C++ may hold a storage that Python has let go of, so each is asked whether it lives."""

    def __init__(self) -> None:
        self.peak = 0
        self._live = 0
        self._storages: dict[int, tuple[StorageWeakRef, Saved]] = {}

    @property
    def live(self) -> int:
        """Bytes alive now."""
        for key in [k for k, (reference, _) in self._storages.items() if reference.expired()]:
            self._live -= self._storages.pop(key)[1].size
        return self._live

    def add(self, tensor: Tensor, origin: str) -> bool:
        """Count a tensor's storage until it is freed, once; whether it was new."""
        if tensor.untyped_storage()._cdata in self.keys():
            return False
        self._remember(tensor, origin, "")
        self._live += tensor.untyped_storage().nbytes()
        self.peak = max(self.peak, self._live)
        return True

    def name(self, tensor: Tensor, origin: str, location: str) -> None:
        """Say what made a tensor's storage, if it is counted: the host's are not."""
        if tensor.untyped_storage()._cdata in self._storages:
            self._remember(tensor, origin, location)

    def _remember(self, tensor: Tensor, origin: str, location: str) -> None:
        storage = tensor.untyped_storage()
        saved = Saved(
            shape=tuple(tensor.shape),
            dtype=str(tensor.dtype).removeprefix("torch."),
            size=storage.nbytes(),
            origin=origin,
            location=location,
        )
        self._storages[storage._cdata] = (StorageWeakRef(storage), saved)

    def keys(self) -> set[int]:
        """The storages alive."""
        _ = self.live
        return set(self._storages)

    def saved(self, key: int) -> Saved:
        """What is known of a storage."""
        return self._storages[key][1]


class Recorder(FakeTensorMode):
    """Where fake tensors live, and where everything that runs on them is written down."""

    def __init__(self, device: torch.device) -> None:
        super().__init__(allow_non_fake_inputs=True)
        self.memory = Memory()
        self.device = device
        self.recording = False
        self.inside: list[str] = []  # operators written in Python that are running
        self._launches: list[Launch] = []
        self._base = 0

    @contextmanager
    def record(self, base: int) -> Iterator[list[Pass]]:
        """Write down what runs in the block: the list it yields has one pass when the block ends."""
        self._launches, self._base = [], base
        self.memory.peak = self.memory.live
        self._peak = self.memory.live
        result: list[Pass] = []
        self.recording = True
        try:
            yield result
        finally:
            self.recording = False
        self._see_peak()
        result.append(Pass(launches=tuple(self._launches), peak_bytes=self._peak - base))

    def _see_peak(self) -> int:
        """The most alive since the last launch."""
        peak, self.memory.peak = self.memory.peak, self.memory.live
        self._peak = max(self._peak, peak)
        return peak

    def launch(
        self,
        kernel: str,
        kind: Kind,
        reads: Iterable[Tensor],
        writes: Iterable[Tensor],
        *,
        operations: int = 0,
        shapes: str = "",
        dtype: str = "",
        collective: Collective | None = None,
    ) -> None:
        """Write down one launch, where anything is written down."""
        if not self.recording:
            return
        self._launches.append(
            Launch(
                kernel=kernel,
                kind=kind,
                read_bytes=sum(map(extent, reads)),
                written_bytes=sum(map(extent, writes)),
                live_bytes=self._see_peak() - self._base,
                operations=operations,
                dtype=dtype,
                shapes=shapes,
                collective=collective,
            )
        )

    def dispatch(
        self,
        func: Any,
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        """Run an operator on fake tensors."""
        kwargs = kwargs or {}
        if TracingContext.try_get() is not None:  # the compiler at work, not the program
            return super().dispatch(func, types, args, kwargs)
        if self.inside and func._schema.name.removeprefix("aten::") in _COMPOSITES:
            with self:
                return func.decompose(*args, **kwargs)
        inside = _written_in_python(func, self.device)
        if inside is not None:
            self.inside.append(func._schema.name)
            try:
                with self:
                    return inside(*args, **kwargs)
            finally:
                self.inside.pop()
        name = func._schema.name.split("::")[-1]
        if name in ("_local_scalar_dense", "nonzero"):
            return self._value(name, args[0])
        if name == "wait_tensor":  # gives what it is given; its fake gives a new one, and nothing is launched
            return args[0]
        # An operator that is told where to write makes nothing new, and not each of them knows fake tensors.
        out = [kwargs[a.name] for a in func._schema.arguments if a.is_out and a.name in kwargs]
        result = out[0] if len(out) == 1 else super().dispatch(func, types, args, kwargs)
        self._note(func, name, args, kwargs, result)
        return result

    def _value(self, name: str, source: Any) -> Any:
        """Stand in for what only the data knows: one for a number, all of them for a choice of elements."""
        if name == "_local_scalar_dense" and source.constant is not None:
            return source.constant.item()
        if source.device.type != "cpu":
            self.launch(name, "sync", [source], [])
        if name == "nonzero":
            with self:
                return torch.empty(source.numel(), source.dim(), dtype=torch.int64, device=source.device)
        return torch.ones((), dtype=source.dtype).item()

    def _note(self, func: Any, name: str, args: Sequence[Any], kwargs: Mapping[str, Any], result: Any) -> None:
        outputs = [t for t in tree_leaves(result) if isinstance(t, Tensor)]
        fresh = [t for t in outputs if t.device.type == self.device.type and self.memory.add(t, name)]
        if name.startswith(_NO_LAUNCH) or (not fresh and not func._schema.is_mutable):
            return
        given = [(a, v) for a, v in zip(func._schema.arguments, args, strict=False)]
        given += [(a, kwargs[a.name]) for a in func._schema.arguments if a.name in kwargs]
        reads: list[Tensor] = []
        writes = list(fresh)
        for argument, value in given:
            tensors = [t for t in tree_leaves(value) if isinstance(t, Tensor)]
            written = argument.alias_info is not None and argument.alias_info.is_write
            if written:
                writes += tensors
            if not (written and (argument.is_out or argument.kwarg_only or name in ("copy_", "zero_", "fill_"))):
                reads += tensors
        if not any(t.device.type == self.device.type for t in (*reads, *writes)):
            return
        operations, shapes, dtype = _operations(func, name, args, kwargs, result)
        across = any(t.device.type != self.device.type for t in (*reads, *writes) if t.dim())
        kind = "transfer" if across else _kind(func, name, operations)
        group = {a.name: value for a, value in given}.get("group_name") if kind == "collective" else None
        self.launch(
            _operator_name(func),
            kind,
            reads,
            writes,
            operations=operations,
            shapes=shapes,
            dtype=dtype,
            collective=None if group is None else _collective(name, group, reads, writes),
        )


def extent(tensor: Tensor) -> int:
    """Bytes from a tensor's first to its last element."""
    if not tensor.numel():
        return 0
    last = sum((size - 1) * abs(stride) for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return int(last + 1) * tensor.element_size()


def _operator_name(func: Any) -> str:
    return str(func._overloadpacket).replace("aten.", "")


def _operations(
    func: Any, name: str, args: Sequence[Any], kwargs: Mapping[str, Any], result: Any
) -> tuple[int, str, str]:
    """Floating-point operations, and the shapes and dtype of the factors."""
    matrices = [t for t in tree_leaves(args) if isinstance(t, Tensor) and t.dim() >= 2][-2:]
    if name.strip("_") in _GEMMS and len(matrices) == 2:
        a, b = matrices
        count = 2 * a.numel() * b.shape[-1]
    elif func._overloadpacket in flop_registry:
        count = int(flop_registry[func._overloadpacket](*args, **kwargs, out_val=result))
    else:
        return 0, "", ""
    dtype = str(matrices[0].dtype).removeprefix("torch.") if matrices else ""
    return count, " @ ".join(str(list(t.shape)) for t in matrices), dtype


def _collective(name: str, group: Any, reads: Sequence[Tensor], writes: Sequence[Tensor]) -> Collective:
    """What an operator sends; its group comes by name, or in later versions of torch itself."""
    from torch.distributed import distributed_c10d as c10d

    if isinstance(group, str):
        group = c10d._resolve_process_group(group)  # type: ignore[attr-defined,arg-type]
    kind = next((k for k in ("all_reduce", "all_gather", "reduce_scatter") if name.startswith(k)), name.rstrip("_"))
    size = max(sum(map(extent, reads)), sum(map(extent, writes)))
    return Collective(kind=kind.replace("_", "-"), size=size, ranks=group.size())


def _kind(func: Any, name: str, operations: int) -> Kind:
    if "c10d" in func._schema.name:
        return "collective"
    if operations:
        return "gemm"
    stem = name.strip("_")
    if stem in _COPIES:
        return "copy"
    if torch.Tag.pointwise in func.tags or stem in _FILLS:
        return "pointwise"
    return "reduction" if stem in _REDUCTIONS else "other"


def _written_in_python(func: Any, device: torch.device) -> Callable[..., Any] | None:
    """The implementation of an operator made with torch.library.custom_op, unless it is one of torch's own primitives.

    Those are made in the same way, and theirs are written in terms of operators that decompose into them.
    """
    definition = OPDEFS.get(func._schema.name)
    if definition is None or func.namespace in _PRIMITIVES:
        return None
    implementations: dict[str | None, Callable[..., Any]] = definition._backend_fns
    return implementations.get(device.type) or implementations.get(None)
