#!/usr/bin/env bash
# One would guess: a Python number that changes from call to call is an input of the compiled function after its first
# change, whether it is added to a tensor or fills one.
# What happens (torch 2.13.0, seen 2026-11-30): `x + value` compiles twice, for the first number and for any. With
# `x + torch.full((), value)` it compiles again for each number, until torch's limit of recompilations ends it.
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
from torch._dynamo.utils import counters

print("torch", torch.__version__)


def added(x, value):
    return x + value


def filled(x, value):
    return x + torch.full((), value)


graphs = {}
for function in (added, filled):
    torch.compiler.reset()
    counters.clear()
    compiled = torch.compile(function, fullgraph=True)
    for value in (0.1, 0.2, 0.3, 0.4, 0.5):
        torch.testing.assert_close(compiled(torch.zeros(3), value), function(torch.zeros(3), value))
    graphs[function.__name__] = counters["stats"]["unique_graphs"]
print("graphs over five numbers:", graphs)
again = graphs == {"added": 2, "filled": 5}
print("each number that fills a tensor compiles" if again else "CHANGED: other counts")
sys.exit(0 if again else 1)
PYTHON
