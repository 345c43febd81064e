"""Heads that are more than a weight and a bias, or hold it elsewhere, are refused."""

import functools
import re

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from compiled_loss.models.output_head import output_head

H, V = 5, 11


def linear(bias=True, kind=nn.Linear):
    head = kind(H, V, bias=bias, dtype=torch.float64)
    if bias:
        nn.init.normal_(head.bias)
    return head


@pytest.mark.parametrize("config", ["IA3Config", "LoHaConfig", "OFTConfig", "VeraConfig", "DoRA"])
def test_other_peft_adapters(config):
    peft = pytest.importorskip("peft")
    keywords = {"LoHaConfig": {"r": 2}, "OFTConfig": {"oft_block_size": 5}, "DoRA": {"r": 2, "use_dora": True}}.get(
        config, {}
    )
    if config == "IA3Config":
        keywords = {"feedforward_modules": []}
    kind = peft.LoraConfig if config == "DoRA" else getattr(peft, config)
    model = peft.get_peft_model(
        nn.ModuleDict({"lm_head": nn.Linear(H, V)}), kind(target_modules=["lm_head"], **keywords)
    )
    with pytest.raises(TypeError, match=r"^model: .* with the adapters default: merge them"):
        output_head(model.base_model.model["lm_head"])


class Own(nn.Linear):
    def forward(self, x):
        return 2 * super().forward(x)


def replaced():
    head = linear()
    head.forward = lambda x: F.linear(x, head.weight) * 3
    return head


def observed(how):
    def observer(*args):
        return None

    head = linear()
    getattr(head, how)(observer)
    return head


def old_weight_norm():
    with pytest.warns(FutureWarning):
        return nn.utils.weight_norm(linear())


def quantised():
    torchao = pytest.importorskip("torchao")
    head = nn.Sequential(nn.Linear(64, 128, bias=False))
    torchao.quantization.quantize_(head, torchao.quantization.Int8WeightOnlyConfig())
    return head


def floating_eight():
    head = linear()
    head.weight = nn.Parameter(head.weight.detach().to(torch.float8_e4m3fn), requires_grad=False)
    return head


class Packed(nn.Module):
    def __init__(self):
        super().__init__()
        self.register_buffer("qweight", torch.zeros(2, 2, dtype=torch.int32))

    def forward(self, x):
        return x


class Linear4bit(nn.Linear):
    """As of bitsandbytes: packed into uint8."""

    def __init__(self):
        super().__init__(H, V)
        self.weight = nn.Parameter(torch.zeros(28, 1, dtype=torch.uint8), requires_grad=False)

    def forward(self, x):
        return x


def emptied(which):
    """As ZeRO-3 leaves a parameter outside of its module's forward."""
    head = linear()
    parameter = nn.Parameter(torch.empty(0))
    parameter.ds_id, parameter.ds_shape = 3, (V, H)
    setattr(head, which, parameter)
    head.register_forward_pre_hook(lambda *args: None)
    return head


def offloaded():
    accelerate = pytest.importorskip("accelerate")
    head = linear()
    accelerate.cpu_offload(head, execution_device="cpu")
    assert head.weight.is_meta
    return head


def moving():
    accelerate = pytest.importorskip("accelerate")
    return accelerate.cpu_offload_with_hook(linear(), execution_device="cpu")[0]


OTHERWISE = "give lm_weight where its weight is all it is, or use a loss of logits"
HOOK = "which may change its results: remove it, by the handle that registering it returned, or use a loss of logits"
REFUSED = {
    "a forward of its own": (
        lambda: linear(kind=Own),
        f"test_output_head_errors.Own, which has a forward of its own: {OTHERWISE}",
    ),
    "a forward of this one": (replaced, "torch.nn.modules.linear.Linear whose forward was replaced on the instance"),
    "a body": (lambda: nn.Conv1d(H, V, 1), "torch.nn.modules.conv.Conv1d, which has a forward of its own"),
    "no weight": (nn.Identity, f"torch.nn.modules.linear.Identity without a weight: {OTHERWISE}"),
    "more in a Sequential": (lambda: nn.Sequential(linear(), nn.Tanh()), "container.Sequential of 2: give lm_weight"),
    "nothing in it": (nn.Sequential, "torch.nn.modules.container.Sequential of 0: give"),
    **{
        how: (
            functools.partial(observed, how),
            f"torch.nn.modules.linear.Linear with the hook observed.<locals>.observer, {HOOK}",
        )
        for how in (
            "register_forward_hook",
            "register_forward_pre_hook",
            "register_full_backward_hook",
            "register_full_backward_pre_hook",
        )
    },
    "a hook on what holds it": (
        lambda: nn.Sequential(observed("register_forward_hook")),
        "torch.nn.modules.linear.Linear with the hook",
    ),
    "old weight_norm": (old_weight_norm, "with the hook WeightNorm, which may change"),
    "torchao": (quantised, "that is quantised or packed, its weight held as"),
    "float8": (
        floating_eight,
        "that is quantised or packed, its weight held as torch.float8_e4m3fn: leave the head out of",
    ),
    "4 bit": (
        Linear4bit,
        "test_output_head_errors.Linear4bit that is quantised or packed, its weight held as torch.uint8",
    ),
    "GPTQ": (Packed, "test_output_head_errors.Packed that is quantised or packed, its weight held as packed integers"),
    "ZeRO-3": (
        functools.partial(emptied, "weight"),
        "whose weight ZeRO-3 holds in parts, of 0 elements here: gather it around loss and backward, by "
        "deepspeed.zero.GatheredParameters(head.parameters())",
    ),
    "ZeRO-3's bias": (functools.partial(emptied, "bias"), "whose weight ZeRO-3 holds in parts, of 0 elements here"),
    "offloaded": (
        offloaded,
        "that AlignDevicesHook brings to its device in forward alone: keep the head on its device",
    ),
    "moved": (moving, "that CpuOffload brings to its device in forward alone"),
}


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("kind", REFUSED)
def test_refused_heads(kind):
    make, text = REFUSED[kind]
    head = make()
    expected = "^draft: expected a head that is its weight and bias, an nn.Linear, got .*"
    with pytest.raises((TypeError, ValueError), match=expected + re.escape(text)):
        output_head(head, "draft")
