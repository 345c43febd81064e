"""Heads as FSDP2, ColwiseParallel, both at once and activation checkpointing leave them: loss and all gradients.

fp64. FSDP's mean of ranks whose losses are shares of one sum.
"""

import pytest
import ranks
import sharded_models as models
import torch
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

from compiled_loss import FusedLinearCrossEntropy

pytestmark = [
    pytest.mark.skipif(not torch.distributed.is_gloo_available(), reason="needs gloo for processes on CPUs"),
    pytest.mark.xdist_group("sharded models"),
]
EAGER = {
    ("fsdp", "unshard"): {},
    ("fsdp", "shells"): {},
    ("fsdp", "tied"): {"how": "functional", "tied": True},
    ("fsdp", "bf16"): {"how": "unshard", "dtype": torch.bfloat16},
    **{("column_parallel", how): {} for how in ("logits", "shell", "group", "checkpoint", "loss_parallel")},
}
TWO_DIMENSIONS = ("unshard", "shells")


def every_case(world, compiled):
    found = {}
    cases = EAGER if world == 2 else {("two_dimensions", how): {} for how in TWO_DIMENSIONS}
    for (kind, name), keywords in cases.items():
        ranks.at(f"{kind}, {name}")
        arguments = {"how": name, **keywords}
        if kind != "column_parallel":
            arguments["compiled"] = compiled
        elif compiled:
            continue
        torch.compiler.reset()
        found[kind, name] = getattr(models, kind)(**arguments)
    return found


@pytest.fixture(scope="module")
def eager(tmp_path_factory):
    return {w: ranks.run(every_case, w, tmp_path_factory.mktemp("ranks"), w, False, limit=200) for w in (2, 4)}


@pytest.fixture(scope="module")
def compiled(tmp_path_factory):
    return {w: ranks.run(every_case, w, tmp_path_factory.mktemp("ranks"), w, True, limit=900) for w in (2, 4)}


@pytest.mark.parametrize("how", ["unshard", "shells"])
def test_fsdp(how, eager):
    """One gather of the head and one reduce-scatter, for the main loss and multi-token prediction together."""
    for errors, counts, _ in (found["fsdp", how] for found in eager[2]):
        assert max(errors.values()) <= ranks.ROUNDING, errors
        # FSDP's own: of the embedding, the body twice, the further body twice; and the head, where it gathers that.
        own = how == "shells"
        assert counts["_allgather_base_"] == 6 - own and counts.get("all_gather_into_tensor", 0) == own
        assert counts["_reduce_scatter_base_"] == 4 - own and counts.get("reduce_scatter_tensor", 0) == own


def test_fsdp_tied_head(eager):
    for errors, _, _ in (found["fsdp", "tied"] for found in eager[2]):
        assert max(errors.values()) <= ranks.ROUNDING, errors


def test_fsdp_in_bf16(eager):
    for errors, _, _ in (found["fsdp", "bf16"] for found in eager[2]):
        assert max(errors.values()) <= 2**-6, errors


@pytest.mark.parametrize("how", TWO_DIMENSIONS)
def test_fsdp_and_vocab_parallel(how, eager):
    """One gather of a rank's part of the head, over the batches' ranks, and none over the vocabulary's."""
    for found in eager[4]:
        errors, counts = found["two_dimensions", how]
        assert max(errors.values()) <= ranks.ROUNDING, errors
        assert counts.get("all_gather_into_tensor", 0) == (how == "shells")


@pytest.mark.parametrize("how", [name for kind, name in EAGER if kind == "column_parallel"])
def test_column_parallel_head(how, eager):
    for found in eager[2]:
        errors = found["column_parallel", how]
        assert max(errors.values()) <= ranks.ROUNDING, errors


@pytest.mark.slow
@pytest.mark.parametrize("how", ["unshard", "shells", "tied"])
def test_fsdp_compiled(how, compiled):
    for errors, _, graphs in (found["fsdp", how] for found in compiled[2]):
        assert max(errors.values()) <= ranks.ROUNDING, errors
        assert graphs == 1


@pytest.mark.slow
@pytest.mark.parametrize("how", TWO_DIMENSIONS)
def test_fsdp_and_vocab_parallel_compiled(how, compiled):
    for found in compiled[4]:
        errors, _ = found["two_dimensions", how]
        assert max(errors.values()) <= ranks.ROUNDING, errors


def other_gather():
    """The words with which a group is refused that has two of a mesh's four ranks."""
    mesh = init_device_mesh("cpu", (4,), mesh_dim_names=("dp",))
    pairs = init_device_mesh("cpu", (2, 2), mesh_dim_names=("rows", "columns"))
    weight = distribute_tensor(torch.ones(8, 2), mesh, [Shard(0)])
    with pytest.raises(ValueError, match="grad_reduce_group: expected a mesh that has the ranks ") as refused:
        FusedLinearCrossEntropy.materialize_lm_weight(weight, grad_reduce_group=pairs.get_group("columns"))
    return str(refused.value)


def test_group_of_a_part_of_the_mesh_error(tmp_path):
    first, *_, last = ranks.run(other_gather, 4, tmp_path, limit=60)
    assert "the ranks 0, 1 along" in first and "the ranks 2, 3 along" in last
