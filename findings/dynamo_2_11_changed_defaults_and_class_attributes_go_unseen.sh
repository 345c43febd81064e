#!/usr/bin/env bash
# One would guess: compiled code that reads a class attribute, or calls a helper with a default, sees it when that changes, as
# it sees a changed global.
# What happens (torch 2.11.0, seen 2026-11-30): both keep the value of the first call, without an error. Changed globals are
# seen. On torch 2.13.0 and 2.15.0 all three are.
# Exits with 0 while that is so, with 1 once it changes.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/python" -m pip install --quiet --disable-pip-version-check torch==2.11.0 numpy==2.3.4
cd "$folder"
TORCHINDUCTOR_CACHE_DIR="$folder/cache" "$folder/venv/bin/python" - <<'PYTHON'
import sys

import torch

print("torch", torch.__version__)
number = 2.0


class Scale:
    value = 2.0


def helper(x, scale=2.0):
    return x * scale


def of_a_global(x):
    return x * number


def of_a_class(x):
    return x * Scale.value


def of_a_default(x):
    return helper(x)


functions = (of_a_global, of_a_class, of_a_default)
compiled = [torch.compile(function, backend="eager", fullgraph=True) for function in functions]
for function in compiled:
    function(torch.ones(()))
number = Scale.value = 5.0
helper.__defaults__ = (5.0,)
found = {f.__name__: (f(torch.ones(())).item(), c(torch.ones(())).item()) for f, c in zip(functions, compiled)}
print("(eager, compiled) after 2 became 5:", found)
stale = [values for values in found.values()] == [(5.0, 5.0), (5.0, 2.0), (5.0, 2.0)]
print("class attributes and defaults go unseen" if stale else "CHANGED: other values are seen")
sys.exit(0 if stale else 1)
PYTHON
