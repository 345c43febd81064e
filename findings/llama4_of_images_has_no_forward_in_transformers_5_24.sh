#!/usr/bin/env bash
# One would guess: a tiny random Llama4ForConditionalGeneration returns logits, as every class of transformers does.
# What happens (transformers 5.24.0, torch 2.13.0, seen 2026-11-30): its forward always raises AttributeError, for it reads
# image_outputs of its text model's output, which has none. In 5.23.0 the same call gives logits.
# Exits with 0 while that is so, with 1 once it changes.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/python" -m pip install --quiet --disable-pip-version-check torch==2.13.0
for version in 5.23.0 5.24.0; do
    "$folder/venv/bin/python" -m pip install --quiet --disable-pip-version-check "transformers==$version"
    HF_HUB_OFFLINE=1 "$folder/venv/bin/python" - <<'PYTHON' | tee -a "$folder/seen"
import sys
import warnings

warnings.filterwarnings("ignore")
import torch
import transformers

text = {
    "vocab_size": 61,
    "hidden_size": 32,
    "intermediate_size": 48,
    "intermediate_size_mlp": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "num_local_experts": 2,
    "attention_chunk_size": 16,
    "pad_token_id": 0,
}
vision = {
    "hidden_size": 16,
    "intermediate_size": 64,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 28,
    "patch_size": 14,
    "vision_output_dim": 16,
    "projector_input_dim": 16,
    "projector_output_dim": 16,
}
torch.manual_seed(0)
config = transformers.Llama4Config(text_config=text, vision_config=vision)
model = transformers.Llama4ForConditionalGeneration(config).eval()
try:
    with torch.no_grad():
        said = f"logits {tuple(model(input_ids=torch.randint(3, 60, (1, 6))).logits.shape)}"
except AttributeError as error:
    said = f"AttributeError: {error}"
print(f"python {sys.version.split()[0]}, torch {torch.__version__}, transformers {transformers.__version__}: {said}")
PYTHON
done
if grep -q "5.23.0: logits" "$folder/seen" && grep -q "5.24.0: AttributeError" "$folder/seen"; then
    echo "5.24.0 raises where 5.23.0 gives logits"
else
    echo "CHANGED: both give logits, or neither does"
    exit 1
fi
