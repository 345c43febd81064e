#!/usr/bin/env bash
# One would guess: an operator inside compiled code is called alike each time. Code that compiles something of its own in
# there, guarded on the state of the dispatcher as Dynamo guards, compiles it once.
# What happens (torch 2.13.0, seen 2026-11-30): in the first call, the one that compiles, ADInplaceOrView is excluded, and
# in all later ones it is not. What Dynamo compiles inside the operator is compiled a second time in the second call.
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
from torch._dynamo.testing import CompileCounter

print("torch", torch.__version__)
excluded, counter = [], CompileCounter()
double = torch.compile(lambda x: 2 * x, backend=counter, fullgraph=True)


@torch.library.custom_op("findings::double", mutates_args=())
def op(x: torch.Tensor) -> torch.Tensor:
    excluded.append(torch._C._dispatch_tls_is_dispatch_key_excluded(torch._C.DispatchKey.ADInplaceOrView))
    return double(x)


op.register_fake(torch.empty_like)
outer = torch.compile(lambda x: op(x) + 1, fullgraph=True)
for _ in range(4):
    torch.testing.assert_close(outer(torch.ones(2)), torch.full((2,), 3.0))
print("ADInplaceOrView is excluded, call by call:", excluded)
print("graphs compiled inside the operator:", counter.frame_count)
differs = excluded == [True, False, False, False] and counter.frame_count == 2
print("the first call differs" if differs else "CHANGED: all calls are alike")
sys.exit(0 if differs else 1)
PYTHON
