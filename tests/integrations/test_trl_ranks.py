"""TRL's trainers in data parallelism."""

import os

import pytest
import ranks
import torch

pytest.importorskip("trl", reason="the extra 'integrations' is not installed")

WORLD = 2


def train(name, folder):
    """What TRL's trainer logs and what ours does, and whether the model is in DistributedDataParallel."""
    from trl_trainers import curves, trainer

    from compiled_loss.integrations.trl import fuse_trainer

    rank = str(torch.distributed.get_rank())
    os.environ |= {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": str(WORLD), "MASTER_ADDR": "-", "MASTER_PORT": "0"}
    logged = []
    for fuse in (lambda _: None, fuse_trainer):
        made = trainer(name, folder, f"{folder}/{rank}", count=16, ddp_find_unused_parameters=False)
        fuse(made)
        ranks.at(f"{name} {len(logged)}")
        logged.append(curves(made))
    return *logged, type(made.model_wrapped).__name__


@pytest.mark.slow
@pytest.mark.parametrize("name", ["SFT", "DPO", "GRPO", "Distillation"])
def test_data_parallel(name, tmp_path):
    from trl_trainers import model, saved

    folder = saved(tmp_path / "model", model())
    for theirs, ours, wrapped in ranks.run(train, WORLD, tmp_path, name, folder, limit=120):
        assert wrapped == "DistributedDataParallel"
        assert theirs.keys() == ours.keys()
        for metric, expected in theirs.items():
            torch.testing.assert_close(ours[metric], expected, rtol=1e-5, atol=1e-5, msg=lambda s: f"{metric}: {s}")  # noqa: B023
