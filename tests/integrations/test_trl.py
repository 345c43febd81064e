"""TRL's trainers with our head and with TRL's own: what they log, step after step."""

import functools

import pytest
import torch

pytest.importorskip("trl", reason="the extra 'integrations' is not installed")

from trl_trainers import COLUMNS, curves, lora, made_exact, model, plain_divergence, rows, saved, trainer

from compiled_loss import Chunking
from compiled_loss.integrations.trl import fuse_trainer

pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),  # of what these packages import
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::UserWarning"),
]

ROUNDING = 32 * torch.finfo(torch.float32).eps  # of the log-probability of an answer, of which all is made


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return functools.cache(lambda kind="Llama", **config: saved(tmp_path_factory.mktemp(kind), model(kind, **config)))


@pytest.fixture
def assert_same_curves(tmp_path, monkeypatch):
    def compare(name, folder, *, chunking=Chunking(), **options):
        """Ours are as close to those of fp64 as TRL's own are: at most twice as far, and a rounding."""
        make = functools.partial(trainer, name, folder, tmp_path, **options)
        theirs, made = curves(make()), make()
        fuse_trainer(made, chunking=chunking)
        ours = curves(made)
        with monkeypatch.context() as patch:
            patch.setattr("trl.trainer.distillation_trainer._chunked_divergence_loss", plain_divergence)
            truth = curves(made_exact(make()))
        assert ours.keys() == theirs.keys() == truth.keys()
        assert truth["loss"].abs().max() > 1e-2
        for metric, expected in truth.items():
            mine, baseline = ((run[metric] - expected).abs().max().item() for run in (ours, theirs))
            size = max(1, expected.abs().max().item())
            assert baseline <= 1e-4 * size, f"{metric}: the truth is another, by {baseline:.1e}"
            assert mine <= 2 * baseline + ROUNDING * size, f"{metric}: off by {mine:.1e}, TRL's by {baseline:.1e}"
        return ours

    return compare


@pytest.mark.parametrize("name", COLUMNS)
def test_curves(name, folder, assert_same_curves):
    assert_same_curves(name, folder())


OPTIONS = {
    "SFT of every token": ("SFT", {"completion_only_loss": False, "padding_free": False}),
    "SFT dft": ("SFT", {"loss_type": "dft"}),
    "SFT label smoothing": ("SFT", {"label_smoothing_factor": 0.2}),
    "SFT accumulation": ("SFT", {"gradient_accumulation_steps": 2}),
    "SFT checkpointing": ("SFT", {"activation_checkpointing": True}),
    "SFT packing": ("SFT", {"packing": True, "max_length": 16}),
    "DPO weighting": ("DPO", {"use_weighting": True}),
    "DPO precomputed": ("DPO", {"precompute_ref_log_probs": True}),
    "DPO ld": ("DPO", {"ld_alpha": 0.5, "loss_type": ["sigmoid", "sft"], "loss_weights": [1.0, 0.5]}),
    "KTO apo": ("KTO", {"loss_type": "apo_zero_unpaired"}),
    "GRPO accumulation": ("GRPO", {"gradient_accumulation_steps": 2, "steps_per_generation": 4, "temperature": 0.7}),
    "GRPO entropy": ("GRPO", {"entropy_coef": 0.05, "top_entropy_quantile": 0.55}),
    "Distillation forward": ("Distillation", {"beta": 0.0, "temperature": 0.8}),
    "Distillation reverse": ("Distillation", {"beta": 1.0, "gradient_accumulation_steps": 2}),
    "Distillation mixture": ("Distillation", {"beta": 0.3}),
    "GKD mixture": ("GKD", {"beta": 0.3}),
    "GKD reverse": ("GKD", {"beta": 1.0, "temperature": 0.8}),
}


@pytest.mark.parametrize("case", OPTIONS)
def test_curves_with_options(case, folder, assert_same_curves):
    name, options = OPTIONS[case]
    assert_same_curves(name, folder(), **options)


@pytest.mark.parametrize("name", ["SFT", "DPO", "GRPO"])
def test_curves_with_lora(name, folder, assert_same_curves):
    """The reference of DPO and GRPO is the model without its adapters."""
    more = {"GRPO": {"gradient_accumulation_steps": 2, "steps_per_generation": 4}}.get(name, {})
    assert_same_curves(name, folder(), peft_config=lora(), **more)


FAMILIES = {
    "softcap": ("Gemma2", {"final_logit_softcapping": 3.0, "sliding_window": 8}),
    "divided": ("Granite", {"logits_scaling": 0.5}),
    "multiplied": ("Cohere", {"logit_scale": 2.0}),
    "tied": ("Llama", {"tie_word_embeddings": True}),
}


@pytest.mark.parametrize("name", ["SFT", "GRPO", "Distillation"])
@pytest.mark.parametrize("family", FAMILIES)
def test_curves_of_families(family, name, folder, assert_same_curves):
    kind, config = FAMILIES[family]
    data = rows(prompts=(3,))  # in fp64 Gemma 2 makes NaN of padding on the left
    assert_same_curves(name, folder(kind, **config), data=data)


def test_curves_of_experts(folder, assert_same_curves):
    experts = {"num_local_experts": 4, "num_experts_per_tok": 2, "output_router_logits": True}
    found = assert_same_curves("SFT", folder("Mixtral", **experts))
    assert found["aux_loss"].min() > 0.5
