"""Run on ranks by test_sharded_models.py: heads as torch's own parallelism leaves them, and models of one process."""

import functools

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.parallel import ColwiseParallel, loss_parallel, parallelize_module
from torch.nn import functional as F
from torch.profiler import ProfilerActivity, profile
from torch.utils.checkpoint import checkpoint

from compiled_loss import (
    Chunking,
    FusedLinearCrossEntropy,
    TEParallelCrossEntropy,
    calculate_loss,
    calculate_mtp_loss,
    cross_entropy,
    linear_cross_entropy,
    multi_token_prediction,
)

B, S, H, V = 4, 6, 8, 30
COUNT = 19  # of label tokens, over all ranks
CHUNKING = Chunking(strategy="tokens", chunk_size=7)


class Model(nn.Module):
    """A body whose hidden states a loss takes to the head, and a second for the next token but one."""

    def __init__(self, tied=False, dtype=torch.float64):
        super().__init__()
        torch.manual_seed(0)
        self.embedding = nn.Embedding(V, H, dtype=dtype)
        self.body = nn.Linear(H, H, dtype=dtype)
        self.further = nn.Linear(H, H, dtype=dtype)
        self.lm_head = nn.Linear(H, V, bias=False, dtype=dtype)
        if tied:
            self.lm_head.weight = self.embedding.weight

    def forward(self, tokens):
        hidden = torch.tanh(self.body(self.embedding(tokens)))
        return hidden, torch.tanh(self.further(hidden))


def batch():
    """Tokens and labels of all ranks."""
    random = torch.Generator().manual_seed(1)
    tokens = torch.randint(0, V, (B, S), generator=random)
    labels = tokens.roll(-1, 1)
    labels[:, -1] = -100
    labels[1, 2] = -100
    assert (labels != -100).sum() == COUNT
    return tokens, labels


def functional(model, hidden, further, labels, weight):
    """Main loss and multi-token prediction by functions."""
    keywords = {"num_label_tokens": COUNT, "chunking": CHUNKING}
    loss = linear_cross_entropy(hidden, weight, labels, reduction="sum", **keywords)
    return loss + multi_token_prediction([further], weight, labels, scaling_factor=0.3, **keywords)


def shells(model, hidden, further, labels, weight, group=None):
    """The same by the reference's Modules, one gathered weight for both."""
    loss_fn = FusedLinearCrossEntropy(chunking=CHUNKING)
    weight = loss_fn.materialize_lm_weight(weight, grad_reduce_group=group)
    head = {"lm_weight": weight, "num_label_tokens": COUNT, "grad_reduce_group": group}
    main = calculate_loss(loss_fn, hidden_states=hidden, labels=labels, model=model, **head)
    return main + calculate_mtp_loss(
        loss_fn,
        mtp_per_depth_h=[further],
        labels=labels,
        model=model,
        scaling_factor=0.3,
        **head,
    )


def expected(tied=False):
    """Loss and gradients of one process, by plain torch."""
    model = Model(tied)
    tokens, labels = batch()
    hidden, further = model(tokens)
    ahead = torch.cat([labels[:, 1:], torch.full((B, 1), -100)], 1)
    loss = sum(
        scale * F.cross_entropy((h @ model.lm_head.weight.t()).flatten(0, 1), y.flatten(), reduction="sum") / COUNT
        for h, y, scale in ((hidden, labels, 1.0), (further, ahead, 0.3))
    )
    loss.backward()
    return loss.item(), {name: p.grad for name, p in model.named_parameters()}


def mine(tensor, ranks, rank):
    """A data-parallel rank's rows."""
    return tensor.chunk(ranks)[rank]


def errors(model, loss, over, tied=False):
    """Against one process: the loss summed over the ranks of `over`, and every gradient."""
    total = loss.detach().double().clone()
    dist.all_reduce(total, group=over)
    theirs, gradients = expected(tied)
    found = {"loss": abs(total.item() - theirs)}
    for name, parameter in model.named_parameters():
        grad = parameter.grad
        grad = grad.full_tensor() if isinstance(grad, DTensor) else grad
        found[name] = (grad.double() - gradients[name]).abs().max().item()
    return found


def collectives(run):
    """What `run` returns, and how often each collective was called."""
    with profile(activities=[ProfilerActivity.CPU]) as profiled:
        result = run()
    counts = {}
    for event in profiled.key_averages():
        name = event.key.partition("::")[2]
        if event.key.startswith("c10d::") or event.key.startswith("_c10d_functional::"):
            counts[name] = counts.get(name, 0) + event.count
    return result, counts


def fsdp(how, compiled, tied=False, dtype=torch.float64):
    """FSDP2 over all ranks; the head is consumed outside its module."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),), mesh_dim_names=("dp",))
    rank, ranks = dist.get_rank(), dist.get_world_size()
    model = Model(tied)
    policy = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32 if dtype != torch.float64 else None)
    whole = tied  # a tied weight is the root's
    for part in () if whole else (model.body, model.further, model.lm_head):
        fully_shard(part, mesh=mesh, mp_policy=policy)
    fully_shard(model, mesh=mesh, mp_policy=policy)
    tokens, labels = (mine(v, ranks, rank) for v in batch())
    loss_of = {"shells": functools.partial(shells, group=mesh.get_group())}.get(how, functional)
    if compiled:
        loss_of = torch.compile(loss_of, fullgraph=True)
    torch._dynamo.utils.counters.clear()

    def step():
        hidden, further = model(tokens)
        if how == "unshard" and not whole:
            model.lm_head.unshard()
        loss = loss_of(model, hidden, further, labels, model.lm_head.weight)
        (loss * ranks).backward()  # FSDP takes the ranks' mean
        return loss

    loss, counts = collectives(step)
    return errors(model, loss, mesh.get_group(), tied), counts, torch._dynamo.utils.counters["stats"]["unique_graphs"]


def two_dimensions(how, compiled):
    """FSDP2 over two ranks, and the vocabulary over two."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
    model = Model()
    parallelize_module(model, mesh["tp"], {"lm_head": ColwiseParallel(use_local_output=False)})
    for part in (model.body, model.further, model.lm_head, model):
        fully_shard(part, mesh=mesh["dp"])
    tokens, labels = (mine(v, 2, mesh["dp"].get_local_rank()) for v in batch())
    loss_of = {"shells": functools.partial(shells, group=mesh.get_group("dp"))}.get(how, functional)
    if compiled:
        loss_of = torch.compile(loss_of, fullgraph=True)

    def step():
        hidden, further = model(tokens)
        if how == "unshard":
            model.lm_head.unshard()
        loss = loss_of(model, hidden, further, labels, model.lm_head.weight)
        (loss * 2).backward()
        return loss

    loss, counts = collectives(step)
    return errors(model, loss, mesh.get_group("dp")), counts


def column_parallel(how):
    """A head of ColwiseParallel whose logits stay DTensors; with activation checkpointing around head and loss."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),), mesh_dim_names=("tp",))
    model, whole = Model(), Model()
    parallelize_module(model, mesh, {"lm_head": ColwiseParallel(use_local_output=False)})
    tokens, labels = batch()

    def loss_of(hidden):
        logits = model.lm_head(hidden)
        if how == "loss_parallel":
            with loss_parallel():
                return F.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="sum")
        if how == "shell":
            return TEParallelCrossEntropy()(logits, labels)
        if how == "group":
            return TEParallelCrossEntropy(tp_group=mesh.get_group())(logits.to_local(), labels)
        return cross_entropy(logits, labels, reduction="sum")

    hidden, _ = model(tokens)
    loss = checkpoint(loss_of, hidden, use_reentrant=False) if how == "checkpoint" else loss_of(hidden)
    if how == "loss_parallel":
        with loss_parallel():
            loss.backward()
        loss = loss.full_tensor()
    else:
        loss.backward()
    theirs = F.cross_entropy(whole.lm_head(whole(tokens)[0]).flatten(0, 1), labels.flatten(), reduction="sum")
    theirs.backward()
    found = {"loss": (loss - theirs).abs().item()}
    for name, parameter in whole.named_parameters():
        grad = model.get_parameter(name).grad
        if parameter.grad is not None:
            grad = grad.full_tensor() if isinstance(grad, DTensor) else grad
            found[name] = (grad - parameter.grad).abs().max().item()
    return found
