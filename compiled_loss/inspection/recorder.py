"""A fake device's memory and its stream of launches.

NOTE [Recording]
The generated host code is run for real, on tensors without data. Every tensor's storage is counted when it first
appears, and again when Python and autograd let it go. So buffer reuse, in-place writes, saved tensors and donated
buffers need no model: the runtime itself does them. The work of a kernel or an operator is recorded instead of done.
Operators that are written in Python are run as well, on the same tensors, so that their launches are seen.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch._guards import TracingContext
from torch._higher_order_ops.utils import registered_hop_fake_fns
from torch._ops import HigherOrderOperator
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._pytree import tree_leaves

from compiled_loss.inspection import attention, errors, operators
from compiled_loss.inspection.network import Collective
from compiled_loss.inspection.record import Kind, Launch, Pass, Saved

_COMPOSITES = ("linear", "matmul", "einsum", "tensordot")  # not decomposed in an operator, whose autograd is its own
_NO_LAUNCH = ("empty", "new_empty", "lift_fresh", "sym_", "is_", "_reinterpret", "set_", "resize_", "_has_", "detach")
_MOST_ASKED = 10_000  # in an inspection; a loop that asks until the data change gets the same answer forever


class Memory:
    """Bytes alive on a device. C++ may hold a storage that Python has let go of, so each is asked whether it lives."""

    def __init__(self) -> None:
        self.peak = 0
        self._live = 0
        self._storages: dict[int, tuple[StorageWeakRef, Saved]] = {}
        self._of_loss: set[int] = set()

    @property
    def live(self) -> int:
        """The bytes alive now."""
        for key in [k for k, (reference, _) in self._storages.items() if reference.expired()]:
            self._live -= self._storages.pop(key)[1].size
        return self._live

    def add(self, tensor: Tensor, origin: str, of_loss: bool) -> bool:
        """Counts a tensor's storage until it is freed, once, and returns True if it was new.

        With `of_loss` it counts as the loss's even before it is written.
        """
        key = tensor.untyped_storage()._cdata
        if key in self.keys():
            return False
        (self._of_loss.add if of_loss else self._of_loss.discard)(key)
        self._remember(tensor, origin, "")
        self._live += tensor.untyped_storage().nbytes()
        self.peak = max(self.peak, self._live)
        return True

    def name(self, tensor: Tensor, origin: str, location: str, of_loss: bool) -> None:
        """Sets what made a tensor's storage, if it is counted; the host's storages are not."""
        if tensor.untyped_storage()._cdata in self._storages:
            self._remember(tensor, origin, location, of_loss)

    def write(self, tensors: Iterable[Tensor], of_loss: bool) -> int:
        """Sets who wrote the tensors last, and returns the live bytes that the loss wrote last."""
        for tensor in tensors:
            (self._of_loss.add if of_loss else self._of_loss.discard)(tensor.untyped_storage()._cdata)
        self._of_loss &= self.keys()
        return sum(self._storages[key][1].size for key in self._of_loss)

    def _remember(self, tensor: Tensor, origin: str, location: str, of_loss: bool = False) -> None:
        storage = tensor.untyped_storage()
        saved = Saved(
            shape=tuple(tensor.shape),
            dtype=str(tensor.dtype).removeprefix("torch."),
            size=storage.nbytes(),
            origin=origin,
            location=location,
            of_loss=of_loss,
        )
        self._storages[storage._cdata] = (StorageWeakRef(storage), saved)

    def keys(self) -> set[int]:
        """Returns the storages alive."""
        _ = self.live
        return set(self._storages)

    def saved(self, key: int) -> Saved:
        """Returns the record of a storage."""
        return self._storages[key][1]


class Recorder(FakeTensorMode):
    """The mode in which fake tensors live, and in which everything that runs on them is recorded."""

    supports_higher_order_operators = True

    def __init__(self, device: torch.device) -> None:
        super().__init__(allow_non_fake_inputs=True)
        self.memory = Memory()
        self.device = device
        self.recording = False
        self.asked = 0  # times that the host has asked for data
        self.inside: list[str] = []  # operators written in Python that are running
        self._launches: list[Launch] = []
        self._base = 0
        self._of_loss = self._all_of_loss = False

    @contextmanager
    def attributing(self) -> Iterator[None]:
        """Runs host code, which says whether its launches are the loss's; within one of the loss's, all are."""
        before = self._of_loss, self._all_of_loss
        self._all_of_loss = self._of_loss
        try:
            yield
        finally:
            self._of_loss, self._all_of_loss = before

    def attribute(self, of_loss: int) -> None:
        """Sets whether the launches from here on are the loss's."""
        self._of_loss = self._all_of_loss or bool(of_loss)

    @contextmanager
    def record(self, base: int) -> Iterator[list[Pass]]:
        """Records what runs in the block: the list that it yields has one pass when the block ends."""
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
        """Returns the most bytes alive since the last launch."""
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
        scratch_bytes: int = 0,
    ) -> None:
        """Records one launch, while recording is on."""
        writes = list(writes)
        of_loss = self.memory.write(writes, self._of_loss)
        if not self.recording:
            return
        self._launches.append(
            Launch(
                kernel=kernel,
                kind=kind,
                read_bytes=sum(map(operators.extent, reads)),
                written_bytes=sum(map(operators.extent, writes)),
                live_bytes=self._see_peak() - self._base,
                operations=operations,
                dtype=dtype,
                shapes=shapes,
                collective=collective,
                scratch_bytes=scratch_bytes,
                of_loss=self._of_loss,
                loss_bytes=of_loss,
            )
        )

    def dispatch(
        self,
        func: Any,
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        """Runs an operator on fake tensors."""
        kwargs = kwargs or {}
        higher = isinstance(func, HigherOrderOperator)
        if higher and func not in registered_hop_fake_fns:
            rule = func.python_key_table.get(FakeTensorMode)  # torch looks by the mode's class, and this is a subclass
            if rule is not None:
                return rule(self, *args, **kwargs)
        if higher or TracingContext.try_get() is not None:  # the compiler at work, not the program
            return super().dispatch(func, types, args, kwargs)
        if self.inside and func._schema.name.removeprefix("aten::") in _COMPOSITES:
            with self:
                return func.decompose(*args, **kwargs)
        inside = operators.written_in_python(func, self.device)
        if inside is not None:
            self.inside.append(func._schema.name)
            try:
                with self:
                    return inside(*args, **kwargs)
            finally:
                self.inside.pop()
        name = func._schema.name.split("::")[-1]
        if name in ("_local_scalar_dense", "nonzero", "wait_tensor"):
            # wait_tensor returns its argument; its fake would return a new one, and nothing is launched.
            return args[0] if name == "wait_tensor" else self._value(name, args[0])
        # An operator with an `out` makes nothing new, and some of them do not support fake tensors.
        out = [kwargs[a.name] for a in func._schema.arguments if a.is_out and a.name in kwargs]
        with _without_constants(args, kwargs):
            if len(out) == 1:
                result = out[0] if func._schema.returns else None
            else:
                result = super().dispatch(func, types, args, kwargs)
        self._note(func, name, args, kwargs, result)
        return result

    def _value(self, name: str, source: Any) -> Any:
        """Returns a substitute for a result that depends on data: 1 for a number, all elements for a choice of some."""
        if name == "_local_scalar_dense" and source.constant is not None:
            return source.constant.item()
        self.asked += 1
        if self.asked > _MOST_ASKED:
            errors.endless(self.asked)
        if source.device.type != "cpu":
            self.launch(name, "sync", [source], [])
        if name == "nonzero":
            with self:
                return torch.empty(source.numel(), source.dim(), dtype=torch.int64, device=source.device)
        return torch.ones((), dtype=source.dtype).item()

    def _note(self, func: Any, name: str, args: Sequence[Any], kwargs: Mapping[str, Any], result: Any) -> None:
        outputs = [t for t in tree_leaves(result) if isinstance(t, Tensor)]
        ours = self._of_loss and bool(self.inside)  # within an operator of the loss nobody else allocates
        fresh = [t for t in outputs if t.device.type == self.device.type and self.memory.add(t, name, ours)]
        sends = func.namespace == "c10d"  # these write their first argument, and their schema does not say so
        if name.startswith(_NO_LAUNCH) or not (fresh or sends or func._schema.is_mutable):
            return
        given = [(a, v) for a, v in zip(func._schema.arguments, args, strict=False)]
        given += [(a, kwargs[a.name]) for a in func._schema.arguments if a.name in kwargs]
        reads: list[Tensor] = []
        writes = list(fresh)
        for argument, value in given:
            tensors = [t for t in tree_leaves(value) if isinstance(t, Tensor)]
            written = argument.alias_info is not None and argument.alias_info.is_write
            written = written or (sends and argument is given[0][0])
            if written:
                writes += tensors
            if not (written and (argument.is_out or argument.kwarg_only or name in ("copy_", "zero_", "fill_"))):
                reads += tensors
        if not any(t.device.type == self.device.type for t in (*reads, *writes)):
            return
        operations, shapes, dtype = operators.operations(func, name, args, kwargs, result)
        across = any(t.device.type != self.device.type for t in (*reads, *writes) if t.dim())
        kind = "transfer" if across else operators.kind(func, name, operations)
        named = {a.name: value for a, value in given} if kind == "collective" else {}
        group = named.get("group_name", named.get("process_group"))
        self.launch(
            operators.operator_name(func),
            kind,
            reads,
            writes,
            operations=operations,
            shapes=shapes,
            dtype=dtype,
            collective=None if group is None else operators.collective(name, group, reads, writes),
            scratch_bytes=attention.scratch(name, args) if kind == "attention" else 0,
        )


@contextmanager
def _without_constants(args: Sequence[Any], kwargs: Mapping[str, Any]) -> Iterator[None]:
    """Hides the values that fake tensors know, with which torch would compute for real on an absent device."""
    known: list[tuple[Any, Tensor]] = []
    if any(isinstance(v, torch.device) and v.type not in ("cpu", "meta") for v in (*args, *kwargs.values())):
        known = [(t, t.constant) for t in tree_leaves(args) if getattr(t, "constant", None) is not None]
    for tensor, _ in known:
        tensor.constant = None
    try:
        yield
    finally:
        for tensor, value in known:
            tensor.constant = value
