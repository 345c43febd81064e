#!/usr/bin/env bash
# One would guess: a compiled function whose backward runs twice (`retain_graph=True`) gives the same gradients twice, or an
# error, whatever was compiled before.
# What happens (torch 2.13.0, seen 2026-11-30): where the same code was compiled before for one backward, in this process or
# another that shares the cache, its backward is taken from the cache. That one writes over what forward kept, and the
# second gradient is wrong, without an error. It needs an autograd Function in the graph. With
# TORCHINDUCTOR_AUTOGRAD_CACHE_ALLOW_CUSTOM_AUTOGRAD=1 torch raises and says why.
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
from torch._functorch import config
from torch._inductor.utils import fresh_cache

print("torch", torch.__version__)


class Square(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        product = x @ x
        ctx.save_for_backward(product)
        return product.sum()

    @staticmethod
    def backward(ctx, upstream):
        (product,) = ctx.saved_tensors
        return product * upstream + 1


def twice(compiled_before, functions_cached):
    """What differs between the first and the second gradient, or the error."""
    torch.compiler.reset()
    x = torch.ones(8, 8, requires_grad=True)
    with fresh_cache(), config.patch(autograd_cache_allow_custom_autograd_functions=functions_cached):
        if compiled_before:
            torch.autograd.grad(torch.compile(Square.apply, fullgraph=True)(x), x)
            torch.compiler.reset()
        loss = torch.compile(Square.apply, fullgraph=True)(x)
        try:
            first = torch.autograd.grad(loss, x, retain_graph=True)[0].clone()
            second = torch.autograd.grad(loss, x)[0]
        except RuntimeError as error:
            return str(error).split(".")[0]
        return (second - first).abs().max().item()


alone, after, allowed = twice(False, False), twice(True, False), twice(True, True)
print("compiled for two backwards                :", alone)
print("the same, compiled before for one backward:", after)
print("the same, with Functions cached           :", allowed)
wrong = alone == 0 and after != 0 and "donated buffers" in str(allowed)
print("the second gradient is wrong" if wrong else "CHANGED: both gradients are equal, or an error says why not")
sys.exit(0 if wrong else 1)
PYTHON
