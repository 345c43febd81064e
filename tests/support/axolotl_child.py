"""Axolotl's own training of a tiny Llama, in a process that it may patch, with one YAML's keys after another's.

python axolotl_child.py FOLDER '[{}, {"plugins": [...], ...}]' prints a JSON list of what became of them.
"""

import json
import os
import sys
import tempfile
import warnings
from pathlib import Path

warnings.filterwarnings("ignore")
os.environ.update(HF_HUB_OFFLINE="1", AXOLOTL_DO_NOT_TRACK="1", DO_NOT_TRACK="1", ACCELERATE_USE_CPU="true")

import torch  # noqa: E402
from axolotl.common.datasets import load_datasets  # noqa: E402
from axolotl.integrations.base import PluginManager  # noqa: E402
from axolotl.train import train  # noqa: E402
from axolotl.utils.config import normalize_config, prepare_plugins, validate_config  # noqa: E402
from axolotl.utils.dict import DictDefault  # noqa: E402
from tokenizers import Tokenizer, models  # noqa: E402
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast  # noqa: E402

V, ROWS, MICROBATCH, ACCUMULATED = 61, 16, 2, 2
SPECIAL = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>", "unk_token": "<unk>"}


def write_model(folder):
    """A Llama, random and tiny, and a tokenizer of numbers."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "max_position_embeddings": 32}
    config = LlamaConfig(vocab_size=V, num_attention_heads=4, num_key_value_heads=2, **sizes)
    LlamaForCausalLM(config).save_pretrained(folder)
    words = [*SPECIAL.values(), *map(str, range(V - len(SPECIAL)))]
    vocabulary = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    PreTrainedTokenizerFast(tokenizer_object=vocabulary, **SPECIAL).save_pretrained(folder)


def write_rows(path):
    """Rows of ids, as Axolotl takes them from others' tokenizers; each has a prompt of another length."""
    random = torch.Generator().manual_seed(0)
    rows = []
    for _ in range(ROWS):
        length = int(torch.randint(6, 20, (), generator=random))
        ids = torch.randint(len(SPECIAL), V, (length,), generator=random).tolist()
        prompt = int(torch.randint(0, length - 3, (), generator=random))
        labels = [-100] * prompt + ids[prompt:]
        rows.append(json.dumps({"input_ids": ids, "attention_mask": [1] * length, "labels": labels}))
    path.write_text("\n".join(rows))


def run(folder, keys):
    """Losses, whether the head was fused, and its weight; or why the YAML was refused."""
    yaml = {
        "base_model": str(folder / "model"),
        "datasets": [{"path": str(folder / "rows.jsonl"), "ds_type": "json", "type": None}],
        "dataset_prepared_path": str(folder / "prepared"),
        "output_dir": tempfile.mkdtemp(dir=folder),
        "sequence_len": 32,
        "micro_batch_size": MICROBATCH,
        "gradient_accumulation_steps": ACCUMULATED,
        "max_steps": ROWS // MICROBATCH // ACCUMULATED,
        "learning_rate": 1.0,
        "optimizer": "sgd",
        "lr_scheduler": "constant",
        "max_grad_norm": 1e9,
        "logging_steps": 1,
        "save_strategy": "no",
        "val_set_size": 0,
        "attn_implementation": "eager",
        "bf16": False,
        "use_cpu": True,
        "seed": 0,
    }
    config = DictDefault(yaml | keys)
    prepare_plugins(config)
    try:
        config = validate_config(config)
    except (TypeError, ValueError) as error:
        return {"refused": str(error)}
    normalize_config(config)
    PluginManager.get_instance().cfg = config
    model, _, trainer = train(cfg=config, dataset_meta=load_datasets(cfg=config))
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    heads = getattr(model.lm_head, "_compiled_loss_fused_head", None)
    return {"losses": losses, "fused": heads is not None, "weight": model.lm_head.weight.tolist()}


def main(folder, runs):
    write_model(folder / "model")
    write_rows(folder / "rows.jsonl")
    print(json.dumps([run(folder, keys) for keys in runs]))


if __name__ == "__main__":
    main(Path(sys.argv[1]), json.loads(sys.argv[2]))
