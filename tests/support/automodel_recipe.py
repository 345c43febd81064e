"""NeMo Automodel's own fine-tuning recipe, from YAML, on a tiny Llama, on ranks of CPUs under gloo.

What is changed, because the recipe asks for a GPU: the device. All else is Automodel's.
"""

import os
import tempfile
from pathlib import Path

import torch
import torch.distributed as dist
from nemo_automodel._transformers import auto_model
from nemo_automodel.components.config.loader import load_yaml_config
from nemo_automodel.recipes.llm.train_ft import TrainFinetuneRecipeForNextTokenPrediction

STEPS = 4
RECIPE = """
seed: 7
step_scheduler:
  global_batch_size: 8
  local_batch_size: 2
  max_steps: {steps}
  ckpt_every_steps: 1000
  num_epochs: 1
dist_env:
  backend: gloo
  timeout_minutes: 1
model:
  _target_: nemo_automodel.NeMoAutoModelForCausalLM.from_config
  config:
    _target_: transformers.LlamaConfig
    vocab_size: 100
    hidden_size: 32
    intermediate_size: 64
    num_hidden_layers: 2
    num_attention_heads: 4
    num_key_value_heads: 2
  force_hf: true
  dtype: float32
checkpoint:
  enabled: false
  checkpoint_dir: {folder}
distributed:
  strategy: fsdp2
  mp_policy:
    _target_: torch.distributed.fsdp.MixedPrecisionPolicy
    param_dtype: float32
  dp_size: null
  tp_size: 1
  cp_size: 1
loss_fn:
{loss}
dataset:
  _target_: nemo_automodel.components.datasets.llm.mock.build_unpacked_dataset
  num_sentences: 64
  vocab_size: 100
packed_sequence:
  packed_sequence_size: 0
dataloader:
  _target_: torchdata.stateful_dataloader.StatefulDataLoader
  collate_fn: nemo_automodel.components.datasets.utils.default_collater
  shuffle: false
optimizer:
  _target_: torch.optim.AdamW
  lr: 1.0e-3
"""


class _OnACPU:
    """torch, whose devices are the CPU."""

    def __init__(self, module, **changed):
        self._module = module
        vars(self).update(changed)

    def __getattr__(self, name):
        return getattr(self._module, name)


def _cpu(*_):
    return torch.device("cpu")


torch.cuda.reset_peak_memory_stats = lambda *_: None
torch.cuda.max_memory_allocated = lambda *_: 0
auto_model.torch = _OnACPU(torch, device=_cpu, cuda=_OnACPU(torch.cuda, current_device=_cpu))


def trained(loss):
    """The class of the loss that the recipe ends with, and (loss, gradient norm) of each step.

    loss: its section of the recipe, {"_target_": ..., keyword: ...}.
    """
    os.environ["LOCAL_RANK"], os.environ["RANK"] = (str(dist.get_rank()),) * 2
    os.environ["WORLD_SIZE"] = str(dist.get_world_size())
    folder = Path(tempfile.mkdtemp())
    section = "\n".join(f"  {name}: {value}" for name, value in loss.items())
    path = folder / "recipe.yaml"
    path.write_text(RECIPE.format(steps=STEPS, folder=folder, loss=section))
    recipe = TrainFinetuneRecipeForNextTokenPrediction(load_yaml_config(str(path)))
    recipe.setup()
    step, steps = recipe._run_train_optim_step, []

    def recorded(*args, **keywords):
        found = step(*args, **keywords)
        steps.append((float(found.metrics["loss"]), float(found.metrics["grad_norm"])))
        return found

    recipe._run_train_optim_step = recorded
    recipe.run_train_validation_loop()
    return type(recipe.loss_fn).__name__, torch.tensor(steps, dtype=torch.float64)
