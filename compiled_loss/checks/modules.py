"""Checks of Modules, configs and pipelines."""

from __future__ import annotations

import difflib
import functools
import inspect
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from numbers import Integral
from typing import Any, ParamSpec, TypeVar

import torch
from torch import Tensor, nn

from compiled_loss.checks import arguments, divergences, multi_token, numbers, options, targets

_P = ParamSpec("_P")
_R = TypeVar("_R")


def named(**names: str) -> Callable[[Callable[_P, _R]], Callable[_P, _R]]:
    """Returns a decorator with which a function's errors name the function's own arguments.

    Each keyword is a name in this library's errors; its value is the name to show instead. This costs nothing while
    there is no error, and `torch.compile` traces it.
    """

    def decorate(function: Callable[_P, _R]) -> Callable[_P, _R]:
        @functools.wraps(function)
        def call(*args: _P.args, **kwargs: _P.kwargs) -> _R:
            return calling(names, function, *args, **kwargs)

        return call

    return decorate


def calling(names: Mapping[str, str], function: Callable[_P, _R], *args: _P.args, **kwargs: _P.kwargs) -> _R:
    """Calls the function and returns its result; its errors have other names, as in `named`."""
    try:
        return function(*args, **kwargs)
    except (TypeError, ValueError, RuntimeError) as error:
        text = str(error)
        if ": expected" not in text:  # it is not ours
            raise
        raise type(error)(renamed(text, names)) from None


def renamed(text: str, names: Mapping[str, str]) -> str:
    """Returns the text with other names for arguments.

    A word after an article is prose, and a word after a dot is an attribute: these stay. It is plain Python, without
    `re`, because Dynamo traces it where a compiled loss gets a bad argument.
    """
    words = [""]
    for word in text.split(" "):
        for old, new in names.items():
            rest = word.removeprefix(old)
            if rest != word and rest[:1] in ("", ".", ",", ":", ";", "=", "[") and words[-1] not in ("a", "its", "the"):
                word = new + rest
                break
        words.append(word)
    return " ".join(words[1:])


def kept(values: Mapping[str, Any], chunking: type) -> None:
    """Raises unless each keyword that a Module keeps is in its range; `chunking` is the class of that keyword."""
    given = values.get
    options.transform(given("softcap"), given("temperature", 1.0))
    options.positive("logit_scale", given("logit_scale", 1.0))
    targets.logit_map(given("teacher_softcap"), given("teacher_logit_scale"), "teacher_")
    options.terms(given("label_smoothing", 0.0), given("z_loss", 0.0))
    options.alignment(given("shift", 0), given("ignore_index", -100), 1)
    options.reduction(given("reduction", "mean"))
    arguments.class_dim(given("class_dim", -1))
    multi_token.scaling(given("scaling_factor", 0.1))
    softcapping(given("logit_softcapping", 0.0))
    divergences.named(given("divergence", "forward_kl"))
    divergences.options(
        given("jsd_weight", 0.5),
        given("lk_decay", 3.0),
        given("temperature_squared", True),
        given("hard_label_weight", 0.0),
    )
    targets.kept_for_callers(given("fp32_upcast", True), given("chunk_size", 0))
    if "chunking" in values:
        arguments.instance("chunking", values["chunking"], chunking)
    weights = given("class_weights")
    if weights is not None:
        arguments.tensor("class_weights", weights)
        arguments.class_weights(weights, weights.numel(), weights.device)


def keywords(owner: Any, given: Mapping[str, object], module: Any) -> None:
    """Raises where a constructor does not know a keyword. `module` is the Module that a config builds."""
    if not given or torch.compiler.is_compiling():  # Dynamo asks for no signatures; it names the keyword itself
        return
    parameters = list(inspect.signature(owner.__init__).parameters.values())[1:]
    if any(p.kind is p.VAR_KEYWORD for p in parameters):
        return
    elsewhere: dict[str, str] = {}
    if module is not None:
        elsewhere |= {name: "comes with the call" for name in inspect.signature(module.forward).parameters}
    if module not in (None, owner):
        where = f"is set on the {module.__name__} that is built"
        elsewhere |= dict.fromkeys(inspect.signature(module).parameters, where)
    fields(owner.__name__, given, [p.name for p in parameters], elsewhere)


def softcapping(value: float) -> None:
    """Raises unless the value is a softcap, or 0 for none."""
    numbers.number("logit_softcapping", value)
    if not 0 <= value < math.inf:
        raise ValueError(f"logit_softcapping: expected a number >= 0, 0 for none, got {value}")


def implementation(value: object) -> None:
    """Raises unless the value is one of Automodel's implementations."""
    if value not in ("cce", "torch_compile"):
        raise ValueError(f"impl: expected 'cce' or 'torch_compile', got {value!r}")


def dtype_of_logits(value: object) -> None:
    """Raises unless the value is a dtype or None."""
    if value is not None and not isinstance(value, torch.dtype):
        raise TypeError(f"logits_dtype: expected a torch.dtype or None, got {type(value).__name__}")


def weighs_a_sum(loss_weights: object, reduction: str) -> None:
    """Raises where weights are given with a reduction other than "sum", in which they could mean two things."""
    if loss_weights is not None and reduction != "sum":
        raise ValueError(f"loss_weights: expected None with reduction {reduction!r}, got weights: use 'sum'")


def fields(owner: str, given: Iterable[str], known: Sequence[str], elsewhere: Mapping[str, str] | None = None) -> None:
    """Raises where a keyword is unknown; `elsewhere` says where some keywords belong."""
    hints = []
    unknown = sorted(set(given) - set(known))
    for name in unknown:
        if elsewhere and name in elsewhere:
            hints.append(f"{name} {elsewhere[name]}")
        else:
            hints += [f"did you mean {close}?" for close in difflib.get_close_matches(name, known, 1)]
    if unknown:
        expected = f"only {', '.join(known)}" if known else "no keywords"
        advice = f": {', '.join(hints)}" if hints else ""
        raise TypeError(f"{owner}: expected {expected}, got {', '.join(unknown)}{advice}")


def no_runtime(owner: str, name: str, value: object) -> None:
    """Raises where a config holds a value that exists only in a running program."""
    if value is not None:
        raise ValueError(f"{name}: expected None in a {owner} that is written down, got {type(value).__name__}")


def factory(value: object, kwargs: object) -> None:
    """Raises unless the factory can be called, with keywords."""
    if not callable(value):
        came = repr(value) if isinstance(value, str) else type(value).__name__
        raise TypeError(f"factory: expected a callable that returns a loss, got {came}")
    if not isinstance(kwargs, dict):
        raise TypeError(f"kwargs: expected a dict, got {type(kwargs).__name__}")


def registration(name: str, config: object, base: type, taken: dict[str, type]) -> None:
    """Raises unless a config may be registered under the name."""
    if not isinstance(name, str) or not name:
        raise TypeError(f"name: expected a str, got {name!r}")
    if not isinstance(config, type) or not issubclass(config, base):
        raise TypeError(f"config: expected a subclass of {base.__name__}, got {config!r}")
    if taken.get(name, config) is not config:
        raise ValueError(f"name: expected one that is not taken, got {name!r}, which is {taken[name].__name__}")


def no_keywords(kwargs: dict[str, object]) -> None:
    """Raises where keywords are given together with a config."""
    if kwargs:
        raise ValueError(f"loss_kwargs: expected none beside a config, got {', '.join(sorted(kwargs))}: set its fields")


def loss_target(loss: object, base: type, known: list[str]) -> None:
    """Raises unless `loss` is a class or callable that may be a loss."""
    names = f"a config, a name of {', '.join(known)}, or a loss class or callable"
    if isinstance(loss, base):
        raise TypeError(f"loss: expected {names}, got {type(loss).__name__}: call its build(loss_fn, model)")
    if isinstance(loss, type) and issubclass(loss, base):
        raise TypeError(f"loss: expected {names}, got the class {loss.__name__}: make one, {loss.__name__}()")
    if not callable(loss):
        raise TypeError(f"loss: expected {names}, got {loss!r}; dotted paths are the caller's to resolve")


def scaling(scaling_factor: float | None, ignored: int | None) -> None:
    """Raises unless the numbers of an auxiliary loss are in range."""
    if scaling_factor is not None:
        multi_token.scaling(scaling_factor, " or None")
    if ignored is not None:
        options.alignment(0, ignored, 1)


def pipeline(loss: object, model: object) -> None:
    """Raises unless a pipeline's loss can be called, and its model is a Module."""
    if not callable(loss):
        raise TypeError(f"loss_fn: expected a loss to call, got {type(loss).__name__}")
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected a Module, got {type(model).__name__}")


def given(name: str, value: object, loss: object) -> None:
    """Raises where an argument that a loss takes is missing."""
    if value is None:
        raise ValueError(f"{name}: expected, for {type(loss).__name__} takes them, got None")


def mtp_outputs(hidden: Sequence[Tensor] | None, logits_: Sequence[Tensor] | None, loss: object) -> Sequence[Tensor]:
    """Returns each depth's outputs. Raises unless exactly one form is given, and the loss takes that form."""
    if (hidden is None) == (logits_ is None):
        both = "both" if hidden is not None else "neither"
        raise ValueError(f"mtp_per_depth_h: expected it or mtp_per_depth_logits, got {both}")
    if logits_ is not None and getattr(loss, "takes_hidden_states", False):
        raise ValueError(
            f"mtp_per_depth_logits: expected mtp_per_depth_h, which {type(loss).__name__} takes, got these"
        )
    found = hidden if logits_ is None else logits_
    assert found is not None
    return found


def ignore_index(value: int | None, loss: object) -> int:
    """Returns the label that a loss ignores. Raises where a different one is given."""
    own = getattr(loss, "ignore_index", -100 if value is None else value)
    own = int(own) if isinstance(own, Integral) and not isinstance(own, bool) else -100
    if value is not None and own != value:
        raise ValueError(f"ignore_index: expected {own} like {type(loss).__name__}, got {value}: None takes the loss's")
    return own


def takes_bias(loss: Any) -> None:
    """Raises where a loss would drop a head's bias."""
    parameters = inspect.signature(loss.forward if isinstance(loss, nn.Module) else loss).parameters
    if "lm_bias" not in parameters and not any(p.kind is p.VAR_KEYWORD for p in parameters.values()):
        raise TypeError(
            f"loss_fn: expected one that takes lm_bias, for the head has a bias, got {type(loss).__name__}: "
            "add it to its keywords, or use a loss of logits"
        )


def seq_idx_tail(value: Tensor) -> None:
    """Raises unless the int32 tensor at the end of a stage's output is a seq_idx."""
    if value.dim() != 2:
        raise ValueError(
            f"output: expected seq_idx [B, S], the int32 tensor at its end, got {arguments.sizes(value.shape)}: "
            "other integers must not come last"
        )
