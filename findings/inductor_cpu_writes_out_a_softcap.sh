#!/usr/bin/env bash
# One would guess: a softcapped log-sum-exp of logits needs no memory of the logits' size on a CPU, as without the softcap:
# the tanh is computed again in the loop that sums, as multiplications are.
# What happens (torch 2.13.0, seen 2026-11-30): Inductor on a CPU writes out a tanh that two loops use, in fp32, so the
# softcap costs a tensor of [N, V]. With torch 2.11.0 it computed the tanh again, and with 2.15.0 it writes it out.
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


def log_sum_exp(logits, change):
    z = change(logits)
    top = z.amax(-1, keepdim=True)
    return (z - top).exp().sum(-1).log() + top.squeeze(-1)


logits, found = torch.randn(64, 512), {}
for name, change in {"scale": lambda x: x * 0.5, "softcap": lambda x: 30.0 * torch.tanh(x / 30.0)}.items():
    torch.compiler.reset()
    value, (code,) = run_and_get_code(torch.compile(log_sum_exp, fullgraph=True), logits, change)
    torch.testing.assert_close(value, torch.logsumexp(change(logits), -1))
    found[name] = "empty_strided_cpu((64, 512)" in code
    print(f"{name:8}: {'64 x 512 numbers' if found[name] else 'nothing of 64 x 512'} written out")
written = found == {"scale": False, "softcap": True}
print("a softcap costs memory of the logits' size" if written else "CHANGED: the memory is other")
sys.exit(0 if written else 1)
PYTHON
