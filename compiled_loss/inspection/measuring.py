"""A real run of the same call on a device that is there, in a child of its own, to compare the prediction with."""

from __future__ import annotations

import statistics
import time
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from compiled_loss.inspection.call import Request, unpack
from compiled_loss.inspection.modules import forget_gradients, leaves
from compiled_loss.inspection.record import Measured
from compiled_loss.measure import PeakMemory

_REPETITIONS = 3
_PROPERTIES = (
    "major",
    "minor",
    "multi_processor_count",
    "max_threads_per_multi_processor",
    "regs_per_multiprocessor",
    "shared_memory_per_block",
    "shared_memory_per_block_optin",
    "L2_cache_size",
    "total_memory",
    "warp_size",
)


def measure(request: Request) -> dict[str, Any]:
    """Returns the peak over the inputs and the seconds of forward and backward, compiled and warm."""
    device = torch.device(request.device)
    fn, inputs = unpack(request.call, device, data=True)
    compiled = torch.compile(fn, dynamic=request.dynamic, options=request.options)

    upstream: list[Tensor] = []

    def step() -> None:
        result = compiled(*inputs)
        if request.backward:
            outputs = [v for v in tree_leaves(result) if isinstance(v, Tensor) and v.requires_grad]
            if not upstream:
                upstream.extend(torch.ones_like(v) for v in outputs)  # given, not counted, as in a prediction
            wanted = leaves(outputs)
            torch.autograd.backward(outputs, upstream)
            forget_gradients(wanted)
        if device.type != "cpu":
            torch.accelerator.synchronize()

    step()  # compiles, and warms the GEMM library's own buffers
    seconds = []
    memory = PeakMemory(device)
    with memory:
        for _ in range(1 if device.type == "cpu" else _REPETITIONS):
            start = time.perf_counter()
            step()
            seconds.append(time.perf_counter() - start)
    return asdict(Measured(peak_bytes=memory.peak, seconds=statistics.median(seconds)))


def properties() -> dict[str, Any] | str:
    """Returns the present GPU as fields of a `Target`, or the reason why there is none."""
    if not torch.cuda.is_available():
        return f"torch {torch.__version__} finds none"
    found = torch.cuda.get_device_properties(0)
    hip = torch.version.hip is not None
    arch: int | str = found.gcnArchName.split(":")[0] if hip else 10 * found.major + found.minor
    same = {name: getattr(found, name) for name in _PROPERTIES}
    return {
        **same,
        "name": f"hip:{arch}" if hip else f"cuda:sm_{arch}",
        "backend": "hip" if hip else "cuda",
        "arch": arch,
        "device_name": found.name,
        "gcnArchName": getattr(found, "gcnArchName", "") if hip else "",
        "is_integrated": int(found.is_integrated),
    }
