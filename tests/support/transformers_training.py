"""Models of `transformers` to train, tiny and random, and their loss in plain torch."""

import copy

import torch
from torch.nn import functional as F
from transformers_models import transformers

from compiled_loss import Chunking

B, S, H, V = 3, 7, 16, 61
COUNT = 23  # of a step's microbatches together
TOKENS = Chunking(strategy="tokens", chunk_size=5)
TIGHT = {"rtol": 1e-10, "atol": 1e-12}  # fp64, through layers and steps


def make(name, dtype=torch.float32, **options):
    """A model of a family, with a spread of logits that makes the loss depend on them."""
    torch.manual_seed(0)
    sizes = {"vocab_size": V, "hidden_size": H, "intermediate_size": 24, "num_hidden_layers": 2, "head_dim": 4}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 32}
    tokens = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": None, "use_cache": False}
    library = transformers()
    config = getattr(library, f"{name}Config")(**{**sizes, **heads, **tokens, "tie_word_embeddings": False, **options})
    model = getattr(library, f"{name}ForCausalLM")(config)
    with torch.no_grad():
        model.get_output_embeddings().weight.mul_(20)
    return model.to(dtype).train()


def exact(model):
    """A copy in fp64: `transformers` rounds to fp32 in its norms."""
    return in_fp64(copy.deepcopy(model))


def in_fp64(model):
    """The model itself, made exact."""
    model = model.double()
    for name, norm in list(model.named_modules()):
        if type(norm).__name__.endswith("RMSNorm"):
            gemma = type(norm).__name__.startswith("Gemma")
            eps = norm.eps if gemma else norm.variance_epsilon
            new = torch.nn.RMSNorm(norm.weight.shape, eps=eps, dtype=torch.float64)
            new.weight = torch.nn.Parameter(1 + norm.weight.detach()) if gemma else norm.weight
            model.set_submodule(name, new)
    return model


def batch(rows=B, seed=0):
    """Ids and labels [rows, S]: each row ignores another number of its first labels, as prompts are."""
    random = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, V, (rows, S), generator=random)
    prompt = torch.randint(0, S - 1, (rows, 1), generator=random)
    return ids, torch.where(torch.arange(S) < prompt, -100, ids)


def plain(logits, labels, count):
    """What all of this is about, in plain torch."""
    losses = F.cross_entropy(logits[:, :-1].reshape(-1, V), labels[:, 1:].reshape(-1), reduction="sum")
    return losses / count
