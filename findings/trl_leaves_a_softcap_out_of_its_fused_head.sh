#!/usr/bin/env bash
# One would guess: the head that TRL fuses into a causal model gives the log-probabilities of that model's own logits.
# What happens (trl 1.16.0, transformers 5.24.0, torch 2.13.0, seen 2026-11-30): the softcap is read from one name of the
# config, final_logit_softcapping. RecurrentGemma calls its softcap logits_soft_cap, so that it is left out: loss and
# log-probabilities are another distribution's, without an error.
# Exits with 0 while that is so, with 1 once it changes.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/python" -m pip install --quiet --disable-pip-version-check torch==2.13.0 trl==1.16.0 transformers==5.24.0
HF_HUB_OFFLINE=1 "$folder/venv/bin/python" - <<'PYTHON'
import sys
import warnings

warnings.filterwarnings("ignore")
import torch
import transformers
import trl
from trl.trainer.utils import add_fused_lm_head

print(f"python {sys.version.split()[0]}, torch {torch.__version__}, trl {trl.__version__}, transformers {transformers.__version__}")
torch.manual_seed(0)
config = transformers.RecurrentGemmaConfig(
    vocab_size=61,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=3,
    num_attention_heads=2,
    num_key_value_heads=1,
    head_dim=16,
    lru_width=32,
    attention_window_size=8,
    logits_soft_cap=5.0,
)
model = transformers.RecurrentGemmaForCausalLM(config).eval()
with torch.no_grad():
    for parameter in model.parameters():
        if parameter.dim() > 1:
            parameter.normal_(0, 0.5)
    ids = torch.randint(3, 60, (1, 6))
    own = model(input_ids=ids, labels=ids, use_cache=False).loss
    logits = model(input_ids=ids, use_cache=False).logits[0, :-1].float()
    logprob = logits.log_softmax(-1).gather(-1, ids[0, 1:, None])[:, 0]
    add_fused_lm_head(model)
    fused = model(input_ids=ids, labels=ids, fused_lm_head=True)
apart = (fused.log_probs[0] - logprob).abs().max().item()
print(f"largest logit {logits.abs().max().item():.2f}, softcap {config.logits_soft_cap}")
print(f"loss of the model {own.item():.4f}, of its fused head {fused.loss.item():.4f}; log-probabilities differ by {apart:.4f}")
dropped = apart > 0.01
print("the softcap is left out" if dropped else "CHANGED: the softcap is there")
sys.exit(0 if dropped else 1)
PYTHON
