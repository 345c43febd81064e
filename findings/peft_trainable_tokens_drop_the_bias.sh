#!/usr/bin/env bash
# One would guess: PEFT's trainable tokens on a head change the rows of the chosen tokens and nothing else, so that with
# adapters just made, whose rows are copies, the head gives what it gave before.
# What happens (peft 0.21.2, torch 2.13.0, seen 2026-11-28): on an nn.Linear with a bias the bias is left out while the
# adapter is active, and is back when it is disabled. Logits and loss change before the first step, without an error.
# Exits with 0 while that is so, with 1 once it changes.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/python" -m pip install --quiet --disable-pip-version-check torch==2.13.0 peft==0.21.2 transformers==5.23.0
"$folder/venv/bin/python" - <<'PYTHON'
import sys
import warnings

warnings.filterwarnings("ignore")
import peft
import torch
import transformers

print(f"python {sys.version.split()[0]}, torch {torch.__version__}, peft {peft.__version__}, transformers {transformers.__version__}")


class Model(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.body = torch.nn.Linear(4, 4)
        self.head = torch.nn.Linear(4, 6)

    def forward(self, x):
        return self.head(self.body(x))


torch.manual_seed(0)
model, x = Model().eval(), torch.randn(3, 4)
before = model(x)
wrapped = peft.get_peft_model(model, peft.TrainableTokensConfig(target_modules=["head"], token_indices=[1, 2]))
active = wrapped(x)
with wrapped.disable_adapter():
    disabled = wrapped(x)
difference = (before - active)[0]
print("head's bias                 ", [round(v, 4) for v in model.head.base_layer.bias.tolist()])
print("logits before minus active  ", [round(v, 4) for v in difference.tolist()])
print("logits before minus disabled", [round(v, 4) for v in (before - disabled)[0].tolist()])
dropped = torch.allclose(difference, model.head.base_layer.bias, atol=1e-6) and torch.equal(before, disabled)
print("the bias is dropped while the adapter is active" if dropped else "CHANGED: the bias is no longer dropped")
sys.exit(0 if dropped else 1)
PYTHON
