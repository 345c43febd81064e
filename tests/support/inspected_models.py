"""Training steps as users write them, to inspect: the child process imports this, and makes one model at a time."""

import functools

import torch
import torch.nn.functional as F

import compiled_loss

VOCAB, WIDTH = 1000, 64
SIZES = {
    "vocab_size": VOCAB,
    "hidden_size": WIDTH,
    "intermediate_size": 128,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "use_cache": False,
}


def made(kind="Llama", attention="sdpa", dtype=torch.bfloat16, where=None, **options):
    """A model; `where` is a device to make it on."""
    import transformers  # takes seconds, and only a child needs it

    config = getattr(transformers, f"{kind}Config")(**{**SIZES, **options}, attn_implementation=attention)
    model = getattr(transformers, f"{kind}ForCausalLM")
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
    """A step with a model of its own, which is made where this arrives, as if at the top of a file."""

    def __init__(self, loss=loss_of, **options):
        self.arguments = (loss, options)

    def __reduce__(self):
        return _step, self.arguments


def _step(loss, options):
    return functools.partial(loss, made(**options))


class Sharded(Step):
    """The same on one rank of many."""

    def __reduce__(self):
        return _sharded_step, self.arguments


def _sharded_step(loss, options):
    return functools.partial(loss, sharded(**options))


class Trained(Step):
    """The same with an optimizer, whose step is the function's last."""

    def __reduce__(self):
        return _trained_step, self.arguments


def _trained_step(loss, options):
    model = made(**options)
    return functools.partial(loss, model, optimizer=torch.optim.AdamW(model.parameters(), lr=1e-3, foreach=True))


# Situations ----------------------------------------------------------------------------------------------------------


def inside(ids, labels):
    """Makes its model itself, where its inputs are."""
    from transformers import LlamaConfig, LlamaForCausalLM

    with torch.device(ids.device):
        return loss_of(LlamaForCausalLM(LlamaConfig(**SIZES)), ids, labels)


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


def sharded(**options):
    """A model that FSDP2 shards over 8 ranks of torch's fake group, of which this is the first."""
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
    from torch.testing._internal.distributed.fake_pg import FakeStore

    if dist.is_initialized():  # by another test's step, in the same child, with as many ranks as it liked
        dist.destroy_process_group()
    dist.init_process_group("fake", rank=0, world_size=8, store=FakeStore())
    model = made(dtype=torch.float32, **options)
    how = {
        "mesh": init_device_mesh("cuda", (8,)),
        "mp_policy": MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32),
    }
    for layer in model.model.layers:
        fully_shard(layer, **how)
    return fully_shard(model, **how)
