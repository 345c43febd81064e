"""TRL's trainers in data parallelism, and models of theirs in fully_shard."""

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


def sharded(folder, by_itself):
    """Loss and gradients of a fused trainer's model in fully_shard, of this rank's part of a batch."""
    from torch.distributed.fsdp import fully_shard
    from trl_trainers import trainer

    from compiled_loss.integrations.trl import fuse_trainer

    rank = torch.distributed.get_rank()
    made = trainer("SFT", folder, f"{folder}/{rank}")
    fuse_trainer(made)
    model = made.model
    for layer in [*model.model.layers, *([model.lm_head] if by_itself else [])]:
        fully_shard(layer)
    fully_shard(model)
    loss = model(**batch(slice(rank, rank + 1)), fused_lm_head=True).loss
    loss.backward()
    return loss.item(), {name: parameter.grad.full_tensor() for name, parameter in model.named_parameters()}


def batch(rows):
    ids = torch.randint(3, 19, (WORLD, 7), generator=torch.Generator().manual_seed(0))[rows]
    labels = torch.where(torch.arange(7) < 3, -100, ids)
    return {"input_ids": ids, "labels": labels, "num_items_in_batch": 4}


@pytest.mark.slow
@pytest.mark.parametrize("by_itself", [False, True], ids=["head in the root", "head by itself"])
def test_fully_shard(by_itself, tmp_path):
    from trl_trainers import model, model_of, saved

    folder = saved(tmp_path / "model", model())
    plain = model_of(folder)
    parts = [plain(**batch(slice(rank, rank + 1))).loss for rank in range(WORLD)]
    torch.stack(parts).mean().backward()
    for (loss, gradients), expected in zip(
        ranks.run(sharded, WORLD, tmp_path, folder, by_itself, limit=120), parts, strict=True
    ):
        assert loss == pytest.approx(expected.item(), rel=1e-6)
        for name, parameter in plain.named_parameters():
            torch.testing.assert_close(gradients[name], parameter.grad, rtol=1e-4, atol=1e-6)


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
