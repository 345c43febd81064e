#!/usr/bin/env bash
# One would guess: `torch.compiler.nested_compile_region` takes any callable, `region(model.forward)` too, as
# `torch.compile` does.
# What happens (torch 2.13.0, seen 2026-11-30): it sets an attribute on what it is given, and a bound method has none:
# AttributeError. A function around the method works, and so does the decorator in the class.
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


class Scaled:
    def __init__(self, scale):
        self.scale = scale

    def scaled(self, x):
        return x * self.scale


one, x, found = Scaled(3.0), torch.ones(()), {}
assert torch.compile(one.scaled, backend="eager", fullgraph=True)(x) == 3
for name, function in (("a bound method", one.scaled), ("a function around it", lambda x: one.scaled(x))):
    try:
        region = torch.compiler.nested_compile_region(function)
        found[name] = torch.compile(lambda x: region(x), backend="eager", fullgraph=True)(x).item()
    except AttributeError as error:
        found[name] = f"AttributeError: {error}"
    print(f"{name}: {found[name]}")
refused = "'method' object" in str(found["a bound method"]) and found["a function around it"] == 3
print("a bound method is refused" if refused else "CHANGED: a bound method is taken")
sys.exit(0 if refused else 1)
PYTHON
