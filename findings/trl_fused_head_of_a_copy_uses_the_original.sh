#!/usr/bin/env bash
# One would guess: copy.deepcopy of a model with TRL's fused head is a model of its own, as of any Module.
# What happens (trl 1.16.0, transformers 5.24.0, torch 2.13.0, seen 2026-11-30): the replaced forward is bound to the
# model that it was made for. The copy's forward computes with the original's weights: when the copy's parameters change,
# what it returns does not.
# Exits with 0 while that is so, with 1 once it changes.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/python" -m pip install --quiet --disable-pip-version-check torch==2.13.0 trl==1.16.0 transformers==5.24.0
HF_HUB_OFFLINE=1 "$folder/venv/bin/python" - <<'PYTHON'
import copy
import sys
import warnings

warnings.filterwarnings("ignore")
import torch
import transformers
import trl
from trl.trainer.utils import add_fused_lm_head

print(f"python {sys.version.split()[0]}, torch {torch.__version__}, trl {trl.__version__}, transformers {transformers.__version__}")
torch.manual_seed(0)
sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
config = transformers.LlamaConfig(vocab_size=61, initializer_range=0.5, **sizes)
ids = torch.tensor([[3, 4, 5]])


def change(model):
    """How far logits move when the parameters of a copy of the model are scaled."""
    other = copy.deepcopy(model)
    with torch.no_grad():
        before = other(input_ids=ids).logits
        for parameter in other.parameters():
            parameter.mul_(1.5)
        return (other(input_ids=ids).logits - before).abs().max().item()


model = transformers.LlamaForCausalLM(config).eval()
plain = change(model)
add_fused_lm_head(model)
fused = change(model)
print(f"parameters of a copy times 1.5: its logits move by {plain:.4f}, with a fused head by {fused:.4f}")
bound = plain > 0.01 and fused == 0
print("the copy computes with the original's weights" if bound else "CHANGED: a copy has weights of its own")
sys.exit(0 if bound else 1)
PYTHON
