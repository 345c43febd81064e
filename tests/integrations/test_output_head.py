"""The weight and bias of a head, whatever wraps it: their product is the head's own forward."""

import functools
from types import SimpleNamespace

import pytest
import torch
from comparing import TIGHT, assert_same
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.nn import functional as F
from torch.nn.utils import parametrizations

from compiled_loss.models.output_head import output_head

H, V = 5, 11


def linear(bias=True, kind=nn.Linear):
    head = kind(H, V, bias=bias, dtype=torch.float64)
    if bias:
        nn.init.normal_(head.bias)
    return head


def agrees(head):
    """Logits and all gradients of the head's own forward, from its weight and bias."""
    x = torch.randn(7, H, dtype=torch.float64, requires_grad=True)
    found = output_head(head)
    wanted = [x, *(p for p in head.parameters() if p.requires_grad)]
    assert_same(F.linear(x, found.weight, found.bias), head(x), wanted)


class Subclass(nn.Linear):
    pass


class Linear(nn.Linear):
    pass


def accelerated():
    accelerate = pytest.importorskip("accelerate")
    head = linear()
    accelerate.hooks.add_hook_to_module(head, accelerate.hooks.AlignDevicesHook(execution_device="cpu"))
    return head


def unhooked():
    accelerate = pytest.importorskip("accelerate")
    head = accelerated()
    accelerate.hooks.remove_hook_from_module(head)
    assert "forward" in vars(head)
    return head


def compiled_in_place():
    head = linear()
    head.compile(backend="eager")
    return head


PLAIN = {
    "bias": linear,
    "no bias": lambda: linear(False),
    "a subclass": lambda: linear(kind=Subclass),
    "another Linear": lambda: linear(kind=Linear),
    "weight_norm": lambda: parametrizations.weight_norm(linear()),
    "orthogonal": lambda: parametrizations.orthogonal(linear(False)),
    "Sequential": lambda: nn.Sequential(linear()),
    "a Sequential of one": lambda: nn.Sequential(nn.Sequential(linear(False))),
    "compiled": lambda: torch.compile(linear(), backend="eager"),
    "compiled in place": compiled_in_place,
    "checkpointed": lambda: checkpoint_wrapper(linear()),
    "accelerate on its device": accelerated,
    "accelerate, taken off": unhooked,
}


@pytest.mark.parametrize("kind", PLAIN)
def test_weight_and_bias_match_the_forward(kind):
    agrees(PLAIN[kind]())


def test_heads_without_forward():
    weight, bias = torch.randn(V, H), torch.randn(V)
    tied = nn.Embedding(V, H)
    for head, expected in (
        (SimpleNamespace(weight=weight), (weight, None)),
        (SimpleNamespace(weight=weight, bias=bias), (weight, bias)),
        (tied, (tied.weight, None)),
        (nn.ParameterDict({"weight": weight}), (weight, None)),
        (nn.ModuleList([tied]), (tied.weight, None)),
        (nn.ModuleDict({"default": tied}), (tied.weight, None)),
    ):
        found = output_head(head)
        assert found.weight.data_ptr() == expected[0].data_ptr()
        assert found.bias is expected[1]


def peft_model(bias=False, **keywords):
    peft = pytest.importorskip("peft")

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.body = nn.Linear(H, H, bias=False, dtype=torch.float64)
            self.lm_head = linear(bias)

        def forward(self, x):
            return self.lm_head(self.body(x))

    config = peft.LoraConfig(**{"target_modules": ["body"], "r": 2} | keywords)
    model = peft.get_peft_model(Model(), config, autocast_adapter_dtype=False)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter))
    return model, lambda: model.base_model.model.lm_head


@pytest.mark.parametrize("bias", [False, True])
def test_peft_modules_to_save(bias):
    peft = pytest.importorskip("peft")
    model, head = peft_model(bias, modules_to_save=["lm_head"])
    agrees(head())
    saved, original = head().modules_to_save["default"].weight, head().original_module.weight
    assert output_head(head()).weight is saved and saved is not original
    with model.disable_adapter():
        assert output_head(head()).weight is original
        agrees(head())
    model.add_adapter("other", peft.LoraConfig(target_modules=["body"], r=2, modules_to_save=["lm_head"]))
    model.set_adapter("other")
    assert output_head(head()).weight is head().modules_to_save["other"].weight
    model.add_adapter("bare", peft.LoraConfig(target_modules=["body"], r=2))
    model.set_adapter("bare")
    agrees(head())


def test_peft_trainable_tokens():
    model, head = peft_model(trainable_token_indices={"lm_head": [1, 4]})
    agrees(head())
    found = output_head(head())
    delta = head().token_adapter.trainable_tokens_delta["default"]
    torch.testing.assert_close(found.weight[[1, 4]], delta, **TIGHT)
    assert torch.autograd.grad(found.weight.sum(), delta)[0].eq(1).all()
    with model.disable_adapter():
        agrees(head())
    model.merge_adapter()
    agrees(head())
    model.unmerge_adapter()
    agrees(head())


def test_peft_trainable_tokens_without_bias():
    """What PEFT's forward computes while they are active; a loss that added it would be another one."""
    model, head = peft_model(True, trainable_token_indices={"lm_head": [1, 4]})
    agrees(head())
    assert output_head(head()).bias is None
    with model.disable_adapter():
        agrees(head())
        assert output_head(head()).bias is not None


def test_lora_on_the_head():
    """LoRA is refused while it changes something, and only then."""
    peft = pytest.importorskip("peft")
    model, head = peft_model(True, target_modules=["body", "lm_head"])
    text = (
        r"^model: expected a head that is its weight and bias, an nn.Linear, got peft\.tuners\.lora\.layer\.Linear "
        r"with the adapters default: merge them, by merge_adapter\(\) or merge_and_unload\(\), .*, by modules_to_save"
    )
    with pytest.raises(TypeError, match=text):
        output_head(head())
    with model.disable_adapter():
        agrees(head())
    model.merge_adapter()
    agrees(head())
    with model.disable_adapter(), pytest.raises(ValueError, match=r"default are merged and disabled: call unmerge_ada"):
        output_head(head())
    model.unmerge_adapter()
    with pytest.raises(TypeError, match="adapters default"):
        output_head(head())
    model.add_adapter("other", peft.LoraConfig(target_modules=["body"], r=2))
    model.set_adapter("other")  # which is none of the head's
    agrees(head())
    model.set_adapter("default")
    agrees(model.merge_and_unload().lm_head)


def test_fsdp_tensor_parallel_and_zero_hooks():
    """fully_shard's, the tensor-parallel styles' and ZeRO's are needed where the head runs, and change nothing."""
    head = linear()

    def observer(*args):
        return None

    for module in ("torch.distributed.fsdp._fully_shard._fsdp_state", "deepspeed.runtime.zero.parameter_offload"):
        observer.__module__ = module
        head.register_forward_pre_hook(functools.partial(observer, head))
    agrees(head)
