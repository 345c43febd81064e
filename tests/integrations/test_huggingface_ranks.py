"""LinearCausalLMLoss of a model that FSDP2 shards, as it leaves the head after forward."""

from types import SimpleNamespace

import pytest
import ranks
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn import functional as F

from compiled_loss.huggingface import LinearCausalLMLoss

pytestmark = [
    pytest.mark.skipif(not dist.is_gloo_available(), reason="needs gloo for processes on CPUs"),
    pytest.mark.xdist_group("transformers"),
]
B, S, H, V = 2, 5, 6, 11


class Model(torch.nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.config = SimpleNamespace()
        self.embedding = torch.nn.Embedding(V, H, dtype=torch.float64)
        self.body = torch.nn.Linear(H, H, dtype=torch.float64)
        self.lm_head = torch.nn.Linear(H, V, bias=False, dtype=torch.float64)

    def get_output_embeddings(self):
        return self.lm_head

    def forward(self, input_ids):
        hidden = self.body(self.embedding(input_ids))
        return SimpleNamespace(hidden_states=(hidden,), logits=self.lm_head(hidden))


def tokens(rank):
    return torch.randint(0, V, (B, S), generator=torch.Generator().manual_seed(rank))


def sharded(reshard, unshard):
    """How far the gradients of two steps are from those of one process; or the error."""
    model, rank, world = Model(), dist.get_rank(), dist.get_world_size()
    mesh = init_device_mesh("cpu", (world,))
    fully_shard(model.body, mesh=mesh)
    fully_shard(model, mesh=mesh, reshard_after_forward=reshard)
    loss_fn, ids = LinearCausalLMLoss(model), tokens(rank)
    for _ in range(2):
        model.zero_grad()
        outputs = model(ids)
        if unshard:
            model.unshard()
        try:
            loss_fn(outputs, ids).backward()
        except ValueError as error:
            return str(error)
    whole = Model()
    losses = [
        F.cross_entropy(whole(t).logits[:, :-1].flatten(0, 1), t[:, 1:].flatten()) for t in map(tokens, range(world))
    ]
    torch.stack(losses).mean().backward()
    pairs = zip(model.parameters(), whole.parameters(), strict=True)
    return max(float((mine.grad.full_tensor() - theirs.grad).abs().max()) for mine, theirs in pairs)


def every_case():
    return {case: sharded(*case) for case in ((False, False), (True, False), (True, True))}


def test_fsdp(tmp_path):
    for found in ranks.run(every_case, 2, tmp_path, limit=200):
        assert found[False, False] <= 1e-14
        assert found[True, True] <= 1e-14
        text = (
            "model: expected the whole head [V, H] on every rank, got a weight placed (Shard(dim=0),): with FSDP2, call"
        )
        assert found[True, False].startswith(text)
