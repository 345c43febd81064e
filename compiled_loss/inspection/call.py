"""A function and its inputs, described so that another process can call it: tensors travel as shapes, without data."""

from __future__ import annotations

import ast
import importlib
import io
import pickle
import re
import sys
from collections.abc import Callable
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from compiled_loss.inspection import errors
from compiled_loss.inspection.modules import placed
from compiled_loss.inspection.targets import Target

_DTYPES = {
    "f64": torch.float64,
    "f32": torch.float32,
    "fp32": torch.float32,
    "f16": torch.float16,
    "fp16": torch.float16,
    "bf16": torch.bfloat16,
    "i64": torch.int64,
    "i32": torch.int32,
}
_SPEC = re.compile(r"(\w+)\[\s*((?:\d+\s*(?:,\s*\d+\s*)*,?)?)\s*\]((?::[^:\s]+)*)")


@dataclass(frozen=True, kw_only=True)
class TensorSpec:
    """A tensor without its data. Integers are drawn from `low` to `high`, floats from a normal distribution.

    The range of integers in a given tensor is kept, except for negative ones, which mark elements to ignore.

    `parse` reads "bf16[8192,4096]:grad" and "int64[8192]:0..131071".
    """

    shape: tuple[int, ...]
    dtype: torch.dtype
    stride: tuple[int, ...] | None = None
    grad: bool = False
    low: int = 0
    high: int = 1

    @staticmethod
    def parse(text: str) -> TensorSpec:
        """Makes it from text. Raises a ValueError that says what was expected."""
        found = _SPEC.fullmatch(text)
        if found is None:
            errors.spec(text, "dtype[size,size] with :grad or :low..high after it")
        assert found is not None
        dtype = _DTYPES.get(found[1]) or getattr(torch, found[1], None)
        if not isinstance(dtype, torch.dtype):
            errors.spec(text, f"a torch dtype or one of {', '.join(_DTYPES)}")
        assert isinstance(dtype, torch.dtype)
        sizes = found[2].strip().rstrip(",")
        shape = tuple(int(size) for size in sizes.split(",")) if sizes else ()
        grad, low, high = False, 0, 1
        for option in filter(None, found[3].split(":")):
            limits = re.fullmatch(r"(-?\d+)\.\.(-?\d+)", option)
            if option == "grad" and dtype.is_floating_point:
                grad = True
            elif limits is not None and not dtype.is_floating_point and int(limits[1]) <= int(limits[2]):
                low, high = int(limits[1]), int(limits[2])
            else:
                errors.spec(text, "grad after a floating dtype, or low..high after an integer one")
        return TensorSpec(shape=shape, dtype=dtype, grad=grad, low=low, high=high)

    @staticmethod
    def of(tensor: Tensor) -> TensorSpec:
        """Describes a tensor. Integers keep their range."""
        low, high = 0, 1
        if (
            not tensor.is_floating_point()
            and not tensor.is_complex()
            and tensor.numel()
            and tensor.device.type != "meta"
        ):
            low, high = max(0, int(tensor.min())), max(0, int(tensor.max()))
        return TensorSpec(
            shape=tuple(tensor.shape),
            dtype=tensor.dtype,
            stride=None if tensor.is_contiguous() else tuple(tensor.stride()),
            grad=tensor.requires_grad,
            low=low,
            high=high,
        )

    def make(self, device: torch.device, *, data: bool) -> Tensor:
        """Returns a tensor as described; with `data` its elements are drawn."""
        if self.stride is None:
            tensor = torch.empty(self.shape, dtype=self.dtype, device=device)
        else:
            tensor = torch.empty_strided(self.shape, self.stride, dtype=self.dtype, device=device)
        if data and self.dtype.is_floating_point:
            # Small, as activations and weights are: the tails of a large softmax are subnormal, which a CPU is slow at.
            tensor.normal_(std=max(1, *self.shape[-1:]) ** -0.5)
        elif data and self.dtype == torch.bool:
            tensor.random_(0, 2)
        elif data:
            tensor.random_(self.low, self.high + 1)
        return tensor.requires_grad_(self.grad)

    def __str__(self) -> str:
        name = next((k for k, v in _DTYPES.items() if v == self.dtype and k[0] != "i"), None)
        text = f"{name or str(self.dtype).removeprefix('torch.')}[{','.join(map(str, self.shape))}]"
        if self.grad:
            return text + ":grad"
        return text if self.dtype.is_floating_point or self.dtype == torch.bool else f"{text}:{self.low}..{self.high}"


@dataclass(frozen=True, kw_only=True)
class Request:
    """A request of the parent. `call` is from `call.pack`; `assemble` are targets, all of the child's backend."""

    call: bytes
    name: str
    device: str
    backward: bool = True
    dynamic: bool | None = None
    options: dict[str, Any] | None = None
    assemble: tuple[Target, ...] = ()
    first_only: bool = False
    dump: str | None = None
    inputs: tuple[str, ...] = field(default=())
    loss: tuple[str, ...] | None = None


def parse_inputs(text: str) -> tuple[Any, ...]:
    """Returns the inputs in a text of the command line: specs of tensors and Python literals, separated by spaces."""
    inputs: list[Any] = []
    for word in re.findall(r"\w+\[[^\]]*\]\S*|\S+", text):
        if "[" in word and not word.startswith("["):
            inputs.append(TensorSpec.parse(word))
        else:
            try:
                inputs.append(ast.literal_eval(word))
            except (ValueError, SyntaxError):
                errors.spec(word, "a tensor such as bf16[8,4]:grad, or a Python literal")
    return tuple(inputs)


def find_function(name: str) -> Callable[..., Any]:
    """Returns the function `package.module:name`, or a public function of this library by its name alone."""
    module, _, attribute = name.rpartition(":")
    module = module or "compiled_loss"
    try:
        found: Any = importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{module}.".startswith(f"{error.name}."):
            raise  # what the module imports is missing
        errors.function(name, str(error))
    try:
        for part in attribute.split("."):
            found = getattr(found, part)
    except AttributeError as error:
        errors.function(name, str(error))
    if not callable(found):
        errors.function(name, f"{type(found).__name__} is not callable")
    result: Callable[..., Any] = found
    return result


class Named:
    """A function that another process finds, because this one cannot import its module."""

    def __init__(self, name: str) -> None:
        self.__name__ = name.rpartition(":")[2]
        self._name = name

    def __reduce__(self) -> tuple[Callable[[str], Callable[..., Any]], tuple[str]]:
        return find_function, (self._name,)

    def __call__(self, *inputs: Any, **options: Any) -> Any:
        raise NotImplementedError(self._name)


def pack(fn: Callable[..., Any], inputs: tuple[Any, ...]) -> bytes:
    """Returns the call as bytes.

    Functions that can be imported go by name, others by value; tensors go as specs.
    """
    try:
        import cloudpickle
    except ImportError:
        errors.extra("cloudpickle")

    class Pickler(cloudpickle.CloudPickler):  # type: ignore[misc]
        def reducer_override(self, value: Any) -> Any:
            if isinstance(value, Tensor):
                if type(value) not in (Tensor, torch.nn.Parameter):
                    errors.tensor(type(value).__name__)
                return _rebuild, (vars(TensorSpec.of(value)), isinstance(value, torch.nn.Parameter))
            if isinstance(value, TensorSpec):
                return _rebuild, (vars(value), False)
            return super().reducer_override(value)

    buffer = io.BytesIO()
    try:
        Pickler(buffer).dump((fn, tuple(TensorSpec.parse(v) if isinstance(v, str) else v for v in inputs)))
    except (errors.InspectionError, ValueError):
        raise
    except Exception as error:
        errors.pickle(getattr(fn, "__name__", type(fn).__name__), f"{type(error).__name__}: {error}")
    return buffer.getvalue()


class _Unpickler(pickle.Unpickler):
    """Makes functions of the caller's script functions of this process's main module.

    A function that travels by value brings the variables that it uses. Dynamo looks for them in the module that the
    function names, so they are put there.
    """

    def find_class(self, module: str, name: str) -> Any:
        found = super().find_class(module, name)
        if (module, name) != ("cloudpickle.cloudpickle", "_make_function"):
            return found

        def make(code: Any, variables: dict[str, Any], *rest: Any) -> Any:
            ours = variables.get("__name__") == "__main__"
            return found(code, vars(sys.modules["__main__"]) if ours else variables, *rest)

        return make


def unpack(call: bytes, device: torch.device, *, data: bool) -> tuple[Callable[..., Any], tuple[Any, ...]]:
    """Returns the function and its inputs, whose tensors are made on `device`."""
    token = _where.set((device, data))
    try:
        with placed(device, data=data):
            fn, inputs = _Unpickler(io.BytesIO(call)).load()
        return fn, inputs
    except errors.InspectionError:
        raise
    except (Exception, SystemExit) as error:
        raise errors.ImportRaisedError from error
    finally:
        _where.reset(token)


_where = ContextVar("_where", default=(torch.device("meta"), False))


def _rebuild(fields: dict[str, Any], parameter: bool) -> Tensor:
    spec = TensorSpec(**fields)
    device, data = _where.get()
    tensor = spec.make(device, data=data)
    return torch.nn.Parameter(tensor, requires_grad=spec.grad) if parameter else tensor
