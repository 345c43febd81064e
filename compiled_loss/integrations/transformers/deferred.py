"""Logits that are not computed. A model treats them as logits, and their cross-entropy is that of a linear head.

NOTE [Deferred logits]
Between its head and its loss a model does only a few operations. It scales and bounds logits, for which
`linear_cross_entropy` has keywords. It selects and reshapes positions, which can be done to hidden states as well. So
in training a fused head returns hidden states that support these operations. The model's own code decides everything
else: which labels are shifted, what is masked, what divides the sum, what is added to it. Any other operation is an
error. Dynamo traces all of it as it traces the model.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NoReturn

import torch
from torch import Tensor
from torch.nn import functional as F

from compiled_loss.engine.math.statistics import TokenStatistics
from compiled_loss.integrations.transformers import checks, indexing, losses
from compiled_loss.integrations.transformers.head_call import HeadCall
from compiled_loss.integrations.transformers.log_probs import DeferredLogProbs
from compiled_loss.integrations.transformers.refusing import Refusing
from compiled_loss.integrations.transformers.transform import Transform


class DeferredLogits(Refusing):
    """The logits [..., V] of a training step, from which a model computes its loss: NOTE [Deferred logits].

    It is `output.logits` after a training step of a model that :func:`fuse_head` was called with. By then it holds no
    tensor but those of `statistics`, and an error explains any other use.
    """

    def __init__(self, call: HeadCall, hidden: Tensor, transform: Transform, *, classes_second: bool = False) -> None:
        self._call = call
        self._hidden: Any = hidden  # [..., H]; None once the model's forward has returned
        self._transform = transform
        self._classes_second = classes_second  # [B, V, ...], as cross_entropy has them
        self._changed = False  # other logits, of which these may be a view, were changed in place
        call.hold(self)

    @staticmethod
    def of(call: HeadCall, hidden: Tensor) -> DeferredLogits:
        """Makes the logits of a head, while it is called."""
        weight = call.weight()
        return DeferredLogits(call, hidden.to(weight.device), Transform.identity(weight.shape[0]))

    @property
    def statistics(self) -> TokenStatistics | None:
        """The statistics of each token that were asked for, from the pass of the loss, detached; or None."""
        return self._call.statistics

    def release(self) -> None:
        """Drops the hidden states."""
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
            return indexing.first(DeferredLogits, args, kwargs or {}).refuse(getattr(func, "__name__", str(func)))
        return known(*args, **(kwargs or {}))

    # Metadata.

    @property
    def shape(self) -> torch.Size:
        """The shape [..., V]."""
        batch, classes = self._positions("shape").shape[:-1], self._transform.classes
        return torch.Size((batch[0], classes, *batch[1:]) if self._classes_second else (*batch, classes))

    @property
    def ndim(self) -> int:
        """The number of dimensions."""
        return self._positions("ndim").dim()

    @property
    def device(self) -> torch.device:
        """The head's device."""
        return self._positions("device").device

    @property
    def dtype(self) -> torch.dtype:
        """The hidden states' dtype."""
        return self._positions("dtype").dtype

    def dim(self) -> int:
        """Returns the number of dimensions."""
        return self.ndim

    def size(self, dim: int | None = None) -> Any:
        """Returns the shape, or the size of one dimension, as `torch.Tensor.size` does."""
        return self.shape if dim is None else self.shape[dim]

    # Operations that change nothing: the loss is computed in fp32, and takes hidden states of any layout.

    def contiguous(self) -> DeferredLogits:
        """Returns the same logits; they stand for any layout and dtype."""
        return self._like(self._positions("contiguous"))

    float = contiguous

    def is_contiguous(self) -> bool:
        """Returns True."""
        return True

    def to(self, *args: Any, **kwargs: Any) -> DeferredLogits:
        """Returns the same logits, which stand for any dtype, on their device. Accelerate calls it after the step."""
        if self._hidden is None:
            return self
        hidden = self._positions("to")
        if hidden[:0].to(*args, **kwargs).device != hidden.device:
            self.refuse("to another device")
        return self._like(hidden)

    # Values.

    def __mul__(self, other: Any) -> DeferredLogits:
        return self._with(self._transform.times(self._number("a product", other)))

    __rmul__ = __mul__

    def __imul__(self, other: Any) -> DeferredLogits:
        return self._in_place(self._transform.times(self._number("a product", other)))

    def __truediv__(self, other: Any) -> DeferredLogits:
        return self._with(self._transform.over(self._number("a quotient", other)))

    def __itruediv__(self, other: Any) -> DeferredLogits:
        return self._in_place(self._transform.over(self._number("a quotient", other)))

    def tanh(self) -> DeferredLogits:
        """Returns the tanh, as `torch.tanh` does; it can be taken once."""
        return self._with(self._transform.tanh() or self.refuse("a second tanh"))

    def __add__(self, other: Any) -> DeferredLogits:
        if not isinstance(other, Tensor):
            self.refuse("a sum")
        self._classes_last("a sum")
        name = f"a sum with {tuple(other.shape)} (of adapters? get_peft_model comes before fuse_head)"
        return self._with(self._transform.plus(other) or self.refuse(name))

    __radd__ = __add__

    # Positions and classes.

    def view(self, *shape: Any) -> DeferredLogits:
        """Views the positions, as `torch.Tensor.view` does."""
        hidden = self._classes_last("view")
        sizes = indexing.integers(shape)
        if sizes[-1] == -1 and math.prod(sizes[:-1]) == math.prod(hidden.shape[:-1]):
            sizes[-1] = self._transform.classes
        if sizes[-1] != self._transform.classes:
            self.refuse(f"view({', '.join(map(str, sizes))}) of [..., {self._transform.classes}]")
        return self._like(hidden.reshape(*sizes[:-1], hidden.shape[-1]))

    reshape = view

    def flatten(self, start_dim: int = 0, end_dim: int = -1) -> DeferredLogits:
        """Flattens the positions, as `torch.Tensor.flatten` does."""
        hidden = self._classes_last("flatten")
        if end_dim % hidden.dim() == hidden.dim() - 1:
            self.refuse("flatten of the classes")
        return self._like(hidden.flatten(start_dim, end_dim))

    def transpose(self, dim0: int, dim1: int) -> DeferredLogits:
        """Exchanges two dimensions, as `torch.Tensor.transpose` does."""
        order = list(range(self.ndim))
        order[dim0], order[dim1] = order[dim1], order[dim0]
        return self.permute(*order)

    def permute(self, *dims: Any) -> DeferredLogits:
        """Permutes dimensions, as `torch.Tensor.permute` does: the classes stay last, or become the second one."""
        hidden, last = self._positions("permute"), self.ndim - 1
        order = [dim % (last + 1) for dim in indexing.integers(dims)]
        if not self._classes_second and order[-1] == last:
            return self._like(hidden.permute(order))
        if order == ([0, *range(2, last + 1), 1] if self._classes_second else [0, last, *range(1, last)]):
            return DeferredLogits(self._call, hidden, self._transform, classes_second=not self._classes_second)
        return self.refuse(f"permute({', '.join(map(str, order))})")

    def __getitem__(self, index: Any) -> DeferredLogits:
        hidden = self._classes_last("an index")
        positions, classes = indexing.split(index, hidden.dim())
        if not isinstance(classes, slice) or classes.start not in (None, 0) or classes.step not in (None, 1):
            self.refuse("an index of classes")
        first = len(range(self._transform.classes)[classes])
        return DeferredLogits(self._call, hidden[positions], self._transform.of_first(first))

    def __setitem__(self, index: Any, value: Any) -> None:
        self.refuse("an assignment")

    # The terms of losses.

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
        """Returns the cross-entropy with labels, as `torch.nn.functional.cross_entropy` does."""
        if self.ndim != 2 and not self._classes_second:
            self.refuse(f"cross_entropy of {tuple(self.shape)}, whose dimension 1 is not the classes,")
        if size_average is not None or reduce is not None:
            self.refuse("cross_entropy with size_average or reduce")
        if target.is_floating_point():
            self.refuse("cross_entropy of probabilities")
        given = {
            "class_weights": weight,
            "ignore_index": ignore_index,
            "reduction": reduction,
            "label_smoothing": label_smoothing,
        }
        loss: Tensor = self.apply(losses.cross_entropy(self._call, target, given))
        return loss

    def logsumexp(self, dim: int, keepdim: bool = False) -> Tensor:
        """Returns the log-sum-exp over the classes, as `torch.logsumexp` does: for a z-loss."""
        hidden = self._classes_last("logsumexp")
        if dim % hidden.dim() != hidden.dim() - 1:
            self.refuse("logsumexp over positions")
        found: Tensor = self.apply(losses.logsumexp(self._call, hidden.shape[:-1]))
        return found.unsqueeze(-1) if keepdim else found

    def log_softmax(self, dim: int) -> DeferredLogProbs:
        """Returns the log-probabilities over the classes, as `torch.log_softmax` does."""
        hidden = self._classes_last("log_softmax")
        if dim % hidden.dim() != hidden.dim() - 1:
            self.refuse("log_softmax over positions")
        return DeferredLogProbs(self, self._call)

    def apply(self, function: Callable[..., Any]) -> Any:
        """Returns the result of a function of a linear head.

        Args:
            function: called as `function(hidden, weight, **keywords)`, as our linear functions are: `hidden` [..., H],
                `weight` [V, H], and keywords `bias`, `logit_scale` and `softcap` with which their logits are these. The
                weight is whole in this call, and not after it.

        """
        return self._call.apply(self._positions("apply"), self._transform, function)

    def refuse(self, name: str) -> NoReturn:
        """Raises an error: the operation cannot be done to hidden states."""
        raise TypeError(self._explanation(name))

    def _explanation(self, name: str) -> str:
        if self._changed:
            name = f"a change in place, and then {name} of what may share memory with what was changed"
        elif self._hidden is None:
            return checks.released(name)
        return checks.operation(self._call.model, name)

    def _positions(self, name: str) -> Tensor:
        if self._hidden is None or self._changed:
            raise AttributeError(self._explanation(name))
        hidden: Tensor = self._hidden
        return hidden

    def _classes_last(self, name: str) -> Tensor:
        hidden = self._positions(name)
        if self._classes_second:
            self.refuse(f"{name} of [B, V, ...]")
        return hidden

    def _number(self, name: str, value: Any) -> Any:
        if not isinstance(value, (int, float)):
            self.refuse(f"{name} with {type(value).__name__}")
        return value

    def _like(self, hidden: Tensor) -> DeferredLogits:
        return DeferredLogits(self._call, hidden, self._transform, classes_second=self._classes_second)

    def _in_place(self, transform: Transform) -> DeferredLogits:
        """Changes these logits, and forbids the use of all others: it is not known which of them are views of these."""
        self._positions("arithmetic")
        for other in self._call.made:
            if other is not self:
                other._changed = True
        self._transform = transform
        return self

    def _with(self, transform: Transform) -> DeferredLogits:
        hidden, second = self._positions("arithmetic"), self._classes_second
        return DeferredLogits(self._call, hidden, transform, classes_second=second)


_FUNCTIONS: dict[Any, Callable[..., Any]] = {
    F.cross_entropy: lambda input, *args, **kwargs: input.cross_entropy(*args, **kwargs),
    F.log_softmax: lambda input, dim, **kwargs: input.log_softmax(dim),
    torch.log_softmax: lambda input, dim: input.log_softmax(dim),
    torch.tanh: lambda input: input.tanh(),
    torch.logsumexp: lambda input, dim, keepdim=False: input.logsumexp(dim, keepdim),
}
