"""Vocabularies, tokens and batches over ranks: losses and all gradients are those of one process and full logits.

Everything is fp64.
"""

import pytest
import ranks
import sharded_layouts
import torch
from sharded_layouts import LAYOUTS
from sharded_losses import LOSSES

pytestmark = pytest.mark.skipif(not torch.distributed.is_gloo_available(), reason="needs gloo for processes on CPUs")
BY_DATA = [name for name, loss in LOSSES.items() if loss.counted]  # what can be a sum over all ranks
TABLE = {  # world, layout: losses, eager
    (2, "dtensor"): list(LOSSES),
    (2, "replicate"): ["everything, tokens", "everything, vocab", "linear_distillation, jsd", "multi_token_prediction"],
    (2, "sequence"): [name for name, loss in LOSSES.items() if "hidden" in loss.wanted],
    (2, "plain"): list(LOSSES),
    (4, "uneven"): list(LOSSES),
    (4, "empty"): list(LOSSES),
    (4, "data"): BY_DATA,
}
COMPILED = {(2, "dtensor"): ["linear_cross_entropy, tokens"]}  # the same under Inductor
FURTHER = {  # and all others, in the slow tests
    key: [name for name in names if name not in COMPILED.get(key, ())] for key, names in TABLE.items()
}


def cases(table, backend):
    return [
        pytest.param(world, layout, loss, backend, id=f"{loss}, {layout} of {world}, {backend or 'eager'}")
        for (world, layout), names in table.items()
        for loss in names
    ]


def steps(table, world, backend):
    """What a rank does: every loss of the table for so many ranks."""
    found = {}
    for (ranks_, layout), names in table.items():
        for loss in names if ranks_ == world else ():
            ranks.at(f"{loss}, {layout}")
            found[layout, loss] = sharded_layouts.step(loss, layout, backend)
    return found


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """Each rank's steps, of a world and a way to run; every group of processes starts once."""
    known = {}

    def get(table, world, backend, limit):
        key = (id(table), world, backend)
        if key not in known:
            folder = tmp_path_factory.mktemp("ranks")
            try:
                known[key] = ranks.run(steps, world, folder, table, world, backend, limit=limit)
            except AssertionError as error:  # each of its tests fails, and none starts the ranks again
                known[key] = error
        if isinstance(known[key], AssertionError):
            raise known[key]
        return known[key]

    return get


def check(found, layout, loss, backend):
    for rank, steps in enumerate(found):
        step = steps[layout, loss]
        worst = {name: error for name, error in step.errors.items() if not error <= ranks.ROUNDING}
        assert not worst, f"rank {rank}"
        assert step.graphs == (0 if backend is None else 1)


@pytest.mark.xdist_group("eager ranks")
@pytest.mark.parametrize(("world", "layout", "loss", "backend"), cases(TABLE, None))
def test_sharded_losses_match_one_process(world, layout, loss, backend, results):
    check(results(TABLE, world, backend, limit=240), layout, loss, backend)


@pytest.mark.xdist_group("compiled ranks")
@pytest.mark.parametrize(("world", "layout", "loss", "backend"), cases(COMPILED, "inductor"))
def test_sharded_losses_compiled(world, layout, loss, backend, results):
    check(results(COMPILED, world, backend, limit=400), layout, loss, backend)


@pytest.mark.slow
@pytest.mark.xdist_group("compiled ranks")
@pytest.mark.parametrize(("world", "layout", "loss", "backend"), cases(FURTHER, "inductor"))
def test_every_sharded_loss_compiled(world, layout, loss, backend, results):
    check(results(FURTHER, world, backend, limit=5000), layout, loss, backend)


def test_every_loss_and_layout_is_in_the_table():
    assert {loss for names in TABLE.values() for loss in names} == set(LOSSES)
    assert {layout for _, layout in TABLE} == set(LAYOUTS)
