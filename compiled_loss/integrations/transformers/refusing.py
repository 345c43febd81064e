"""Operators that substitutes for tensors lack. Each is refused by its name, because Python's error would not help."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NoReturn

_CONVERSIONS = ("array", "bool", "float", "int", "len")
_ARITHMETIC = ("abs", "matmul", "neg", "pow", "rsub", "rtruediv", "sub")
_COMPARISONS = ("eq", "ge", "gt", "le", "lt", "ne")


class Refusing:
    """The base of classes that refuse every operator which they do not define."""

    def refuse(self, name: str) -> NoReturn:
        """Raises an error that says what to do instead."""
        raise NotImplementedError(name)


def _refused(name: str) -> Callable[..., Any]:
    def method(self: Refusing, *_others: Any, **_keywords: Any) -> NoReturn:
        self.refuse(name)

    return method


for _name in (*_CONVERSIONS, *_ARITHMETIC, *_COMPARISONS):
    setattr(Refusing, f"__{_name}__", _refused(f"__{_name}__"))
