"""Losses on one rank of many, for the inspector's child process; torch's fake group proves code, not numbers."""

from functools import partial

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


def _distilled(hidden, weight, teacher_hidden, teacher_weight, labels, *, part, chunking):
    tensors = (hidden, weight, teacher_hidden, teacher_weight, labels)
    return compiled_loss.linear_distillation(
        *tensors, vocab_shard=part, chunking=chunking, reduction="sum", num_label_tokens=1000
    )


def _logits(logits, labels, *, part):
    return compiled_loss.cross_entropy(logits, labels, vocab_shard=part, reduction="sum", num_label_tokens=1000)


def linear(part, chunking):
    return partial(_linear, part=part, chunking=chunking)


def distilled(part, chunking):
    return partial(_distilled, part=part, chunking=chunking)


def logits(part):
    return partial(_logits, part=part)
