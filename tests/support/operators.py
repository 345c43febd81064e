"""What runs: before an error, and where."""

from contextlib import contextmanager

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class _Recorded(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.ran, self.devices = [], set()

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        operands = tree_leaves((args, kwargs))
        self.devices |= {(str(operator), v.device.type) for v in operands if isinstance(v, torch.Tensor)}
        if operator is not torch.ops.aten.promote_types.default:  # of dtypes alone
            self.ran.append(str(operator))
        return operator(*args, **(kwargs or {}))


@contextmanager
def no_operators():
    """Fails where an operator runs inside: no view, no cast, no copy, no collective."""
    with _Recorded() as recorded:
        yield
    assert recorded.ran == []


@contextmanager
def on_one_device(kind):
    """Fails where an operator has a tensor of another device. It would be copied, which no CUDA graph captures."""
    with _Recorded() as recorded:
        yield
    assert recorded.devices
    assert {operator for operator, device in recorded.devices if device != kind} == set()
