"""Heads of models over ranks, weight and bias, through the losses that look for them: loss and all gradients."""

import pytest
import ranks
import sharded_heads as heads
import torch

pytestmark = [
    pytest.mark.skipif(not torch.distributed.is_gloo_available(), reason="needs gloo for processes on CPUs"),
    pytest.mark.xdist_group("sharded heads"),
]
CASES = [("data_parallel", how) for how in ("fsdp", "hsdp", "bf16", "bf16, gathered")]
CASES += [("tensor_parallel", how) for how in ("eager", "transformers")]


def every_case():
    found = {}
    for kind, how in CASES:
        ranks.at(f"{kind}, {how}")
        found[kind, how] = getattr(heads, kind)(how)
    return found | {dtype: heads.gathered_in(dtype) for dtype in (None, torch.bfloat16)}


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    return ranks.run(every_case, 4, tmp_path_factory.mktemp("ranks"), limit=300)


@pytest.mark.parametrize(("kind", "how"), CASES)
def test_weight_and_bias_of_sharded_heads(kind, how, found):
    # bf16: two roundings of 2^-9 each in hidden states, head, logits and their gradients
    bound = 2**-6 if how.startswith("bf16") else ranks.ROUNDING
    for rank in found:
        assert max(rank[kind, how].values()) <= bound, rank[kind, how]


@pytest.mark.slow
def test_tensor_parallel_compiled(tmp_path):
    for errors in ranks.run(heads.tensor_parallel, 2, tmp_path, "compiled", limit=600):
        assert max(errors.values()) <= ranks.ROUNDING, errors


def test_mixed_precision_policy(found):
    """Gathered in the narrow dtype, reduced in the weight's own: the mean of 1, 1, 1 and 2^-8 has no bf16."""
    mean = (3 + 2**-8) / 4
    for rank in found:
        assert rank[None] == (torch.float32, torch.float32, [mean])
        assert rank[torch.bfloat16] == (torch.bfloat16, torch.float32, [mean])
