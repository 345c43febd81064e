"""Logits that are not computed. A model treats them as logits, and their cross-entropy is that of a linear head.

NOTE [Deferred logits]
What a model does between its head and its loss is one of few operations: it scales and bounds logits, which are
keywords of `linear_cross_entropy`, and selects and reshapes positions, which may be done to hidden states as well. So
in training a fused head returns hidden states that know how to do these. The model's own code decides on all else:
which labels are shifted, what is masked, what divides the sum, what is added to it. An operation that is none of these
is an error. Dynamo traces all of it as it traces the model.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NoReturn

import torch
from torch import Tensor
from torch.nn import functional as F

from compiled_loss.engine.math.statistics import TokenStatistics
from compiled_loss.functional.cross_entropy import linear_cross_entropy, linear_cross_entropy_with_statistics
from compiled_loss.functional.statistics import linear_token_statistics
from compiled_loss.integrations.transformers import checks
from compiled_loss.integrations.transformers.head_call import HeadCall
from compiled_loss.integrations.transformers.transform import Transform


class DeferredLogits:
    """The logits [..., V] of a training step, of which a model computes its loss; errors explain what it is not.

    It is what `output.logits` is after a training step of a model that :func:`fuse_head` was called with. By then it
    holds no tensor but those of `statistics`.
    """

    def __init__(self, call: HeadCall, hidden: Tensor, transform: Transform, *, classes_second: bool = False) -> None:
        self._call = call
        self._hidden: Any = hidden  # [..., H]; None once the model's forward has returned
        self._transform = transform
        self._classes_second = classes_second  # [B, V, ...], as cross_entropy has them
        call.made.append(self)

    @staticmethod
    def of(call: HeadCall, hidden: Tensor) -> DeferredLogits:
        """A head's, while it is called."""
        return DeferredLogits(call, hidden, Transform.identity(call.classes()))

    @property
    def statistics(self) -> TokenStatistics | None:
        """What the loss saw of each token, detached: those that were asked for, or None."""
        return self._call.statistics

    def release(self) -> None:
        """Hold the hidden states no longer."""
        self._hidden = None

    def __repr__(self) -> str:
        return f"DeferredLogits of {self._call.model}"

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):
            raise AttributeError(name)
        raise AttributeError(self._explanation(name))

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        known = _FUNCTIONS.get(func)
        if known is None:
            deferred = next(v for v in (*args, *(kwargs or {}).values()) if isinstance(v, DeferredLogits))
            deferred._refuse(getattr(func, "__name__", str(func)))
        return known(*args, **(kwargs or {}))

    # What logits say of themselves.

    @property
    def shape(self) -> torch.Size:
        batch, classes = self._positions("shape").shape[:-1], self._transform.classes
        return torch.Size((batch[0], classes, *batch[1:]) if self._classes_second else (*batch, classes))

    @property
    def ndim(self) -> int:
        return self._positions("ndim").dim()

    @property
    def device(self) -> torch.device:
        return self._positions("device").device

    @property
    def dtype(self) -> torch.dtype:
        return self._positions("dtype").dtype

    def dim(self) -> int:
        return self.ndim

    def size(self, dim: int | None = None) -> Any:
        return self.shape if dim is None else self.shape[dim]

    # What changes nothing: the loss is computed in fp32, on the head's device, of hidden states however they lie.

    def float(self) -> DeferredLogits:
        return self._like(self._positions("float"))

    def contiguous(self) -> DeferredLogits:
        return self._like(self._positions("contiguous"))

    def to(self, *args: Any, **kwargs: Any) -> DeferredLogits:
        hidden = self._positions("to")
        if hidden[:0].to(*args, **kwargs).device != hidden.device:
            self._refuse("to another device")
        return self._like(hidden)

    # Values.

    def __mul__(self, other: Any) -> DeferredLogits:
        return self._with(self._transform.times(self._number("a product", other)))

    __rmul__ = __mul__

    def __truediv__(self, other: Any) -> DeferredLogits:
        return self._with(self._transform.over(self._number("a quotient", other)))

    def tanh(self) -> DeferredLogits:
        return self._with(self._transform.tanh() or self._refuse("a second tanh"))

    def __add__(self, other: Any) -> DeferredLogits:
        if not isinstance(other, Tensor):
            self._refuse("a sum")
        return self._with(self._transform.plus(other) or self._refuse(f"a sum with {tuple(other.shape)}"))

    __radd__ = __add__

    # Positions and classes.

    def view(self, *shape: Any) -> DeferredLogits:
        hidden = self._classes_last("view")
        sizes = _ints(shape)
        if sizes[-1] == -1 and math.prod(sizes[:-1]) == math.prod(hidden.shape[:-1]):
            sizes[-1] = self._transform.classes
        if sizes[-1] != self._transform.classes:
            self._refuse(f"view({', '.join(map(str, sizes))}) of [..., {self._transform.classes}]")
        return self._like(hidden.reshape(*sizes[:-1], hidden.shape[-1]))

    reshape = view

    def flatten(self, start_dim: int = 0, end_dim: int = -1) -> DeferredLogits:
        hidden = self._classes_last("flatten")
        if end_dim % hidden.dim() == hidden.dim() - 1 and start_dim % hidden.dim() != hidden.dim() - 1:
            self._refuse("flatten of the classes")
        return self._like(hidden.flatten(start_dim, end_dim))

    def transpose(self, dim0: int, dim1: int) -> DeferredLogits:
        order = list(range(self.ndim))
        order[dim0], order[dim1] = order[dim1], order[dim0]
        return self.permute(*order)

    def permute(self, *dims: Any) -> DeferredLogits:
        hidden, last = self._positions("permute"), self.ndim - 1
        order = [dim % (last + 1) for dim in _ints(dims)]
        second, behind = [0, last, *range(1, last)], [0, *range(2, last + 1), 1]
        if self._classes_second and order == behind:
            return DeferredLogits(self._call, hidden, self._transform)
        if not self._classes_second and order[-1] == last:
            return self._like(hidden.permute(order))
        if not self._classes_second and order == second:
            return DeferredLogits(self._call, hidden, self._transform, classes_second=True)
        return self._refuse(f"permute({', '.join(map(str, order))})")

    def __getitem__(self, index: Any) -> DeferredLogits:
        hidden = self._classes_last("an index")
        index = index if isinstance(index, tuple) else (index,)
        taken = [_dims(part) for part in index if part is not Ellipsis]
        whole = any(part is Ellipsis for part in index) or sum(taken) == hidden.dim()
        if not whole or index[-1] is Ellipsis:
            return self._like(hidden[index])
        classes = index[-1]
        if not isinstance(classes, slice) or classes.start not in (None, 0) or classes.step not in (None, 1):
            self._refuse("an index of classes")
        first = len(range(self._transform.classes)[classes])
        positions = (*index[:-1], slice(None))
        return DeferredLogits(self._call, hidden[positions], self._transform.of_first(first))

    def __setitem__(self, index: Any, value: Any) -> None:
        self._refuse("an assignment")

    # What a loss is computed of.

    def cross_entropy(
        self,
        target: Tensor,
        weight: Tensor | None = None,
        size_average: bool | None = None,
        ignore_index: int = -100,
        reduce: bool | None = None,
        reduction: str = "mean",
        label_smoothing: Any = 0.0,
    ) -> Tensor:
        """As `torch.nn.functional.cross_entropy`."""
        if self.ndim != 2 and not self._classes_second:
            self._refuse(f"cross_entropy of {tuple(self.shape)}, whose dimension 1 is not the classes,")
        if size_average is not None or reduce is not None:
            self._refuse("cross_entropy with size_average or reduce")
        if target.is_floating_point():
            self._refuse("cross_entropy of probabilities")
        keywords = {
            "class_weights": weight,
            "ignore_index": ignore_index,
            "reduction": reduction,
            "label_smoothing": label_smoothing,
        }
        return self._loss(target, keywords)

    def logsumexp(self, dim: int, keepdim: bool = False) -> Tensor:
        hidden = self._classes_last("logsumexp")
        if dim % hidden.dim() != hidden.dim() - 1:
            self._refuse("logsumexp over positions")
        labels = hidden.new_zeros(hidden.shape[:-1], dtype=torch.int64)

        def logsumexp(hidden: Tensor, weight: Tensor, **keywords: Any) -> Tensor:
            wanted, chunking = ("logsumexp",), self._call.chunking
            return linear_token_statistics(
                hidden, weight, labels, wanted=wanted, chunking=chunking, **keywords
            ).logsumexp

        values: Tensor = self.apply(logsumexp)
        return values.unsqueeze(-1) if keepdim else values

    def apply(self, function: Callable[..., Any]) -> Any:
        """What a function of a linear head gives.

        Args:
            function: called as function(hidden, weight, **keywords), as our linear functions are: `hidden` [..., H],
                `weight` [V, H], and keywords `bias`, `logit_scale` and `softcap` that make their logits these. The
                weight is whole in this call, and not after it.

        """
        return self._call.apply(self._positions("apply"), self._transform, function)

    def _loss(self, labels: Tensor, given: dict[str, Any]) -> Tensor:
        call = self._call
        call.losses += 1

        def loss(hidden: Tensor, weight: Tensor, **keywords: Any) -> Tensor:
            keywords = {"chunking": call.chunking, **given, **keywords}
            if not call.wanted:
                return linear_cross_entropy(hidden, weight, labels, **keywords)
            loss, found = linear_cross_entropy_with_statistics(hidden, weight, labels, **keywords)
            call.keep(found)
            return loss

        value: Tensor = self.apply(loss)
        return value

    # How errors come about.

    def _explanation(self, name: str) -> str:
        return checks.released(name) if self._hidden is None else checks.operation(self._call.model, name)

    def _refuse(self, name: str) -> NoReturn:
        raise TypeError(self._explanation(name))

    def _positions(self, name: str) -> Tensor:
        if self._hidden is None:
            raise AttributeError(checks.released(name))
        hidden: Tensor = self._hidden
        return hidden

    def _classes_last(self, name: str) -> Tensor:
        hidden = self._positions(name)
        if self._classes_second:
            self._refuse(f"{name} of [B, V, ...]")
        return hidden

    def _number(self, name: str, value: Any) -> Any:
        if not isinstance(value, (int, float)):
            self._refuse(f"{name} with {type(value).__name__}")
        return value

    def _like(self, hidden: Tensor) -> DeferredLogits:
        return DeferredLogits(self._call, hidden, self._transform, classes_second=self._classes_second)

    def _with(self, transform: Transform) -> DeferredLogits:
        hidden = self._positions("arithmetic")
        return DeferredLogits(self._call, hidden, transform, classes_second=self._classes_second)


def _ints(given: Any) -> list[int]:
    """The integers that a method was given, each by itself or all in one sequence."""
    return list(given[0] if len(given) == 1 and not isinstance(given[0], int) else given)


def _dims(part: Any) -> int:
    """How many dimensions a part of an index takes."""
    if part is None:
        return 0
    return part.dim() if isinstance(part, Tensor) and part.dtype == torch.bool else 1


_FUNCTIONS: dict[Any, Any] = {
    F.cross_entropy: lambda input, target, *args, **kwargs: input.cross_entropy(target, *args, **kwargs),
    torch.tanh: lambda input: input.tanh(),
    torch.mul: lambda input, other: input * other,
    torch.div: lambda input, other: input / other,
    torch.add: lambda input, other: input + other,
    torch.logsumexp: lambda input, dim, keepdim=False: input.logsumexp(dim, keepdim),
}
