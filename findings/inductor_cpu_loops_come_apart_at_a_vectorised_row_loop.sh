#!/usr/bin/env bash
# One would guess: for a softmax over the last dimension that also returns each row's log-sum-exp, Inductor's C++ is one
# parallel loop over rows with the inner loops inside, so that a row stays in the cache between its passes.
# What happens (torch 2.13.0, seen 2026-11-29): the step that makes the log-sum-exp of several rows at a time is
# vectorised over rows, the loops no longer match, and all code is generated again as separate loops over the whole
# tensor. With an operation on an int16 in that step, which changes no number and is not vectorised, there is one loop.
# Exits with 0 while that is so, with 1 once it changes.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/python" -m pip install --quiet --disable-pip-version-check torch==2.13.0 numpy
TORCHINDUCTOR_CACHE_DIR="$folder/cache" "$folder/venv/bin/python" - <<'PYTHON'
import sys

import torch
from torch._inductor import metrics

print(f"python {sys.version.split()[0]}, torch {torch.__version__}")


def softmax(z, scalar):
    maximum = z.amax(-1)
    lse = maximum + (z - maximum.unsqueeze(-1)).exp().sum(-1).log()
    if scalar:
        never = (lse > float("inf")).to(torch.int16)
        lse = lse.masked_fill(never.bool(), 0.0)
    return (z - lse.unsqueeze(-1)).exp(), lse


torch.manual_seed(0)
z, found = torch.randn(64, 512), {}
for scalar in (False, True):
    torch.compiler.reset()
    metrics.reset()
    _, lse = torch.compile(softmax, fullgraph=True)(z, scalar)
    torch.testing.assert_close(lse, z.logsumexp(-1))
    found[scalar] = len(metrics.cpp_outer_loop_fused_inner_counts)
    print(f"{'with an int16' if scalar else 'as written   '}: {found[scalar]} loops over rows that hold the others")
apart = found == {False: 0, True: 1}
print("a vectorised loop over rows takes the others apart" if apart else "CHANGED: the loops are put together otherwise")
sys.exit(0 if apart else 1)
PYTHON
