#!/usr/bin/env bash
# One would guess: `torch.utils.flop_counter` is a few formulas, and importing it to register another costs nothing.
# What happens (torch 2.13.0, triton 3.7.0, seen 2026-11-30): it imports Triton, most of the third of a second that it
# takes, in processes that never touch a GPU.
# Exits with 0 while that is so, with 1 once it changes.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/python" -m pip install --quiet --disable-pip-version-check torch==2.13.0 triton==3.7.0 numpy==2.3.4
cd "$folder"
TORCHINDUCTOR_CACHE_DIR="$folder/cache" "$folder/venv/bin/python" - <<'PYTHON'
import sys
import time

import torch

print("torch", torch.__version__)


def triton():
    return sum(name.split(".")[0] == "triton" for name in sys.modules)


before, start = triton(), time.perf_counter()
from torch.utils.flop_counter import FlopCounterMode  # noqa: E402

print(f"modules of Triton before {before}, after {triton()}; {time.perf_counter() - start:.2f} s")
with FlopCounterMode(display=False) as counter:
    torch.ones(2, 3) @ torch.ones(3, 4)
assert counter.get_total_flops() == 48
imported = before == 0 and triton() > 0
print("Triton is imported" if imported else "CHANGED: Triton is not imported")
sys.exit(0 if imported else 1)
PYTHON
