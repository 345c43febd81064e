"""Layouts of logits: any dimension may be the vocabulary, and any strides are taken without a copy."""

from __future__ import annotations

from math import inf, prod
from typing import Any, NamedTuple

import torch
from torch import Tensor

from compiled_loss import checks
from compiled_loss.distributed.vocab_shard import is_sharded
from compiled_loss.engine.operators import composite
from compiled_loss.engine.transforms import traced


def check_class_dim(name: str, value: Tensor, class_dim: int) -> int:
    """Returns the dimension of a tensor that is V, counted from its first. Raises an error unless there is one."""
    checks.tensor(name, value)
    checks.class_dim(class_dim)
    if class_dim == -1:
        return value.dim() - 1
    checks.class_dim(class_dim, value.dim())
    return class_dim % value.dim()


def classes_last(name: str, value: Tensor, class_dim: int) -> Tensor:
    """Returns a view [..., V]."""
    checks.tensor(name, value)
    checks.class_dim(class_dim)
    if class_dim == -1:
        return value
    checks.class_dim(class_dim, value.dim())
    if torch.compiler.is_compiling() and not (traced() or is_sharded(value)):
        (view,) = _moved(_Given(value, class_dim))
        return view
    return value.movedim(class_dim, -1)


class _ClassesLast(torch.autograd.Function):
    """The view [..., V], whose gradient is computed and is no view.

    If it were a view, Inductor would write out the gradient in the other layout, and then copy it.
    """

    @staticmethod
    def forward(ctx: Any, value: Tensor, class_dim: int) -> Tensor:
        ctx.class_dim = class_dim
        return value.movedim(class_dim, -1)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, None]:
        return g.movedim(-1, ctx.class_dim).clamp(min=-inf), None  # the clamp changes nothing, but is computed


class _Given(NamedTuple):
    value: Tensor
    class_dim: int


@composite("classes_last", _Given)
def _moved(given: _Given) -> tuple[Tensor]:
    return (_ClassesLast.apply(*given),)


def merged(*values: Tensor) -> list[Tensor]:
    """Returns views of [..., V or k] with as few leading dimensions as all their strides allow, at least one.

    Nothing is copied. Eager code loops over all but two dimensions.
    """
    shape = values[0].shape
    if len(shape) < 2 or all(v.is_contiguous() for v in values):
        return [v.reshape(prod(shape[:-1]), v.shape[-1]) for v in values]
    if torch.compiler.is_compiling():  # there is no loop then
        return list(values)
    if values[0].numel() == 0:
        return [v.reshape(0, v.shape[-1]) for v in values]
    sizes = [shape[0]]
    for i in range(1, len(shape) - 1):
        if all(v.stride(i - 1) == shape[i] * v.stride(i) for v in values):
            sizes[-1] *= shape[i]
        else:
            sizes.append(shape[i])
    return [v.view(*sizes, v.shape[-1]) for v in values]
