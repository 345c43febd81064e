"""A GPU that is not there: torch, Inductor and Triton are told of a device, and then generate code for it.

NOTE [Fake device]
`fake_device.cpp` registers a device guard and CUDA hooks that do nothing; C++ needs these. `fake_attention.cpp` chooses
a kernel of fused attention, as torch's CUDA library would. This file answers the calls from Python. Nothing can be
allocated or launched: tensors are `FakeTensor`s, which have a shape and no data. From then on the process cannot use a
real GPU, so all of this runs in a child (`child.py`), one for each target.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

from compiled_loss.inspection import errors, fake_streams
from compiled_loss.inspection.attention import cudnn_versions
from compiled_loss.inspection.targets import Target

_SOURCES = tuple(Path(__file__).with_name(f"fake_{name}.cpp") for name in ("device", "attention"))


def build() -> Path:
    """Returns the shared library of both C++ files for this torch, compiled once and kept in the compiler's cache."""
    from torch._inductor.runtime.cache_dir_utils import cache_dir

    if not sys.platform.startswith("linux"):
        errors.platform(sys.platform)
    root = Path(torch.__file__).parent
    try:
        folder = Path(cache_dir()) / "compiled_loss"
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        errors.cache(str(error))
    sources = b"".join(source.read_bytes() for source in _SOURCES)
    key = hashlib.sha256(sources + f"{torch.__version__} {root}".encode()).hexdigest()[:16]
    library = folder / f"fake_device_{key}.so"
    if library.exists():
        return library
    compiler = next((c for c in (os.environ.get("CXX"), "g++", "clang++") if c and shutil.which(c)), None)
    if compiler is None:
        errors.compiler(os.environ.get("CXX"))
    assert compiler is not None
    scratch = library.with_suffix(f".{os.getpid()}")
    command = [compiler, "-std=c++20", "-O1", "-shared", "-fPIC", f"-I{root / 'include'}", *map(str, _SOURCES)]
    command += ["-o", str(scratch), f"-L{root / 'lib'}", "-lc10", "-ltorch_cpu", f"-Wl,-rpath,{root / 'lib'}"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        errors.shim(compiler, done.stderr)
    scratch.replace(library)  # whole or not at all, however many build it at once
    return library


def install(shim: ctypes.CDLL, target: Target) -> None:
    """Makes `target` the process's one GPU. `shim` was loaded before torch."""
    shim.install_fake_device_guard()
    shim.install_fake_attention(target.backend == "hip", _prefers_cudnn(target))
    if target.backend == "hip":
        torch.version.hip = "6.4"
    try:
        import triton
    except ImportError:
        errors.extra("triton")
    from torch._dynamo import device_interface
    from torch._inductor.runtime import triton_helpers
    from triton.backends.compiler import GPUTarget

    properties = _properties(target)
    capability = (target.major, target.minor)
    device = torch.device("cuda", 0)
    triton_target = GPUTarget(target.backend, target.arch, target.warp_size)

    class Driver:
        def get_current_target(self) -> GPUTarget:
            return triton_target

        def get_current_device(self) -> int:
            return 0

        def get_current_stream(self, device: object) -> int:
            return 0

        def get_active_torch_device(self) -> torch.device:
            return device

        def get_device_properties(self, device: object) -> dict[str, int]:
            return {"max_shared_mem": target.shared_memory_per_block_optin}

    def nothing(*arguments: Any, **keywords: Any) -> None: ...

    def zero(*arguments: Any, **keywords: Any) -> int:
        return 0

    def yes(*arguments: Any, **keywords: Any) -> bool:
        return True

    def get_properties(*arguments: Any, **keywords: Any) -> Any:
        return properties

    class Interface(device_interface.CudaInterface):
        class Worker:
            set_device = staticmethod(nothing)
            current_device = staticmethod(zero)
            get_device_properties = staticmethod(get_properties)

        current_device = staticmethod(zero)
        set_device = synchronize = raise_if_triton_unavailable = staticmethod(nothing)
        device_count = staticmethod(lambda: 1)
        is_available = is_bf16_supported = is_triton_capable = is_gpu_initialized = staticmethod(yes)
        get_device_properties = staticmethod(get_properties)
        get_compute_capability = staticmethod(
            lambda *a, **k: target.gcnArchName.split(":")[0] or 10 * target.major + target.minor
        )
        exchange_device = maybe_exchange_device = staticmethod(zero)
        get_raw_stream = staticmethod(zero)

    triton.runtime.driver.set_active(Driver())
    triton_helpers.set_driver_to_gpu = nothing
    device_interface.init_device_reg()
    for name in ("cuda", "cuda:0"):
        device_interface.register_interface_for_device(name, Interface)
    cuda: Any = torch.cuda
    cuda.get_device_properties = get_properties
    cuda.get_device_name = lambda *a: target.device_name
    cuda.get_device_capability = lambda *a: capability
    # One function each: Dynamo registers handlers by identity.
    cuda.current_device = lambda: 0
    cuda._exchange_device = lambda device: 0
    cuda._maybe_exchange_device = lambda device: 0
    cuda.set_device = lambda device: None
    cuda.device_count = lambda: 1
    cuda.is_available = lambda: False  # where it is True the pattern matcher allocates real tensors
    cuda.amp.common.amp_definitely_not_available = lambda: False  # otherwise autocast turns itself off
    cuda.is_bf16_supported = lambda including_emulation=True: True
    cuda.get_rng_state = lambda *a, **k: torch.zeros(16, dtype=torch.uint8)
    cuda.set_rng_state = lambda *a, **k: None
    cuda.synchronize = lambda *a, **k: None
    cuda._lazy_init = lambda: None
    torch.backends.cudnn.is_acceptable = lambda tensor: False  # otherwise an LSTM's weights ask for a version
    fake_streams.install()
    native: Any = torch._C
    native._cuda_getCurrentRawStream = lambda device: 0


def _prefers_cudnn(target: Target) -> bool:
    """Returns True if torch takes cuDNN's attention before flash attention: on such GPUs, from version 9.15.1 on.

    The packages of a CUDA build of torch bring cuDNN, so its version is known. For a build for CPUs it is not known,
    and flash attention is assumed.
    """
    allowed = os.environ.get("TORCH_CUDNN_SDPA_DEPRIORITIZED") != "1"
    return (
        allowed
        and target.backend == "cuda"
        and target.major in (9, 10)
        and max(cudnn_versions(), default=()) > (9, 15, 0)
    )


def _properties(target: Target) -> Any:
    """Returns the result of torch.cuda.get_device_properties."""
    from dataclasses import asdict
    from types import SimpleNamespace

    values = asdict(target)
    values["name"] = values.pop("device_name")
    return SimpleNamespace(**values)
