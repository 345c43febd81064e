"""A rank that stops in the middle of a step: the others are told in time, and no process is left."""

import datetime
import multiprocessing
import os
import time

import pytest
import ranks
import torch
import torch.distributed as dist

import compiled_loss as cl
from compiled_loss import Chunking, VocabShard

pytestmark = pytest.mark.skipif(not dist.is_gloo_available(), reason="needs gloo for processes on CPUs")
N, H, V = 6, 4, 10
WORLD, FAULTY = 3, 1
PATIENCE, SLACK = 6, 20  # seconds: of the group that shares the vocabulary; and in which a busy machine wakes a rank
STRATEGIES = ("tokens", "vocab")


def step(shard, number, strategy):
    """In the second step the faulty rank stops between forward and backward."""
    hidden = torch.ones(N, H, requires_grad=True)
    weight = torch.ones(shard.stop - shard.start, H, requires_grad=True)
    labels = torch.zeros(N, dtype=torch.int64)
    loss = cl.linear_cross_entropy(hidden, weight, labels, vocab_shard=shard, chunking=Chunking(strategy=strategy))
    if number == 2 and dist.get_rank() == FAULTY:
        raise MemoryError("no room for this step")
    loss.backward()


def two_steps(folder, strategies, lives_on):
    """Write down what a rank was told in its second step, and after how many seconds."""
    rank = dist.get_rank()
    (folder / f"{rank}.pid").write_text(str(os.getpid()))
    for strategy in strategies:
        shard = VocabShard.even(V, dist.new_group(timeout=datetime.timedelta(seconds=PATIENCE)))
        step(shard, 1, strategy)
        ranks.at(f"the second step, {strategy}")
        begun = time.monotonic()
        try:
            step(shard, 2, strategy)
        except (RuntimeError, MemoryError) as error:
            (folder / f"{rank}.{strategy}").write_text(f"{time.monotonic() - begun} {error}")
            if not lives_on:
                raise
        while any(not (folder / f"{other}.{strategy}").exists() for other in range(WORLD)):
            time.sleep(0.1)  # the faulty rank takes no part


def told(folder, strategy):
    """Seconds and text, of each rank that did nothing wrong."""
    found = [(folder / f"{rank}.{strategy}").read_text().split(" ", 1) for rank in range(WORLD) if rank != FAULTY]
    return [(float(seconds), text) for seconds, text in found]


def none_is_left(folder):
    assert not multiprocessing.active_children()
    for rank in range(WORLD):
        with pytest.raises(ProcessLookupError):
            os.kill(int((folder / f"{rank}.pid").read_text()), 0)


def test_rank_that_skips_its_collectives(tmp_path):
    """The group's timeout ends the wait; whoever waits for a rank that gave up sees its connection close."""
    ranks.run(two_steps, WORLD, tmp_path, tmp_path, STRATEGIES, True, limit=240)
    for strategy in STRATEGIES:
        found = told(tmp_path, strategy)
        assert all(seconds < PATIENCE + SLACK for seconds, _ in found)
        assert all("imed out" in text or "onnection closed" in text for _, text in found)
        assert any(seconds > PATIENCE / 2 and "imed out" in text for seconds, text in found)
    none_is_left(tmp_path)


def test_rank_that_ends(tmp_path):
    """The others see its connection close, and the launcher says who failed, where and why."""
    with pytest.raises(AssertionError, match=r"(?s)rank 1 exited with 1 at: the second step.*MemoryError: no room for"):
        ranks.run(two_steps, WORLD, tmp_path, tmp_path, ["tokens"], False, limit=120)
    for seconds, text in told(tmp_path, "tokens"):
        assert seconds < PATIENCE + SLACK and "onnection" in text
    none_is_left(tmp_path)
