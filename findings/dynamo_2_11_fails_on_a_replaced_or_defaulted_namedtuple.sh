#!/usr/bin/env bash
# One would guess: a compiled function may return a NamedTuple that it made by `_replace`, or one with a field that has an
# object for its default: a function without tensors in them may, and both work where they are not returned.
# What happens (torch 2.11.0, seen 2026-11-30): the first ends in an internal AssertionError without a text, the second in
# "Reconstruction failure". On torch 2.13.0 and 2.15.0 both compile.
# Exits with 0 while that is so, with 1 once it changes.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/python" -m pip install --quiet --disable-pip-version-check torch==2.11.0 numpy==2.3.4
cd "$folder"
TORCHINDUCTOR_CACHE_DIR="$folder/cache" "$folder/venv/bin/python" - <<'PYTHON'
import sys
from typing import NamedTuple

import torch

print("torch", torch.__version__)
NOTHING = object()


class Pair(NamedTuple):
    first: torch.Tensor
    second: torch.Tensor


class Maybe(NamedTuple):
    first: torch.Tensor
    second: object = NOTHING


def made(x):
    return Pair(x, x + 1)


def replaced(x):
    return Pair(x, x + 1)._replace(first=x * 2)


def defaulted(x):
    return Maybe(x)


found = {}
for function in (made, replaced, defaulted):
    try:
        torch.compile(function, backend="eager", fullgraph=True)(torch.ones(2))
        found[function.__name__] = "compiles"
    except Exception as error:
        found[function.__name__] = f"{type(error).__name__} {str(error).splitlines()[:1]}"
    print(f"{function.__name__}: {found[function.__name__]}")
fails = (
    found["made"] == "compiles" and "AssertionError" in found["replaced"] and "Reconstruction" in found["defaulted"]
)
print("neither can be returned" if fails else "CHANGED: one of them can be returned")
sys.exit(0 if fails else 1)
PYTHON
