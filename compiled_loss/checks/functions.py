"""Checks of a loss that a user writes: its arguments, its operations and its results."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from compiled_loss.checks import arguments, numbers


def _meant(name: str) -> str:
    given = "logits [C, V]" if name == "logits_loss" else "statistics [C]"
    return f"{name}: expected a function ({given}, *inputs [C, ...]) -> [C] of torch operations on its arguments"


def function(name: str, value: object) -> None:
    """Raises unless the value can be called."""
    if not callable(value):
        raise TypeError(f"{_meant(name)}, got {type(value).__name__}")


def given(name: str, value: Any) -> None:
    """Raises unless an input is a tensor, or a number without gradient."""
    if isinstance(value, Tensor):
        arguments.tensor(name, value)
    if not isinstance(value, Tensor) or not value.dim():
        numbers.number(name, value, " or a Tensor [..., C]")


def of_tokens(name: str, value: Tensor, own: torch.Size, shape: torch.Size, device: torch.device) -> None:
    """Raises unless an input, of which the rank has `own`, has a value for each token of [...]."""
    if value.dtype.is_complex:
        raise TypeError(f"{name}: expected bool, integer or floating, got {value.dtype}")
    if arguments.differ(own[: len(shape)], shape):
        raise ValueError(
            f"{name}: expected {arguments.sizes(shape)} first, a value for each token, got {arguments.sizes(own)}"
        )
    arguments.same_device(name, value, device)


def result(name: str, value: Any, shape: torch.Size) -> None:
    """Raises unless the value has one loss per row."""
    if not isinstance(value, Tensor):
        raise ValueError(f"{_meant(name)}; it returned {type(value).__name__}")
    if not value.dtype.is_floating_point:
        raise ValueError(f"{_meant(name)}; it returned {value.dtype}")
    if value.dim() != 1 or value.shape != shape:
        sizes = ", ".join([str(n) if isinstance(n, int) else "C" for n in value.shape])
        raise ValueError(
            f"{_meant(name)}; it returned [{sizes}]. Return one value for each token and leave the mean or sum to "
            "`reduction`"
        )


def closes_over(name: str = "token_loss") -> None:
    """Raises an error: under torch.compile the token strategy takes only functions that close over nothing."""
    what = "a plain function without closure, defaults or global numbers"
    how = f"Give what it closes over as inputs: linear_{name}(..., {name}, tensor, number)"
    if name == "logits_loss":
        raise ValueError(f"logits_loss: expected under torch.compile {what}. {how}")
    raise ValueError(
        f"strategy: expected 'vocab' or 'auto', got 'tokens', which under torch.compile takes {what}. {how}"
    )


def whole_rows(group: str | None, strategy: str, reduction: str) -> None:
    """Raises unless a loss of logits is possible: it needs all logits of a token, and a scalar result."""
    if group is not None:
        raise ValueError(
            "weight: expected all classes of the vocabulary, got a rank's: a logits_loss needs whole rows; use "
            "linear_token_loss, or gather the weight"
        )
    if strategy == "vocab":
        raise ValueError("strategy: expected 'tokens' or 'auto', got 'vocab': a logits_loss needs whole rows")
    if reduction == "none":
        raise ValueError(
            "reduction: expected 'mean' or 'sum', got 'none': gradients are formed before the upstream ones are known"
        )


@contextlib.contextmanager
def tracing(name: str) -> Iterator[None]:
    """Turns an error of tracing into one that says what a function may do."""
    try:
        yield
    except AssertionError as error:
        if "FakeTensor" not in str(error):
            raise
        raise ValueError(
            f"{_meant(name)}; it reads a tensor that is none of them. Give that tensor as an input: "
            f"linear_{name}(..., {name}, tensor)"
        ) from error
    except Exception as error:
        if str(error).startswith(_meant(name)):
            raise
        line = str(error).strip().partition("\n")[0]
        raise ValueError(
            f"{_meant(name)}; it could not be traced: {type(error).__name__}: {line}. It must not branch on values, "
            "read them with .item(), or write to its arguments: use torch.where, and give numbers that change as inputs"
        ) from error


def traced_operators(name: str, graph: torch.fx.GraphModule) -> None:
    """Raises unless the function's operators give the same in every call, of its arguments alone."""
    for node in graph.graph.nodes:
        if node.op == "get_attr":
            raise ValueError(
                f"{_meant(name)}; it makes a tensor of numbers. Write the numbers themselves, or give the tensor as an "
                "input"
            )
        if node.op != "call_function" or not isinstance(node.target, torch._ops.OpOverload):
            continue
        called = node.target._schema.name.removeprefix("aten::")
        if torch.Tag.nondeterministic_seeded in node.target.tags:
            raise ValueError(f"{_meant(name)}; it calls {called}, which is random. Give the random numbers as an input")
        if node.target._schema.is_mutable:
            raise ValueError(
                f"{_meant(name)}; it calls {called}, which writes in place. Use {called.rstrip('_')} instead"
            )
        if called in ("_local_scalar_dense", "item"):
            raise ValueError(
                f"{_meant(name)}; it reads a value with .item(), or has torch do so, as clamp does of a number "
                "beside a tensor. Compute with the tensor instead, and give clamp two tensors or two numbers"
            )


def traced_often(name: str, function: Any, times: int) -> None:
    """Warns that the values a function closes over change from call to call."""
    called = getattr(function, "__qualname__", type(function).__name__)
    warnings.warn(
        f"{name}: {called} was another function in each of {times} calls, because it closes over values that change. "
        "Each takes milliseconds to trace, and compiled kernels are compiled again. Give such numbers as inputs: "
        f"linear_{name}(..., {name}, number)",
        UserWarning,
        stacklevel=2,
    )


def number_of_rows(name: str, guards: object) -> None:
    """Raises an error: the function's results depend on the number of tokens."""
    raise ValueError(
        f"{_meant(name)}; it depends on how many tokens a chunk has ({guards}). A token's loss must depend on that "
        "token alone"
    )


def own_row(name: str, together: Tensor, alone: Tensor) -> None:
    """Raises unless a row's loss is the same without the other rows."""
    if not torch.allclose(together, alone, rtol=1e-3, atol=1e-5, equal_nan=True):
        raise ValueError(
            f"{_meant(name)}; a token's loss depends on other tokens, of which a chunk has only some. Compute what "
            "belongs to all of them, such as a mean, before, and give it as an input"
        )
