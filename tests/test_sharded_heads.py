"""Heads of models over ranks, weight and bias, through the losses that look for them: loss and all gradients.

fp64: 1e-11 is what rounding costs, with room to spare.
"""

import pytest
import ranks
import sharded_heads as heads
import torch

pytestmark = [
    pytest.mark.skipif(not torch.distributed.is_gloo_available(), reason="needs gloo for processes on CPUs"),
    pytest.mark.xdist_group("sharded heads"),
]
TIGHT = 1e-11
FSDP = [("data_parallel", how) for how in ("fsdp", "bf16", "bf16, gathered")]
CASES = {2: [*FSDP, ("tensor_parallel", "eager")], 4: [("data_parallel", "hsdp")]}


def every_case(world):
    found = {}
    for kind, how in CASES[world]:
        ranks.at(f"{kind}, {how}")
        found[kind, how] = getattr(heads, kind)(how)
    if world == 2:
        found["gathered"] = {dtype: heads.gathered_in(dtype) for dtype in (None, torch.bfloat16)}
    return found


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    return {w: ranks.run(every_case, w, tmp_path_factory.mktemp("ranks"), w, limit=200) for w in CASES}


@pytest.mark.parametrize("world", CASES)
def test_weight_and_bias(world, found):
    for kind, how in CASES[world]:
        # bf16: two roundings of 2^-9 each in hidden states, head, logits and their gradients
        bound = 2**-6 if how.startswith("bf16") else TIGHT
        for rank in found[world]:
            assert max(rank[kind, how].values()) <= bound, (kind, how, rank[kind, how])


@pytest.mark.slow
def test_compiled(tmp_path):
    for errors in ranks.run(heads.tensor_parallel, 2, tmp_path, "compiled", limit=600):
        assert max(errors.values()) <= TIGHT, errors


def test_a_policys_dtype(found):
    """Gathered in the narrow dtype, reduced in the weight's own: the mean of 1 and 2^-8 has no bf16."""
    for rank in found[2]:
        whole, narrow = rank["gathered"][None], rank["gathered"][torch.bfloat16]
        mean = (1 + 2**-8) / 2
        assert whole == (torch.float32, torch.float32, [mean])
        assert narrow == (torch.bfloat16, torch.float32, [mean])
