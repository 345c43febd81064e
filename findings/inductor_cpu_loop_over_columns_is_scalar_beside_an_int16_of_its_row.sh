#!/usr/bin/env bash
# One would guess: what is computed once a row, from an int16 among others, is computed before the loop over the row's
# columns, and leaves that loop vectorised.
# What happens (torch 2.13.0, seen 2026-11-30): Inductor puts the row's expression into the loop over columns. Its C++ has
# no vectors of int16 there, so the whole loop is scalar code, with one exponential at a time. If the number of the row is
# returned, too, it is written out, and the loop is vectorised.
# Exits with 0 while that is so, with 1 once it changes.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/python" -m pip install --quiet --disable-pip-version-check torch==2.13.0 numpy
TORCHINDUCTOR_CACHE_DIR="$folder/cache" "$folder/venv/bin/python" - <<'PYTHON'
import sys

import torch
from torch._inductor.utils import run_and_get_code

print(f"python {sys.version.split()[0]}, torch {torch.__version__}")


def total(z, least, returned):
    top = torch.maximum(least, z.amax(-1))
    flag = (top > 1e30).to(torch.int16)
    top = top.masked_fill(flag.bool(), 0.0)
    found = (z - top.unsqueeze(-1)).exp().sum(-1)
    return (found, top) if returned else (found,)


torch.manual_seed(0)
z, least, found = torch.randn(64, 512), torch.zeros(64), {}
for returned in (False, True):
    torch.compiler.reset()
    (sums, *_), (code,) = run_and_get_code(torch.compile(total, fullgraph=True), z, least, returned)
    top = torch.maximum(least, z.amax(-1))
    torch.testing.assert_close(sums, (z - top.unsqueeze(-1)).exp().sum(-1))
    found[returned] = "std::exp(" in code and ".exp()" not in code
    how = "one exponential at a time" if found[returned] else "vectors of exponentials"
    print(f"{'returned, too' if returned else 'used alone   '}: {how}")
scalar = found == {False: True, True: False}
print("an int16 of its row makes a loop over columns scalar" if scalar else "CHANGED: the loop is written otherwise")
sys.exit(0 if scalar else 1)
PYTHON
