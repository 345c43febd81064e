"""torchtitan's own Trainer on its debug model, with tokens of its own making, on ranks of CPUs under gloo.

What is changed, because its release asks for a GPU: the device, FlexAttention, whose backward no CPU has, and how FSDP
sums, in a way that gloo has. All else is torchtitan's.
"""

import dataclasses
import os
import tempfile
import time
import types

import torch
import torch.distributed as dist
from torch.nn import functional as F
from torch.nn.attention.flex_attention import AuxOutput, create_block_mask, create_mask
from torchtitan.tools import utils

utils.device_type, utils.device_module = "cpu", types.ModuleType("on a CPU")  # before anything of it looks

import torchtitan.trainer  # noqa: E402
from torchtitan.components.dataloader import BaseDataLoader  # noqa: E402
from torchtitan.components.loss import ChunkedLossWrapper, CrossEntropyLoss  # noqa: E402
from torchtitan.components.tokenizer import BaseTokenizer  # noqa: E402
from torchtitan.distributed import fsdp  # noqa: E402
from torchtitan.models.common import attention  # noqa: E402
from torchtitan.models.llama3.config_registry import llama3_debugmodel  # noqa: E402

VOCABULARY, LAYERS, STEPS = 2048, 2, 4
ALL_BACKENDS = hasattr(dist, "set_timeout")  # a torch that FSDP of "spmd_types" and pipelines of this release need


def _on_a_cpu():
    fake = {
        "get_device_name": lambda device=None: "CPU",
        "get_device_properties": lambda device=None: types.SimpleNamespace(total_memory=2**33, name="CPU"),
        "memory_stats": lambda device=None: dict.fromkeys(_MEMORY, 0),
        "current_device": lambda: 0,
        "device_count": lambda: 1,
    }
    nothing = ("set_device", "synchronize", "reset_peak_memory_stats", "empty_cache")
    vars(utils.device_module).update(fake | dict.fromkeys(nothing, lambda *_: None))
    if not ALL_BACKENDS:
        dist.set_timeout = dist.distributed_c10d._set_pg_timeout
    attention.FlexAttention._compiled_flex_attn = staticmethod(_attention)
    attention._compiled_create_block_mask = create_block_mask
    undivided = fsdp.disable_fsdp_gradient_division

    def summed(model):
        undivided(model)
        for module in model.modules():
            if isinstance(module, fsdp.FSDPModule):
                module.set_force_sum_reduction_for_comms(True)

    fsdp.disable_fsdp_gradient_division = summed
    torchtitan.trainer.time = types.SimpleNamespace(  # it waits for other ranks' logs
        perf_counter=time.perf_counter, sleep=lambda seconds: None
    )


_MEMORY = ("active_bytes.all.peak", "reserved_bytes.all.peak", "num_alloc_retries", "num_ooms")


def _attention(q, k, v, *, block_mask, scale, enable_gqa, **_):
    mask = create_mask(block_mask.mask_mod, q.shape[0], 1, q.shape[2], k.shape[2], device=q.device)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale, enable_gqa=enable_gqa), AuxOutput()


_on_a_cpu()


class Tokens(BaseDataLoader):
    """Sequences with few ids, of which a rank masks other shares of labels than the next."""

    @dataclasses.dataclass(kw_only=True, slots=True)
    class Config(BaseDataLoader.Config):
        infinite: bool = True

    def __init__(self, config, *, dp_rank, seq_len, local_batch_size, **_):
        self.generator = torch.Generator().manual_seed(dp_rank)
        self.shape, self.masked = (local_batch_size, seq_len + 1), 0.2 + 0.3 * dp_rank

    def __iter__(self):
        while True:
            tokens = 97 * torch.randint(0, 17, self.shape, generator=self.generator)
            labels = tokens[:, 1:].clone()
            labels[torch.rand(labels.shape, generator=self.generator) < self.masked] = -100
            positions = torch.arange(labels.shape[1]).repeat(labels.shape[0], 1)
            yield {"input": tokens[:, :-1].contiguous(), "positions": positions}, labels

    def state_dict(self):
        return {}

    def load_state_dict(self, state):
        pass


class NoTokenizer(BaseTokenizer):
    @dataclasses.dataclass(kw_only=True, slots=True)
    class Config(BaseTokenizer.Config):
        pass

    def __init__(self, config, **_):
        super().__init__()

    def encode(self, *_, **__):
        return []

    def decode(self, *_, **__):
        return ""

    def get_vocab_size(self):
        return VOCABULARY


def own_loss(num_chunks=8):
    """torchtitan's."""
    return ChunkedLossWrapper.Config(
        num_chunks=num_chunks, loss_fn=CrossEntropyLoss.Config(global_vocab_size=VOCABULARY)
    )


def trained(loss, settings):
    """(loss, gradient norm) of each step, and the losses of each validation, of a Trainer's config and what it changes.

    `settings` are {"section.field": value}; fields of the parallelism need no section.
    """
    os.environ["LOCAL_RANK"] = str(dist.get_rank())
    config = llama3_debugmodel()
    config.model_spec.model.layers = config.model_spec.model.layers[:LAYERS]
    config.loss, config.dataloader, config.tokenizer = loss, Tokens.Config(), NoTokenizer.Config()
    config.validator.enable, config.validator.dataloader = False, Tokens.Config()
    config.validator.freq = config.validator.steps = 2
    defaults = {
        "training.steps": STEPS,
        "training.local_batch_size": 2,
        "training.seq_len": 64,
        "training.mixed_precision_param": "float32",
        "training.disable_cuda_graphs": True,
        "spmd_backend": "spmd_types" if ALL_BACKENDS else "partial_dtensor",
        "checkpoint.enable": False,
        "debug.seed": 0,
        "dump_folder": tempfile.mkdtemp(),
    }
    for name, value in (defaults | settings).items():
        owner, (*sections, field) = config, name.split(".")
        if not sections and not hasattr(config, name):
            owner = config.parallelism
        for section in sections:
            owner = getattr(owner, section)
        setattr(owner, field, value)
    trainer, steps, validations = torchtitan.trainer.Trainer(config), [], []
    metrics = trainer.metrics_processor
    metrics.log = lambda step, mean, largest, norm, extra_metrics=None: steps.append((mean, norm))
    metrics.log_validation = lambda loss, step: validations.append(loss)
    trainer.train()
    return torch.tensor(steps, dtype=torch.float64), torch.tensor(validations, dtype=torch.float64)
