"""The classes of `transformers` that generate text and compute its loss, and configs that change how."""

import importlib
import inspect
import re
from pathlib import Path

NAMES = re.compile(r".*(CausalLM|ConditionalGeneration|LMHeadModel|DoubleHeadsModel)")
ALIGNMENTS = ("ForCTC", "ForRNNT", "ForTDT")  # their loss sums over alignments: no cross-entropy of a head
T5 = {"model_type": "t5", "decoder_start_token_id": 2}
VARIANTS = {  # beside each class's own default: (class, config)
    "Llama, tied": ("LlamaForCausalLM", {"tie_word_embeddings": True}),
    "Gemma 2, untied": ("Gemma2ForCausalLM", {"tie_word_embeddings": False}),
    "Cohere, untied": ("CohereForCausalLM", {"tie_word_embeddings": False}),
    "Mamba, tied": ("MambaForCausalLM", {"tie_word_embeddings": True}),
    "T5, untied: no scale": ("T5ForConditionalGeneration", {"tie_word_embeddings": False}),
    "OPT, a projection before its head": ("OPTForCausalLM", {"word_embed_proj_dim": 24}),
    "Ernie 4.5 MoE, biases": ("Ernie4_5_MoeForCausalLM", {"use_bias": True}),
    "BLIP-2 around T5": ("Blip2ForConditionalGeneration", {"text_config": T5}),
    "InstructBLIP around T5": ("InstructBlipForConditionalGeneration", {"text_config": T5}),
    "InstructBLIP video around T5": ("InstructBlipVideoForConditionalGeneration", {"text_config": T5}),
    "LLaVA around Gemma 2": ("LlavaForConditionalGeneration", {"text_config": {"model_type": "gemma2"}}),
    "LLaVA around Granite": ("LlavaForConditionalGeneration", {"text_config": {"model_type": "granite"}}),
    "LLaVA-NeXT around Mixtral": (
        "LlavaNextForConditionalGeneration",
        {"text_config": {"model_type": "mixtral", "output_router_logits": False}},
    ),
    "PaliGemma around Gemma 2": ("PaliGemmaForConditionalGeneration", {"text_config": {"model_type": "gemma2"}}),
    "Encoder-decoder with GPT-2": (
        "EncoderDecoderModel",
        {"decoder": {"model_type": "gpt2", "is_decoder": True, "add_cross_attention": True}},
    ),
    "Vision encoder-decoder with TrOCR": (
        "VisionEncoderDecoderModel",
        {"decoder": {"model_type": "trocr", "is_decoder": True, "add_cross_attention": True}},
    ),
}


def cases():
    """By name: every generative class with its tiny config, then the variants, as (class, what its config is given)."""
    classes = generative_classes()
    variants = {name: (classes[kind], given) for name, (kind, given) in VARIANTS.items() if kind in classes}
    return {name: (kind, {}) for name, kind in classes.items()} | variants


def generative_classes():
    """By name, in the order of their names: every model whose forward takes labels and that generates.

    What needs an absent package to be imported is left out.
    """
    import transformers

    found = {}
    package = transformers.models
    for path in sorted(Path(package.__path__[0]).glob("*/modeling_*.py")):
        try:
            module = importlib.import_module(f"{package.__name__}.{path.parent.name}.{path.stem}")
        except ModuleNotFoundError:
            continue
        for name, kind in vars(module).items():
            if isinstance(kind, type) and kind.__module__ == module.__name__ and _generates(kind):
                found[name] = kind
    return dict(sorted(found.items()))


def _generates(kind):
    from transformers import GenerationMixin, PreTrainedModel

    if not issubclass(kind, PreTrainedModel) or kind.__name__.endswith(ALIGNMENTS):
        return False
    named = issubclass(kind, GenerationMixin) or NAMES.fullmatch(kind.__name__)
    return bool(named) and "labels" in inspect.signature(kind.forward).parameters
