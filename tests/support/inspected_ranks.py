"""Losses on one rank of many, for the inspector's child process; torch's fake group proves code, not numbers."""

from functools import partial

import torch
import torch.distributed as dist

import compiled_loss
from compiled_loss import VocabShard


class Part:
    """A rank's part of a vocabulary, made where it arrives: a group does not travel."""

    def __init__(self, vocab, world, rank):
        self.arguments = (vocab, world, rank)

    def __reduce__(self):
        return _made, self.arguments


def _made(vocab, world, rank):
    from torch.testing._internal.distributed.fake_pg import FakeStore

    if dist.is_initialized():
        dist.destroy_process_group()
    dist.init_process_group("fake", rank=rank, world_size=world, store=FakeStore())
    return VocabShard.even(vocab, dist.group.WORLD)


def _linear(hidden, weight, labels, *, part, chunking):
    return compiled_loss.linear_cross_entropy(
        hidden, weight, labels, vocab_shard=part, chunking=chunking, reduction="sum", num_label_tokens=1000
    )


def _distilled(hidden, weight, teacher_hidden, teacher_weight, labels, *, part, chunking, reduction):
    tensors = (hidden, weight, teacher_hidden, teacher_weight, labels)
    return compiled_loss.linear_distillation(
        *tensors, vocab_shard=part, chunking=chunking, reduction=reduction, hard_label_weight=0.2
    )


def _cached(hidden, weight, values, indices, labels, *, part, chunking, reduction):
    top = {"teacher_topk": (values, indices), "divergence": "jsd", "hard_label_weight": 0.2}
    tensors = (hidden, weight, None, None, labels)
    return compiled_loss.linear_distillation(*tensors, vocab_shard=part, chunking=chunking, reduction=reduction, **top)


def _logits(logits, labels, *, part):
    return compiled_loss.cross_entropy(logits, labels, vocab_shard=part, reduction="sum", num_label_tokens=1000)


def _exchanged(rows, *, part):
    """Each kind of collective, of the whole of which a rank has `rows`."""
    ops, ranks, name = torch.ops._c10d_functional, len(part.members), part.group_name
    whole = ops.wait_tensor(ops.all_gather_into_tensor(rows * 2, ranks, name))
    own = ops.wait_tensor(ops.reduce_scatter_tensor(whole, "sum", ranks, name))
    return ops.wait_tensor(ops.broadcast(own * 3, 0, name))


def exchanged(part):
    return partial(_exchanged, part=part)


def linear(part, chunking):
    return partial(_linear, part=part, chunking=chunking)


def distilled(part, chunking, reduction):
    return partial(_distilled, part=part, chunking=chunking, reduction=reduction)


def cached(part, chunking, reduction):
    return partial(_cached, part=part, chunking=chunking, reduction=reduction)


def logits(part):
    return partial(_logits, part=part)
