"""What sharded losses refuse, on every rank and in the same words; and what is not refused: NaN, empty batches."""

from functools import partial

import pytest
import ranks
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor

import compiled_loss as cl
from compiled_loss import Chunking, VocabShard
from compiled_loss.distributed import vocab_shard

pytestmark = [
    pytest.mark.skipif(not dist.is_gloo_available(), reason="needs gloo for processes on CPUs"),
    pytest.mark.xdist_group("sharding errors"),
]
N, H, V = 6, 4, 10
CHUNKINGS = (Chunking(strategy="tokens", chunk_size=4), Chunking(strategy="vocab", chunk_size=2))


def refused(mesh):
    """By name: a call that raises on every rank, what, and how its text begins."""
    rank, ranks_ = dist.get_rank(), dist.get_world_size()
    group, device = mesh.get_group(), "cpu"
    hidden, weight, labels = torch.ones(N, H), torch.ones(V, H), torch.zeros(N, dtype=torch.int64)
    vocab = distribute_tensor(weight, mesh, [Shard(0)])
    part = VocabShard.even(V, group)
    own = weight[part.start : part.stop]
    logits = distribute_tensor(torch.ones(N, V), mesh, [Shard(1)])
    other = init_device_mesh(device, (ranks_, 1), mesh_dim_names=("rows", "one"))

    def linear(hidden=hidden, weight=vocab, labels=labels, **keywords):
        return cl.linear_cross_entropy(hidden, weight, labels, **keywords)

    return {
        "another V": (
            lambda: VocabShard(rank * 5, rank * 5 + 5, V + rank, group),
            "vocab_size: expected the same on every rank of the group, got by rank 0:5 of 10, 5:10 of 11",
        ),
        "a class twice": (
            lambda: VocabShard(rank * 4, rank * 4 + 6, V, group),
            "start, stop: expected that the 2 ranks of the group have each class of the vocabulary once",
        ),
        "a group of other ranks": (
            lambda: VocabShard(rank * 2, rank * 2 + 2, V, group),
            "start, stop: expected that the 2 ranks of the group have each class of the vocabulary once",
        ),
        "a group of parts that differ": (
            lambda: cl.TEParallelCrossEntropy(tp_group=group)(torch.ones(N, 3 + rank), labels),
            "logits: expected the same on every rank",
        ),
        "a mesh for a group": (lambda: VocabShard.even(V, "tp"), "group: expected a process group, got str"),
        "beyond V": (
            lambda: VocabShard(0, V + 1, V, group),
            "start, stop: expected 0 <= start <= stop <= V = 10, got 0 and 11",
        ),
        "rows of another part": (
            lambda: linear(weight=own[1:], vocab_shard=part),
            "weight: expected 5 classes, ",
        ),
        "twice": (lambda: linear(vocab_shard=part), "vocab_shard: expected None beside a DTensor"),
        "no shard": (lambda: linear(weight=own, vocab_shard=3), "vocab_shard: expected a VocabShard, got int"),
        "width": (
            lambda: linear(distribute_tensor(hidden, mesh, [Shard(1)])),
            "hidden: expected Replicate, or Shard over tokens, got S(1) over mesh dimension tp",
        ),
        "width of the weight": (
            lambda: linear(weight=distribute_tensor(weight, mesh, [Shard(1)])),
            "weight: expected Shard(0), over the vocabulary, or Replicate, got S(1) over mesh dimension tp",
        ),
        "a partial weight": (
            lambda: linear(weight=DTensor.from_local(weight, mesh, [Partial()])),
            "weight: expected Shard or Replicate, got P(sum) over mesh dimension tp",
        ),
        "partial labels": (
            lambda: linear(labels=DTensor.from_local(labels, mesh, [Partial()])),
            "labels: expected Shard or Replicate, got P(sum) over mesh dimension tp",
        ),
        "another mesh": (
            lambda: linear(distribute_tensor(hidden, other["one"], [Replicate()])),
            "hidden: expected a mesh that has the ranks 0, 1 along a dimension, got one of the dimensions one without",
        ),
        "a whole bias": (
            lambda: linear(bias=distribute_tensor(torch.ones(V), mesh, [Replicate()])),
            "bias: expected the classes ",
        ),
        "a whole teacher": (
            lambda: cl.linear_distillation(
                hidden, vocab, hidden, distribute_tensor(weight, mesh, [Replicate()]), labels
            ),
            "teacher_weight: expected the classes ",
        ),
        "a teacher's whole bias": (
            lambda: cl.linear_distillation(
                hidden, vocab, hidden, vocab, labels, teacher_bias=distribute_tensor(torch.ones(V), mesh, [Replicate()])
            ),
            "teacher_bias: expected the classes ",
        ),
        "a teacher's plain whole bias": (
            lambda: cl.linear_soft_cross_entropy(
                hidden, vocab, torch.ones(N), teacher_hidden=hidden, teacher_weight=vocab, teacher_bias=torch.ones(V)
            ),
            "teacher_bias: expected 5 classes, ",
        ),
        "biases to pick": (
            lambda: cl.linear_soft_cross_entropy(
                hidden,
                vocab,
                torch.ones(N),
                teacher_hidden=hidden,
                teacher_weight=weight,
                teacher_bias=distribute_tensor(torch.ones(V), mesh, [Shard(0)]),
                draft_to_target=torch.arange(V),
            ),
            "teacher_bias: expected the whole [V'] on every rank beside draft_to_target, got a shard",
        ),
        "a mean of distillation over other tokens": (
            lambda: cl.linear_distillation(
                distribute_tensor(hidden, mesh, [Shard(0)]), weight, hidden[:3], weight, labels[:3]
            ),
            "num_label_tokens: expected the count of all ranks, for the tokens are sharded over",
        ),
        "a mean of a policy loss over other tokens": (
            lambda: cl.linear_policy_loss(
                distribute_tensor(hidden, mesh, [Shard(0)]), weight, labels[:3], torch.zeros(3), torch.zeros(3)
            ),
            "token_weights: expected a Tensor where tokens are sharded over ranks: make_token_weights(num_tokens=...)",
        ),
        "answers divided between ranks": (
            lambda: cl.linear_preference_loss(
                distribute_tensor(hidden, mesh, [Shard(0)]),
                weight,
                labels[:3],
                segment_ids=torch.tensor([0, 0, 1]),
                num_pairs=1,
            ),
            "hidden: expected all tokens of each answer on one rank, got them sharded over ",
        ),
        "a loss of a rank's logits": (
            lambda: cl.linear_logits_loss(hidden, vocab, lambda logits: logits.amax(1)),
            "weight: expected all classes of the vocabulary, got a rank's: a logits_loss needs whole rows",
        ),
        "weights of other positions": (
            lambda: cl.masked_soft_cross_entropy(
                logits, logits, torch.ones(N), token_weights=(torch.arange(N) != rank).float()
            ),
            "labels, position_mask: expected the same tokens on all ranks that share the vocabulary, but they differ",
        ),
        "a whole plain teacher": (
            lambda: cl.distillation(logits, torch.ones(N, V), labels),
            "teacher_logits: expected 5 classes, ",
        ),
        "rows to pick": (
            lambda: cl.linear_soft_cross_entropy(
                hidden,
                vocab,
                torch.ones(N),
                teacher_hidden=hidden,
                teacher_weight=vocab,
                draft_to_target=torch.arange(V),
            ),
            "teacher_weight: expected the whole [V', H'] on every rank beside draft_to_target, got a shard",
        ),
        "a mean over other tokens": (
            lambda: linear(distribute_tensor(hidden, mesh, [Shard(0)]), weight, labels[:3]),
            "num_label_tokens: expected the count of all ranks, for the tokens are sharded over tp, got None: a mean "
            "would divide by each rank's own. A loss that has a reduction takes the count with reduction='sum'",
        ),
        "labels out of range": (
            lambda: linear(labels=labels + V),
            "labels: expected 0 <= label < V = 10, or ignore_index = -100, got 10",
        ),
        "other labels": (
            lambda: linear(labels=labels + rank),
            "labels, position_mask: expected the same tokens on all ranks that share the vocabulary, but they differ",
        ),
        "a mask of other positions": (
            lambda: cl.masked_soft_cross_entropy(logits, logits, (torch.arange(N) != rank).float()),
            "labels, position_mask: expected the same tokens on all ranks that share the vocabulary, but they differ",
        ),
        "what fully_shard holds": (
            lambda: linear(
                weight=fully_shard(torch.nn.Linear(H, V, bias=False), mesh=mesh).weight, labels=labels + rank
            ),
            "labels, position_mask: expected the same tokens on all ranks that share the vocabulary, but they differ. "
            "A weight that fully_shard holds is no vocabulary shard: call unshard() of its module first",
        ),
        "more tokens": (
            lambda: linear(torch.ones(N + rank, H), labels=torch.zeros(N + rank, dtype=torch.int64)),
            "tokens: expected as many on every rank that shares the vocabulary, got from 6 to 7",
        ),
        "another V of a DTensor": (
            lambda: linear(weight=DTensor.from_local(own[rank:], mesh, [Shard(0)], shape=(V - rank, H), stride=(H, 1))),
            "classes: expected as many on every rank that shares the vocabulary, got from 9 to 10",
        ),
        "torch.func": (
            lambda: torch.func.grad(linear)(hidden),
            "torch.func: expected a vocabulary on one rank, got one over several",
        ),
    }


def texts():
    mesh = init_device_mesh("cpu", (dist.get_world_size(),), mesh_dim_names=("tp",))
    found = {}
    for name, (call, expected) in refused(mesh).items():
        ranks.at(name)
        try:
            found[name] = (f"nothing, but {call()}", expected)
        except (TypeError, ValueError, NotImplementedError) as error:
            found[name] = (str(error), expected)
    return found


def test_same_error_on_every_rank(tmp_path):
    first, second = ranks.run(texts, 2, tmp_path, limit=120)
    wrong = {name: (got, expected) for name, (got, expected) in first.items() if not got.startswith(expected)}
    wrong |= {name: (got, expected) for name, (got, expected) in second.items() if not got.startswith(expected)}
    assert not wrong


def poisoned(chunkings):
    """Losses and gradients of a label that is no class, under compile."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),), mesh_dim_names=("tp",))
    torch.manual_seed(0)
    weight, hidden = torch.randn(V, H), torch.randn(N, H)
    labels = torch.tensor([0, 3, V, 9, -100, 2])
    found = []
    for chunking in chunkings:
        h, w = hidden.clone().requires_grad_(), distribute_tensor(weight, mesh, [Shard(0)]).requires_grad_()
        loss = torch.compile(cl.linear_cross_entropy, backend="aot_eager", fullgraph=True)(
            h, w, labels, chunking=chunking
        )
        loss.backward()
        found.append((loss.detach(), h.grad.isnan().any(-1), w.grad.to_local().isnan().all()))
    return found


@pytest.mark.parametrize(
    "chunking", [CHUNKINGS[0], pytest.param(CHUNKINGS[1], marks=pytest.mark.slow)], ids=["tokens", "vocab"]
)
def test_label_out_of_range_is_nan_on_every_rank(tmp_path, chunking):
    for found in zip(*ranks.run(poisoned, 2, tmp_path, [chunking], limit=240), strict=True):
        for loss, rows, weight in found:
            assert loss.isnan() and weight
            assert rows.tolist() == [False, False, True, False, False, False]


def disagreeing():
    """Losses and gradients where ranks have other labels, or another mask, and code cannot look: two under compile."""
    vocab_shard.can_read_values = lambda tokens: False  # in this process, as on a GPU
    mesh = init_device_mesh("cpu", (dist.get_world_size(),), mesh_dim_names=("tp",))
    rank, count = dist.get_rank(), {"reduction": "sum", "num_label_tokens": N}
    torch.manual_seed(0)
    labels, mask = torch.arange(N) + rank, (torch.arange(N) != rank).float()
    teacher, states = distribute_tensor(torch.randn(V, H), mesh, [Shard(0)]), torch.randn(N, H)
    scores = distribute_tensor(torch.randn(N, V), mesh, [Shard(1)])
    chunked = [partial(cl.linear_cross_entropy, labels=labels, chunking=chunking, **count) for chunking in CHUNKINGS]
    chunked.append(partial(cl.linear_cross_entropy, labels=labels, reduction="none"))
    chunked.append(lambda h, w: sum(v.sum() for v in cl.linear_token_statistics(h, w, labels)[:3]))
    seen = partial(cl.linear_cross_entropy_with_statistics, labels=labels, chunking=CHUNKINGS[0], **count)
    chunked.append(lambda h, w: torch.stack([(found := seen(h, w)).loss, *(v.sum() for v in found.statistics[:3])]))
    chunked.append(lambda h, w: cl.linear_distillation(h, w, states, teacher, labels))
    chunked.append(lambda h, w: cl.linear_soft_cross_entropy(h, w, mask, target_probs=scores))
    same, top = torch.arange(N), (torch.full((N, 2), -2.0), torch.tensor([[1, 3]] * N) + rank)
    chunked.append(lambda h, w: cl.linear_distillation(h, w, None, None, same, teacher_topk=top))
    kept = torch.tensor([[1, 3]] * N)
    for y, ids in ((labels, kept), (same, kept + rank)):
        chunked.append(lambda h, w, y=y, ids=ids: cl.linear_token_statistics(h, w, y, kept_ids=ids).entropy)
    chunked.append(lambda h, w: cl.linear_token_statistics(h, w, same, ids=kept + rank).ids_logprob)
    given = [partial(cl.cross_entropy, labels=labels), lambda x: cl.distillation(x, scores, labels)]
    given.append(lambda x: cl.masked_soft_cross_entropy(x, scores, mask))
    found = []
    for call in (*chunked, *given):
        vocab = distribute_tensor(torch.randn(V, H), mesh, [Shard(0)])
        inputs = [torch.randn(N, H), vocab] if call in chunked else [scores.detach().clone()]
        inputs = [value.requires_grad_() for value in inputs]
        ranks.at(f"loss {len(found)}")
        run = torch.compile(call, backend="aot_eager", fullgraph=True) if call in (chunked[0], given[-1]) else call
        loss = run(*inputs)
        loss.sum().backward()
        grads = [v.grad.to_local() if isinstance(v.grad, DTensor) else v.grad for v in inputs]
        found.append([bool(loss.isnan().all()), *(bool(v.isnan().any()) for v in grads)])  # 0 where a mask is 0
    return found


def test_disagreeing_ranks_are_nan_where_labels_are_not_read(tmp_path):
    for found in ranks.run(disagreeing, 2, tmp_path, limit=240):
        assert len(found) == 14
        assert all(all(nan) for nan in found), [nan for nan in found if not all(nan)]


def empty_batches():
    """Many data-parallel steps in which one rank has no token, or none that counts."""
    rank = dist.get_rank()
    weight = torch.randn(V, H, generator=torch.Generator().manual_seed(0), requires_grad=True)
    steps = []
    for step in range(6):
        tokens = 0 if (rank + step) % 2 else N
        hidden = torch.randn(tokens, H, requires_grad=True)
        labels = torch.randint(0, V, (tokens,)) if step < 4 else torch.full((tokens,), -100)
        loss = cl.linear_cross_entropy(
            hidden, weight, labels, reduction="sum", num_label_tokens=N, chunking=CHUNKINGS[step % 2]
        )
        loss.backward()
        dist.all_reduce(weight.grad)
        steps.append((loss.item() == 0, bool(weight.grad.isfinite().all()), hidden.grad.shape == hidden.shape))
    return steps


def test_rank_without_tokens(tmp_path):
    for steps in ranks.run(empty_batches, 2, tmp_path, limit=240):
        assert all(finite and shaped for _, finite, shaped in steps)
        assert {zero for zero, *_ in steps[:4]} == {True, False}
        assert all(zero for zero, *_ in steps[4:])
