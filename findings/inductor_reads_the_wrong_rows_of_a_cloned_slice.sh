#!/usr/bin/env bash
# One would guess: an operator that declares that it writes a tensor (`mutates_args`) may be given `x[2:4].clone()`. A clone
# is a new tensor, so what is computed from it afterwards is computed from rows 2 and 3, compiled or not.
# What happens (torch 2.13.0, seen 2026-11-30): the compiled function reads rows 0 and 1, without an error. Inductor puts
# the slice in the clone's place, and what it generates for later readers begins at the start of the storage. With a
# computation in the clone's place, `x[2:4] + 0`, it is right.
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

print("torch", torch.__version__)


@torch.library.custom_op("findings::look", mutates_args=("x",))
def look(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    return y.clone()  # x is declared as written, and left as it is


@look.register_fake
def _(x, y):
    return torch.empty_like(y)


def cloned(x):
    part = x[2:4].clone()
    other = look(part, x[:2])
    return part + 1, other


def computed(x):
    part = x[2:4] + 0
    other = look(part, x[:2])
    return part + 1, other


x, wrong = torch.arange(12.0).reshape(6, 2), []
for function in (cloned, computed):
    eager, compiled = function(x)[0], torch.compile(function, fullgraph=True)(x)[0]
    print(f"{function.__name__}: eager {eager.tolist()}, compiled {compiled.tolist()}")
    if not torch.equal(eager, compiled):
        wrong.append((function.__name__, compiled.tolist()))
silent = wrong == [("cloned", (x[:2] + 1).tolist())]
print("the clone's rows are read from the start of the storage" if silent else "CHANGED: other rows are read")
sys.exit(0 if silent else 1)
PYTHON
