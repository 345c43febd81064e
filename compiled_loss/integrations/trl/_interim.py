"""INTERIM, until the branch `fuse` is here: logits that are not computed."""

from __future__ import annotations

import contextlib
import types

import torch


class DeferredLogits:
    def __init__(self, head, hidden, scale=1.0, softcap=None, dtype=None):
        self.head, self.hidden, self.scale, self.softcap, self.dtype_ = head, hidden, scale, softcap, dtype

    def _new(self, **changed):
        return DeferredLogits(
            **dict(head=self.head, hidden=self.hidden, scale=self.scale, softcap=self.softcap, dtype=self.dtype_) | changed
        )

    @property
    def shape(self):
        return torch.Size((*self.hidden.shape[:-1], self.head.weight.shape[0]))

    def float(self):
        return self

    def to(self, *_):
        return self

    def __mul__(self, by):
        if self.softcap == "open":
            assert abs(self.scale * by - self.total) < 1e-6
            return self._new(scale=self.total, softcap=by)
        return self._new(scale=self.scale * by)

    def __truediv__(self, by):
        return self._new(scale=self.scale / by)

    def __getitem__(self, index):
        return self._new(hidden=self.hidden[index])

    @classmethod
    def __torch_function__(cls, func, kinds, args=(), kwargs=None):
        if func is torch.tanh:
            return _Capped(args[0])
        raise TypeError(f"{func}")

    def call(self, function):
        options = {"bias": self.head.bias, "softcap": self.softcap, "logit_scale": self.scale}
        hidden, weight = self.hidden, self.head.weight
        if self.dtype_ is not None:
            hidden, weight = hidden.to(self.dtype_), weight.to(self.dtype_)
        if weight.dtype != hidden.dtype:
            hidden = hidden.to(weight.dtype)
        if hasattr(weight, "full_tensor"):
            weight = weight.full_tensor()
        return function(hidden, weight, options)


class _Capped:
    def __init__(self, inner):
        self.inner = inner

    def __mul__(self, by):
        return self.inner._new(scale=self.inner.scale * by, softcap=by)


@contextlib.contextmanager
def deferring(model):
    head = model.get_output_embeddings()
    before = head.__dict__.get("forward")

    def forward(self, hidden):
        kind = hidden.device.type
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None
        return DeferredLogits(self, hidden, dtype=dtype)

    head.forward = types.MethodType(forward, head)
    try:
        yield
    finally:
        if before is None:
            del head.forward
        else:
            head.forward = before
