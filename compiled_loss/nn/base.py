"""The base of the Modules of losses.

NOTE [Kept keywords]
A keyword that is the same for all batches is a field of the Module, given when it is made. The tensors of a batch come
with the call. `compile` comes with the call, too, because `nn.Module.compile` is a method. The fields are spelled once,
in a dataclass of options that the Module and its config inherit. The call takes every other argument of the function,
so it takes a new one at once. A test fails, and names the class, where a new keyword belongs among the fields.
"""

import dataclasses
import functools
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

from torch import Tensor, nn

from compiled_loss import checks
from compiled_loss.planner.chunking import Chunking


@dataclass(kw_only=True, eq=False, repr=False)
class Loss(nn.Module):
    """A dataclass that is a Module without parameters. Its fields are validated when it is made."""

    def extra_repr(self) -> str:
        """Returns the fields that do not have their default, as text."""
        shown = []
        for f in dataclasses.fields(self):
            value = getattr(self, f.name)
            text = str(list(value.shape)) if isinstance(value, Tensor) else repr(value)
            if text != repr(f.default):
                shown.append(f"{f.name}={text}")
        return ", ".join(shown)


@dataclass(kw_only=True, eq=False, repr=False)
class ClassWeighted(Loss):
    """A loss whose class weights are a buffer: they move with the Module."""

    class_weights: Tensor | None = None
    """[V], any floating dtype, without gradient."""

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "class_weights" and name not in self._buffers:
            self.register_buffer(name, value)
        else:
            super().__setattr__(name, value)


del ClassWeighted.class_weights  # the default, an attribute of the class, would hide the buffer

_Class = TypeVar("_Class", bound=type[Loss])


def loss_module(function: Callable[..., Any] | None = None) -> Callable[[_Class], _Class]:
    """Returns a decorator that lets the constructor of a dataclass make a Module.

    If a function is given, `forward` calls it with the fields: NOTE [Kept keywords].
    """

    def decorate(cls: _Class) -> _Class:
        assign, names = cls.__init__, tuple(f.name for f in dataclasses.fields(cls))

        @functools.wraps(assign)
        def __init__(self: Loss, *args: Any, **keywords: Any) -> None:  # noqa: N807
            given = dict(zip(names, args, strict=False)) | keywords
            checks.modules.keywords(cls, keywords, cls)
            checks.modules.kept(given, Chunking)
            nn.Module.__init__(self)  # not that of another base class of a subclass
            assign(self, *args, **keywords)

        cls.__init__ = __init__  # type: ignore[assignment, method-assign]
        if function is not None:
            cls.forward = _forward(cls, function, names)
        return cls

    return decorate


def _forward(cls: type[Loss], function: Callable[..., Any], kept: tuple[str, ...]) -> Callable[..., Any]:
    """Returns a method that calls the function. Its signature is that of the function, without the fields."""

    def forward(self: Loss, *tensors: Any, **call: Any) -> Any:  # a Tensor, or a record that has the loss
        return function(*tensors, **call, **{name: getattr(self, name) for name in kept})

    signature = inspect.signature(function, eval_str=True)
    left = [p for p in signature.parameters.values() if p.name not in kept]
    this = inspect.Parameter("self", inspect.Parameter.POSITIONAL_OR_KEYWORD)
    forward.__signature__ = signature.replace(parameters=[this, *left])  # type: ignore[attr-defined]
    forward.__doc__ = f"The loss; see :func:`compiled_loss.{function.__name__}`."
    forward.__module__, forward.__qualname__ = cls.__module__, f"{cls.__qualname__}.forward"
    return forward
