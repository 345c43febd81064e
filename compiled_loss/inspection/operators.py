"""Operators as launches: their kinds, their operations and bytes, and which of them contain others."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch._library.custom_ops import OPDEFS
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from compiled_loss.engine.operators import DEFINED
from compiled_loss.inspection import attention
from compiled_loss.inspection.network import Collective
from compiled_loss.inspection.record import Kind

_PRIMITIVES = ("prims", "rngprims")
_GEMMS = ("mm", "addmm", "bmm", "baddbmm", "scaled_mm")
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


def extent(tensor: Tensor) -> int:
    """Returns the bytes from a tensor's first to its last element."""
    if not tensor.numel():
        return 0
    last = sum((size - 1) * abs(stride) for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return int(last + 1) * tensor.element_size()


def operator_name(func: Any) -> str:
    """Returns the operator's name as reports write it."""
    return str(func._overloadpacket).replace("aten.", "")


def operations(
    func: Any, name: str, args: Sequence[Any], kwargs: Mapping[str, Any], result: Any
) -> tuple[int, str, str]:
    """Returns the number of floating-point operations, and the shapes and dtype of the factors."""
    matrices = [t for t in tree_leaves(args) if isinstance(t, Tensor) and t.dim() >= 2]
    if attention.is_attention(name):
        matrices = matrices[1:3] if "backward" in name else matrices[:2]
    matrices = matrices[-2:]
    if name.strip("_") in _GEMMS and len(matrices) == 2:
        a, b = matrices
        count = 2 * a.numel() * b.shape[-1]
    elif func._overloadpacket in flop_registry:
        count = int(flop_registry[func._overloadpacket](*args, **kwargs, out_val=result))
        if attention.is_attention(name) and attention.is_causal(func, args, kwargs):
            count //= 2
    else:
        return 0, "", ""
    dtype = str(matrices[0].dtype).removeprefix("torch.") if matrices else ""
    return count, " @ ".join(str(list(t.shape)) for t in matrices), dtype


def collective(name: str, group: Any, reads: Sequence[Tensor], writes: Sequence[Tensor]) -> Collective:
    """Returns the collective that an operator is. Its group is given by name, in a box, or in later torch as itself."""
    from torch.distributed import distributed_c10d as c10d

    if isinstance(group, str):
        group = c10d._resolve_process_group(group)  # type: ignore[attr-defined,arg-type]
    elif isinstance(group, torch.ScriptObject):
        group = c10d.ProcessGroup.unbox(group)  # type: ignore[arg-type]
    stem = name.strip("_").replace("allreduce", "all_reduce").replace("allgather", "all_gather")
    kind = next((k for k in ("all_reduce", "all_gather", "reduce_scatter") if stem.startswith(k)), name.rstrip("_"))
    written = {id(tensor) for tensor in writes}
    sizes = sum(extent(t) for t in reads if id(t) not in written), sum(map(extent, writes))
    return Collective(kind=kind.replace("_", "-"), size=max(sizes), ranks=group.size())


def kind(func: Any, name: str, operations: int) -> Kind:
    """Returns the kind of launch that an operator is."""
    if "c10d" in func._schema.name:
        return "collective"
    if attention.is_attention(name):
        return "attention"
    if operations:
        return "gemm"
    stem = name.strip("_")
    if stem in _COPIES:
        return "copy"
    if torch.Tag.pointwise in func.tags or stem in _FILLS:
        return "pointwise"
    return "reduction" if stem in _REDUCTIONS else "other"


def written_in_python(func: Any, device: torch.device) -> Callable[..., Any] | None:
    """Returns the implementation of an operator of ours or of torch.library.custom_op, except torch's own primitives.

    Those are made in the same way, but their implementations use operators that decompose into them.
    """
    ours = DEFINED.get(func._schema.name)
    if ours is not None:
        return ours.implementation
    definition = OPDEFS.get(func._schema.name)
    if definition is None or func.namespace in _PRIMITIVES:
        return None
    implementations: dict[str | None, Callable[..., Any]] = definition._backend_fns
    return implementations.get(device.type) or implementations.get(None)
