"""Machine code for generated kernels, and its registers, spills and shared memory. No GPU is asked."""

from __future__ import annotations

import re
import subprocess
import tempfile
from pathlib import Path
from typing import Any

from compiled_loss.inspection.record import Configuration
from compiled_loss.inspection.targets import Target

_ASSEMBLY = ("ptx", "cubin", "amdgcn", "hsaco")


def assemble(
    name: str, source: str, target: Target, *, first_only: bool, keep: Path | None = None
) -> tuple[Configuration, ...]:
    """Returns the configurations of a Triton kernel that Inductor would try on `target`, in its order, or the first.

    If several kernels have one name, the second one is name#2. `keep` is a folder for the texts and binaries.
    """
    from torch._inductor import config as inductor
    from torch._inductor.codecache import PyCodeCache

    kernel: Any = getattr(PyCodeCache.load(source), name.partition("#")[0])
    properties = kernel.device_props._replace(
        type=target.backend,
        cc=target.arch,
        major=target.major,
        multi_processor_count=target.multi_processor_count,
        warp_size=target.warp_size,
    )
    kernel.device_props = properties
    kernel.triton_meta = {**kernel.triton_meta, "device": properties}
    found = []
    for i, config in enumerate(list(kernel.configs)[: 1 if first_only else None]):
        with inductor.patch(use_static_cuda_launcher=False):  # kernels of that launcher forget their machine code
            binary = kernel._precompile_config(config).kernel
        options = [f"{k}={v}" for k, v in config.kwargs.items()] + [f"warps={config.num_warps}"]
        if keep is not None:
            folder = keep / "assembly" / target.name.replace(":", "-")
            folder.mkdir(parents=True, exist_ok=True)
            for kind in _ASSEMBLY:
                text = binary.asm.get(kind)
                if text is not None:
                    path = folder / f"{name[-200:]}-{i}.{kind}"
                    path.write_bytes(text if isinstance(text, bytes) else text.encode())
        registers, spills = _nvidia(binary.asm["cubin"]) if "cubin" in binary.asm else _amd(binary.asm["amdgcn"])
        found.append(
            Configuration(
                target=target.name,
                options=" ".join(options),
                registers=registers,
                spills=spills,
                shared=int(binary.metadata.shared),
            )
        )
    return tuple(found)


def _nvidia(cubin: bytes) -> tuple[int, int]:
    """Returns registers, and bytes of stack and local memory, per thread, from the resource table of a cubin."""
    import triton

    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        done = subprocess.run([tool, "-res-usage", file.name], capture_output=True, text=True, check=True)
    usage = {key: int(value) for key, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", done.stdout)}
    return usage["REG"], usage["STACK"] + usage["LOCAL"]


def _amd(text: str) -> tuple[int, int]:
    """Returns vector registers, and bytes of scratch memory, per thread, from the metadata of a code object."""
    fields = dict(re.findall(r"\.(vgpr_count|private_segment_fixed_size):\s+(\d+)", text))
    return int(fields["vgpr_count"]), int(fields["private_segment_fixed_size"])
