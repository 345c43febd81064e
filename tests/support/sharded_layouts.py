"""How tensors lie over ranks, and one loss in one layout: a new layout is one row.

B sequences, S positions, H width, V vocabulary. Everything is fp64.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from sharded_losses import LOSSES, problem
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

import compiled_loss
from compiled_loss import VocabShard, reference

VOCAB = {
    "weight": 0,
    "bias": 0,
    "forbidding": 0,
    "teacher_weight": 0,
    "teacher_bias": 0,
    "logits": -1,
    "teacher_logits": -1,
    "target_probs": -1,
}
TOKENS = (
    *("hidden", "further", "teacher_hidden", "labels", "allowed", "mask", "token_weights", "position_mask"),
    *("top_values", "top_indices", "old_logprob", "advantages"),
)
TOKENS_AND_VOCAB = ("logits", "teacher_logits", "target_probs")


class Layout(NamedTuple):
    """How tensors lie: [data, vocabulary] ranks of a mesh, or plain shards of a vocabulary cut somewhere."""

    vocab: int = 29
    hidden: str = "plain"  # or "replicate", "sequence"
    cuts: Callable[[int], list[int]] | None = None  # of plain shards, over a number of ranks
    data: int = 1  # ranks over which B is sharded


LAYOUTS = {
    "dtensor": Layout(),
    "replicate": Layout(hidden="replicate"),
    "sequence": Layout(hidden="sequence"),
    "plain": Layout(cuts=lambda ranks: [min(29, -(-29 // ranks) * r) for r in range(ranks + 1)]),
    "uneven": Layout(cuts=lambda ranks: [0, 0, *(3 * r * r + 1 for r in range(1, ranks - 1)), 29]),
    "empty": Layout(vocab=5),
    "data": Layout(hidden="replicate", data=2),
}


class Step(NamedTuple):
    """What came of a step on a rank: errors against the whole in one process, by tensor; the graphs; or a failure."""

    errors: dict[str, float]
    graphs: int = 0
    failure: str = ""


def shard(name: str, value: Tensor, layout: Layout, mesh: Any, part: VocabShard | None) -> Tensor:
    """A rank's part of a tensor: plain, or a DTensor that knows its layout."""
    if part is not None:
        return value.narrow(VOCAB[name], part.start, part.stop - part.start) if name in VOCAB else value
    rows, columns = Replicate(), Replicate()
    if name in VOCAB:
        columns = Shard(VOCAB[name] % value.dim())
    elif name in ("hidden", "further", "teacher_hidden"):
        if layout.hidden == "plain":
            return value
        columns = Shard(1) if layout.hidden == "sequence" else Replicate()
    elif name not in TOKENS or layout.data == 1:
        return value
    if layout.data == 1:
        return distribute_tensor(value, mesh, [columns])
    if name in TOKENS or name in TOKENS_AND_VOCAB:
        rows = Shard(0)
    return distribute_tensor(value, mesh, [rows, columns])


def whole(grad: Tensor | None, name: str, part: VocabShard | None) -> Tensor:
    """A gradient of all ranks."""
    assert grad is not None, name
    if isinstance(grad, DTensor):
        return grad.full_tensor()
    if part is None or name not in VOCAB:
        return grad
    parts: list[Any] = [None] * len(part.members)
    dist.all_gather_object(parts, grad)
    return torch.cat(parts, VOCAB[name])


def step(loss_name: str, layout_name: str, backend: str | None) -> Step:
    """One loss in one layout, forward and back, on this rank."""
    loss, layout = LOSSES[loss_name], LAYOUTS[layout_name]
    tensors = problem(layout.vocab)
    ranks = dist.get_world_size() // layout.data
    part, mesh = None, None
    if layout.cuts is not None:
        cuts = layout.cuts(ranks)
        part = VocabShard(cuts[dist.get_rank()], cuts[dist.get_rank() + 1], layout.vocab, dist.group.WORLD)
    elif layout.data == 1:
        mesh = dist.device_mesh.init_device_mesh("cpu", (ranks,), mesh_dim_names=("tp",))
    else:
        mesh = dist.device_mesh.init_device_mesh("cpu", (layout.data, ranks), mesh_dim_names=("dp", "tp"))

    full = {name: value.clone().requires_grad_(name in loss.wanted) for name, value in tensors.items()}
    expected = loss.call(reference, full, {})
    expected.backward()

    own = {
        name: shard(name, tensors[name], layout, mesh, part).detach().clone().requires_grad_(name in loss.wanted)
        for name in (*loss.wanted, *loss.others)
    }
    own["count"] = tensors["count"]
    how: dict[str, Any] = {} if part is None else {"vocab_shard": part}
    if loss.chunking is not None:
        how["chunking"] = loss.chunking
    torch.compiler.reset()
    graphs = CompileCounterWithBackend(backend or "eager")  # of the call, not of operators that compile their own

    def call(given: dict[str, Tensor]) -> Tensor:
        return loss.call(compiled_loss, given, how)

    run = call if backend is None else torch.compile(call, fullgraph=True, backend=graphs)
    got = run(own)
    got.backward()
    total = got.detach().clone()
    if layout.data > 1:
        dist.all_reduce(total, group=mesh.get_group("dp"))
    errors = {"loss": (total - expected.detach()).abs().item()}
    for name in loss.wanted:
        errors[name] = (whole(own[name].grad, name, part) - full[name].grad).abs().max().item()
    return Step(errors, graphs.frame_count)
