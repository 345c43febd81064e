"""Operators that stand-ins for tensors lack: each is refused by its name, where Python would not say what to do."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NoReturn

_CONVERSIONS = ("array", "bool", "float", "int", "len")
_ARITHMETIC = ("abs", "matmul", "neg", "pow", "rsub", "rtruediv", "sub")
_COMPARISONS = ("eq", "ge", "gt", "le", "lt", "ne")


class Refusing:
    """What a class of these does not define itself, it refuses."""

    def refuse(self, name: str) -> NoReturn:
        """Raise an error that says what to do instead."""
        raise NotImplementedError(name)


def _refused(name: str) -> Callable[..., Any]:
    def method(self: Refusing, *_others: Any, **_keywords: Any) -> NoReturn:
        self.refuse(name)

    return method


for _name in (*_CONVERSIONS, *_ARITHMETIC, *_COMPARISONS):
    setattr(Refusing, f"__{_name}__", _refused(f"__{_name}__"))
