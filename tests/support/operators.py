"""What runs before an error."""

from contextlib import contextmanager

import torch
from torch.utils._python_dispatch import TorchDispatchMode


class _Recorded(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.ran = []

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        if operator is not torch.ops.aten.promote_types.default:  # of dtypes alone
            self.ran.append(str(operator))
        return operator(*args, **(kwargs or {}))


@contextmanager
def no_operators():
    """Fails where an operator runs inside: no view, no cast, no copy, no collective."""
    with _Recorded() as recorded:
        yield
    assert recorded.ran == []
