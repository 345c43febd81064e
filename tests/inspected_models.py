"""Training steps as users write them, to inspect: the child process imports this, and makes one model at a time."""

import functools

import torch
import torch.nn.functional as F
from transformers import Gemma2Config, Gemma2ForCausalLM, LlamaConfig, LlamaForCausalLM, Qwen3Config, Qwen3ForCausalLM

import compiled_loss

KINDS = {
    "llama": (LlamaConfig, LlamaForCausalLM),
    "qwen3": (Qwen3Config, Qwen3ForCausalLM),
    "gemma2": (Gemma2Config, Gemma2ForCausalLM),
}
VOCAB, WIDTH = 1000, 64
SIZES = {
    "vocab_size": VOCAB,
    "hidden_size": WIDTH,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "use_cache": False,
}


@functools.cache
def made(kind="llama", attention="sdpa", dtype=torch.bfloat16, where=None, **options):
    """A model; `where` is a device to make it on."""
    config, model = KINDS[kind]
    config = config(**SIZES, attn_implementation=attention, **options)
    if where is None:
        return model(config).to(dtype)
    with torch.device(where):
        return model(config).to(dtype)


def loss_of(model, ids, labels):
    logits = model(input_ids=ids).logits
    return F.cross_entropy(logits.flatten(0, 1).float(), labels.flatten())


def our_loss_of(model, ids, labels):
    hidden = model.model(input_ids=ids).last_hidden_state
    return compiled_loss.linear_cross_entropy(hidden, model.lm_head.weight, labels)


class Step:
    """A step with a model of its own, made where this arrives: as at the top of a file."""

    def __init__(self, loss=loss_of, **options):
        self.arguments = (loss, options)

    def __reduce__(self):
        return _step, self.arguments


def _step(loss, options):
    return functools.partial(loss, made(**options))


# Situations ----------------------------------------------------------------------------------------------------------


def inside(ids, labels):
    """Makes its model itself, where its inputs are."""
    config, model = KINDS["llama"]
    with torch.device(ids.device):
        return loss_of(model(config(**SIZES)), ids, labels)


def autocast(model, ids, labels):
    with torch.autocast("cuda", dtype=torch.bfloat16):
        return loss_of(model, ids, labels)


def checkpointed(model, ids, labels):
    model.gradient_checkpointing_enable({"use_reentrant": False})
    return loss_of(model, ids, labels)


def in_regions(model, ids, labels):
    """Every block is a nested region, compiled once."""
    block = type(model.model.layers[0])
    region = type("Region", (block,), {"forward": torch.compiler.nested_compile_region(block.forward)})
    for layer in model.model.layers:
        layer.__class__ = region
    return loss_of(model, ids, labels)


def trained(model, ids, labels, optimizer):
    """A whole step, whose gradients and optimizer are in its graph."""
    loss = loss_of(model, ids, labels)
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    return loss.detach()
