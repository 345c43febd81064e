"""Accelerate's FSDP2 and DDP with gradient accumulation: a step's tokens weigh alike, as in one process."""

from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import ranks
import torch
import torch.distributed as dist
from torch import nn
from torch.nn import functional as F

from compiled_loss import linear_cross_entropy

pytestmark = [
    pytest.mark.skipif(not dist.is_gloo_available(), reason="needs gloo for processes on CPUs"),
    pytest.mark.xdist_group("transformers"),  # which it imports
]
WORLD, STEPS, MICROBATCHES, B, S, H, V = 2, 2, 3, 2, 7, 8, 23


class Model(nn.Module):
    """As those of transformers, which take seconds to import on every rank: a loss of logits, and a head to find."""

    def __init__(self, tied):
        super().__init__()
        torch.manual_seed(0)
        self.embedding = nn.Embedding(V, H)
        self.block = nn.Sequential(nn.Linear(H, H), nn.Tanh())
        self.norm = nn.RMSNorm(H)
        self.lm_head = nn.Linear(H, V, bias=False)
        if tied:
            self.lm_head.weight = self.embedding.weight
        self.double().train()

    def get_input_embeddings(self):
        return self.embedding

    def get_output_embeddings(self):
        return self.lm_head

    def forward(self, input_ids, labels, num_items_in_batch):
        logits = self.lm_head(self.norm(self.block(self.embedding(input_ids))))
        labels = F.pad(labels, (0, 1), value=-100)[:, 1:].flatten()
        loss = F.cross_entropy(logits.flatten(0, 1), labels, reduction="sum") / num_items_in_batch
        return SimpleNamespace(loss=loss, logits=logits)


class Functional(nn.Module):
    """A model of one's own, whose loss takes the head's weight."""

    def __init__(self, tied):
        super().__init__()
        self.model = Model(tied)

    def forward(self, input_ids, labels, num_items_in_batch):
        model = self.model
        hidden = model.norm(model.block(model.embedding(input_ids)))
        options = {"shift": 1, "reduction": "sum", "num_label_tokens": num_items_in_batch}
        return SimpleNamespace(loss=linear_cross_entropy(hidden, model.lm_head.weight, labels, **options))


def rows():
    """Ids and labels of all steps and ranks; rows ignore other numbers of labels."""
    random = torch.Generator().manual_seed(0)
    count = STEPS * MICROBATCHES * WORLD * B
    ids = torch.randint(0, V, (count, S), generator=random)
    prompt = torch.randint(0, S - 1, (count, 1), generator=random)
    return ids, torch.where(torch.arange(S) < prompt, -100, ids)


def accelerator_for(fsdp):
    """An Accelerator of two CPU processes; of itself it takes DDP there, whatever plugin it is given."""
    from accelerate import Accelerator, FullyShardedDataParallelPlugin, PartialState
    from accelerate.state import AcceleratorState
    from accelerate.utils import DistributedType

    AcceleratorState._reset_state(reset_partial_state=True)
    accelerator = Accelerator(cpu=True)
    if fsdp:
        plugin = FullyShardedDataParallelPlugin(
            fsdp_version=2,
            reshard_after_forward=True,
            auto_wrap_policy="transformer_based_wrap",
            transformer_cls_names_to_wrap=["Sequential"],
            cpu_ram_efficient_loading=False,
        )
        accelerator.state.fsdp_plugin = plugin
        PartialState().distributed_type = accelerator.state.distributed_type = DistributedType.FSDP
    return accelerator


def train(kind, tied, fsdp):
    """Each step's loss and gradients, whole."""
    accelerator = accelerator_for(fsdp)
    model = Functional(tied) if kind == "functional" else Model(tied)
    if kind == "fused":
        from compiled_loss.integrations.transformers import fuse_head

        fuse_head(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    data = [{"input_ids": row, "labels": label} for row, label in zip(*rows(), strict=True)]
    loader = torch.utils.data.DataLoader(data, batch_size=B)
    model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
    assert (type(model).__name__ == "DistributedDataParallel") is not fsdp
    batches, seen = iter(loader), []
    for step in range(STEPS):
        ranks.at(f"{kind}, tied {tied}, fsdp {fsdp}, step {step}")
        microbatches = [next(batches) for _ in range(MICROBATCHES)]
        count = accelerator.reduce(sum((batch["labels"][:, 1:] != -100).sum() for batch in microbatches))
        total = torch.zeros((), dtype=torch.float64)
        for i, batch in enumerate(microbatches):
            with accelerator.no_sync(model) if i < MICROBATCHES - 1 else nullcontext():
                loss = model(**batch, num_items_in_batch=count).loss
                accelerator.backward(loss * accelerator.num_processes)
            total += loss.detach()
        whole = (p.grad.full_tensor() if fsdp else p.grad for p in model.parameters())
        seen.append((accelerator.reduce(total), [gradient.clone() for gradient in whole]))
        optimizer.step()
        optimizer.zero_grad()
    accelerator.free_memory()
    return seen


CASES = [
    ("functional", False, True),
    ("functional", False, False),
    ("fused", False, True),
    ("fused", True, True),
    ("fused", False, False),
]


def on_a_rank():
    ranks.as_torchrun()
    return {case: train(*case) for case in CASES}


def plain(tied):
    """The same of one process and whole batches, in logits."""
    model, (ids, labels), seen = Model(tied), rows(), []
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    for ids_of_step, labels_of_step in zip(ids.chunk(STEPS), labels.chunk(STEPS), strict=True):
        loss = model(ids_of_step, labels_of_step, (labels_of_step[:, 1:] != -100).sum()).loss
        loss.backward()
        seen.append((loss.detach(), [p.grad.clone() for p in model.parameters()]))
        optimizer.step()
        optimizer.zero_grad()
    return seen


@pytest.mark.filterwarnings("ignore")
def test_steps_are_those_of_one_process(tmp_path):
    pytest.importorskip("accelerate")
    for found in ranks.run(on_a_rank, WORLD, tmp_path, limit=200):
        for (kind, tied, fsdp), steps in found.items():
            name = f"{kind}, tied {tied}, fsdp {fsdp}"
            torch.testing.assert_close(
                steps, plain(tied), rtol=0.0, atol=ranks.ROUNDING, msg=lambda text, name=name: f"{name}: {text}"
            )
