"""LinearCausalLMLoss compares a model's logits with its head's: what it lets pass, and what it does not."""

import copy
from types import SimpleNamespace

import pytest
import torch
from torch.nn import functional as F
from transformers_models import B, H, V, batch, llama

from compiled_loss.huggingface import LinearCausalLMLoss
from compiled_loss.huggingface.comparison import compare
from compiled_loss.huggingface.families import Transform
from compiled_loss.models.output_head import OutputHead

pytestmark = pytest.mark.xdist_group("transformers")

LOW = (torch.bfloat16, torch.float16)
DTYPES = (torch.float32, *LOW)
PLAIN = Transform(None, 1.0)


def changed(columns, value):
    def change(logits):
        logits = logits.clone()
        logits[..., columns] = value(logits[..., columns])
        return logits

    return change


OTHERS = {
    "softcap 15": lambda z: 15 * torch.tanh(z / 15),
    "softcap 30": lambda z: 30 * torch.tanh(z / 30),
    "softcap 50": lambda z: 50 * torch.tanh(z / 50),
    "scale 1.05": lambda z: 1.05 * z,
    "scale 1.02": lambda z: 1.02 * z,
    "scale 0.98": lambda z: 0.98 * z,
    "less by 10 for 8 tokens": changed(slice(8), lambda z: z - 10),
    "the least for some tokens": changed([3, 5], lambda z: torch.full_like(z, torch.finfo(z.dtype).min)),
    "inf for a token": changed([3], lambda z: torch.full_like(z, torch.inf)),
    "NaN for a token": changed([3], lambda z: torch.full_like(z, torch.nan)),
    "fewer tokens": lambda z: z[..., :-1],
    "none": lambda z: z[:, :0],
}


class Knowing(torch.nn.Module):
    """A model that knows the next token: logits of a standard deviation of 2, the label's about 22."""

    classes, width, change = 500, 64, staticmethod(lambda logits: logits)

    def __init__(self, dtype):
        super().__init__()
        torch.manual_seed(0)
        self.config = SimpleNamespace()
        embedding = torch.randn(self.classes, self.width)
        self.embedding = torch.nn.Parameter(embedding.to(dtype))
        self.lm_head = torch.nn.Linear(self.width, self.classes, bias=False)
        noise = torch.randn(self.classes, self.width) * 2 / self.width**0.5
        self.lm_head.weight = torch.nn.Parameter((noise + embedding * 22 / self.width).to(dtype))

    def get_output_embeddings(self):
        return self.lm_head

    def forward(self, input_ids, logits_to_keep=0, output_hidden_states=True):
        hidden = self.embedding[input_ids]
        logits = self.change(self.lm_head(hidden[:, -logits_to_keep:]))
        return SimpleNamespace(hidden_states=(hidden,), logits=logits)


@pytest.mark.parametrize("keep", [0, 1])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("how", OTHERS)
def test_changed_logits_are_an_error(how, dtype, keep):
    model, ids = Knowing(dtype), torch.arange(8).reshape(2, 4)
    loss_fn = LinearCausalLMLoss(model)
    loss_fn(model(ids, logits_to_keep=keep), ids)
    model.change = OTHERS[how]
    with pytest.raises(
        ValueError, match=r"^(model: expected as logits its head's .* others, by up|outputs: expected logi)"
    ):
        LinearCausalLMLoss(model)(model(ids, logits_to_keep=keep), ids)


@pytest.mark.parametrize("dtype", DTYPES)
def test_comparison_is_repeated(dtype):
    """Small logits hide a softcap, and padding hides all: calls 1, 2, 4, 8, ... look again."""
    model, ids = Knowing(dtype), torch.arange(8).reshape(2, 4)
    loss_fn = LinearCausalLMLoss(model)
    outputs = model(ids)
    nothing = SimpleNamespace(hidden_states=(0 * outputs.hidden_states[0],), logits=0 * outputs.logits)
    other = SimpleNamespace(hidden_states=outputs.hidden_states, logits=30 * torch.tanh(outputs.logits / 30))
    for _ in range(3):
        loss_fn(nothing, ids)
    with pytest.raises(ValueError, match=r"^model: expected as logits its head's"):
        loss_fn(other, ids)
    for _ in range(3):
        loss_fn(outputs, ids)
    with pytest.raises(ValueError, match=r"^model: expected as logits its head's"):
        loss_fn(other, ids)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_nan_and_inf_hidden_states(bad):
    """With a GradScaler, hidden states of inf and NaN are steps to be skipped."""
    model, ids = Knowing(torch.float32), torch.arange(8).reshape(2, 4)
    with torch.no_grad():
        model.embedding[2, 0] = bad
    loss_fn = LinearCausalLMLoss(model)
    assert not loss_fn(model(ids), ids).isfinite()
    model.change = OTHERS["scale 1.02"]  # in the rows that are finite
    with pytest.raises(ValueError, match=r"^model: expected as logits its head's"):
        loss_fn(model(ids), ids)


# No false alarms ----------------------------------------------------------------------------------------------------


def partial_sums(hidden, weight):
    """A GEMM that adds parts of H up in the dtype of its inputs, as cuBLAS may."""
    parts = (F.linear(h, w) for h, w in zip(hidden.split(256, -1), weight.split(256, -1), strict=True))
    return sum(parts)


def rounded_once(hidden, weight):
    """fp32 inside, rounded at the end."""
    return F.linear(hidden.float(), weight.float()).to(hidden.dtype)


def rounded_never(hidden, weight):
    return F.linear(hidden, weight).float()


@pytest.mark.parametrize("product", [partial_sums, rounded_once, rounded_never])
@pytest.mark.parametrize("transform", [PLAIN, Transform(30.0, 1.0), Transform(None, 0.3), Transform(5.0, 7.0)])
@pytest.mark.parametrize("dtype", DTYPES)
def test_rounding_passes(dtype, transform, product):
    torch.manual_seed(0)
    outliers = torch.ones(1024).index_fill_(0, torch.tensor([7, 500]), 30.0)
    hidden = (torch.randn(4, 8, 1024) * outliers).to(dtype)
    weight = (torch.randn(3000, 1024) / 16).to(dtype)
    logits = product(hidden, weight)
    if transform.softcap is not None:
        logits = torch.tanh(logits / transform.softcap) * transform.softcap
    compare(logits / transform.temperature, hidden, OutputHead(weight, None), transform)


FAMILIES = {
    "Llama": ("LlamaForCausalLM", {}),
    "Gemma2, a softcap": ("Gemma2ForCausalLM", {"final_logit_softcapping": 3.0}),
    "Cohere, a scale": ("CohereForCausalLM", {"logit_scale": 0.3}),
    "Falcon-Mamba, float()": ("FalconMambaForCausalLM", {}),
    "xLSTM, float() and a softcap": ("xLSTMForCausalLM", {"output_logit_soft_cap": 3.0, "num_heads": 2}),
}


@pytest.mark.parametrize("autocast", LOW)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("family", FAMILIES)
def test_no_false_alarms(family, dtype, autocast):
    """In the model's dtype and under autocast, with outputs as they are and in fp32, the loss inside and outside."""
    kind, config = FAMILIES[family]
    model, (ids, labels) = llama(dtype, kind, **config), batch()
    contexts = [
        torch.autocast("cpu", dtype=autocast, enabled=on) for on in ((True, False) if dtype not in LOW else (False,))
    ]
    for context in contexts:
        with context:
            outputs = model(input_ids=ids, **LinearCausalLMLoss.forward_keywords)
            single = copy.copy(outputs)
            single.hidden_states = tuple(h.float() for h in outputs.hidden_states)
            single.logits = outputs.logits.float()
            inside = [LinearCausalLMLoss(model)(out, labels) for out in (outputs, single)]
        outside = [LinearCausalLMLoss(model)(out, labels) for out in (outputs, single)]
        for loss in inside + outside:
            torch.testing.assert_close(loss, inside[0], rtol=0.02, atol=0)  # bf16's products of these logits


def test_bias_is_compared():
    model, (ids, labels) = llama(kind="PhiForCausalLM"), batch()
    with torch.no_grad():
        model.lm_head.bias.normal_()
    outputs = model(input_ids=ids, output_hidden_states=True)
    LinearCausalLMLoss(model)(outputs, labels)
    assert outputs.logits.shape == (B, ids.shape[1], V) and model.lm_head.weight.shape == (V, H)
    with torch.no_grad():
        model.lm_head.bias[3] += 0.01
    with pytest.raises(ValueError, match=r"^model: expected as logits its head's .* by up to 0.01:"):
        LinearCausalLMLoss(model)(outputs, labels)
