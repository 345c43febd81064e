"""Models, which stand for their shapes wherever they were made, and the tensors that they are differentiated by.

NOTE [Models]
A file may make its model on the CPU, on "meta" or on the device. An optimizer may hold the model's parameters from then
on, and hooks and shards depend on them. So a parameter or a buffer is put on the device at the moment when a Module
registers it, before any other code has seen it.
"""

from __future__ import annotations

import functools
import gc
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode, unset_fake_temporarily
from torch.nn.modules import module as registration


@contextmanager
def placed(device: torch.device, *, data: bool) -> Iterator[None]:
    """Puts on `device` the tensors that Modules register in the block.

    With `data` their elements are kept; elements of tensors on "meta" are drawn.
    """
    moved: dict[int, tuple[Tensor, Tensor]] = {}  # one that several modules share stays one

    def put(module: nn.Module, name: str, given: Tensor | None) -> Any:
        if given is None or given.device.type == device.type or torch.compiler.is_compiling():
            return None
        if id(given) not in moved:
            moved[id(given)] = given, _on(device, given, data=data)
        return moved[id(given)][1]

    handles = [
        registration.register_module_parameter_registration_hook(put),
        registration.register_module_buffer_registration_hook(put),
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _on(device: torch.device, given: Tensor, *, data: bool) -> Tensor:
    with torch.no_grad():
        there = torch.empty_like(given, device=device)
        if data and given.is_meta and given.is_floating_point():
            there.normal_(std=max(1, *given.shape[-1:]) ** -0.5)
        elif data:
            there.zero_() if given.is_meta else there.copy_(given)
    if isinstance(given, nn.Parameter):
        there = nn.Parameter(there, requires_grad=given.requires_grad)
    vars(there).update({name: value for name, value in vars(given).items() if name not in vars(there)})
    return there


def draw(tensor: Tensor, *arguments: Any, **options: Any) -> Tensor:
    """Replaces a truncated normal distribution, which torch draws again and again until the data are in bounds."""
    with torch.no_grad():
        return tensor.normal_()


def swap(one: Tensor, other: Tensor) -> None:
    """Exchanges two tensors behind their objects, as `Module.to` does with fake ones.

    Torch's own function refuses where there is a weak reference. A fake mode has one to each parameter, and it does no
    harm.
    """
    one.__class__, other.__class__ = other.__class__, one.__class__
    one.__dict__, other.__dict__ = other.__dict__, one.__dict__
    torch._C._swap_tensor_impl(one, other)  # type: ignore[attr-defined]


def leaves(outputs: Iterable[Tensor]) -> list[Tensor]:
    """Returns the tensors at which the outputs' gradients arrive: inputs and parameters, wherever they come from."""
    nodes = [torch.autograd.graph.get_gradient_edge(value).node for value in outputs]
    seen, found = set(nodes), []
    while nodes:
        node: Any = nodes.pop()
        if hasattr(node, "variable"):
            found.append(node.variable)
        for following, _ in node.next_functions:
            if following is not None and following not in seen:
                seen.add(following)
                nodes.append(following)
    return found


def forget_gradients(of: Iterable[Tensor]) -> None:
    """Drops the gradients of tensors, and of all Modules' parameters, for which a graph may have seen other tensors."""
    for tensor in of:
        tensor.grad = None
    for value in gc.get_objects():
        if issubclass(type(value), nn.Module):  # some objects answer isinstance() by importing things
            for parameter in value._parameters.values():
                if parameter is not None:
                    parameter.grad = None


@contextmanager
def started(mode: FakeTensorMode) -> Iterator[None]:
    """Initialises optimizers in `mode`, which Dynamo leaves for this, and creates meshes of ranks outside of it.

    A mesh reads numbers of its tensor of ranks, to find the rank's own.
    """
    with ExitStack() as stack:
        for kind in _subclasses(torch.optim.Optimizer):
            if "_init_group" in vars(kind):
                stack.enter_context(mock.patch.object(kind, "_init_group", _under(vars(kind)["_init_group"], mode)))
        if torch.distributed.is_available():
            from torch.distributed import device_mesh

            made, init = device_mesh.init_device_mesh, device_mesh.DeviceMesh.__init__
            stack.enter_context(mock.patch.object(device_mesh.DeviceMesh, "__init__", _under(init)))
            for module in (device_mesh, torch.distributed):
                stack.enter_context(mock.patch.object(module, "init_device_mesh", _under(made)))
        yield


def _subclasses(kind: type) -> Iterator[type]:
    each: type
    for each in kind.__subclasses__():
        yield each
        yield from _subclasses(each)


def _under(function: Callable[..., Any], mode: FakeTensorMode | None = None) -> Callable[..., Any]:
    """Returns a function that calls the given one in a mode, or in none."""

    @functools.wraps(function)
    def called(*arguments: Any, **options: Any) -> Any:
        with unset_fake_temporarily() if mode is None else mode:
            return function(*arguments, **options)

    return called
