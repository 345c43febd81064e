"""Losses that take a model's head: its bias takes part, and what no weight and bias can say is refused.

Expectations are plain torch on the logits of the head's own forward, in fp64.
"""

import re

import pytest
import torch
from comparing import TIGHT, assert_same
from model_heads import FUSED, H, Model, Parallel, V, auxiliary, batch, linear, plain
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations

from compiled_loss import (
    MaskedCrossEntropy,
    PipelineCausalLMLoss,
    calculate_loss,
    calculate_mtp_loss,
    calculate_mtp_losses,
)
from compiled_loss.models.outputs import head_weight

HEADS = {
    "bias": linear,
    "no bias": lambda: linear(False),
    "weight_norm and bias": lambda: parametrizations.weight_norm(linear()),
    "Sequential": lambda: nn.Sequential(linear()),
}


@pytest.mark.parametrize("kind", HEADS)
@pytest.mark.parametrize("how", ["calculate_loss", "mtp", "pipeline"])
def test_weight_and_bias_of_the_head(kind, how):
    model = Model(HEADS[kind]())
    head = model.lm_head
    hidden, further, labels = batch()
    wanted = [hidden, *head.parameters()]
    if how == "calculate_loss":
        found = calculate_loss(FUSED, hidden_states=hidden, labels=labels, model=model)
        expected = plain(head, hidden, labels)
    elif how == "mtp":
        wanted = [*further, *head.parameters()]
        found = calculate_mtp_loss(FUSED, mtp_per_depth_h=further, labels=labels, model=model, scaling_factor=0.7)
        expected = auxiliary(head, further, labels, 0.7)
        of_logits = MaskedCrossEntropy(reduction="mean")
        logits = calculate_mtp_loss(of_logits, mtp_per_depth_h=further, labels=labels, model=model, scaling_factor=0.7)
        torch.testing.assert_close(logits, expected, **TIGHT)
    else:
        wanted += further
        found = PipelineCausalLMLoss(FUSED, model, scaling_factor=0.7)((hidden, *further), labels)
        expected = plain(head, hidden, labels) + auxiliary(head, further, labels, 0.7)
    assert_same(found, expected, wanted)


@pytest.mark.parametrize("kind", ["bias", "weight_norm and bias"])
def test_weight_and_bias_of_the_head_compiled(kind):
    model = Model(HEADS[kind]())
    hidden, further, labels = batch()
    loss = PipelineCausalLMLoss(FUSED, model, scaling_factor=0.7)
    found = torch.compile(lambda *stage: loss(stage, labels), fullgraph=True, backend="aot_eager")(hidden, *further)
    expected = plain(model.lm_head, hidden, labels) + auxiliary(model.lm_head, further, labels, 0.7)
    assert_same(found, expected, [hidden, *further, *model.lm_head.parameters()])


def test_given_lm_weight_and_lm_bias():
    """The model is not looked at, so its bias takes part where it is given, and only there."""
    model = Model(linear())
    head = model.lm_head
    hidden, further, labels = batch()
    given = {"labels": labels, "model": model, "lm_weight": head.weight}
    bare = lambda states: states @ head.weight.t()  # noqa: E731
    assert_same(
        calculate_loss(FUSED, hidden_states=hidden, **given), plain(bare, hidden, labels), [hidden, head.weight]
    )
    found = calculate_loss(FUSED, hidden_states=hidden, lm_bias=head.bias, **given)
    assert_same(found, plain(head, hidden, labels), [hidden, *head.parameters()])
    for bias, logits in ((None, bare), (head.bias, head)):
        found = calculate_mtp_losses(FUSED, mtp_per_depth_h=further, lm_bias=bias, scaling_factor=1.0, **given)
        torch.testing.assert_close(found.loss, auxiliary(logits, further, labels, 1.0), **TIGHT)


class Theirs(nn.Module):
    """Somebody's loss of hidden states."""

    takes_hidden_states = True

    def forward(self, hidden_states, labels, lm_weight, num_label_tokens=None, grad_reduce_group=None):
        logits = hidden_states @ lm_weight.t()
        return F.cross_entropy(logits.flatten(0, 1), labels.flatten())


class TheirsWithBias(Theirs):
    def forward(self, hidden_states, labels, lm_weight, lm_bias=None, **kwargs):
        logits = F.linear(hidden_states, lm_weight, lm_bias)
        return F.cross_entropy(logits.flatten(0, 1), labels.flatten())


class TheirsOfAnything(Theirs):
    def forward(self, hidden_states, labels, lm_weight, **kwargs):
        logits = F.linear(hidden_states, lm_weight, kwargs.get("lm_bias"))
        return F.cross_entropy(logits.flatten(0, 1), labels.flatten())


def test_custom_loss_with_and_without_lm_bias():
    hidden, further, labels = batch()
    model = Model(linear())
    for loss in (TheirsWithBias(), TheirsOfAnything()):
        found = calculate_loss(loss, hidden_states=hidden, labels=labels, model=model)
        assert_same(found, plain(model.lm_head, hidden, labels), [hidden, *model.parameters()])
    text = "loss_fn: expected one that takes lm_bias, for the head has a bias, got Theirs: add it to its keywords"
    for call in (
        lambda: calculate_loss(Theirs(), hidden_states=hidden, labels=labels, model=model),
        lambda: calculate_mtp_loss(Theirs(), mtp_per_depth_h=further, labels=labels, model=model),
        lambda: PipelineCausalLMLoss(Theirs(), model)(hidden, labels),
    ):
        with pytest.raises(TypeError, match="^" + text):
            call()
    bare = Model(linear(False))
    found = calculate_loss(Theirs(), hidden_states=hidden, labels=labels, model=bare)
    assert_same(found, plain(bare.lm_head, hidden, labels), [hidden])


class Doubled(nn.Linear):
    def forward(self, x):
        return 2 * super().forward(x)


def lora():
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(target_modules=["lm_head"], r=2)
    return peft.get_peft_model(Model(linear(False)), config, autocast_adapter_dtype=False)


def quantised():
    torchao = pytest.importorskip("torchao")
    model = Model(nn.Linear(64, 128, bias=False))
    torchao.quantization.quantize_(model, torchao.quantization.Int8WeightOnlyConfig())
    return model


def hooked():
    model = Model(linear())
    model.lm_head.register_forward_hook(lambda module, inputs, output: output * 2)
    return model


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize(
    ("make", "text"),
    [
        (lora, r"got peft.tuners.lora.layer.Linear with the adapters default: merge them"),
        (quantised, r"got torch.nn.modules.linear.Linear that is quantised or packed"),
        (hooked, r"got torch.nn.modules.linear.Linear with the hook hooked.<locals>.<lambda>, which may change"),
        (lambda: Model(Doubled(H, V)), "got test_model_heads.Doubled, which has a forward of its own"),
        (lambda: Model(nn.Sequential(linear(), nn.Tanh())), "container.Sequential of 2: give lm_weight"),
    ],
    ids=["LoRA", "torchao", "hook", "forward", "Sequential"],
)
def test_lora_quantised_and_hooked_heads_are_errors(make, text):
    """A loss of logits takes it."""
    model = make()
    hidden, further, labels = batch()
    for call in (
        lambda: calculate_loss(FUSED, hidden_states=hidden, labels=labels, model=model),
        lambda: calculate_mtp_loss(FUSED, mtp_per_depth_h=further, labels=labels, model=model),
        lambda: PipelineCausalLMLoss(FUSED, model)((hidden, *further), labels),
    ):
        with pytest.raises((TypeError, ValueError), match=r"^model\.\S*lm_head: expected a head .*" + re.escape(text)):
            call()
    if make is lora:
        loss = MaskedCrossEntropy(reduction="mean")
        found = calculate_mtp_loss(loss, mtp_per_depth_h=further, labels=labels, model=model, scaling_factor=1.0)
        wanted = [p for p in model.parameters() if p.requires_grad]
        assert_same(found, auxiliary(model.base_model.model.lm_head, further, labels, 1.0), [*further, *wanted])


@pytest.mark.parametrize("what", ["modules_to_save", "trainable_token_indices"])
def test_peft_modules_to_save_and_trainable_tokens(what):
    peft = pytest.importorskip("peft")
    base = nn.ModuleDict({"body": nn.Linear(H, H, dtype=torch.float64), "lm_head": linear(False)})
    value = ["lm_head"] if what == "modules_to_save" else {"lm_head": [1, 7]}
    config = peft.LoraConfig(target_modules=["body"], r=2, **{what: value})
    model = peft.get_peft_model(base, config, autocast_adapter_dtype=False)
    head = model.base_model.model["lm_head"]
    with torch.no_grad():
        for parameter in head.parameters():
            if parameter.requires_grad:
                parameter.add_(1)
    wanted = [p for p in head.parameters() if p.requires_grad]
    hidden, further, labels = batch()
    found = PipelineCausalLMLoss(FUSED, model, scaling_factor=0.7)((hidden, *further), labels)
    expected = plain(head, hidden, labels) + auxiliary(head, further, labels, 0.7)
    assert_same(found, expected, [hidden, *further, *wanted])


class Embedded(nn.Module):
    """Names its head as it likes, and says so, or says nothing."""

    def __init__(self, says):
        super().__init__()
        self.embed_out = linear()
        self.says = says

    def get_output_embeddings(self):
        return self.embed_out if self.says else None


def named(name):
    model = nn.Module()
    parent = model
    *parents, last = name.split(".")
    for part in parents:
        parent.add_module(part, nn.Module())
        parent = getattr(parent, part)
    parent.add_module(last, linear())
    return model


@pytest.mark.parametrize(
    ("make", "name"),
    [
        (lambda: Embedded(True), "embed_out"),
        (lambda: Parallel(Embedded(True)), "module.embed_out"),
        (lambda: named("language.lm_head"), "language.lm_head"),
        (lambda: named("_lm_head"), "_lm_head"),
        (lambda: named("decoder.lm_head_projection"), "decoder.lm_head_projection"),
        (lambda: Model(nn.Sequential(linear())), "lm_head.0"),
        (lambda: Model(nn.ModuleDict({"default": linear()})), "lm_head.default"),
    ],
)
def test_head_lookup(make, name):
    """By a loss of hidden states, and by one of logits."""
    model = make()
    hidden, further, labels = batch()
    head = model.get_submodule(name)
    found = calculate_loss(FUSED, hidden_states=hidden, labels=labels, model=model)
    torch.testing.assert_close(found, plain(head, hidden, labels), **TIGHT)
    for loss in (FUSED, MaskedCrossEntropy(reduction="mean")):
        found = calculate_mtp_loss(loss, mtp_per_depth_h=further, labels=labels, model=model, scaling_factor=1.0)
        torch.testing.assert_close(found, auxiliary(head, further, labels, 1.0), **TIGHT)


def test_tied_embedding_as_head():
    """As models say whose embeddings are tied."""
    model = Model(nn.Embedding(V, H, dtype=torch.float64))
    _, further, labels = batch()
    logits = lambda states: states @ model.lm_head.weight.t()  # noqa: E731
    for loss in (FUSED, MaskedCrossEntropy(reduction="mean")):
        found = calculate_mtp_loss(loss, mtp_per_depth_h=further, labels=labels, model=model, scaling_factor=1.0)
        assert_same(found, auxiliary(logits, further, labels, 1.0), [*further, model.lm_head.weight])


def test_head_on_meta_error():
    """On meta beside hidden states that are not; where all is on meta, nothing is missing."""
    with torch.device("meta"):
        model = Model(nn.Linear(H, V))
    hidden, _, labels = batch()
    with pytest.raises(ValueError, match=r"^model\.lm_head: .*whose weight is on the device meta, offloaded or never"):
        calculate_loss(FUSED, hidden_states=hidden.float(), labels=labels, model=model)
    assert head_weight(model, hidden.float().to("meta")).weight is model.lm_head.weight


def test_missing_or_ambiguous_head_error():
    hidden, _, labels = batch()
    several = nn.ModuleDict({"lm_head_a": linear(), "lm_head_b": linear()})
    for model, text in (
        (
            Embedded(False),
            "model: expected get_output_embeddings() or a Module called lm_head, got Embedded: give lm_we",
        ),
        (several, "model: expected one Module with lm_head in its name, got lm_head_a, lm_head_b: give lm_weight"),
    ):
        with pytest.raises(ValueError, match="^" + re.escape(text)):
            calculate_loss(FUSED, hidden_states=hidden, labels=labels, model=model)
