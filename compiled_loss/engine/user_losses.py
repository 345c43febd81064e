"""The names of losses that users write: when a function is traced, and when an earlier trace is used again.

NOTE [What a function closes over]
Dynamo does not look into a function whose name is a constant of its graph. So it would not notice that a number which
the function closes over has changed. Under `torch.compile` a function therefore has a name only if it closes over
nothing that can change: it has no closure and no default, and among the globals that it reads are only torch and math.
Any other function is left to Dynamo, in the vocab strategy. Eager code looks at the values in each call. If it cannot
follow them, as in a Module, it traces the function in each call.
"""

from __future__ import annotations

import dis
import functools
import types
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from compiled_loss.checks import functions as checks
from compiled_loss.engine.math.row_losses import Named
from compiled_loss.engine.traced_losses import Input, Signature, traced


def may_be_named(function: Any) -> bool:
    """Returns True if the function might be a constant of Dynamo's graph, as far as Dynamo itself can tell."""
    if not torch.compiler.is_compiling():
        return True
    if not isinstance(function, types.FunctionType):
        return False
    try:
        return _is_ours(function) or function.__closure__ is None
    except AttributeError:  # Dynamo's own, of a function that is defined in compiled code
        return False


def _is_ours(function: Any) -> bool:
    """Returns True if the function is the library's own. Nobody changes what these close over."""
    return getattr(function, "__module__", None) == "compiled_loss.functional.policy_terms"


def named(function: Callable[..., Tensor], signature: Signature) -> Named | None:
    """Returns the function's `RowLoss` by name; None under `torch.compile` if the function might change unseen.

    Raises an error unless the function is a loss.
    """
    name = _constant_name(function, *signature) if torch.compiler.is_compiling() else _name(function, signature)
    if not name:
        return None
    wants = [signature.weight_wants_gradient] if signature.weighted else []
    wants += [one.wants_gradient for one in signature.inputs if one.shape is not None]
    wanted = tuple([i for i, one in enumerate(wants) if one])
    return Named(name, sum([one.shape is None for one in signature.inputs]), wanted)


def _constant_name(function: Callable[..., Tensor], inputs: tuple[Input, ...], *options: Any) -> str:
    signature = Signature(tuple([Input(*one) for one in inputs]), *options)
    values = _values(function)
    return _name(function, signature) if _is_ours(function) or (values is not None and not values.changing) else ""


# This is what torch.compiler.assume_constant_result does; that function imports Dynamo.
_constant_name._dynamo_marked_constant = True  # type: ignore[attr-defined]

_CONSTANTS = (bool, int, float, str, torch.dtype, types.NoneType)
_LOOKING_AROUND = {"globals", "locals", "vars", "getattr", "eval", "exec", "__import__"}  # a key cannot follow these
_NAMES: dict[tuple[Any, ...], str] = {}
_DIFFERENT: dict[tuple[Any, ...], set[str]] = {}  # names of one function's code
_MANY = 8  # so many names of one function cause a warning


def _name(function: Callable[..., Tensor], signature: Signature) -> str:
    values = _values(function)
    key = None if values is None else (values.key, signature)
    found = None if key is None else _NAMES.get(key)
    if found is None:
        found = traced(function, signature)
        if key is not None:
            _NAMES[key] = found
        if not _is_ours(function):
            different = _DIFFERENT.setdefault((getattr(function, "__code__", type(function)), signature), set())
            if found not in different and len(different) == _MANY - 1:
                checks.traced_often(signature.name(), function, _MANY)
            different.add(found)
    return found


class _Values(NamedTuple):
    """The values that a function computes with; two functions with the same key compute the same."""

    key: tuple[Any, ...]
    changing: bool  # whether it closes over, or looks up, anything that can change


def _values(value: Any, inside: tuple[int, ...] = ()) -> _Values | None:
    """Returns the values of a function, a partial of one, or a constant; None for others, which each call traces."""
    if isinstance(value, _CONSTANTS):
        return _Values((type(value), value), changing=True)
    if isinstance(value, types.BuiltinFunctionType):
        return _Values((value,), changing=True)
    if id(value) in inside:
        return None
    inside = (*inside, id(value))
    if isinstance(value, functools.partial):
        names = sorted(value.keywords)
        parts = [_values(part, inside) for part in (value.func, *value.args, *[value.keywords[n] for n in names])]
        return _joined((functools.partial, len(value.args), *names), parts)
    return _of_function(value, inside) if isinstance(value, types.FunctionType) and not vars(value) else None


def _of_function(function: types.FunctionType, inside: tuple[int, ...]) -> _Values | None:
    if _is_fixed(function.__module__):
        return _Values((function,), changing=True)
    names = _looked_up(function.__code__)
    if names is None:
        return None
    found = [function.__globals__[name] for name in names if name in function.__globals__]
    modules = [one.__name__ for one in found if isinstance(one, types.ModuleType)]
    if not all([_is_fixed(name) for name in modules]):
        return None
    others = [one for one in found if not isinstance(one, types.ModuleType)]
    cells = [_content(cell) for cell in function.__closure__ or ()]
    defaults = [*(function.__defaults__ or ()), *[v for _, v in sorted((function.__kwdefaults__ or {}).items())]]
    parts = [_values(part, inside) for part in (*cells, *defaults, *others)]
    own = (function.__code__, len(cells), len(defaults), *names, *modules)
    return _joined(own, parts) if parts else _Values(own, changing=False)


def _joined(own: tuple[Any, ...], parts: list[_Values | None]) -> _Values | None:
    if None in parts:
        return None
    return _Values((own, *[part.key for part in parts if part is not None]), changing=True)


def _is_fixed(module: str | None) -> bool:
    """Returns True if nobody changes the contents of the module."""
    return (module or "").partition(".")[0] in ("builtins", "torch", "math")


def _content(cell: Any) -> Any:
    try:
        return cell.cell_contents
    except ValueError:  # empty still
        return None


def _looked_up(code: types.CodeType) -> list[str] | None:
    """Returns the names that a function's code, with its inner functions, may look up among its globals.

    It returns None if they cannot be known.
    """
    names = list(code.co_names)
    if _LOOKING_AROUND & set(names) or any(one.opname == "IMPORT_NAME" for one in dis.get_instructions(code)):
        return None
    for inner in [_looked_up(value) for value in code.co_consts if isinstance(value, types.CodeType)]:
        if inner is None:
            return None
        names += inner
    return names
