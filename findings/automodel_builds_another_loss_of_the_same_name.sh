#!/usr/bin/env bash
# One would guess: NeMo Automodel's loss builder makes the class that it is given.
# What happens (nemo_automodel 0.7.0, torch 2.13.0, seen 2026-11-30): it looks the class up by its name alone. A class of
# the user's that is called as one of its own is not made: Automodel's is, without a word.
# Exits with 0 while that is so, with 1 once it changes.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/python" -m pip install --quiet --disable-pip-version-check torch==2.13.0 transformers==5.18.0 pyyaml
"$folder/venv/bin/python" -m pip install --quiet --disable-pip-version-check --no-deps nemo-automodel==0.7.0
"$folder/venv/bin/python" - <<'PYTHON'
import importlib.metadata
import sys
import warnings

warnings.filterwarnings("ignore")
import torch
from nemo_automodel.components.loss.loss import build_loss_module

print(f"python {sys.version.split()[0]}, torch {torch.__version__}, nemo_automodel {importlib.metadata.version('nemo_automodel')}")


class MaskedCrossEntropy(torch.nn.Module):
    """A loss of a user's."""

    def forward(self, logits, labels):
        return logits.new_zeros(())


found = type(build_loss_module(MaskedCrossEntropy))
print(f"asked for {MaskedCrossEntropy.__module__}.{MaskedCrossEntropy.__name__}, got {found.__module__}.{found.__name__}")
other = found is not MaskedCrossEntropy
print("another class of this name is made" if other else "CHANGED: the class that was given is made")
sys.exit(0 if other else 1)
PYTHON
