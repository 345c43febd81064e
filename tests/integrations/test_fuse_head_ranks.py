"""A fused head in data parallelism: DDP, and FSDP2 with the head in the root, in a unit of its own, or of several."""

import importlib
import os
import sys

import pytest
import ranks
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Shard, distribute_tensor
from torch.nn import functional as F

from compiled_loss import Chunking
from compiled_loss.integrations.transformers import fuse_head

pytestmark = [
    pytest.mark.skipif(not dist.is_gloo_available(), reason="needs gloo for processes on CPUs"),
    pytest.mark.xdist_group("transformers"),
]
B, S, H, V = 2, 5, 6, 11
STEPS = 2


class Model(torch.nn.Module):
    """As those of transformers, which take seconds to import on every rank."""

    def __init__(self, tied=False):
        super().__init__()
        torch.manual_seed(0)
        self.embedding = torch.nn.Embedding(V, H, dtype=torch.float64)
        self.body = torch.nn.Linear(H, H, dtype=torch.float64)
        self.norm = torch.nn.RMSNorm(H, dtype=torch.float64)
        self.lm_head = torch.nn.Linear(H, V, bias=False, dtype=torch.float64)
        if tied:
            self.lm_head.weight = self.embedding.weight

    def get_output_embeddings(self):
        return self.lm_head

    def forward(self, input_ids, labels=None):
        logits = self.lm_head(self.norm(torch.tanh(self.body(self.embedding(input_ids)))))
        logits = 3 * torch.tanh(logits / 3)
        loss = F.cross_entropy(logits[:, :-1].reshape(-1, V), labels[:, 1:].reshape(-1))
        return {"loss": loss, "logits": logits}


def root(model, mesh):
    fully_shard(model.body, mesh=mesh)
    return fully_shard(model, mesh=mesh)


def own_unit(model, mesh, **options):
    fully_shard(model.lm_head, mesh=mesh, **options)
    return root(model, mesh)


def gathered(model, mesh):
    return own_unit(model, mesh, reshard_after_forward=False)


def one_unit(model, mesh, **options):
    """As Accelerate's."""
    fully_shard([model.norm, model.lm_head], mesh=mesh, **options)
    return root(model, mesh)


def one_gathered_unit(model, mesh):
    return one_unit(model, mesh, reshard_after_forward=False)


def ddp(model, mesh):
    return torch.nn.parallel.DistributedDataParallel(model)


def unused(model, mesh):
    """Which walks the output."""
    return torch.nn.parallel.DistributedDataParallel(model, find_unused_parameters=True)


def vocab_parallel(model, mesh):
    """Each rank has some of the classes, and all ranks the same tokens."""
    model.lm_head.weight = torch.nn.Parameter(distribute_tensor(model.lm_head.weight.detach(), mesh, [Shard(0)]))
    return model


def tokens(rank):
    return torch.randint(0, V, (B, S), generator=torch.Generator().manual_seed(rank))


def whole(gradient):
    return gradient.full_tensor() if hasattr(gradient, "full_tensor") else gradient


def compared(place, tied, strategy):
    """How far losses and gradients are from those of one process; or the error."""
    ranks.at(f"{place.__name__} {tied} {strategy}")
    model, world = Model(tied).train(), dist.get_world_size()
    mesh = init_device_mesh("cpu", (world,))
    fuse_head(model, chunking=Chunking(strategy=strategy))
    model = place(model, mesh)
    sharded = place is vocab_parallel
    mine, off = tokens(0 if sharded else dist.get_rank()), 0.0
    expected = Model(tied)
    for _ in range(STEPS):
        model.zero_grad()
        expected.zero_grad()
        try:
            loss = model(input_ids=mine, labels=mine)["loss"]
        except ValueError as error:
            return str(error)
        loss.backward()
        truths = [expected(ids, ids)["loss"] for ids in map(tokens, range(1 if sharded else world))]
        torch.stack(truths).mean().backward()
        off = max(off, float((loss - truths[0 if sharded else dist.get_rank()]).abs()))
        for got, want in zip(model.parameters(), expected.parameters(), strict=True):
            off = max(off, float((whole(got.grad) - want.grad).abs().max()))
    return off


CASES = [(place, False) for place in (root, own_unit, gathered, one_gathered_unit, one_unit, ddp, unused)]
CASES += [(vocab_parallel, False), (root, True), (ddp, True)]


def every_case():
    return {
        (place.__name__, tied, strategy): compared(place, tied, strategy)
        for place, tied in CASES
        for strategy in ("tokens", "vocab")
    }


def test_data_parallel(tmp_path):
    for found in ranks.run(every_case, 2, tmp_path, limit=200):
        assert len(found) == 2 * len(CASES)
        for (place, *_), off in found.items():
            if place == "one_unit":
                assert off.startswith("model: expected a head that is an FSDP2 unit by itself, or stays gathered, got ")
            else:
                assert off <= 1e-14, found


def of_zero_3(tied):
    """Losses and weights of steps of a model whose weights DeepSpeed holds in parts, without and with a fused head."""
    os.environ |= {"DS_ACCELERATOR": "cpu", "RANK": str(dist.get_rank()), "LOCAL_RANK": str(dist.get_rank())}
    os.environ |= {"WORLD_SIZE": str(dist.get_world_size()), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}
    deepspeed = importlib.import_module("deepspeed")
    importlib.import_module("deepspeed.comm.torch")
    sys.modules["deepspeed.comm.torch"].build_shm_op = lambda: None  # which would be compiled
    none_stays = dict.fromkeys(("param_persistence_threshold", "max_live_parameters", "max_reuse_distance"), 0)
    config = {"train_micro_batch_size_per_gpu": B, "zero_allow_untested_optimizer": True}
    config["zero_optimization"] = {"stage": 3} | {f"stage3_{name}": value for name, value in none_stays.items()}
    ids, found = tokens(dist.get_rank()), []
    for fused in (False, True):
        ranks.at(f"ZeRO-3 {tied} {fused}")
        model = Model(tied).float().train()
        if fused:
            fuse_head(model)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
        engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config)
        losses = []
        for _ in range(STEPS):
            loss = engine(input_ids=ids, labels=ids)["loss"]
            engine.backward(loss)
            engine.step()
            losses.append(loss.detach())
        with deepspeed.zero.GatheredParameters(list(model.parameters())):
            found.append([*losses, *(parameter.detach().clone() for parameter in model.parameters())])
    return found


@pytest.mark.slow
@pytest.mark.parametrize("tied", [False, True])
def test_zero_3(tied, tmp_path):
    pytest.importorskip("deepspeed")
    for own, fused in ranks.run(of_zero_3, 2, tmp_path, tied, limit=200):
        torch.testing.assert_close(fused, own, rtol=1e-5, atol=1e-6)
