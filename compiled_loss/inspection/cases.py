"""The calls that `compiled-loss inspect` was asked for: their functions and their inputs.

NOTE [Other]
`--compare` takes a line of its own, which the same arguments read. Arguments of what is called, and of the device, are
taken from the first function if the line does not give them. Arguments of how it is called (options, chunking,
Inductor's options, dynamic) never are.
"""

from __future__ import annotations

import argparse
import os
import re
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from inspect import Parameter, signature
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from compiled_loss.inspection.arguments import SHAPE, WHAT

INPUTS = {  # of our own functions, by the names of their parameters
    "hidden": "{dtype}[{tokens},{hidden}]:grad",
    "weight": "{dtype}[{vocab},{hidden}]:grad",
    "logits": "{dtype}[{tokens},{vocab}]:grad",
    "labels": "int64[{tokens}]:0..{last}",
    "student_hidden": "{dtype}[{tokens},{hidden}]:grad",
    "student_weight": "{dtype}[{vocab},{hidden}]:grad",
    "teacher_hidden": "{dtype}[{tokens},{hidden}]",
    "teacher_weight": "{dtype}[{vocab},{hidden}]",
    "student_logits": "{dtype}[{tokens},{vocab}]:grad",
    "teacher_logits": "{dtype}[{tokens},{vocab}]",
    "target_probs": "{dtype}[{tokens},{vocab}]",
    "position_mask": "bool[{tokens}]",
}
CHUNKING = ("strategy", "chunk_size", "memory_budget")


def unchunked(hidden: Tensor, weight: Tensor, labels: Tensor, **options: Any) -> Tensor:
    """Computes the ordinary loss of a linear head, which holds all logits, as a baseline for ours."""
    return F.cross_entropy((hidden @ weight.T).float(), labels, **options)


@dataclass(frozen=True, kw_only=True)
class Case:
    """A call to inspect. `label` distinguishes it from the other one."""

    label: str
    fn: Callable[..., Any]
    inputs: tuple[Any, ...]
    device: str
    backward: bool
    dynamic: bool | None
    inductor: dict[str, Any] | None
    loss: tuple[str, ...] | None


def cases_of(given: argparse.Namespace) -> list[Case]:
    """Makes the call, and the one to compare it with: NOTE [Other]."""
    labels = [_label(given, given.function.rpartition(":")[2], [])]
    other = given.compare
    if other is not None:
        labels.append(_label(other, other.function.rpartition(":")[2], [*SHAPE, "device"]))
        if labels[0] == labels[1]:
            labels = [_label(one, one.function, []) for one in (given, other)]
            labels[1] += " (2)" * (labels[0] == labels[1])
    _complete(given, WHAT)
    first = _find(given.function)
    cases = [_case(labels[0], given, first, None)]
    if other is not None:
        _complete(other, vars(given))
        cases.append(_case(labels[1], other, _find(other.function), first))
    return cases


def _label(given: argparse.Namespace, name: str, more: Sequence[str]) -> str:
    """Returns the name of a call in a report: its function, and the given arguments of how to call it."""
    said = [(key, getattr(given, key)) for key in (*CHUNKING, "dynamic", *more)]
    said += [*(given.option or ()), *(given.inductor or ())]
    return " ".join([name, *(f"{key}={value}" for key, value in said if value is not None)])


def _complete(given: argparse.Namespace, above: dict[str, Any]) -> None:
    """Takes arguments that were not given from `above`: NOTE [Other]."""
    if given.inputs is None:
        given.inputs = above["inputs"]
    said = [f"--{name}" for name in SHAPE if getattr(given, name) is not None]
    if said and given.inputs is not None:
        raise RuntimeError(f"{', '.join(said)}: inputs of {given.function} are those of --inputs")
    for name in WHAT:
        if getattr(given, name) is None:
            setattr(given, name, above[name])


def _find(name: str) -> Callable[..., Any]:
    """Finds the function, in the current folder as well. If its import needs a GPU, another process finds it."""
    from compiled_loss.inspection.call import Named, find_function
    from compiled_loss.inspection.errors import InspectionError

    if name == unchunked.__name__:
        return unchunked
    if ":" in name and os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    try:
        found = find_function(name)
    except InspectionError:
        raise
    except Exception as error:  # the user's module runs when it is imported
        if re.search("cuda|nvidia", str(error), re.IGNORECASE):
            return Named(name)
        raise RuntimeError(f"{name}: its import raised {type(error).__name__}: {error}") from error
    if isinstance(found, type):
        raise RuntimeError(f"{name} is a class: name a function, or an instance that is made in the module")
    return found


def _case(label: str, given: argparse.Namespace, fn: Callable[..., Any], first: Callable[..., Any] | None) -> Case:
    """Makes a call. If `first` is given, it is the function whose inputs a function that is not ours takes."""
    from compiled_loss.inspection.call import Named, TensorSpec, parse_inputs

    options = dict(given.option or ())
    if options and isinstance(fn, torch.nn.Module):  # a partial would hide its parameters
        raise RuntimeError(f"--option: {given.function} is a Module, which gets its options where it is made")
    chunking = {name: getattr(given, name) for name in CHUNKING if getattr(given, name) is not None}
    if chunking:
        if "chunking" not in _parameters(fn):
            raise RuntimeError(f"--{next(iter(chunking)).replace('_', '-')}: {given.function} takes no chunking")
        from compiled_loss.planner.chunking import Chunking

        options["chunking"] = Chunking(**chunking)
    if given.inputs is not None:
        inputs = parse_inputs(given.inputs)
    elif ":" in given.function and first is None:
        raise RuntimeError(
            f'{given.function}: needs --inputs, such as --inputs "bf16[8192,4096]:grad int64[8192]:0..9"'
        )
    else:
        inputs = _made(fn if first is None or ":" not in given.function else first, given)
    if _parameters(fn) and not isinstance(fn, Named):
        try:
            signature(_called(fn)).bind(*inputs, **options)
        except TypeError as error:
            raise RuntimeError(f"{given.function}: {error}, with {len(inputs)} inputs and {list(options)}") from None
    inductor = dict(given.inductor or ())
    if inductor:
        from torch._inductor import list_options

        unknown = sorted(inductor.keys() - set(list_options()))
        if unknown:
            raise RuntimeError(f"--inductor: torch {torch.__version__} has no {', '.join(unknown)}")
    tensors = {name: value for name, value in options.items() if isinstance(value, TensorSpec)}
    others = {name: value for name, value in options.items() if name not in tensors}
    if others:
        fn = _named(partial(fn, **others), label)
    if tensors:
        fn = _named(partial(_by_name, fn, tuple(tensors)), label)
    return Case(
        label=label,
        fn=fn,
        inputs=(*inputs, *tensors.values()),
        device=given.device,
        backward=given.backward,
        dynamic=given.dynamic,
        inductor=inductor or None,
        loss=None if given.loss is None else tuple(given.loss),
    )


def _called(fn: Callable[..., Any]) -> Callable[..., Any]:
    return fn.forward if isinstance(fn, torch.nn.Module) else fn


def _parameters(fn: Callable[..., Any]) -> dict[str, Parameter]:
    """Returns {name: parameter}; it is empty for a function without a signature, such as some of torch's."""
    try:
        return dict(signature(_called(fn)).parameters)
    except (TypeError, ValueError):
        return {}


def _made(fn: Callable[..., Any], given: argparse.Namespace) -> tuple[Any, ...]:
    """Makes inputs of sizes N, H and V for a function of ours."""
    from compiled_loss.inspection.call import parse_inputs

    sizes = {name: getattr(given, name) for name in SHAPE} | {"last": given.vocab - 1}
    positional = [
        p.name for p in _parameters(fn).values() if p.kind == p.POSITIONAL_OR_KEYWORD and p.default is p.empty
    ]
    unknown = [name for name in positional if name not in INPUTS]
    if unknown or not positional:
        raise RuntimeError(f"{given.function}: needs --inputs, for nothing is known of {', '.join(unknown) or 'them'}")
    return parse_inputs(" ".join(INPUTS[name].format(**sizes) for name in positional))


def _named(fn: partial[Any], name: str) -> partial[Any]:
    fn.__name__ = name  # type: ignore[attr-defined]
    return fn


def _by_name(fn: Callable[..., Any], names: tuple[str, ...], *inputs: Any) -> Any:
    """Calls with the last inputs as keyword arguments, because a tensor to be differentiated must be an input."""
    return fn(*inputs[: -len(names)], **dict(zip(names, inputs[-len(names) :], strict=True)))
