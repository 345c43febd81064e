"""The errors of inspections; see `checks`."""

from __future__ import annotations

import torch


class InspectionError(RuntimeError):
    """An inspection that cannot be made; the text says what to change."""


class ImportRaisedError(Exception):
    """Raised from what an import raised, where a function arrives."""


def platform(platform: str) -> None:
    """Raise: no fake device here."""
    raise InspectionError(
        f"device: expected 'cpu' on {platform}, got a GPU's: code for GPUs that are absent is generated on Linux only"
    )


def compiler(given: str | None) -> None:
    """Raise: the fake device cannot be built."""
    tried = f"CXX={given}, g++ or clang++" if given else "g++ or clang++"
    raise InspectionError(f"a C++ compiler: expected {tried} on PATH, found none: install g++, or set CXX")


def shim(compiler: str, output: str) -> None:
    """Raise: the fake device does not compile."""
    raise InspectionError(
        f"the fake device does not compile with {compiler} against torch {torch.__version__}:\n{output[-2000:]}"
    )


def extra(name: str) -> None:
    """Raise: a package is missing."""
    raise InspectionError(f"inspection needs {name}: pip install 'compiled-loss[inspect]'")


def device(device: str, known: list[str]) -> None:
    """Raise: no such target."""
    raise InspectionError(f"device: expected one of {', '.join(['cpu', 'cuda', *known])}, got {device!r}")


def gpu(detail: str) -> None:
    """Raise: the real GPU was asked for and is not there."""
    raise InspectionError(
        f"device: expected a GPU that torch can use behind 'cuda', got none ({detail}): "
        "name a target such as 'cuda:sm_90' to inspect without one"
    )


def spec(text: str, expected: str) -> None:
    """Raise: an input is not described."""
    raise ValueError(f"inputs: expected {expected}, got {text!r}")


def function(name: str, reason: str) -> None:
    """Raise: there is no such function."""
    raise InspectionError(
        f"function: expected package.module:name or a public name of compiled_loss, got {name!r}: {reason}"
    )


def tensor(kind: str) -> None:
    """Raise: a tensor that is more than its shape."""
    raise InspectionError(f"inputs: expected plain tensors and parameters, got a {kind}: pass its local tensor")


def pickle(name: str, reason: str) -> None:
    """Raise: the function cannot travel."""
    raise InspectionError(
        f"{name}: expected a function that can be sent to another process, got {reason}: "
        "define it at the top of a module"
    )


def raised(name: str, trace: str) -> None:
    """Raise: the user's function, or the compiler, did."""
    raise InspectionError(f"{name} raised while it was inspected:\n{trace}")


def imported(name: str, trace: str) -> None:
    """Raise: the user's module did, when the process that inspects imported it."""
    raise InspectionError(f"{name}: its import raised, in the process that inspects:\n{trace}")


def endless(times: int) -> None:
    """Raise: a loop over what only data can say."""
    raise InspectionError(
        f"the host asked for data {times} times: expected a program whose loops end whatever the data are, for tensors "
        "have none here: leave such a loop out of what is inspected"
    )


def died(status: object, output: str) -> None:
    """Raise: the child process is gone."""
    raise InspectionError(
        f"the process that inspects ended with status {status} and no answer; its last output:\n{output[-2000:]}"
    )


def gradient(name: str) -> None:
    """Raise: nothing to differentiate."""
    raise InspectionError(
        f"{name}: expected a result that requires grad, got none: mark inputs with :grad, or use backward=False"
    )


def targets(names: list[str], device: str) -> None:
    """Raise: kernels are generated for one vendor at a time."""
    raise InspectionError(
        f"assemble: expected targets of the vendor of device={device!r}, whose sources these are, got {names}"
    )


def timing(names: list[str]) -> None:
    """Raise: what the compiler would decide by a stopwatch."""
    raise InspectionError(
        f"options: expected none by which the compiler times kernels on the GPU, got {', '.join(names)}: "
        "code is generated here without running any"
    )


def cache(reason: str) -> None:
    """Raise: the fake device cannot be kept."""
    raise InspectionError(f"TORCHINDUCTOR_CACHE_DIR: expected a cache folder that can be written: {reason}")
