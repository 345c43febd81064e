"""Models' transforms of their logits, and their own losses, read from the forward of their class.

NOTE [What a forward says]
The families of `transformers` differ in few things, and use the same names for them. A softcap or a factor is one of
the attributes below. A class whose config has such an attribute need not use it (AyaVision around Cohere), and may
multiply by what others divide by (HyperCLOVA X and Granite). So the forward decides, and the model gives the value. All
parts of a loss are in statements whose target is named a loss. A part of a form that `_own_loss` does not know is a
loss that we do not compute. If a forward uses other names, the comparison of logits shows it.
"""

from __future__ import annotations

import ast
import functools
import inspect
import operator
import re
import textwrap
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from compiled_loss.checks.heads import FACTORS, SOFTCAPS
from compiled_loss.huggingface import checks

SHIFTS = {  # the distance of the labels of a loss_function from the positions that predict them
    "ForCausalLMLoss": 1,
    "causal_lm_loss": 1,
    "ForMaskedLMLoss": 0,  # T5Gemma, Dia
    "aligned_lm_loss": 0,
}

_LOSS = re.compile(r"(\w*_)?loss(es)?")
_LOGITS = re.compile(r"[\w.]*logits(\.(float|contiguous)\(\)|\.to\([\w.]+\))*")
_LABELS = re.compile(r"labels(\.contiguous\(\)|\.to\([\w.]+\))*")
_WEIGHTED = re.compile(r"self\.([\w.]+) \* (\w+_loss)(\.to\([\w.]+\))?")


class Transform(NamedTuple):
    """The transform softcap tanh(logits / softcap) / temperature."""

    softcap: float | None
    temperature: float


class OwnLoss(NamedTuple):
    """The loss that a class's forward returns.

    `calls`: the result of its loss_function is a part of it. `labels`: it takes labels. `weights`: for the variable of
    each further loss, the attribute that multiplies it. `others`: parts that are not known, and the variables they are
    in. `elsewhere`: one of them is another model's whole loss.
    """

    calls: bool
    labels: bool
    weights: dict[str, str]
    others: tuple[tuple[str, str], ...]
    elsewhere: bool


def innermost(model: Any) -> Any:
    """Returns the model inside of torch.compile, data parallelism, DeepSpeed and PEFT."""
    while not hasattr(type(model), "loss_function"):
        children = getattr(model, "_modules", {})
        wrapped = next((name for name in ("_orig_mod", "_fsdp_wrapped_module", "module") if name in children), None)
        if wrapped is not None:
            model = children[wrapped]
        elif hasattr(type(model), "get_base_model"):
            model = model.get_base_model()
        else:
            break
    return model


def text_config(model: Any) -> Any:
    """Returns the config of the part that reads and writes text."""
    config: Any = getattr(model, "config", None)
    return config.get_text_config() if hasattr(config, "get_text_config") else config


def shift(model: Any) -> int:
    """Returns the distance of labels from the positions that predict them, in the loss_function of the class."""
    function = getattr(type(model), "loss_function", None)
    if isinstance(function, property):  # it first looks for a function that was set; this substitute has none
        assert function.fget is not None
        function = function.fget(SimpleNamespace(loss_type=getattr(model, "loss_type", None)))
    if function is None:
        return 1
    name = getattr(function, "__name__", type(function).__name__)
    if name not in SHIFTS:
        checks.unknown_loss_function(model, name)
    return SHIFTS[name]


def transform(model: Any) -> Transform:
    """Returns the model's transform of its head's products."""
    config = text_config(model)
    softcap, before, factor = None, 1.0, 1.0
    for function in reversed(_forwards(model.__class__)):  # a base's forward comes first
        seen = set()
        for node in sorted(_expressions(function), key=lambda node: (node.lineno, node.col_offset)):
            name = node.value if isinstance(node, ast.Constant) else _last(node)
            if name in SOFTCAPS and getattr(config, name, None):  # as self.config.name, or getattr(config, "name")
                if softcap is None:
                    softcap, before = checks.number(name, getattr(config, name)), factor
            elif isinstance(node, ast.BinOp) and isinstance(node.op, (ast.Mult, ast.Div)):
                text = ast.unparse(node)
                for side in (node.left, node.right):
                    if isinstance(side, ast.Attribute) and side.attr in FACTORS and text not in seen:
                        value = checks.number(side.attr, _value(model, side))
                        factor *= 1 / value if isinstance(node.op, ast.Div) else value
                        seen.add(text)  # the same in another branch
    return Transform(None if softcap is None else softcap / before, 1 / factor)


def own_loss(model: Any) -> OwnLoss:
    """Returns the loss that the model's forward computes."""
    return _own_loss(model.__class__)


def unknown_parts(model: Any, own: OwnLoss) -> tuple[str, ...]:
    """Returns the parts of its loss besides loss_function and aux_loss that no weight of 0 switches off."""
    weights = {name: operator.attrgetter(path)(model) for name, path in own.weights.items() if name != "aux_loss"}
    parts = [text for name, text in own.others if weights.get(name) != 0]
    return (*parts, *(f"{name} by {own.weights[name]}" for name, weight in weights.items() if weight != 0))


def balance(model: Any, own: OwnLoss) -> float:
    """Returns the factor of aux_loss in the loss; 0 if it is not added."""
    path = own.weights.get("aux_loss")
    return 0.0 if path is None else checks.number(path, operator.attrgetter(path)(model))


def last_hidden_state(model: Any, outputs: Any) -> Tensor:
    """Returns the hidden states that the head was given, at all positions."""
    last = checks.last_hidden_state(outputs)
    if last.dim() == 4:  # Gemma3n's are [4, B, S, H]
        tail = next((module for module in model.modules() if hasattr(module, "altup_unembed_projections")), None)
        last = last if tail is None else _gemma3n_tail(tail, last)
    return last


def _gemma3n_tail(text: Any, states: Tensor) -> Tensor:
    """Computes the end of Gemma3nTextModel.forward, which comes after the last hidden states that it returns."""
    first, *rest = states.unbind()
    magnitude = first.square().mean(-1, keepdim=True).sqrt()
    parts = [first]
    for projection, state in zip(text.altup_unembed_projections, rest, strict=True):
        part = projection(state)
        parts.append(part * magnitude / part.square().mean(-1, keepdim=True).clamp(min=1e-5).sqrt())
    result: Tensor = text.norm(torch.stack(parts).mean(0))
    return result


@functools.cache
def _forwards(kind: type) -> tuple[ast.FunctionDef, ...]:
    """Returns the forward of a class, and those of its bases that it calls; their first argument is renamed to self."""
    found: list[ast.FunctionDef] = []
    for base in kind.__mro__:
        own = vars(base).get("forward")
        if own is None:
            continue
        if base is nn.Module:
            break
        function = _parsed(kind, inspect.unwrap(own))
        found.append(function)
        if not _delegates(function):
            break
    return tuple(found)


def _parsed(kind: type, forward: Any) -> ast.FunctionDef:
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(forward))).body[0]
    except (OSError, TypeError, SyntaxError):
        tree = None
    if not isinstance(tree, ast.FunctionDef):
        checks.unreadable(kind)
    arguments = [*tree.args.posonlyargs, *tree.args.args]
    for node in ast.walk(tree):
        if isinstance(node, ast.Name) and arguments and node.id == arguments[0].arg:
            node.id = "self"
    return tree


def _delegates(function: ast.FunctionDef) -> bool:
    """Returns True if the function calls a forward by its name, as one does with a base's."""
    return any(isinstance(node, ast.Call) and _last(node.func) == "forward" for node in ast.walk(function))


def _expressions(function: ast.FunctionDef) -> Iterator[ast.expr]:
    return (node for node in ast.walk(function) if isinstance(node, ast.expr))


def _value(model: Any, attribute: ast.Attribute) -> Any:
    """Returns the value of self.a.b as it is now; any other is looked up in the config. It is 1 if there is none."""
    path = ast.unparse(attribute)
    if re.fullmatch(r"self(\.\w+)+", path):
        value = operator.attrgetter(path.removeprefix("self."))(model)
    else:
        value = getattr(text_config(model), attribute.attr, None)
    return 1.0 if value is None else value


@functools.cache
def _own_loss(kind: type) -> OwnLoss:
    calls = labels = elsewhere = False
    others: list[tuple[str, str]] = []
    weights = {}
    for function in _forwards(kind):
        arguments = function.args
        labels |= any(a.arg == "labels" for a in (*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs))
        for variable, part in _parts(function):
            text = ast.unparse(part)
            if isinstance(part, ast.Constant) or (isinstance(part, ast.Name) and _LOSS.fullmatch(part.id)):
                continue
            if isinstance(part, ast.Attribute) and part.attr == "loss":
                if not _delegates(function):
                    elsewhere = True
                    others.append((variable, text))
            elif isinstance(part, ast.Call) and _last(part.func) == "loss_function":
                calls = True
                if not _plain(part):
                    others.append((variable, text))
            elif match := _WEIGHTED.fullmatch(text):
                weights[match[2]] = match[1]
            else:
                others.append((variable, text))
    nodes = [node for function in _forwards(kind) for node in ast.walk(function)]
    if "aux_loss" in weights and not any(isinstance(node, ast.keyword) and node.arg == "aux_loss" for node in nodes):
        others.append(("aux_loss", "an aux_loss that it does not return"))
    return OwnLoss(calls, labels, weights, tuple(others), elsewhere)


def _parts(function: ast.FunctionDef) -> Iterator[tuple[str, ast.expr]]:
    """Yields everything that is assigned to, added to, or returned as a loss, with the variable it is in."""
    for node in ast.walk(function):
        found: list[tuple[str, ast.expr]] = []
        if isinstance(node, (ast.Assign, ast.AnnAssign, ast.NamedExpr, ast.AugAssign)) and node.value is not None:
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            names = {_last(name) for target in targets for name in ast.walk(target)} - {"aux_loss"}
            plain = not isinstance(node, ast.AugAssign) or isinstance(node.op, ast.Add)
            value = node.value if plain else ast.BinOp(ast.Name("loss"), ast.Sub(), node.value)
            found = [(name, value) for name in names if _LOSS.fullmatch(name)]
        elif isinstance(node, ast.keyword) and node.arg == "loss":
            found = [("loss", node.value)]
        elif isinstance(node, ast.Dict):
            entries = zip(node.keys, node.values, strict=True)
            found = [("loss", value) for key, value in entries if isinstance(key, ast.Constant) and key.value == "loss"]
        for name, value in found:
            yield from ((name, part) for part in _summands(value))


def _summands(value: ast.expr) -> Iterator[ast.expr]:
    if isinstance(value, ast.IfExp):
        yield from (*_summands(value.body), *_summands(value.orelse))
    elif isinstance(value, ast.BinOp) and isinstance(value.op, ast.Add):
        yield from (*_summands(value.left), *_summands(value.right))
    else:
        yield value


def _plain(call: ast.Call) -> bool:
    """Returns True if a loss_function gets the logits and labels of forward, and no labels that are shifted already."""
    keywords = {keyword.arg: keyword.value for keyword in call.keywords}
    given = dict(zip(("logits", "labels"), call.args, strict=False)) | keywords
    logits, labels = (ast.unparse(given[name]) if name in given else "" for name in ("logits", "labels"))
    return bool(_LOGITS.fullmatch(logits) and _LABELS.fullmatch(labels)) and "shift_labels" not in keywords


def _last(node: ast.AST) -> str:
    """Returns the last name of a.b.c, or an empty text."""
    return node.attr if isinstance(node, ast.Attribute) else node.id if isinstance(node, ast.Name) else ""
