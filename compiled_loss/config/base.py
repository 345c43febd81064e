"""What configs share: fields, validation, and what is written down of them.

NOTE [Round trip]
`to_dict` gives plain values that JSON and YAML hold, and `from_dict` takes them back. Process groups are made where the
program runs: a config that holds one has no dict, and says so.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, ClassVar, TypeVar

import torch
from torch import nn

from compiled_loss import checks
from compiled_loss.planner.chunking import Chunking

_Config = TypeVar("_Config", bound="Typed")
_RUNTIME = ("tp_group", "factory")


@dataclass
class Typed:
    """What all configs share. Fields stay assignable, so they are validated on construction and again by `build`."""

    def __post_init__(self) -> None:
        self.validate()

    def validate(self) -> None:
        """Raise where a field is not what it may be."""

    def to_dict(self) -> dict[str, Any]:
        """Plain values by field name: NOTE [Round trip]."""
        values = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        for name in _RUNTIME:
            checks.modules.no_runtime(type(self).__name__, name, values.pop(name, None))
        return {name: _plain(value) for name, value in values.items()}

    @classmethod
    def from_dict(cls: type[_Config], values: dict[str, Any]) -> _Config:
        """The config of `to_dict`."""
        checks.modules.fields(cls.__name__, values, [f.name for f in dataclasses.fields(cls)])
        chunking = values.get("chunking")
        return cls(**values | ({"chunking": _chunking(chunking)} if isinstance(chunking, dict) else {}))


def _plain(value: Any) -> Any:
    if isinstance(value, Chunking):
        fields = {f.name: getattr(value, f.name) for f in dataclasses.fields(value) if f.init}
        dtype = fields["accumulate_dtype"]
        return fields | {"accumulate_dtype": None if dtype is None else str(dtype).removeprefix("torch.")}
    return value


def _chunking(fields: dict[str, Any]) -> Chunking:
    checks.modules.fields("Chunking", fields, [f.name for f in dataclasses.fields(Chunking) if f.init])
    dtype = fields.get("accumulate_dtype")
    return Chunking(**fields | {"accumulate_dtype": getattr(torch, dtype, dtype) if isinstance(dtype, str) else dtype})


@dataclass
class LossConfig(Typed):
    """Base of the loss configs: fields are the keywords of a loss, `build` makes it."""

    module: ClassVar[type[nn.Module] | None] = None

    def validate(self) -> None:
        """Raise where a field is not what it may be: the Module looks."""
        if self.module is not None:
            self._make()

    def build(self) -> nn.Module:
        """The loss."""
        if self.module is None:
            raise NotImplementedError(f"{type(self).__name__}: expected a subclass that overrides build()")
        return self._make()

    def _make(self) -> nn.Module:
        assert self.module is not None
        return self.module(**{f.name: getattr(self, f.name) for f in dataclasses.fields(self)})


@dataclass
class LossFromFactoryConfig(LossConfig):
    """Of any class or callable that returns a loss.

    Attributes:
        factory: called as factory(**kwargs).
        kwargs: its keyword arguments.

    """

    factory: Callable[..., nn.Module] | None = None
    kwargs: dict[str, Any] = field(default_factory=dict)

    def validate(self) -> None:
        """Raise unless there is something to call."""
        checks.modules.factory(self.factory, self.kwargs)

    def build(self) -> nn.Module:
        """What the factory returns."""
        self.validate()
        assert self.factory is not None
        return self.factory(**self.kwargs)
