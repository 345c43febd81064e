"""A vocabulary over ranks within the contracts of one process: the error budget, and one graph for every N."""

import pytest
import ranks
import torch
import torch.distributed as dist
from torch._dynamo.testing import CompileCounterWithBackend
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard, distribute_tensor
from torch.nn import functional as F

from compiled_loss import Chunking, cross_entropy, linear_cross_entropy, reference
from compiled_loss.testing import assert_within_error_budget, head_inputs

pytestmark = [
    pytest.mark.skipif(not dist.is_gloo_available(), reason="needs gloo for processes on CPUs"),
    pytest.mark.xdist_group("sharding contracts"),
]
TOKENS, WIDTH, VOCAB = 448, 32, 896
DTYPES = (torch.float32, torch.bfloat16)
CONFIDENT = (0.0, 0.5, 1.0)
WAYS = {
    "tokens": Chunking(strategy="tokens", chunk_size=64),
    "vocab": Chunking(strategy="vocab", chunk_size=128),
    "logits": None,
}
BUDGET = [(way, dtype, confident) for way in WAYS for dtype in DTYPES for confident in CONFIDENT]
SIZES = (6, 11, 7, 30)


def whole(tensor):
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def problem(way, dtype, confident):
    """What has a gradient, labels, and the loss of them in full logits."""
    inputs = head_inputs(TOKENS, WIDTH, VOCAB, dtype=dtype, ignored=0.1, confident=confident)
    if way != "logits":
        return [inputs.hidden, inputs.weight, inputs.bias], inputs.labels
    logits = (inputs.hidden.double() @ inputs.weight.double().t() + inputs.bias.double()).detach().to(dtype)
    return [logits.requires_grad_()], inputs.labels


def unchunked(way, leaves, labels):
    if way == "logits":
        return F.cross_entropy(leaves[0].float(), labels)
    hidden, weight, bias = leaves
    return F.cross_entropy((hidden @ weight.t()).float() + bias.float(), labels)


def truth(way, leaves, labels):
    if way == "logits":
        return reference.cross_entropy(leaves[0], labels)
    return reference.linear_cross_entropy(*leaves[:2], labels, bias=leaves[2])


def sharded(way, leaves, labels):
    if way == "logits":
        return cross_entropy(leaves[0], labels)
    return linear_cross_entropy(*leaves[:2], labels, bias=leaves[2], chunking=WAYS[way])


def budget():
    """Loss and whole gradients of every case on a rank."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),), mesh_dim_names=("tp",))
    found = {}
    for way, dtype, confident in BUDGET:
        ranks.at(f"{way}, {dtype}, {confident}")
        leaves, labels = problem(way, dtype, confident)
        split = [Shard(1)] if way == "logits" else [None, Shard(0), Shard(0)]
        own = [
            leaf if placement is None else distribute_tensor(leaf.detach(), mesh, [placement]).requires_grad_()
            for leaf, placement in zip(leaves, split, strict=True)
        ]
        loss = sharded(way, own, labels)
        found[way, dtype, confident] = [whole(v) for v in (loss.detach(), *torch.autograd.grad(loss, own))]
    return found


@pytest.fixture(scope="module")
def budgets(tmp_path_factory):
    return ranks.run(budget, 2, tmp_path_factory.mktemp("ranks"), limit=200)


@pytest.mark.parametrize("confident", CONFIDENT)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("way", WAYS)
def test_error_budget_of_vocab_parallel(way, dtype, confident, budgets):
    """Contract 4, against one process: fp64 for the truth, and full logits in the same dtypes for what they cost."""
    leaves, labels = problem(way, dtype, confident)
    exact = [leaf.detach().double().requires_grad_() for leaf in leaves]
    results = []
    for loss_of, values in ((unchunked, leaves), (truth, exact)):
        loss = loss_of(way, values, labels)
        results.append([loss, *torch.autograd.grad(loss, values)])
    names = ("loss", "dz") if way == "logits" else ("loss", "dH", "dW", "db")
    for rank, found in enumerate(budgets):
        for name, mine, baseline, exactly in zip(names, found[way, dtype, confident], *results, strict=True):
            assert_within_error_budget(mine, baseline, exactly, name=f"{name} of rank {rank}")


def varying(backend, reduction):
    """Errors at each number of tokens against one process, and how many graphs there are after it."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),), mesh_dim_names=("tp",))
    chunking = Chunking(strategy="vocab", chunk_size=8)
    counter = CompileCounterWithBackend(backend)
    loss_of = torch.compile(linear_cross_entropy, fullgraph=True, dynamic=True, backend=counter)
    found = []
    for size in SIZES:
        inputs = head_inputs(size, 8, 30, dtype=torch.float64, ignored=0.2)
        upstream = torch.rand(size, generator=torch.Generator().manual_seed(0), dtype=torch.float64) + 0.5
        upstream = upstream if reduction == "none" else upstream[0]
        own = inputs.hidden, distribute_tensor(inputs.weight.detach(), mesh, [Shard(0)]).requires_grad_()
        loss = loss_of(*own, inputs.labels, reduction=reduction, chunking=chunking)
        mine = [loss, *torch.autograd.grad(loss, own, upstream)]
        loss = reference.linear_cross_entropy(*inputs[:3], reduction=reduction)
        expected = [loss, *torch.autograd.grad(loss, inputs[:2], upstream)]
        errors = [(whole(a) - b).abs().max().item() for a, b in zip(mine, expected, strict=True)]
        graphs = sum(len(graph.graph.nodes) > 0 for graph in counter.graphs)  # what is begun anew is empty
        found.append((errors, graphs))
    return found


def check_varying(folder, backend, reduction, limit):
    for steps in ranks.run(varying, 2, folder, backend, reduction, limit=limit):
        assert all(error <= ranks.ROUNDING for errors, _ in steps for error in errors), steps
        assert [graphs for _, graphs in steps] == [1] * len(SIZES)


@pytest.mark.slow
def test_one_graph_as_n_varies(tmp_path):
    check_varying(tmp_path, "aot_eager", "none", limit=200)


@pytest.mark.slow
@pytest.mark.parametrize("reduction", ["none", "sum"])
def test_one_graph_as_n_varies_inductor(reduction, tmp_path):
    check_varying(tmp_path, "inductor", reduction, limit=400)
