#!/usr/bin/env bash
# One would guess: `assume_constant_result` keeps the result of that function. Another closure of the same code, which gives
# another number, is another function: Dynamo calls it, or compiles again.
# What happens (torch 2.13.0, seen 2026-11-30): two closures that differ in what they close over alone share one result, that
# of the first. The number is wrong, without an error.
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


def constant(number):
    @torch._dynamo.assume_constant_result
    def function():
        return number

    return function


def scaled(x, scale):
    return x * scale()


compiled = torch.compile(scaled, backend="eager", fullgraph=True)
found = [(compiled(torch.ones(()), one).item(), scaled(torch.ones(()), one).item()) for one in map(constant, (2.0, 5.0))]
print("(compiled, eager) of 2 and of 5:", found)
stale = found == [(2.0, 2.0), (2.0, 5.0)]
print("the second closure has the first one's result" if stale else "CHANGED: each has its own")
sys.exit(0 if stale else 1)
PYTHON
