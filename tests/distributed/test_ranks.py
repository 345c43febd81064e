"""The tests' own processes: a rank that hangs or fails is told, and none is left behind."""

import multiprocessing
import time

import pytest
import ranks
import torch
import torch.distributed as dist

pytestmark = pytest.mark.skipif(not dist.is_gloo_available(), reason="needs gloo for processes on CPUs")


def hang():
    ranks.at("before the wait")
    if dist.get_rank() == 1:
        time.sleep(1000)
    dist.barrier()


def fail():
    ranks.at("a step")
    if dist.get_rank() == 0:
        raise RuntimeError("no such step")
    dist.barrier()


def tell():
    total = torch.tensor([float(dist.get_rank())])
    dist.all_reduce(total)
    return total.item()


def test_what_ranks_return(tmp_path):
    assert ranks.run(tell, 2, tmp_path, limit=60) == [1.0, 1.0]


@pytest.mark.slow
def test_hang_is_reported(tmp_path):
    with pytest.raises(AssertionError, match=r"rank 1 hung at: before the wait\n.*time\.sleep|in hang") as told:
        ranks.run(hang, 2, tmp_path, limit=12)
    assert "rank 0 hung at: before the wait" in str(told.value) and 'test_ranks.py", line' in str(told.value)
    assert not multiprocessing.active_children()


def test_failure_is_reported(tmp_path):
    with pytest.raises(AssertionError, match=r"(?s)rank 0 exited with 1 at: a step.*RuntimeError: no such step"):
        ranks.run(fail, 2, tmp_path, limit=60)
    assert not multiprocessing.active_children()
