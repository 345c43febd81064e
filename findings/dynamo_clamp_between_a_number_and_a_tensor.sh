#!/usr/bin/env bash
# One would guess: `ratio.clamp(0.9, 1 + high)`, where `high` is a tensor of one number, compiles: it runs eagerly, and a
# clamp between two numbers or two tensors compiles. Policy losses clip so where one bound is annealed.
# What happens (torch 2.13.0, seen 2026-11-30; 2.11.0 and 2.15.0 alike): torch reads the tensor with .item() to have two
# numbers, which leaves Dynamo's fake tensors a symbol that is in no output, and the compiler fails with an internal
# error that names neither clamp nor its argument.
# Exits with 0 while that is so, with 1 once it changes.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/python" -m pip install --quiet --disable-pip-version-check torch==2.13.0 numpy==2.3.4
cat > "$folder/clamp.py" <<'PYTHON'
import sys

import torch

print("torch", torch.__version__)
ratio, low, high = torch.tensor([0.5, 1.0, 2.0]), torch.tensor(0.1), torch.tensor(0.3)


def numbers(ratio, high):
    return ratio.clamp(0.9, 1.3)


def tensors(ratio, high):
    return ratio.clamp(1 - low, 1 + high)


def both(ratio, high):
    return ratio.clamp(0.9, 1 + high)


failed = []
for function in (numbers, tensors, both):
    torch.testing.assert_close(function(ratio, high), torch.tensor([0.9, 1.0, 1.3]))
    compiled = torch.compile(function, fullgraph=True, backend="eager")
    try:
        torch.testing.assert_close(compiled(ratio, high), function(ratio, high))
        print(f"clamp between {function.__name__}: compiles")
    except Exception as error:
        failed.append(function.__name__)
        print(f"clamp between {function.__name__}: {type(error).__name__}: {str(error).splitlines()[0][:100]}")
sys.exit(0 if failed == ["both"] else 1)
PYTHON
"$folder/venv/bin/python" "$folder/clamp.py"
