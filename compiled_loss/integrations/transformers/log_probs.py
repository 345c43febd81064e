"""The log-probabilities of deferred logits, as the Trainer's label smoothing and `nll_loss` take them."""

from __future__ import annotations

from typing import Any, NoReturn

import torch
from torch import Tensor
from torch.nn import functional as F

from compiled_loss.integrations.transformers import indexing, losses
from compiled_loss.integrations.transformers.head_call import HeadCall
from compiled_loss.integrations.transformers.refusing import Refusing


class DeferredLogProbs(Refusing):
    """The log-softmax [..., V] of deferred logits, or its negative."""

    def __init__(self, logits: Any, call: HeadCall, *, negative: bool = False) -> None:
        self._logits = logits
        self._call = call
        self._negative = negative
        self._sums: Tensor | None = None  # over the classes, from the pass that gathered

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is F.nll_loss and isinstance(args[0], DeferredLogProbs):
            return args[0].nll_loss(*args[1:], **(kwargs or {}))
        return indexing.first(DeferredLogProbs, args, kwargs or {}).refuse(getattr(func, "__name__", str(func)))

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):
            raise AttributeError(name)
        return self.refuse(name)

    @property
    def shape(self) -> torch.Size:
        """The shape [..., V]."""
        shape: torch.Size = self._logits.shape
        return shape

    def dim(self) -> int:
        """Returns the number of dimensions."""
        return len(self.shape)

    def refuse(self, name: str) -> NoReturn:
        """Raises an error: the operation is none of those that are supported."""
        self._logits.refuse(f"{name} of log_softmax")
        raise AssertionError

    def __neg__(self) -> DeferredLogProbs:
        return DeferredLogProbs(self._logits, self._call, negative=not self._negative)

    def nll_loss(self, target: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Returns the loss of `torch.nn.functional.nll_loss`."""
        if self._negative:
            self.refuse("the negative")
        loss: Tensor = self._logits.cross_entropy(target, *args, **kwargs)
        return loss

    def gather(self, dim: int, index: Tensor) -> Tensor:
        """Returns the result of `torch.Tensor.gather`, for one class of each token: [..., 1], differentiable."""
        if dim % self.dim() != self.dim() - 1 or index.shape != (*self.shape[:-1], 1):
            self.refuse(f"gather of {tuple(index.shape)}")
        chosen, self._sums = self._of_tokens(index.squeeze(-1))
        return self._signed(chosen, keepdim=True)

    def sum(self, dim: int, keepdim: bool = False, dtype: torch.dtype | None = None) -> Tensor:
        """Returns the sum over the classes, as `torch.Tensor.sum` does; differentiable."""
        if dim % self.dim() != self.dim() - 1:
            self.refuse("sum over positions")
        if self._sums is None:
            labels = torch.zeros(self.shape[:-1], dtype=torch.int64, device=self._logits.device)
            _, self._sums = self._of_tokens(labels)
        return self._signed(self._sums, keepdim=keepdim).to(dtype)

    def _of_tokens(self, labels: Tensor) -> tuple[Tensor, Tensor]:
        pair: tuple[Tensor, Tensor] = self._logits.apply(losses.log_probs(self._call, labels, self.shape[-1]))
        return pair

    def _signed(self, values: Tensor, *, keepdim: bool) -> Tensor:
        """Returns values with their sign, in a new tensor, because callers fill it."""
        values = -values if self._negative else values.clone()
        return values.unsqueeze(-1) if keepdim else values
