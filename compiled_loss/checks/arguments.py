"""Checks of a loss's arguments, before any work: each error names the argument, what was expected and what came."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.autograd import forward_ad

from compiled_loss.checks import numbers

OLDEST_TORCH = (2, 11)
_DEQUANTISE = "give its values in a floating dtype, or use a loss of the logits that its module computes"


class UnsupportedTorchError(ImportError, ValueError):
    """The installed torch is older than the oldest this library is tested on."""


def torch_version(version: str) -> None:
    """Raises unless `version` is one this library is tested on, or newer."""
    if tuple(int(part) for part in version.split(".")[:2]) < OLDEST_TORCH:
        oldest = ".".join(map(str, OLDEST_TORCH))
        raise UnsupportedTorchError(
            f"compiled_loss: expected torch >= {oldest}, got {version}: pip install 'torch>={oldest}'"
        )


def tensor(name: str, value: object) -> None:
    """Raises unless `value` is a tensor whose elements lie in memory as its dtype says, or a DTensor."""
    kind = type(value)
    if not isinstance(value, Tensor):
        own = isinstance(value, torch.nn.Module) and isinstance(getattr(value, "weight", None), Tensor)
        raise TypeError(
            f"{name}: expected a Tensor, got {kind.__name__}" + (f": use {kind.__name__.lower()}.weight" if own else "")
        )
    if value.is_nested:
        raise TypeError(
            f"{name}: expected a dense Tensor, got a nested one: use .values() of each nested argument, which has all "
            "sequences one after another"
        )
    if value.layout is not torch.strided:
        raise TypeError(f"{name}: expected a dense Tensor, got one of layout {value.layout}: use .to_dense()")
    known = kind in (Tensor, torch.nn.Parameter) or kind.__module__.startswith("torch.")
    if not known and hasattr(kind, "__tensor_flatten__"):  # Dynamo 2.11 cannot ask a Parameter's class for it
        raise TypeError(f"{name}: expected a plain Tensor, got {kind.__name__}: {_DEQUANTISE}")
    _no_tangent(name, value)


def _no_tangent(name: str, value: Tensor) -> None:
    """Raises where a forward-mode derivative is asked for, outside functorch transforms."""
    if forward_ad._current_level < 0 or torch._C._are_functorch_transforms_active():
        return
    # While tracing nobody can tell which tensors are dual, so every tensor is refused.
    if torch.compiler.is_compiling() or forward_ad.unpack_dual(value).tangent is not None:
        raise RuntimeError(
            f"{name}: expected a Tensor without a tangent, got a dual one: this loss has no forward-mode derivative "
            "outside torch.func transforms; take it with torch.func.jvp, or from the functions of "
            "compiled_loss.reference"
        )


def floating(name: str, value: Tensor) -> None:
    """Raises unless `value` is of a floating dtype that gradients are computed in."""
    floating_dtype(name, value.dtype)


def floating_dtype(name: str, value: object) -> None:
    """Raises unless `value` is a dtype that gradients are computed in."""
    if value not in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
        quantised = isinstance(value, torch.dtype) and value.itemsize == 1 and value != torch.bool
        advice = f": {_DEQUANTISE}" if quantised else ""
        raise TypeError(f"{name}: expected float32, bfloat16, float16 or float64, got {value}{advice}")


def linear_weight(weight: object, bias: Tensor | None, called: str = "weight") -> None:
    """Raises where the weight of a head is a Module that has a bias, too."""
    if isinstance(weight, torch.nn.Module) and bias is None and isinstance(getattr(weight, "bias", None), Tensor):
        kind = type(weight).__name__
        name = kind.lower()
        raise TypeError(f"{called}: expected a Tensor, got {kind}: use {name}.weight and bias={name}.bias")


def labels(
    value: Tensor,
    own: torch.Size,
    rows: str,
    shape: torch.Size,
    device: torch.device,
    *,
    name: str = "labels",
    without: str = "its last dimension",
    hint: Callable[[], str] = str,
) -> None:
    """Raises unless `value` is int64, shaped like `rows` without a dimension and on its device.

    `own` is the shape of this rank's part of the value. `hint` explains a wrong shape. It is called only when the
    shapes differ, because its own comparisons would be guards under torch.compile.
    """
    tensor(name, value)
    if value.is_floating_point() and value.dim() == len(shape) + 1:
        raise TypeError(
            f"{name}: expected int64 {sizes(shape)}, got {value.dtype} {sizes(value.shape)}: probabilities are labels "
            "of cross_entropy() on logits, and target_probs of linear_soft_cross_entropy() on a head"
        )
    if value.dtype != torch.int64:
        raise TypeError(f"{name}: expected int64, got {value.dtype}: use {name}.long()")
    if differ(own, shape):
        raise ValueError(
            f"{name}: expected the shape of {rows} without {without}, {sizes(shape)}, got {sizes(own)}{hint()}"
        )
    same_device(name, value, device)


def same_device(name: str, value: Tensor, device: torch.device) -> None:
    """Raises unless `value` is on `device`."""
    if value.device != device:
        raise ValueError(f"{name}: expected on {device} like the first argument, got {value.device}")


def class_dim(value: object, dimensions: int | None = None) -> None:
    """Raises unless `value` is a dimension of a tensor with so many `dimensions`, if their number is known."""
    if isinstance(value, bool) or not isinstance(value, (int, torch.SymInt)):
        raise TypeError(f"class_dim: expected an int, got {type(value).__name__}")
    if dimensions is not None and not -dimensions <= value < dimensions:
        raise ValueError(f"class_dim: expected from {-dimensions} to {dimensions - 1}, got {value}")


def logits(value: Tensor, vocab: int, name: str = "logits") -> None:
    """Raises unless `value` is [..., V], or a rank's part of it."""
    floating(name, value)
    if value.dim() < 1 or vocab < 1:
        raise ValueError(f"{name}: expected [..., V] with V >= 1, got {sizes(value.shape)}")


def head(hidden: Tensor, weight: Tensor, vocab: int, names: tuple[str, str] = ("hidden", "weight")) -> None:
    """Raises unless hidden @ weight.T exists; `names` are their arguments, `vocab` V of all ranks."""
    for name, value in zip(names, (hidden, weight), strict=True):
        floating(name, value)
    if weight.dim() != 2 or weight.shape[1] == 0 or vocab == 0:
        swapped = weight.dim() > 2 and hidden.dim() == 2
        raise ValueError(
            f"{names[1]}: expected [V, H] with V >= 1 and H >= 1, got {sizes(weight.shape)}"
            + (f": {names[0]} comes first, {names[1]} second" if swapped else "")
        )
    if hidden.dim() < 1 or hidden.shape[-1] != weight.shape[1]:
        transposed = hidden.dim() >= 1 and hidden.shape[-1] == weight.shape[0]
        raise ValueError(
            f"{names[0]}: expected [..., H] with H = {weight.shape[1]}, the width of {names[1]}, "
            f"got {sizes(hidden.shape)}" + (f": use {names[1]}.t() where it is [H, V]" if transposed else "")
        )
    same_device(names[1], weight, hidden.device)


def same_dtype(hidden: torch.dtype, weight: torch.dtype, names: tuple[str, str]) -> None:
    """Raises unless one GEMM can take both."""
    if hidden != weight:
        raise TypeError(
            f"{names[1]}: expected the dtype of {names[0]}, {hidden}, got {weight}: "
            "cast one of them, or call under torch.autocast"
        )


def vocabulary_vector(name: str, value: Tensor, vocab: int, device: torch.device) -> None:
    """Raises unless `value` is a floating [V]."""
    tensor(name, value)
    floating(name, value)
    if value.shape != (vocab,):
        raise ValueError(f"{name}: expected [V] = [{vocab}], got {sizes(value.shape)}")
    same_device(name, value, device)


def class_weights(value: Tensor | None, vocab: int, device: torch.device) -> None:
    """Raises unless `value` is None or a constant [V]."""
    if value is None:
        return
    vocabulary_vector("class_weights", value, vocab, device)
    if value.requires_grad:
        raise ValueError(
            "class_weights: expected a tensor without gradient, got requires_grad=True: use class_weights.detach()"
        )


def per_token(name: str, value: Tensor, own: torch.Size, shape: torch.Size, device: torch.device) -> None:
    """Raises unless `value`, of which the rank has `own`, broadcasts to `shape`, that of the labels."""
    if value.dtype.is_complex:
        raise TypeError(f"{name}: expected bool, integer or floating, got {value.dtype}")
    pairs = zip(reversed(own), reversed(shape), strict=False)
    if len(own) > len(shape) or any(
        numbers.holds(mine != 1, otherwise=True) and differ([mine], [theirs]) for mine, theirs in pairs
    ):
        raise ValueError(f"{name}: expected to broadcast to the labels' {sizes(shape)}, got {sizes(own)}")
    same_device(name, value, device)


def tokens(
    own: torch.Size, labels_: Tensor, name: str, source: torch.Size, device: torch.device, weight: Tensor | None = None
) -> None:
    """Raises unless labels, of which the rank has `own`, fit `source` [..., V or H], the argument before `weight`."""

    def hint() -> str:
        if weight is not None and labels_.shape == weight.shape[:-1]:
            return f": {name} comes first, its weight second"
        return _shifted(own, name, source[:-1])

    labels(labels_, own, name, source[:-1], device, hint=hint)


def _shifted(own: torch.Size, name: str, rows: torch.Size) -> str:
    """Returns a hint if labels of the shape `own` are one token short."""
    short = len(own) == len(rows) > 0 and own == (*rows[:-1], rows[-1] - 1)
    return f": give unshifted labels with shift=1, or leave out the last token of {name}" if short else ""


def class_labels(own: torch.Size, labels_: Tensor, name: str, rows: torch.Size, given: Tensor, class_dim_: int) -> None:
    """Raises unless labels fit the rows of logits, `given` as `name` with their classes along `class_dim`."""
    last = class_dim_ in (-1, given.dim() - 1)

    def hint() -> str:
        if name == "logits" and labels_.shape == given.shape:
            return ": use labels.to(logits.dtype) where they are probabilities"
        if last and given.dim() > 2 and labels_.shape == given.shape[:1] + given.shape[2:]:
            return ": use class_dim=1"
        return _shifted(own, name, rows)

    without = "its last dimension" if last else f"dimension {class_dim_}"
    labels(labels_, own, name, rows, given.device, without=without, hint=hint)


def instance(name: str, value: object, kind: type) -> None:
    """Raises unless `value` is an instance of a class of this library."""
    if not isinstance(value, kind):
        raise TypeError(f"{name}: expected a {kind.__name__}, got {type(value).__name__}")


def labels_in_range(invalid: Tensor, values: Tensor, vocab: int, ignore_index: int) -> None:
    """Raises if a label is marked invalid. It reads the tensors, so it is for eager CPU code only."""
    if invalid.any():
        first = values[invalid].reshape(-1)[0].item()
        raise ValueError(f"labels: expected 0 <= label < V = {vocab}, or ignore_index = {ignore_index}, got {first}")


def first_derivative() -> None:
    """Raises in a backward that is to be differentiated again; AOTAutograd itself refuses a compiled one."""
    if torch.is_grad_enabled() and not torch.compiler.is_compiling():
        raise RuntimeError(
            "create_graph: expected False, got True: this loss has no second derivative outside torch.func transforms; "
            "take it with torch.func, or from the functions of compiled_loss.reference"
        )


def differ(shape: Sequence[int], expected: Sequence[int]) -> bool:
    """Returns True if the sizes differ.

    Sizes of which nothing is known while tracing are asserted to be equal when the code runs.
    """
    if len(shape) != len(expected):
        return True
    for one, other in zip(shape, expected, strict=True):
        if not numbers.holds(one == other, otherwise=True):
            return True
        if torch.compiler.is_compiling():
            torch._check(one == other)
    return False


def sizes(shape: torch.Size) -> str:
    """Returns a shape as errors show it."""
    return "[" + ", ".join([str(int(size)) for size in shape]) + "]"
