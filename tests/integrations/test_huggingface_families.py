"""Families of `transformers`: our loss and its gradients are the model's own, or an error, never another number."""

import importlib
import inspect
import re
from pathlib import Path

import pytest
import torch
from transformers_models import HEADS, SIZES, STATE, B, H, S, V, batch, build, llama, transformers, transformers_losses

from compiled_loss.huggingface import LinearCausalLMLoss, aligned_lm_loss, causal_lm_loss, families, set_loss_function

pytestmark = pytest.mark.xdist_group("transformers")

VISION = {"hidden_size": H, "intermediate_size": H, "num_hidden_layers": 1, "num_attention_heads": 2}
VISION |= {"image_size": 28, "patch_size": 14}
BART = {"vocab_size": V, "d_model": H, "max_position_embeddings": 64, "pad_token_id": 0, "decoder_start_token_id": 2}
BART |= {f"{part}_{what}": n for part in ("encoder", "decoder") for what, n in (("layers", 1), ("ffn_dim", H))}
BART |= {"encoder_attention_heads": 2, "decoder_attention_heads": 2}
MPT = {"vocab_size": V, "d_model": H, "n_heads": 2, "n_layers": 2}
GPT = {"vocab_size": V, "n_embd": H, "n_layer": 2, "n_head": 2, "n_positions": 64}
EXPERTS = {"output_router_logits": True, "num_local_experts": 3, "num_experts_per_tok": 2}
BAMBA = SIZES | STATE | {"num_key_value_heads": 2, "attn_layer_indices": [1], "mamba_n_heads": 8}
T5GEMMA = SIZES | HEADS | {"query_pre_attn_scalar": 16}
IMAGES = {**{f"IMGIMG{chr(65 + i)}Z": 40 + i for i in range(5)}, "<image>": 50}
QUANTISER = {"embed_dim": 8, "num_embeddings": 8, "latent_channels": 8, "base_channels": 32, "channel_multiplier": [1]}
QUANTISER |= {"num_res_blocks": 1, "resolution": 8}


def around(kind, name, text, **config):
    """A model that sees, around one of text."""
    text_config = getattr(transformers(), f"{text}Config")(**SIZES | HEADS | {"pad_token_id": 0} | config)
    vision = transformers().SiglipVisionConfig(**VISION)
    return build(kind, text_config=text_config, vision_config=vision, **{name: 60})


def t5gemma():
    return build("T5GemmaForConditionalGeneration", encoder=dict(T5GEMMA), decoder=dict(T5GEMMA), vocab_size=V)


RIGHT = {
    "Llama": llama,
    "Gemma2, a softcap": lambda: llama(kind="Gemma2ForCausalLM", final_logit_softcapping=3.0),
    "Gemma3, a softcap": lambda: llama(kind="Gemma3ForCausalLM", final_logit_softcapping=3.0),
    "Gemma3n, four hidden states": lambda: llama(
        kind="Gemma3nForCausalLM", final_logit_softcapping=3.0, hidden_size_per_layer_input=8,
        vocab_size_per_layer_input=V,
        num_kv_shared_layers=0, intermediate_size=[H, H], layer_types=["full_attention"] * 2, laurel_rank=4,
        activation_sparsity_pattern=[0.0, 0.0],
    ),
    "RecurrentGemma": lambda: llama(kind="RecurrentGemmaForCausalLM", logits_soft_cap=3.0, block_types=["recurrent"]),
    "xLSTM": lambda: llama(kind="xLSTMForCausalLM", output_logit_soft_cap=3.0, num_heads=2),
    "NanoChat": lambda: llama(kind="NanoChatForCausalLM", final_logit_softcapping=3.0),
    "Cohere": lambda: llama(kind="CohereForCausalLM", logit_scale=0.25),
    "Cohere2": lambda: llama(kind="Cohere2ForCausalLM", logit_scale=0.25),
    "Granite, divides": lambda: llama(kind="GraniteForCausalLM", logits_scaling=4.0),
    "HyperCLOVA X, multiplies": lambda: llama(kind="HyperCLOVAXForCausalLM", logits_scaling=2.0),
    "HyperCLOVA X, by little": lambda: llama(kind="HyperCLOVAXForCausalLM", logits_scaling=1.02),
    "Falcon-H1": lambda: llama(kind="FalconH1ForCausalLM", lm_head_multiplier=0.25, mamba_d_ssm=H, **STATE),
    "MPT, a scale it does not use": lambda: build("MptForCausalLM", **MPT, logit_scale=0.25),
    "MPT, a scale of letters": lambda: build("MptForCausalLM", **MPT, logit_scale="inv_sqrt_d_model"),
    "AyaVision, a scale it does not use": lambda: around(
        "AyaVisionForConditionalGeneration", "image_token_index", "Cohere2"
    ),
    "LLaVA around Gemma2": lambda: around(
        "LlavaForConditionalGeneration", "image_token_index", "Gemma2", final_logit_softcapping=3.0
    ),
    "LLaVA around Granite": lambda: around(
        "LlavaForConditionalGeneration", "image_token_index", "Granite", logits_scaling=4.0
    ),
    "PaliGemma, its text's softcap": lambda: around(
        "PaliGemmaForConditionalGeneration", "image_token_index", "Gemma2", final_logit_softcapping=3.0
    ),
    "Gemma3 that sees, a softcap it does not use": lambda: around(
        "Gemma3ForConditionalGeneration", "image_token_index", "Gemma3Text", final_logit_softcapping=3.0
    ),
    "Phi, a bias": lambda: llama(kind="PhiForCausalLM"),
    "GPT-2, no loss_type": lambda: build("GPT2LMHeadModel", **GPT),
    "Mamba, fp32 logits": lambda: build("MambaForCausalLM", vocab_size=V, hidden_size=H, num_hidden_layers=2),
    "Mixtral": lambda: llama(kind="MixtralForCausalLM", router_aux_loss_coef=0.5, **EXPERTS),
    "JetMoe, another name": lambda: build(
        "JetMoeForCausalLM", vocab_size=V, hidden_size=H, num_hidden_layers=2, num_key_value_heads=2, kv_channels=16,
        intermediate_size=H, num_experts_per_tok=2, num_local_experts=4, output_router_logits=True, aux_loss_coef=0.5,
    ),
    "Bamba without its z-loss": lambda: build("BambaForCausalLM", **BAMBA, z_loss_coefficient=0.0),
}  # fmt: skip
REFUSED = {  # and what the error says; set_loss_function is right for these
    "Bamba": (lambda: build("BambaForCausalLM", **BAMBA, z_loss_coefficient=0.1), r"z_loss by z_loss_coefficient"),
    "Chameleon": (
        lambda: build(
            "ChameleonForConditionalGeneration",
            **SIZES,
            num_key_value_heads=2,
            vocabulary_map=IMAGES,
            vq_config=QUANTISER,
        ),
        r"expected as logits its head's of the last hidden state, with softcap None and temperature 1.0",
    ),
    "Bert": (
        lambda: llama(kind="BertLMHeadModel", is_decoder=True),
        "expected as logits its head's of the last hidden",
    ),
    "RemBert": (
        lambda: llama(kind="RemBertForCausalLM", is_decoder=True, output_embedding_size=24, input_embedding_size=24),
        r"^outputs: expected as last of hidden_states \[B, S, 24\], which the head multiplies, got \[2, 7, 32\]: the",
    ),
    "Electra": (
        lambda: llama(kind="ElectraForCausalLM", is_decoder=True, embedding_size=16),
        r"^outputs: expected as last of hidden_states \[B, S, 16\], which the head multiplies, got \[2, 7, 32\]: the",
    ),
    "T5Gemma": (t5gemma, r"^model: expected a causal model, got T5GemmaForCond.*, an encoder and a decoder"),
}
NEVER_CALLED = {
    "Bart": lambda: build("BartForCausalLM", **BART),
    "XLNet": lambda: build("XLNetLMHeadModel", vocab_size=V, d_model=H, n_layer=1, n_head=2, d_inner=H),
    "CPM-Ant": lambda: build(
        "CpmAntForCausalLM", vocab_size=V, hidden_size=H, num_attention_heads=2, dim_head=16, dim_ff=H,
        num_hidden_layers=1, prompt_length=4, prompt_types=2, segment_types=2,
    ),
    "XLM": lambda: build("XLMWithLMHeadModel", vocab_size=V, emb_dim=H, n_layers=1, n_heads=2),
}  # fmt: skip
NEVER_CALLED_CLASSES = ["Qwen2AudioForConditionalGeneration", "GraniteSpeechForConditionalGeneration"]
NEVER_CALLED_CLASSES += ["ImageGPTForCausalImageModeling", "ClvpForCausalLM", "WhisperForCausalLM"]
NEVER_CALLED_CLASSES += ["GPT2DoubleHeadsModel", "T5ForConditionalGeneration", "BartForConditionalGeneration"]
ANOTHERS = ["Blip2ForConditionalGeneration", "InstructBlipForConditionalGeneration"]


def own(model, count=None):
    """Loss and gradients as the model itself computes them with its loss_function of now."""
    ids, labels = batch()
    keywords = {} if count is None else {"num_items_in_batch": count}
    loss = model(input_ids=ids, labels=labels, **keywords).loss
    return loss, gradients(model, loss)


def gradients(model, loss):
    """Of the embedding and the head, which are behind and before all else."""
    leaves = {id(m.weight): m.weight for m in (model.get_input_embeddings(), model.get_output_embeddings())}
    return torch.autograd.grad(loss, list(leaves.values()))


def assert_same(found, expected):
    torch.testing.assert_close(found[0], expected[0], rtol=1e-5, atol=1e-6)
    for mine, theirs in zip(found[1], expected[1], strict=True):
        # fp32 of sums over V and S, through two layers: errors are of the size of the largest entry.
        torch.testing.assert_close(mine, theirs, rtol=1e-3, atol=1e-5 * float(theirs.abs().max()))


@pytest.mark.parametrize("count", [None, 23])
@pytest.mark.parametrize("family", RIGHT)
def test_loss_and_gradients_match_the_model(family, count):
    model = RIGHT[family]()
    expected = own(model, count)
    assert float(expected[0].detach()) > 1e-3
    loss_fn = LinearCausalLMLoss(model)
    ids, labels = batch()
    loss = loss_fn(model(input_ids=ids, **loss_fn.forward_keywords), labels, count)
    assert_same((loss, gradients(model, loss)), expected)
    set_loss_function(model)
    assert model.loss_function is causal_lm_loss
    assert_same(own(model, count), expected)


@pytest.mark.parametrize("family", REFUSED)
def test_refused_families_take_set_loss_function(family):
    make, text = REFUSED[family]
    model = make()
    expected = own(model)
    ids, labels = batch()

    def linear():
        loss_fn = LinearCausalLMLoss(model)
        loss_fn(model(input_ids=ids, **loss_fn.forward_keywords), labels)

    with pytest.raises(ValueError, match=text):
        linear()
    set_loss_function(model)
    assert_same(own(model), expected)


@pytest.mark.parametrize("family", NEVER_CALLED)
def test_models_that_never_call_loss_function_error(family):
    """Bart's decoders, XLNet and CPM-Ant do not shift; XLM's loss is its head's."""
    model = NEVER_CALLED[family]()
    for take in (LinearCausalLMLoss, set_loss_function):
        with pytest.raises(ValueError, match=r"^model: expected one whose forward calls self.loss_function, got "):
            take(model)


@pytest.mark.parametrize("name", NEVER_CALLED_CLASSES + ANOTHERS)
def test_refused_classes(name):
    """Models of several parts, by their class alone."""
    kind = getattr(transformers(), name)
    text = "another's" if name in ANOTHERS else "calls self.loss_function"
    text = {"another's": "whose own loss_function gives its loss"}.get(text, text)
    with pytest.raises(ValueError, match=rf"^model: expected one {'' if name in ANOTHERS else 'whose forward '}{text}"):
        set_loss_function(kind.__new__(kind))


def test_t5gemma_aligned_labels():
    """T5Gemma's loss_type is ForMaskedLM: its decoder's inputs are the labels, shifted."""
    model = t5gemma()
    expected = own(model)
    model.loss_function = causal_lm_loss
    with pytest.raises(ValueError, match=r"^labels: expected a model whose labels are shifted by its loss_function"):
        own(model)
    set_loss_function(model)  # in spite of the one that was set
    assert model.loss_function is aligned_lm_loss
    assert_same(own(model), expected)
    assert_same(own(model, 5), (expected[0] * 11 / 5, [gradient * 11 / 5 for gradient in expected[1]]))
    dia = transformers().DiaForConditionalGeneration
    dia = dia.__new__(dia)
    torch.nn.Module.__init__(dia)
    dia.loss_type = "ForMaskedLM"
    set_loss_function(dia)
    assert dia.loss_function is aligned_lm_loss


@pytest.mark.parametrize("count", [None, 23, torch.tensor(23)])
def test_aligned_lm_loss_matches_transformers(count):
    theirs = transformers_losses().ForMaskedLMLoss
    logits = 3 * torch.randn(B, S, V, dtype=torch.float64)
    _, labels = batch()
    for ignore_index in (-100, int(labels[1, 1])):
        keywords = {"vocab_size": V, "num_items_in_batch": count, "ignore_index": ignore_index}
        targets = labels.where(labels >= 0, ignore_index)
        mine = aligned_lm_loss(logits, targets, **keywords, position_ids=None)
        torch.testing.assert_close(mine.float(), theirs(logits, targets, **keywords).float())


@pytest.mark.slow  # imports every model of transformers
def test_every_class_of_transformers():
    """By the text of its forward: whoever names a cross-entropy there, or no loss_function, is refused."""
    package = transformers().models
    known = re.compile(r"^class (\w*(?:CausalLM|ConditionalGeneration|LMHeadModel|DoubleHeadsModel))\(", re.MULTILINE)
    seen = {True: 0, False: 0}
    for path in sorted(Path(package.__path__[0]).glob("*/modeling_*.py")):
        for name in known.findall(path.read_text()):
            kind = getattr(importlib.import_module(f"{package.__name__}.{path.parent.name}.{path.stem}"), name)
            if "forward" not in vars(kind) or "labels" not in inspect.signature(kind.forward).parameters:
                continue
            text = inspect.getsource(inspect.unwrap(kind.forward))
            own = "self.loss_function(" not in text or re.search(r"cross_?entropy|z_loss|diffusion_loss", text, re.I)
            found = families.own_loss(kind.__new__(kind))
            assert bool(found.calls and not found.others and set(found.weights) <= {"aux_loss"}) <= (not own), name
            seen[bool(own)] += 1
    assert seen[True] > 50 and seen[False] > 200
