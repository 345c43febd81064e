#!/usr/bin/env bash
# One would guess: a Trainer with both label_smoothing_factor and compute_loss_func smooths the labels, hands the factor
# to the function, or says that the two do not go together.
# What happens (transformers 5.23.0, torch 2.13.0, seen 2026-11-29): the factor is dropped without a word. The loss that
# is logged is the function's own, the same with a factor of 0 and of 0.5, though the Trainer did make its smoother.
# Exits with 0 while that is so, with 1 once it changes.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/python" -m pip install --quiet --disable-pip-version-check \
    torch==2.13.0 transformers==5.23.0 accelerate==1.15.0
cd "$folder"
"$folder/venv/bin/python" - <<'PYTHON'
import logging
import sys
import warnings

warnings.filterwarnings("ignore")
import torch
import transformers

print(f"python {sys.version.split()[0]}, torch {torch.__version__}, transformers {transformers.__version__}")
SIZES = {"hidden_size": 8, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
ROWS = [{"input_ids": ids, "labels": ids} for ids in torch.randint(0, 32, (4, 6), generator=torch.Generator().manual_seed(0))]
said = []


class Said(logging.Handler):
    def emit(self, record):
        said.append(record.getMessage())


transformers.utils.logging.get_logger("transformers").addHandler(Said(level=logging.WARNING))


def cross_entropy(outputs, labels, num_items_in_batch=None):
    logits, targets = outputs.logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten()
    return torch.nn.functional.cross_entropy(logits, targets)


def logged(factor, function):
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(vocab_size=32, num_key_value_heads=2, **SIZES))
    arguments = transformers.TrainingArguments(
        "out", max_steps=1, per_device_train_batch_size=4, use_cpu=True, report_to=[], logging_steps=1,
        save_strategy="no", disable_tqdm=True, label_smoothing_factor=factor,
    )
    trainer = transformers.Trainer(model, arguments, train_dataset=ROWS, compute_loss_func=function)
    trainer.train()
    return next(entry["loss"] for entry in trainer.state.log_history if "loss" in entry), trainer.label_smoother


plain, _ = logged(0.0, None)
smooth, _ = logged(0.5, None)
beside, smoother = logged(0.5, cross_entropy)
without, _ = logged(0.0, cross_entropy)
print("factor 0,   no function:", plain)
print("factor 0.5, no function:", smooth)
print("factor 0,   function   :", without)
print("factor 0.5, function   :", beside, "with", type(smoother).__name__)
warned = [text for text in said if "label_smoothing" in text]
print("warnings about it      :", warned)
dropped = beside == without and abs(smooth - plain) > 1e-4 and smoother is not None and not warned
print("the factor is dropped" if dropped else "CHANGED: the factor is not dropped, or not without a word")
sys.exit(0 if dropped else 1)
PYTHON
