"""Losses that users write: traced, checked and differentiated once, then a `RowLoss` like the library's own.

C rows of a chunk. See engine/math/row_losses.py, NOTE [Row losses].

NOTE [What a function closes over]
Dynamo does not look into a function whose name is a constant of its graph, so nothing would tell it that a number the
function closes over has changed. Under `torch.compile` only a function that closes over nothing which can change has a
name: no closure, no default, no number, string or object among the globals it reads; functions of the same kind it may
call. Any other is left to Dynamo, in the vocab strategy. Eager code looks at the values in each call.
"""

from __future__ import annotations

import functools
import hashlib
import types
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from compiled_loss.checks import functions as checks
from compiled_loss.engine.kernels import symbolic_rows
from compiled_loss.engine.math import row_losses
from compiled_loss.engine.math.row_losses import Evaluated, Named, RowGradients, RowLoss
from compiled_loss.engine.math.statistics import Classes, RowStatistics, TokenStatistics
from compiled_loss.engine.transforms import without_autocast

_ROWS = 5  # of the example on which a function is tried


class Input(NamedTuple):
    """What a function is given beside the statistics: a value a row, or, without a shape, a number."""

    dtype: torch.dtype
    shape: tuple[int, ...] | None  # of a row
    wants_gradient: bool


class Signature(NamedTuple):
    """What a function is traced for."""

    inputs: tuple[Input, ...]
    dtype: torch.dtype  # of the statistics
    device: torch.device
    weighted: bool  # whether rows have weights
    weight_wants_gradient: bool


def may_be_named(function: Any) -> bool:
    """Whether the function might be a constant of Dynamo's graph, as far as Dynamo itself can tell."""
    if not torch.compiler.is_compiling():
        return True
    return isinstance(function, types.FunctionType) and (_is_ours(function) or function.__closure__ is None)


def _is_ours(function: Any) -> bool:
    """Whether it is the library's own, whose closures nobody changes."""
    return getattr(function, "__module__", None) == "compiled_loss.functional.policy_terms"


def named(function: Callable[..., Tensor], signature: Signature) -> Named | None:
    """Its `RowLoss`; None under `torch.compile` where it might change unseen. Raise unless it is a loss."""
    name = _constant_name(function, *signature) if torch.compiler.is_compiling() else _name(function, signature)
    if not name:
        return None
    wants = [signature.weight_wants_gradient] if signature.weighted else []
    wants += [one.wants_gradient for one in signature.inputs if one.shape is not None]
    wanted = tuple([i for i, one in enumerate(wants) if one])
    return Named(name, sum([one.shape is None for one in signature.inputs]), wanted)


def _constant_name(
    function: Callable[..., Tensor],
    inputs: tuple[Input, ...],
    dtype: torch.dtype,
    device: torch.device,
    weighted: bool,
    weight_wants_gradient: bool,
) -> str:
    signature = Signature(tuple([Input(*one) for one in inputs]), dtype, device, weighted, weight_wants_gradient)
    if not _is_ours(function):
        closed_over = _closed_over(function)
        if closed_over is None or not all([isinstance(one, _CODE) for one in closed_over]):
            return ""
    return _name(function, signature)


# What torch.compiler.assume_constant_result does, which imports Dynamo.
_constant_name._dynamo_marked_constant = True  # type: ignore[attr-defined]

_CODE = (types.CodeType, types.BuiltinFunctionType, type)
_VALUES = (bool, int, float, str, torch.dtype, types.NoneType)
_OF_MODULES = frozenset(vars(torch.nn.Module()))  # what torch keeps in one
_NAMES: dict[tuple[Any, ...], str] = {}
_TRACES: Counter[object] = Counter()  # of each function's code
_MANY = 8  # traces of one function, from which on somebody should hear of it


def _name(function: Callable[..., Tensor], signature: Signature) -> str:
    closed_over = _closed_over(function)
    key = None if closed_over is None else (*closed_over, signature)
    found = None if key is None else _NAMES.get(key)
    if found is None:
        code = getattr(function, "__code__", type(function))
        _TRACES[code, signature] += not _is_ours(function)
        if _TRACES[code, signature] == _MANY:
            checks.traced_often(function, _MANY)
        found = _traced(function, signature)
        if key is not None:
            _NAMES[key] = found
    return found


def _closed_over(function: Any) -> list[Any] | None:
    """The code of a function and of those it calls, and the values they close over; None if some cannot be told."""
    found: list[Any] = []
    return found if _collect(function, found, set()) else None


def _collect(value: Any, found: list[Any], seen: set[int]) -> bool:
    if id(value) in seen:
        return True
    seen.add(id(value))
    if isinstance(value, _VALUES):
        found.append((type(value), value))
        return True
    if isinstance(value, (types.FunctionType, *_CODE)):
        found.append(getattr(value, "__code__", value))
    parts = _parts(value)
    return parts is not None and all([_collect(part, found, seen) for part in parts])


def _parts(value: Any) -> list[Any] | None:
    """What a value is made of, as far as a loss may use it; None where that cannot be told."""
    if isinstance(value, functools.partial):
        return [value.func, *value.args, *[part for pair in sorted(value.keywords.items()) for part in pair]]
    if isinstance(value, torch.nn.Module):
        own = [part for name, part in vars(value).items() if name not in _OF_MODULES]
        return [type(value).forward, value.training, *own, *value.children()]
    if isinstance(value, types.FunctionType) and not _is_fixed(value.__module__):
        cells = [_content(cell) for cell in value.__closure__ or ()]
        defaults = [*(value.__defaults__ or ()), *(value.__kwdefaults__ or {}).values()]
        return [*cells, *defaults, *[value.__globals__[n] for n in _names(value.__code__) if n in value.__globals__]]
    if isinstance(value, (types.ModuleType, type)):
        return [] if _is_fixed(getattr(value, "__module__", value.__name__)) else None
    return [] if isinstance(value, (types.FunctionType, *_CODE)) else None


def _is_fixed(module: str) -> bool:
    """Whether nobody changes what is in a module."""
    return module.partition(".")[0] in ("builtins", "torch", "math")


def _content(cell: Any) -> Any:
    try:
        return cell.cell_contents
    except ValueError:  # empty still
        return None


def _names(code: types.CodeType) -> list[str]:
    """What a function's code may look for among its globals, the functions inside of it included."""
    inner = [n for value in code.co_consts if isinstance(value, types.CodeType) for n in _names(value)]
    return [*code.co_names, *inner]


def _traced(function: Callable[..., Tensor], signature: Signature) -> str:
    from torch.utils._python_dispatch import _disable_current_modes

    # Nothing of what happens here is the caller's: no mode sees it.
    with torch.inference_mode(False), torch.enable_grad(), without_autocast(signature.device), _disable_current_modes():
        graph, uses = _loss_of(function, signature)
        _check_rows(graph, signature)
        gradients = _with_gradients(function, signature, uses)
    text = f"{gradients.code}{uses}{signature}"
    found = row_losses.user_name(hashlib.sha256(text.encode()).hexdigest()[:16], total=uses[4], entropy=uses[2])
    row_losses.define(found, _row_loss(gradients, uses, signature))
    return found


def _loss_of(function: Callable[..., Tensor], signature: Signature) -> tuple[torch.fx.GraphModule, list[bool]]:
    """The function as a graph for a CPU, and which of the statistics it uses."""
    cpu = torch.device("cpu")

    def loss(*operands: Tensor) -> Tensor:
        return _called(function, operands, signature.dtype)

    graph = _graph(loss, signature._replace(device=cpu), weight=False)
    checks.traced_operators(graph)
    placeholders = [node for node in graph.graph.nodes if node.op == "placeholder"]
    return graph, [bool(node.users) for node in placeholders[: len(TokenStatistics._fields)]]


def _called(function: Callable[..., Tensor], operands: Sequence[Tensor], dtype: torch.dtype) -> Tensor:
    statistics = TokenStatistics(*operands[: len(TokenStatistics._fields)])
    loss = function(statistics, *operands[len(TokenStatistics._fields) :])
    checks.result(loss, statistics.logprob.shape)
    return loss.to(dtype)


def _with_gradients(
    function: Callable[..., Tensor], signature: Signature, uses: Sequence[bool]
) -> torch.fx.GraphModule:
    """(weight, *statistics, *inputs) -> (weight * loss, the loss if its gradient is wanted, *gradients)."""
    differentiable = [used and kind != "correct" for kind, used in zip(TokenStatistics._fields, uses, strict=True)]
    differentiable += [one.wants_gradient for one in signature.inputs]

    def evaluated(weight: Tensor, *operands: Tensor) -> tuple[Tensor, ...]:
        at = [v for v, one in zip(operands, differentiable, strict=True) if one]

        def loss(*at: Tensor) -> Tensor:
            left = list(at)
            whole = [left.pop(0) if one else v for v, one in zip(operands, differentiable, strict=True)]
            return _called(function, whole, signature.dtype)

        if at:
            value, pullback = torch.func.vjp(loss, *at)  # type: ignore[misc]  # no auxiliary output
            gradients = pullback(weight)
        else:
            value, gradients = loss(), ()
        return value * weight, *([value] if signature.weight_wants_gradient else []), *gradients

    return _graph(evaluated, signature, weight=True)


def _graph(function: Callable[..., Any], signature: Signature, *, weight: bool) -> torch.fx.GraphModule:
    from torch.fx.experimental.proxy_tensor import make_fx

    _, fake, _, count = symbolic_rows(_ROWS)
    with fake:

        def rows(dtype: torch.dtype, *shape: int) -> Tensor:
            return torch.empty((count, *shape), dtype=dtype, device=signature.device)

        operands = [rows(signature.dtype)] if weight else []
        operands += [rows(torch.bool if kind == "correct" else signature.dtype) for kind in TokenStatistics._fields]
        for one in signature.inputs:
            shaped = one.shape is not None
            of_rows = rows(one.dtype, *(one.shape or ()))
            operands.append(of_rows if shaped else torch.empty((), dtype=one.dtype, device=signature.device))
        with checks.tracing():
            return make_fx(function, tracing_mode="fake")(*operands)


def _check_rows(graph: torch.fx.GraphModule, signature: Signature) -> None:
    """Raise unless each row's loss is its own: the same with the other rows as without them."""
    random = torch.Generator("cpu").manual_seed(0)

    def example(dtype: torch.dtype, *shape: int) -> Tensor:
        if dtype.is_floating_point:
            return (0.1 + 0.8 * torch.rand(shape, generator=random, dtype=torch.float64, device="cpu")).to(dtype)
        return torch.randint(0, 2, shape, generator=random, device="cpu").to(dtype)

    statistics = [example(torch.bool if k == "correct" else signature.dtype, _ROWS) for k in TokenStatistics._fields]
    statistics[0] = -statistics[0]
    operands = [(v, True) for v in statistics]
    for one in signature.inputs:
        shape = () if one.shape is None else (_ROWS, *one.shape)
        operands.append((example(one.dtype, *shape), one.shape is not None))
    with torch.no_grad():
        together = graph(*[v for v, _ in operands])
        for i in range(_ROWS):
            alone = graph(*[v[i : i + 1] if of_rows else v for v, of_rows in operands])
            checks.own_row(together[i : i + 1], alone)


def _row_loss(graph: torch.fx.GraphModule, uses: Sequence[bool], signature: Signature) -> RowLoss:
    used = dict(zip(TokenStatistics._fields, uses, strict=True))
    of_rows = [one.shape is not None for one in signature.inputs]
    weighted = signature.weighted

    def evaluate(
        known: RowStatistics, labels: Tensor, classes: Classes, numbers: Sequence[Tensor], inputs: Sequence[Tensor]
    ) -> Evaluated:
        numbers, inputs, ignored = list(numbers), list(inputs), labels == classes.ignored
        weight = inputs.pop(0) if weighted else classes.nan_if_invalid(labels, known.nll.dtype)
        mean = None if known.total is None else known.total / (classes.last - classes.first)
        given = [inputs.pop(0) if one else numbers.pop(0) for one in of_rows]
        loss, *left = graph(weight, -known.nll, known.lse, known.entropy, known.correct, mean, *given)
        d_inputs = [left.pop(0)] if signature.weight_wants_gradient else []
        d = {kind: left.pop(0) for kind in TokenStatistics._fields if used[kind] and kind != "correct"}
        d_inputs += left
        d_total = None if mean is None else d["mean_logit"] / (classes.last - classes.first)
        d_nll = -d["logprob"] if "logprob" in d else known.nll.new_zeros(known.nll.shape)
        return Evaluated(
            loss.masked_fill(ignored, 0.0),
            RowGradients(d_nll, d.get("logsumexp"), d_total, d.get("entropy")),
            tuple([v.masked_fill(ignored.view(-1, *[1] * (v.dim() - 1)), 0.0) for v in d_inputs]),
        )

    rows = [one for one in signature.inputs if one.shape is not None]
    wants = [signature.weight_wants_gradient] * weighted + [one.wants_gradient for one in rows]
    return RowLoss(
        evaluate,
        with_total=used["mean_logit"],
        with_entropy=used["entropy"],
        numbers=len(signature.inputs) - len(rows),
        linear=int(weighted),
        wanted=tuple([i for i, one in enumerate(wants) if one]),
        computed=True,
    )
