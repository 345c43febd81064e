"""Tiny random models of Hugging Face `transformers`, and batches for them."""

import os
import warnings

import pytest
import torch

B, S, H, V = 2, 7, 32, 61
SIZES = {"vocab_size": V, "hidden_size": H, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
HEADS = {"num_key_value_heads": 2, "head_dim": 16}
TOKENS = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": None, "use_cache": False}
STATE = {"mamba_n_heads": 4, "mamba_d_head": 8, "mamba_d_state": 8, "mamba_n_groups": 1}


def transformers():
    os.environ |= {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_VERBOSITY": "error"}
    import transformers as library

    return library


def transformers_losses():
    transformers()
    from transformers.loss import loss_utils

    return loss_utils


def spread(model):
    """The model with logits that make its loss depend on them."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(0, 0.2)
    return model.eval()


def build(name, dtype=torch.float32, **config):
    """A model of this class; its config's sizes are given by the caller where they are called otherwise."""
    torch.manual_seed(0)
    kind = getattr(transformers(), name)
    return spread(kind(kind.config_class(**TOKENS | config))).to(dtype)


def llama(dtype=torch.float32, kind="LlamaForCausalLM", **config):
    """One of the many that are called as Llama's."""
    return build(kind, dtype, **SIZES | HEADS | {"tie_word_embeddings": False} | config)


def batch():
    """Ids and labels [B, S], some of them ignored."""
    ids = torch.randint(5, 39, (B, S), generator=torch.Generator().manual_seed(0))
    labels = ids.clone()
    labels[0, :3] = -100
    return ids, labels


def with_lora(model, **config):
    peft = pytest.importorskip("peft")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        adapted = peft.get_peft_model(model, peft.LoraConfig(task_type="CAUSAL_LM", **config))
    with torch.no_grad():
        for parameter in adapted.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * 0.3)
    return adapted
