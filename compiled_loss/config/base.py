"""The base of the configs: fields, validation, and plain values to write down.

NOTE [Round trip]
`to_dict` gives plain values that JSON and YAML hold, and `from_dict` takes them back. A process group exists only in a
running program, so a config that holds one has no dict, and says so. A factory is written as "module:name", which
`from_dict` imports. A factory without such a name, a lambda for instance, stays as it is, and so do a factory's
keywords.
"""

from __future__ import annotations

import dataclasses
import pkgutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import nn

from compiled_loss import checks
from compiled_loss.planner.chunking import Chunking

if TYPE_CHECKING:
    from typing_extensions import Self


@dataclass
class Typed:
    """The base of all configs. Fields stay assignable, so they are validated on construction and again by `build`."""

    def __new__(cls, *args: Any, **keywords: Any) -> Self:
        checks.modules.keywords(cls, keywords, getattr(cls, "module", None))
        return super().__new__(cls)

    def __post_init__(self) -> None:
        for f in dataclasses.fields(self):
            value = getattr(self, f.name)
            if isinstance(f.default, Chunking) and isinstance(value, Mapping):
                setattr(self, f.name, chunking_of(value))
        self.validate()

    def validate(self) -> None:
        """Raises an error where a field has a wrong value."""

    def to_dict(self) -> dict[str, Any]:
        """Returns plain values by field name: NOTE [Round trip]."""
        values = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        checks.modules.no_runtime(type(self).__name__, "tp_group", values.pop("tp_group", None))
        return {name: _plain(value) for name, value in values.items()}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """Returns the config from the values that `to_dict` returned."""
        return cls(**values)


def _plain(value: Any) -> Any:
    if isinstance(value, Chunking):
        fields = {f.name: getattr(value, f.name) for f in dataclasses.fields(value) if f.init}
        dtype = fields["accumulate_dtype"]
        return fields | {"accumulate_dtype": None if dtype is None else str(dtype).removeprefix("torch.")}
    return value


def chunking_of(values: Mapping[str, Any]) -> Chunking:
    """Returns a chunking from plain values, as YAML has them."""
    checks.modules.fields("Chunking", values, [f.name for f in dataclasses.fields(Chunking) if f.init])
    dtype = values.get("accumulate_dtype")
    return Chunking(**{**values, "accumulate_dtype": getattr(torch, dtype, dtype) if isinstance(dtype, str) else dtype})


@dataclass
class LossConfig(Typed):
    """Base class of the loss configs. The fields are the keywords of a loss, and `build` makes the loss."""

    module: ClassVar[type[nn.Module] | None] = None

    def validate(self) -> None:
        """Raises an error where a field has a wrong value; the Module checks them."""
        if self.module is not None:
            self._make()

    def build(self) -> nn.Module:
        """Returns the loss."""
        if self.module is None:
            raise NotImplementedError(f"{type(self).__name__}: expected a subclass that overrides build()")
        return self._make()

    def _make(self) -> nn.Module:
        assert self.module is not None
        return self.module(**{f.name: getattr(self, f.name) for f in dataclasses.fields(self)})


@dataclass
class LossFromFactoryConfig(LossConfig):
    """The config of any class or callable that returns a loss.

    Attributes:
        factory: called as `factory(**kwargs)`.
        kwargs: its keyword arguments.

    """

    factory: Callable[..., nn.Module] | None = None
    kwargs: dict[str, Any] = field(default_factory=dict)

    def validate(self) -> None:
        """Raises an error unless the factory can be called."""
        checks.modules.factory(self.factory, self.kwargs)

    def build(self) -> nn.Module:
        """Calls the factory, and returns its result."""
        self.validate()
        assert self.factory is not None
        return self.factory(**self.kwargs)

    def to_dict(self) -> dict[str, Any]:
        """Returns the factory's name and its keywords: NOTE [Round trip]."""
        name = f"{getattr(self.factory, '__module__', None)}:{getattr(self.factory, '__qualname__', None)}"
        return {"factory": name if _found(name) == self.factory else self.factory, "kwargs": dict(self.kwargs)}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """Returns the config from the values that `to_dict` returned; it imports a factory that is a name."""
        factory = values.get("factory")
        return cls(**{**values, "factory": _found(factory) or factory})


def _found(name: Any) -> Any:
    """Returns the object that "module:name" stands for; None if there is none."""
    try:
        return pkgutil.resolve_name(name)
    except (TypeError, ValueError, ImportError, AttributeError):
        return None
