"""The errors of inspections."""

from __future__ import annotations

import torch


class InspectionError(RuntimeError):
    """An inspection that cannot be made; the text says what to change."""


class ImportRaisedError(Exception):
    """An error in an import while a function arrives; it is raised from the original error."""


def platform(platform: str) -> None:
    """Raises an error: there is no fake device on this platform."""
    raise InspectionError(
        f"device: expected 'cpu' on {platform}, got a GPU's: code for GPUs that are absent is generated on Linux only"
    )


def compiler(given: str | None) -> None:
    """Raises an error: the fake device cannot be built."""
    tried = f"CXX={given}, g++ or clang++" if given else "g++ or clang++"
    raise InspectionError(f"a C++ compiler: expected {tried} on PATH, found none: install g++, or set CXX")


def shim(compiler: str, output: str) -> None:
    """Raises an error: the fake device does not compile."""
    raise InspectionError(
        f"the fake device does not compile with {compiler} against torch {torch.__version__}:\n{output[-2000:]}"
    )


def extra(name: str) -> None:
    """Raises an error: a package is missing."""
    raise InspectionError(f"inspection needs {name}: pip install 'compiled-loss[inspect]'")


def device(device: str, known: list[str]) -> None:
    """Raises an error: there is no such target."""
    raise InspectionError(f"device: expected one of {', '.join(['cpu', 'cuda', *known])}, got {device!r}")


def gpu(detail: str) -> None:
    """Raises an error: the real GPU was asked for and is not there."""
    raise InspectionError(
        f"device: expected a GPU that torch can use behind 'cuda', got none ({detail}): "
        "name a target such as 'cuda:sm_90' to inspect without one"
    )


def spec(text: str, expected: str) -> None:
    """Raises an error: the text describes no input."""
    raise ValueError(f"inputs: expected {expected}, got {text!r}")


def function(name: str, reason: str) -> None:
    """Raises an error: there is no such function."""
    raise InspectionError(
        f"function: expected package.module:name or a public name of compiled_loss, got {name!r}: {reason}"
    )


def tensor(kind: str) -> None:
    """Raises an error: a tensor is more than its shape."""
    raise InspectionError(f"inputs: expected plain tensors and parameters, got a {kind}: pass its local tensor")


def pickle(name: str, reason: str) -> None:
    """Raises an error: the function cannot be sent to another process."""
    raise InspectionError(
        f"{name}: expected a function that can be sent to another process, got {reason}: "
        "define it at the top of a module"
    )


def raised(name: str, trace: str) -> None:
    """Raises an error: the user's function, or the compiler, raised one."""
    raise InspectionError(f"{name} raised while it was inspected:\n{trace}")


def imported(name: str, trace: str) -> None:
    """Raises an error: the import of the user's module raised one, in the process that inspects."""
    raise InspectionError(f"{name}: its import raised, in the process that inspects:\n{trace}")


def endless(times: int) -> None:
    """Raises an error: a loop depends on data, which tensors do not have here."""
    raise InspectionError(
        f"the host asked for data {times} times: expected a program whose loops end whatever the data are, for tensors "
        "have none here: leave such a loop out of what is inspected"
    )


def died(status: object, output: str) -> None:
    """Raises an error: the child process has ended."""
    raise InspectionError(
        f"the process that inspects ended with status {status} and no answer; its last output:\n{output[-2000:]}"
    )


def gradient(name: str) -> None:
    """Raises an error: there is nothing to differentiate."""
    raise InspectionError(
        f"{name}: expected a result that requires grad, got none: mark inputs with :grad, or use backward=False"
    )


def targets(names: list[str], device: str) -> None:
    """Raises an error: kernels are generated for one vendor at a time."""
    raise InspectionError(
        f"assemble: expected targets of the vendor of device={device!r}, whose sources these are, got {names}"
    )


def timing(names: list[str]) -> None:
    """Raises an error: an option makes the compiler time kernels on the GPU."""
    raise InspectionError(
        f"options: expected none by which the compiler times kernels on the GPU, got {', '.join(names)}: "
        "code is generated here without running any"
    )


def cache(reason: str) -> None:
    """Raises an error: the fake device cannot be stored."""
    raise InspectionError(f"TORCHINDUCTOR_CACHE_DIR: expected a cache folder that can be written: {reason}")
