"""The GPUs that code is generated for, the properties that the compiler reads, and their peak rates. No torch here.

A target is an instruction set with the properties that Inductor and Triton read; several GPUs share one.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Target:
    """Device properties as torch names them; sizes in bytes. `arch` is Triton's name of the instruction set."""

    name: str
    backend: str
    arch: int | str
    device_name: str
    major: int
    minor: int
    multi_processor_count: int
    max_threads_per_multi_processor: int
    regs_per_multiprocessor: int
    shared_memory_per_block_optin: int
    L2_cache_size: int
    total_memory: int
    warp_size: int = 32
    max_threads_per_block: int = 1024
    shared_memory_per_block: int = 48 << 10
    gcnArchName: str = ""  # noqa: N815 - torch's names
    is_integrated: int = 0


@dataclass(frozen=True, kw_only=True)
class Gpu:
    """Peak rates: operations per second by dtype, dense and without sparsity, and bytes per second of its memory."""

    target: str
    half: float
    single: float
    double: float
    bytes_per_second: float
    source: str

    def rate(self, dtype: str) -> float:
        """Returns operations per second; fp32 without TF32, which torch leaves off unless asked."""
        return {"float32": self.single, "float64": self.double}.get(dtype, self.half)


# CUDA: compute capability tables of the CUDA C++ Programming Guide; counts and caches from each GPU's white paper.
# HIP: AMD Instinct MI300X data sheet and the CDNA 3 white paper (4 MiB of L2 on each of 8 dies; 64 KiB of LDS).
TARGETS = {
    target.name: target
    for target in (
        Target(
            name="cuda:sm_80",
            backend="cuda",
            arch=80,
            device_name="NVIDIA A100-SXM4-80GB",
            major=8,
            minor=0,
            multi_processor_count=108,
            max_threads_per_multi_processor=2048,
            regs_per_multiprocessor=65536,
            shared_memory_per_block_optin=163 << 10,
            L2_cache_size=40 << 20,
            total_memory=80 << 30,
        ),
        Target(
            name="cuda:sm_90",
            backend="cuda",
            arch=90,
            device_name="NVIDIA H100 80GB HBM3",
            major=9,
            minor=0,
            multi_processor_count=132,
            max_threads_per_multi_processor=2048,
            regs_per_multiprocessor=65536,
            shared_memory_per_block_optin=227 << 10,
            L2_cache_size=50 << 20,
            total_memory=80 << 30,
        ),
        Target(
            name="cuda:sm_100",
            backend="cuda",
            arch=100,
            device_name="NVIDIA B200",
            major=10,
            minor=0,
            multi_processor_count=148,
            max_threads_per_multi_processor=2048,
            regs_per_multiprocessor=65536,
            shared_memory_per_block_optin=227 << 10,
            L2_cache_size=126 << 20,
            total_memory=180 << 30,
        ),
        Target(
            name="hip:gfx942",
            backend="hip",
            arch="gfx942",
            device_name="AMD Instinct MI300X",
            major=9,
            minor=4,
            multi_processor_count=304,
            max_threads_per_multi_processor=2048,
            regs_per_multiprocessor=65536 * 2,
            shared_memory_per_block=64 << 10,
            shared_memory_per_block_optin=64 << 10,
            L2_cache_size=4 << 20,
            total_memory=192 << 30,
            warp_size=64,
            gcnArchName="gfx942:sramecc+:xnack-",
        ),
    )
}
"""Instruction sets that code is generated for, by name. A GPU of that kind need not be there."""

GPUS = {
    "A100": Gpu(
        target="cuda:sm_80",
        half=312e12,
        single=19.5e12,
        double=19.5e12,  # tensor cores
        bytes_per_second=2.039e12,
        source="NVIDIA A100 data sheet (2021), SXM 80 GB",
    ),
    "H100": Gpu(
        target="cuda:sm_90",
        half=989.5e12,
        single=67e12,
        double=67e12,  # tensor cores
        bytes_per_second=3.35e12,
        source="NVIDIA H100 data sheet, SXM: bf16 1979 TFLOP/s with sparsity",
    ),
    "H200": Gpu(
        target="cuda:sm_90",
        half=989.5e12,
        single=67e12,
        double=67e12,
        bytes_per_second=4.8e12,
        source="NVIDIA H200 data sheet, SXM: bf16 1979 TFLOP/s with sparsity",
    ),
    "B200": Gpu(
        target="cuda:sm_100",
        half=2.25e15,
        single=75e12,
        double=37e12,
        bytes_per_second=7.7e12,
        source="NVIDIA HGX B200 data sheet, one of eight: bf16 4.5 PFLOP/s with sparsity",
    ),
    "MI300X": Gpu(
        target="hip:gfx942",
        half=1307.4e12,
        single=163.4e12,
        double=163.4e12,
        bytes_per_second=5.3e12,
        source="AMD Instinct MI300X data sheet, matrix rates",
    ),
}
"""Peak rates of GPUs by name, for `Inspection.roofline_seconds`; `source` says where they are from."""
