#!/usr/bin/env bash
# One would guess: differentiating twice through a Function that is `once_differentiable` is an error, as its name says. A
# gradient penalty, `loss + gradient ** 2`, raises.
# What happens (torch 2.13.0, seen 2026-11-30): the decorator looks at the upstream gradient alone. Where that requires no
# gradient, as the 1 that autograd begins with, the gradient comes back as a constant, and the penalty has no effect,
# without an error. For x squared at 3, of x ** 2 + (2 x) ** 2, the derivative is 6, where it is 30.
# Exits with 0 while that is so, with 1 once it changes.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/python" -m pip install --quiet --disable-pip-version-check torch==2.13.0 numpy==2.3.4
cd "$folder"
TORCHINDUCTOR_CACHE_DIR="$folder/cache" "$folder/venv/bin/python" - <<'PYTHON'
import sys

import torch
from torch.autograd.function import once_differentiable

print("torch", torch.__version__)


class Square(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x * x

    @staticmethod
    @once_differentiable
    def backward(ctx, upstream):
        (x,) = ctx.saved_tensors
        return 2 * x * upstream


def derivative(square):
    """Of the square and its gradient penalty, at 3."""
    x = torch.tensor(3.0, requires_grad=True)
    y = square(x)
    (gradient,) = torch.autograd.grad(y, x, create_graph=True)
    try:
        return torch.autograd.grad(y + gradient**2, x)[0].item()
    except RuntimeError as error:
        return str(error)


plain, once = derivative(lambda x: x * x), derivative(Square.apply)
print("plain torch:", plain)
print("once_differentiable:", once)
dropped = (plain, once) == (30.0, 6.0)
print("the penalty's derivative is dropped" if dropped else "CHANGED: it is there, or an error")
sys.exit(0 if dropped else 1)
PYTHON
