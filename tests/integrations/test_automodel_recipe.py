"""Our losses in NeMo Automodel's own recipe, built from YAML: every step's loss and gradient norm are its own loss's.

Automodel is imported in the ranks' processes alone, for it takes seconds.
"""

import importlib.util
from types import SimpleNamespace

import pytest
import ranks
import torch
from comparing import assert_matches

import compiled_loss

if importlib.util.find_spec("nemo_automodel") is None:
    pytest.skip("NeMo Automodel is not installed", allow_module_level=True)

ROUNDINGS = 16 * torch.finfo(torch.float32).eps  # of sums in fp32, which each step's loss and norm are
OWN = {"_target_": "nemo_automodel.components.loss.masked_ce.MaskedCrossEntropy"}
MASKED = {"_target_": "compiled_loss.integrations.automodel.CompiledMaskedCrossEntropy"}
LINEAR = {"_target_": "compiled_loss.integrations.automodel.CompiledLinearCrossEntropy", "impl": "torch_compile"}
LINEAR["chunking"] = "{chunk_size: 16}"


def trained(*losses):
    from automodel_recipe import trained

    return [trained(loss) for loss in losses]


def assert_same(own, *ours):
    assert own[1].shape == (4, 2)
    assert own[1][0, 0] > own[1][-1, 0], "it learns"
    for _, found in ours:
        torch.testing.assert_close(found, own[1], rtol=ROUNDINGS, atol=0)


def training():
    own, *ours = trained(OWN, MASKED, LINEAR)
    assert [name for name, _ in ours] == ["CompiledMaskedCrossEntropy", "CompiledLinearCrossEntropy"]
    assert_same(own, *ours)


def inspections():
    """What recipes ask of a loss."""
    from nemo_automodel.components.loss.linear_ce_base import LinearCrossEntropy
    from nemo_automodel.recipes.llm import train_ft

    from compiled_loss.integrations import automodel

    linear, masked = automodel.CompiledLinearCrossEntropy(), automodel.CompiledMaskedCrossEntropy()
    assert isinstance(linear, LinearCrossEntropy) and not isinstance(masked, LinearCrossEntropy)
    for loss in (linear, masked):
        assert train_ft._supports_loss_weights(loss)
        assert "lm_head" not in dict(loss.named_modules())
    without_choice = torch.nn.Linear(2, 2)  # a model that cannot leave logits out
    assert train_ft._maybe_downgrade_loss_fn(masked, without_choice, False) is masked
    with pytest.raises(ValueError, match="logits_to_keep"):
        train_ft._maybe_downgrade_loss_fn(linear, without_choice, False)


class Model(torch.nn.Module):
    """That says what it does to its logits."""

    def __init__(self, head=None, **config):
        super().__init__()
        self.lm_head = torch.nn.Linear(8, 11, bias=False) if head is None else head
        text = SimpleNamespace(final_logit_softcapping=config.pop("softcap", None), **config)
        self.config = SimpleNamespace(get_text_config=lambda: text)

    def forward(self, hidden, logits_to_keep=0):
        return self.lm_head(hidden)


def heads():
    """One that is not what the loss computes ends the recipe's setup."""
    from nemo_automodel.components.loss.utils import prepare_lm_weight
    from nemo_automodel.recipes.llm.train_ft import _maybe_downgrade_loss_fn

    from compiled_loss.integrations.automodel import CompiledLinearCrossEntropy

    plain, capped = CompiledLinearCrossEntropy(), CompiledLinearCrossEntropy(logit_softcapping=30.0)
    for loss, model in ((plain, Model()), (capped, Model(softcap=30.0)), (plain, Model(logit_scale=1.0))):
        assert _maybe_downgrade_loss_fn(loss, model, False) is loss
        assert prepare_lm_weight(loss, model) is model.lm_head.weight
        assert compiled_loss.prepare_lm_weight(loss, model) is model.lm_head.weight
    for loss, model, text in (
        (plain, Model(torch.nn.Linear(8, 11)), "lm_head: expected a head .* with a bias"),
        (plain, Model(softcap=30.0), "model_config: expected None, .* as final_logit_softcapping, got 30.0"),
        (capped, Model(), "model_config: expected 30.0, .* as final_logit_softcapping, got None"),
        (plain, Model(logits_scaling=8.0), "model_config: expected logits_scaling of 1, .* got 8.0"),
    ):
        with pytest.raises(ValueError, match=text):
            _maybe_downgrade_loss_fn(loss, model, False)


def builders():
    """A class by a name of its registry becomes Automodel's own, whoever wrote it."""
    from nemo_automodel.components.loss import build_loss_module
    from nemo_automodel.components.loss.linear_ce import FusedLinearCrossEntropy

    from compiled_loss.integrations import automodel

    assert type(build_loss_module(compiled_loss.FusedLinearCrossEntropy)) is FusedLinearCrossEntropy
    for cls in (
        automodel.CompiledLinearCrossEntropy,
        automodel.CompiledMaskedCrossEntropy,
        automodel.CompiledTEParallelCrossEntropy,
    ):
        assert type(build_loss_module(cls, reduction="mean")) is cls


def batch():
    hidden, weight = torch.randn(2, 6, 8, requires_grad=True), torch.randn(11, 8, requires_grad=True)
    labels = torch.randint(0, 11, (2, 6))
    labels[0, :2] = -100
    return hidden, weight, labels, torch.rand(2, 6)


def values():
    """Of each of 0.7's keywords."""
    from nemo_automodel.components.loss.chunked_ce import ChunkedCrossEntropy
    from nemo_automodel.components.loss.masked_ce import MaskedCrossEntropy

    hidden, weight, labels, weights = batch()
    mask = torch.rand(2, 6) < 0.6
    for keywords in ({}, {"loss_weights": weights}, {"mask": mask}, {"num_label_tokens": 5, "loss_weights": weights}):
        given = dict(keywords)
        own = ChunkedCrossEntropy(chunk_len=5, compile=False)
        ours = compiled_loss.ChunkedCrossEntropy(chunk_len=5, compile=False)
        assert_matches(
            lambda h, w, loss=ours, given=given: loss(h, labels, w, **given),
            lambda h, w, loss=own, given=given: loss(h, labels, w, **given),
            [hidden, weight],
        )
        assert_matches(
            lambda h, given=given: compiled_loss.MaskedCrossEntropy(ignore_index=3)(h, labels, **given),
            lambda h, given=given: MaskedCrossEntropy(ignore_index=3)(h, labels.clone(), **given),
            [torch.randn(2, 6, 11, requires_grad=True)],
        )


def mtp():
    """Depths, their weights, and another label that the loss ignores."""
    from nemo_automodel.components.loss.masked_ce import MaskedCrossEntropy
    from nemo_automodel.components.loss.mtp import calculate_mtp_loss

    model, (hidden, _, labels, weights) = Model(), batch()
    states = [hidden, torch.randn(2, 6, 8, requires_grad=True)]
    given = {"labels": labels, "model": model, "loss_weights": weights, "num_label_tokens": 7, "return_per_depth": True}
    own = calculate_mtp_loss(MaskedCrossEntropy(ignore_index=3), mtp_per_depth_h=states, **given)
    for loss in (
        compiled_loss.MaskedCrossEntropy(ignore_index=3),
        compiled_loss.ChunkedCrossEntropy(compile=False, ignore_index=3),
    ):
        found = compiled_loss.calculate_mtp_loss(loss, mtp_per_depth_h=states, **given)
        torch.testing.assert_close(found.loss, own.loss)
        torch.testing.assert_close(found.per_depth_losses, own.per_depth_losses)


def list_mle():
    from nemo_automodel.components.loss.listmle import listmle_loss

    probabilities = torch.randn(7, 11).softmax(-1)
    assert_matches(
        lambda logits: compiled_loss.listmle_loss(logits, probabilities, 4),
        lambda logits: listmle_loss(logits, probabilities, 4),
        [torch.randn(7, 11, requires_grad=True)],
    )


ONE_RANK = (training, inspections, heads, builders, values, mtp, list_mle)


@pytest.fixture(scope="module")
def failures(tmp_path_factory):
    (failures,) = ranks.run(ranks.failures_of, 1, tmp_path_factory.mktemp("automodel"), *ONE_RANK, limit=400)
    return failures


@pytest.mark.parametrize("test", [test.__name__ for test in ONE_RANK])
def test_one_rank(failures, test):
    assert test not in failures, failures[test]


@pytest.mark.slow
def test_fsdp2_of_two_ranks(tmp_path):
    for found in ranks.run(trained, 2, tmp_path, OWN, MASKED, LINEAR, limit=400):
        assert_same(*found)
