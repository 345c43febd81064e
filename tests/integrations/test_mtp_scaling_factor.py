"""The factor of multi-token prediction, from the loss, the output or the model that says it."""

from types import SimpleNamespace

import pytest
import torch
from comparing import TIGHT
from model_heads import FUSED, Model, Parallel, auxiliary, batch, linear, plain

from compiled_loss import MaskedCrossEntropy, MTPLossConfig, PipelineCausalLMLoss


class Shaped(Model):
    """As Automodel's: the factor stands in the model's mtp_config, and a stage gives a tuple."""

    def __init__(self):
        super().__init__(linear())
        self.mtp_config = SimpleNamespace(num_layers=2, loss_scaling_factor=0.5)


def method(model):
    model.get_mtp_loss_scaling_factor = lambda: 0.4


def attribute(model):
    method(model)
    model.mtp_loss_scaling_factor = 0.3


def nothing(model):
    del model.mtp_config


def without(model):
    """A config that has other fields."""
    attribute(model)
    model.mtp_config = SimpleNamespace(num_layers=2)


def other(*changes):
    def change(model):
        for made in changes:
            made(model)

    return change


@pytest.mark.parametrize(
    ("change", "given", "asked", "factor"),
    [
        (lambda model: None, None, None, 0.5),
        (attribute, None, None, 0.5),
        (other(nothing, attribute), None, None, 0.3),
        (without, None, None, 0.3),
        (other(nothing, method), None, None, 0.4),
        (nothing, None, None, 0.1),
        (attribute, 0.2, None, 0.2),
        (attribute, 0.2, 0.9, 0.9),
        (attribute, None, 0.0, 0.0),
    ],
)
@pytest.mark.parametrize("form", ["tuple", "object", "dict", "parallel"])
@pytest.mark.parametrize("fused", [True, False])
def test_mtp_scaling_factor(change, given, asked, factor, form, fused):
    model = Shaped()
    change(model)
    hidden, further, labels = batch()
    logits = model.lm_head(hidden)
    fields = {"logits": logits, "hidden_states": hidden, "mtp_per_depth_h": further}
    if given is not None:
        fields["mtp_loss_scaling_factor"] = given
        form = "object" if form in ("tuple", "parallel") else form
    stage = (hidden if fused else logits, *further)
    output = {"object": SimpleNamespace(**fields), "dict": fields}.get(form, stage)
    loss_fn = FUSED if fused else MaskedCrossEntropy(reduction="mean")
    owner = Parallel(model) if form == "parallel" else model
    loss = PipelineCausalLMLoss(loss_fn, owner, scaling_factor=asked)
    if form == "dict":
        loss = MTPLossConfig(scaling_factor=asked).build(loss_fn, owner)
    expected = plain(model.lm_head, hidden, labels) + auxiliary(model.lm_head, further, labels, factor)
    torch.testing.assert_close(loss(output, labels), expected, **TIGHT)
