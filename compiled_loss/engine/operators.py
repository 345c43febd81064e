"""Operators with named operands: each argument is a field of a NamedTuple, and none is addressed by its position.

NOTE [Operators]
A pass over the chunks is one operator for the compiler. The compiler sees the sizes and dtypes of the results, and
never the loop. Forward-mode differentiation and functorch do not look into an operator either, and would give zeros. So
callers check for them first, and then call plain torch code instead.

NOTE [Around a loop]
A few numbers a token are computed before and after a loop. On a CPU they are a part of the operator, because there each
kernel that Inductor writes for them takes about a second to compile. On other devices only the loop is an operator, and
Inductor fuses the rest.

NOTE [Small calls]
A loop over few logits in one chunk is traced into the caller's graph, where its sizes are known. There is nothing to
undo, and no memory to save. Calls of an operator and of the kernels inside it take longer than the mathematics: 8
tokens took 2.4 times as long as the unchunked loss, and take 1.2 times as long without the operator.

NOTE [Composites]
Autograd Functions are applied inside composites. A composite is an operator without a kernel of its own. Dynamo keeps
it as one node of its graph. AOTAutograd traces the Python inside, so generated code does not change. If Dynamo met the
Function itself, it would trace forward and backward, a third of all its steps, and guard what they look at. By default
AOTAutograd's cache takes no graph with an autograd Function, but it takes one with a composite.
"""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from compiled_loss.planner.cost import Strategy
from compiled_loss.planner.plan import Lengths

_SCHEMA = {
    "Tensor": "Tensor",
    "Tensor | None": "Tensor?",
    "list[Tensor]": "Tensor[]",
    "int": "SymInt",
    "int | None": "SymInt?",
    "bool": "bool",
    "str": "str",
    "str | None": "str?",
    "torch.dtype | None": "ScalarType?",
    "tuple[int, ...]": "int[]",
}
FEW_LOGITS = 1 << 18  # NOTE [Small calls]: with more, an operator adds a tenth or less to a call on a CPU
# Part of a composite's call: AOTAutograd caches what it finds in one under its name and operands.
_PACKAGE = sorted(Path(__file__).parents[1].rglob("*.py"))
_SOURCE = hashlib.sha256(b"".join([file.read_bytes() for file in _PACKAGE])).hexdigest()


def is_compiling() -> bool:
    """Returns True where code is traced: by Dynamo, by AOTAutograd in composites, or by us, NOTE [Kernels]."""
    return torch.compiler.is_compiling() or torch._guards.TracingContext.try_get() is not None


class Defined(NamedTuple):
    """The implementation of an operator, and its number of floating-point operations as a function of shapes."""

    implementation: Callable[..., list[Tensor]]
    operations: Callable[..., int]


DEFINED: dict[str, Defined] = {}


def unpack(values: Iterable[Any], *kinds: type[Any]) -> tuple[Any, ...]:
    """Returns one NamedTuple of each kind, filled with the values in their order, and a tuple of the values left."""
    rest, found = tuple(values), []
    for kind in kinds:
        count = len(kind._fields)
        found.append(kind(*rest[:count]))
        rest = rest[count:]
    return *found, rest


def _fields_of(operands: Iterable[Iterable[Any]]) -> list[Any]:
    """Returns the fields of all, one after another; `itertools.chain` is ten times as much work for Dynamo."""
    values: list[Any] = []
    for operand in operands:
        values.extend(operand)
    return values


def none(kind: type[Any]) -> Any:
    """Returns the kind of NamedTuple with None in every field."""
    return kind(*(None,) * len(kind._fields))


def _schema(name: str, kinds: Sequence[type[Any]]) -> str:
    """Returns the arguments of a schema."""
    hints = [(field, hint) for kind in kinds for field, hint in kind.__annotations__.items()]
    fields = [f"{_SCHEMA[hint.__forward_arg__]} {field}" for field, hint in hints]
    if len(dict(hints)) < len(hints):  # Inductor would say so in the first compiled call
        raise TypeError(f"{name}: expected fields of different names, got {', '.join(fields)}")
    return ", ".join(fields)


def composite(name: str, *kinds: type[Any]) -> Callable[[Callable[..., Sequence[Tensor]]], Callable[..., list[Tensor]]]:
    """Returns a decorator that makes a composite of a function from NamedTuples of these kinds to tensors.

    In eager code it is the function. For Dynamo it is one node: NOTE [Composites].
    """

    def define(function: Callable[..., Sequence[Tensor]]) -> Callable[..., list[Tensor]]:
        def on_fields(*values: Any) -> list[Tensor]:
            *operands, _source = unpack(values, *kinds)
            return list(function(*operands))

        qualified = f"compiled_loss::{name}"
        torch.library.define(qualified, f"({_schema(name, kinds)}, str source) -> Tensor[]")
        torch.library.impl(qualified, "CompositeImplicitAutograd")(on_fields)
        opaque = getattr(torch.ops.compiled_loss, name).default

        def call(*operands: Any) -> list[Tensor]:
            if torch.compiler.is_dynamo_compiling():
                return list(opaque(*_fields_of(operands), _SOURCE))
            return list(function(*operands))

        return call

    return define


class Loop(NamedTuple):
    """A loop over chunks inside a larger operator: NOTE [Around a loop]."""

    strategy: Strategy
    implementation: Callable[..., list[Tensor]]
    operator: Callable[..., list[Tensor]]

    def is_small(self, problem: Any, lengths: Lengths) -> bool:
        """Returns True if the loop is known to have few logits and one chunk: NOTE [Small calls]."""
        tokens, classes = problem.hidden.shape[0], problem.weight.shape[0]
        if not isinstance(tokens, int) or not isinstance(classes, int) or lengths.ranks > 1:
            return False
        plan = lengths.plan(self.strategy, problem.hidden)
        one_dtype = plan.accumulate_dtype == problem.hidden.dtype  # Inductor has no GEMM that adds into a wider one
        return tokens * classes <= FEW_LOGITS and plan.count == 1 and one_dtype


def operator(
    name: str,
    *kinds: type[Any],
    like: Callable[..., Sequence[Tensor]],
    operations: Callable[..., int],
    loop: Loop | None = None,
) -> Callable[[Callable[..., list[Tensor]]], Callable[..., list[Tensor]]]:
    """Returns a decorator that makes an operator of a function from NamedTuples of these kinds to new tensors.

    `like` takes the same arguments, and returns tensors of the same sizes and dtypes as the function, without data.
    `operations` takes them with shapes in place of tensors. In eager code the last argument's `compiled` decides
    whether the operator is called or the function itself. If there is a `loop`, the function takes it, or its operator,
    as its first argument.
    """
    schema = _schema(name, kinds)

    def define(function: Callable[..., list[Tensor]]) -> Callable[..., list[Tensor]]:
        implementation = function if loop is None else functools.partial(function, loop.implementation)

        def on_fields(*values: Any) -> list[Tensor]:
            with torch.no_grad():
                return implementation(*unpack(values, *kinds)[:-1])

        qualified = f"compiled_loss::{name}"  # not by custom_op: a call of one takes longer
        torch.library.define(qualified, f"({schema}) -> Tensor[]")
        torch.library.impl(qualified, "CompositeExplicitAutograd")(on_fields)
        torch.library.register_fake(qualified)(lambda *values: list(like(*unpack(values, *kinds)[:-1])))
        opaque = getattr(torch.ops.compiled_loss, name).default
        DEFINED[qualified] = Defined(on_fields, lambda *shapes, **_: operations(*unpack(shapes, *kinds)[:-1]))

        def call(*operands: Any) -> list[Tensor]:
            if loop is not None and is_compiling():
                if loop.is_small(operands[0], operands[-1]):
                    return function(loop.implementation, *operands)
                if operands[0].hidden.device.type != "cpu":
                    return function(loop.operator, *operands)
            values = _fields_of(operands)
            return list(opaque(*values)) if operands[-1].compiled else on_fields(*values)

        return call

    return define
