"""Fused heads of `transformers`' models: what PEFT, torch.compile and others make of them."""

import functools

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend
from torch.nn import functional as F
from transformers_models import B, S, V, batch, llama, with_lora

from compiled_loss import testing
from compiled_loss.integrations.transformers import DeferredLogits, fuse_head, unfuse_head
from compiled_loss.integrations.transformers.deferring import deferring

pytestmark = pytest.mark.xdist_group("transformers")


def step(model, **options):
    """Loss and all gradients, with the same dropout each time."""
    ids, labels = batch()
    torch.manual_seed(3)
    model.zero_grad()
    output = model(input_ids=ids, labels=labels, **options)
    output.loss.backward()
    return output, {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def assert_same_step(found, expected):
    torch.testing.assert_close(found[0].loss, expected[0].loss, rtol=1e-5, atol=1e-6)
    assert found[1].keys() == expected[1].keys()
    for name, theirs in expected[1].items():
        # fp32 of sums over V and S, through two layers: errors are of the size of the largest entry.
        torch.testing.assert_close(found[1][name], theirs, rtol=1e-3, atol=1e-5 * float(theirs.abs().max()))


# PEFT ---------------------------------------------------------------------------------------------------------------

HEADS = {
    "none": (False, {"target_modules": ["q_proj"]}),
    "LoRA": (False, {"target_modules": ["q_proj", "lm_head"]}),
    "LoRA with dropout": (False, {"target_modules": ["lm_head"], "lora_dropout": 0.5, "use_rslora": True}),
    "LoRA with bias": (False, {"target_modules": ["lm_head"], "lora_bias": True}),
    "modules_to_save": (False, {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens", "lm_head"]}),
    "modules_to_save, tied": (
        True,
        {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"], "ensure_weight_tying": True},
    ),
    "trainable tokens": (False, {"target_modules": ["q_proj"], "trainable_token_indices": [7, 9]}),
    "trainable tokens, tied": (True, {"target_modules": ["q_proj"], "trainable_token_indices": [7, 9]}),
}


@pytest.mark.parametrize("which", HEADS)
def test_peft(which):
    tied, config = HEADS[which]
    model = with_lora(llama(tie_word_embeddings=tied), **config).train()
    expected = step(model)
    fuse_head(model)
    found = step(model)
    assert_same_step(found, expected)
    assert isinstance(found[0].logits, DeferredLogits)
    ids, labels = batch()
    with model.disable_adapter():
        disabled = model(input_ids=ids, labels=labels).loss
        unfuse_head(model)
        torch.testing.assert_close(disabled, model(input_ids=ids, labels=labels).loss, rtol=1e-5, atol=1e-6)


def test_peft_adapters_merged_and_several():
    model = with_lora(llama(), target_modules=["lm_head", "v_proj"]).train()
    model.add_adapter("second", model.peft_config["default"])
    model.base_model.set_adapter(["default", "second"])
    expected = step(model)
    fuse_head(model)
    assert_same_step(step(model), expected)
    model.merge_adapter()
    ids, labels = batch()
    merged = model(input_ids=ids, labels=labels)
    torch.testing.assert_close(merged.loss, expected[0].loss.detach(), rtol=1e-5, atol=1e-6)
    assert isinstance(merged.logits, DeferredLogits)


def in_fp64(model):
    """Loss and gradients in plain torch: models of transformers round their logits to fp32."""
    ids, labels = batch()
    model.zero_grad()
    logits = model(input_ids=ids).logits
    loss = F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
    loss.backward()
    return loss, {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def assert_within_budget(found, own, exact):
    """A step of a fused model, and of its own, against the same model in fp64."""
    loss, gradients = in_fp64(exact)
    testing.assert_within_error_budget(found[0].loss.float(), own[0].loss.float(), loss, name="loss")
    assert found[1].keys() == gradients.keys()
    for name, truth in gradients.items():
        testing.assert_within_error_budget(found[1][name], own[1][name], truth, name=name)


def test_lora_in_bf16():
    """Adapters are fp32 beside bf16 weights, and an update smaller than their roundings counts."""
    model = with_lora(llama(torch.bfloat16), target_modules=["lm_head"]).train()
    exact = with_lora(llama(torch.bfloat16), target_modules=["lm_head"]).double().train()
    with torch.no_grad():
        for parameter, theirs in zip(exact.parameters(), model.parameters(), strict=True):
            theirs.mul_(2.0**-4 if theirs.dtype == torch.float32 else 1)
            parameter.copy_(theirs)
    own = step(model)
    fuse_head(model)
    assert_within_budget(step(model), own, exact)


def test_peft_after_fuse_head_is_an_error():
    for config, text in {
        (
            "lm_head",
            False,
        ): r"^model: expected a forward that .* a sum with \(2, 7, 61\) \(of adapters\? get_peft_model c",
        (
            "q_proj",
            True,
        ): r"^model: expected a forward that calls the head which fuse_head found, got LlamaForCausalLM's",
    }.items():
        model = llama()
        fuse_head(model)
        saved = {"modules_to_save": ["lm_head"]} if config[1] else {}
        model = with_lora(model, target_modules=[config[0]], **saved).train()
        with pytest.raises((TypeError, RuntimeError), match=text):
            step(model)
    model = with_lora(llama(), target_modules=["lm_head"], use_dora=True)
    with pytest.raises(
        TypeError, match=r"^model.get_output_embeddings\(\): expected a head .* adapters default: merge"
    ):
        fuse_head(model)


# Others -------------------------------------------------------------------------------------------------------------


def test_resized_vocabularies():
    model = llama().train()
    model.resize_token_embeddings(V + 6)
    expected = step(model)
    fuse_head(model)
    assert_same_step(step(model), expected)
    model.resize_token_embeddings(V + 9)
    with pytest.raises(RuntimeError, match=r"or whose head was replaced since \(by peft, resize_token_embeddings or"):
        step(model)


def test_autocast():
    model = llama().train()
    with torch.autocast("cpu", torch.bfloat16):
        own = step(model)
        fuse_head(model)
        found = step(model)
    assert_within_budget(found, own, llama().double().train())


def test_tuple_output_and_generation():
    model, (ids, labels) = llama().train(), batch()
    expected = model(input_ids=ids, labels=labels, return_dict=False)
    fuse_head(model)
    loss, logits, *_ = model(input_ids=ids, labels=labels, return_dict=False)
    torch.testing.assert_close(loss, expected[0], rtol=1e-5, atol=1e-6)
    assert isinstance(logits, DeferredLogits)
    assert model.generate(ids, max_new_tokens=3, do_sample=False).shape == (B, S + 3)


def test_hooks_of_accelerate_that_move_what_a_model_takes_and_gives():
    """Those of the head, which find its input, and of the model, which move its output; before fuse_head or after."""
    hooks = pytest.importorskip("accelerate.hooks")
    expected = step(llama().train())
    for first in (False, True):
        model = llama().train()
        if first:
            fuse_head(model)
        for module in (model, *([] if first else [model.lm_head])):
            hooks.add_hook_to_module(module, hooks.AlignDevicesHook(execution_device="cpu", io_same_device=True))
        if not first:
            fuse_head(model)
        found = step(model)
        assert_same_step(found, expected)
        assert isinstance(found[0].logits, DeferredLogits)
        unfuse_head(model)
        assert isinstance(step(model)[0].logits, torch.Tensor)


def test_quantised_head_is_an_error():
    quantization = pytest.importorskip("torchao.quantization")
    model = llama()
    quantization.quantize_(model, quantization.Int8WeightOnlyConfig(), filter_fn=lambda _, name: name == "lm_head")
    with pytest.raises(
        TypeError, match=r"^model.get_output_embeddings\(\): expected a head that is its weight and bias"
    ):
        fuse_head(model)


def test_deferring_a_call_in_any_mode():
    model, (ids, _) = llama().eval(), batch()
    logits = model(input_ids=ids).logits
    with torch.no_grad(), deferring(model):
        deferred = model(input_ids=ids).logits[:, :-1]

        def log_prob(hidden, weight, **keywords):
            return (hidden @ weight.t() * keywords["logit_scale"]).log_softmax(-1)

        found = deferred.apply(log_prob)
    torch.testing.assert_close(found, logits[:, :-1].log_softmax(-1))
    assert not [module for module in model.modules() if "forward" in vars(module)]


# torch.compile ------------------------------------------------------------------------------------------------------

COMPILED = {
    "Llama": llama,
    "Gemma2": functools.partial(llama, kind="Gemma2ForCausalLM", final_logit_softcapping=3.0),
    "Granite": functools.partial(llama, kind="GraniteForCausalLM", logits_scaling=4.0),
    "Cohere": functools.partial(llama, kind="CohereForCausalLM", logit_scale=0.25),
    "Qwen2": functools.partial(llama, kind="Qwen2ForCausalLM"),
    "Phi": functools.partial(llama, kind="PhiForCausalLM"),
    "Mixtral": functools.partial(
        llama, kind="MixtralForCausalLM", output_router_logits=True, num_local_experts=3, num_experts_per_tok=2
    ),
}
CASES = [("Gemma2", "eager", ("entropy", "correct"))]
CASES += [pytest.param(which, "aot_eager", (), marks=pytest.mark.slow) for which in COMPILED]
CASES += [pytest.param(which, "inductor", (), marks=pytest.mark.slow) for which in ("Llama", "Mixtral")]


@pytest.mark.parametrize(("which", "backend", "statistics"), CASES)
def test_compiled_whole(which, backend, statistics):
    """One graph, of the model and its loss, for all steps; nothing is compiled again as labels change."""
    model = COMPILED[which](num_hidden_layers=1).train()
    expected = step(model, num_items_in_batch=torch.tensor(13))
    fuse_head(model, statistics=statistics)
    eager = step(model, num_items_in_batch=torch.tensor(13))[0].logits.statistics
    torch._dynamo.reset()
    counter = CompileCounterWithBackend(backend)
    compiled = torch.compile(model, fullgraph=True, backend=counter)
    for _ in range(2):
        found = step(compiled, num_items_in_batch=torch.tensor(13))
        assert_same_step((found[0], {n.removeprefix("_orig_mod."): g for n, g in found[1].items()}), expected)
    assert counter.frame_count == 1
    if backend == "inductor":
        unfuse_head(compiled)
        assert isinstance(step(compiled)[0].logits, torch.Tensor)
        fuse_head(compiled)
        assert isinstance(step(compiled)[0].logits, DeferredLogits)
    if statistics:
        torch.testing.assert_close(found[0].logits.statistics, eager)
    with pytest.raises(AttributeError, match=r"^logits: expected no use of a training step's"):
        found[0].logits.argmax(-1)
