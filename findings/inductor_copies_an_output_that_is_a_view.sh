#!/usr/bin/env bash
# One would guess: an elementwise function of [N, V, d], written with the classes last, `movedim(1, -1)` before and
# `movedim(-1, 1)` after, compiles to the code of the same function written with the classes second: the result is one
# buffer.
# What happens (torch 2.13.0, seen 2026-11-30): the first writes what the view shows into a buffer of its own layout, and
# then copies it to the strides that eager code gives. A second tensor of the result's size is alive.
# Exits with 0 while that is so, with 1 once it changes.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/python" -m pip install --quiet --disable-pip-version-check torch==2.13.0 numpy==2.3.4
cd "$folder"
TORCHINDUCTOR_CACHE_DIR="$folder/cache" "$folder/venv/bin/python" - <<'PYTHON'
import re
import sys

import torch
from torch._inductor.utils import run_and_get_code

print("torch", torch.__version__)


def second(x, scale):
    return (x - x.amax(1, keepdim=True)).exp() * scale[:, None]


def last(x, scale):
    z = x.movedim(1, -1)
    return ((z - z.amax(-1, keepdim=True)).exp() * scale[..., None]).movedim(-1, 1)


x, scale, large = torch.randn(4, 64, 8), torch.randn(4, 8), {}
for function in (second, last):
    torch.compiler.reset()
    result, (code, *_) = run_and_get_code(torch.compile(function, fullgraph=True), x, scale)
    torch.testing.assert_close(result, function(x, scale))
    assert result.stride() == function(x, scale).stride()
    sizes = [eval(size) for size in re.findall(r"= empty_strided_cpu\((\([^)]*\))", code)]
    large[function.__name__] = sum(torch.Size(size).numel() == x.numel() for size in sizes)
print("buffers of the result's size, by where the classes are written:", large)
copied = large == {"second": 1, "last": 2}
print("a view is computed, and then copied" if copied else "CHANGED: other numbers of buffers")
sys.exit(0 if copied else 1)
PYTHON
