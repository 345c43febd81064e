"""TRL's trainers with our head and with TRL's own: what they log, step after step."""

import pytest
import torch

pytest.importorskip("trl", reason="the extra 'integrations' is not installed")

from trl_trainers import COLUMNS, curves, made_exact, model, plain_divergence, saved, trainer

from compiled_loss import Chunking
from compiled_loss.integrations.trl import fuse_trainer, unfuse_trainer

pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),  # of what these packages import
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::UserWarning"),
]

ROUNDING = 32 * torch.finfo(torch.float32).eps  # of log-probabilities of answers and gradients, the largest that is logged


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return saved(tmp_path_factory.mktemp("model"), model())


def assert_same_curves(make, monkeypatch, fuse=fuse_trainer):
    """Ours are as close to those of fp64 as TRL's own are: at most twice as far, and one rounding."""
    theirs, made = curves(make()), make()
    fuse(made)
    ours = curves(made)
    with monkeypatch.context() as patch:
        patch.setattr("trl.trainer.distillation_trainer._chunked_divergence_loss", plain_divergence)
        truth = curves(made_exact(make()))
    assert ours.keys() == theirs.keys() == truth.keys()
    assert truth["loss"].abs().max() > 1e-2
    for name, expected in truth.items():
        mine, baseline = ((run[name] - expected).abs().max().item() for run in (ours, theirs))
        assert mine <= 2 * baseline + ROUNDING, f"{name}: off by {mine:.1e}, TRL's by {baseline:.1e}"


@pytest.mark.parametrize("name", COLUMNS)
def test_curves(name, folder, tmp_path, monkeypatch):
    assert_same_curves(lambda: trainer(name, folder, tmp_path), monkeypatch)
