"""Two processes under torch.distributed.pipelining: losses and all gradients are those of one process and full logits.

Everything is fp64.
"""

import pipelining_child as child
import pytest
import ranks
import torch
from comparing import TIGHT

pytestmark = [
    pytest.mark.skipif(not torch.distributed.is_gloo_available(), reason="needs gloo for processes on CPUs"),
    pytest.mark.xdist_group("pipelining"),  # one pair of processes for all tests
]


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """What each process knows, by case."""
    return ranks.run(child.steps, 2, tmp_path_factory.mktemp("pipelining"), limit=240)


@pytest.mark.parametrize("name", child.CASES)
def test_pipeline_step_matches_one_process(name, results):
    """mtp.py:370: the fused loss with a tuple was refused. mtp.py:403: num_label_tokens never came."""
    case = child.CASES[name]
    if case.keywords and not child.PASSES_KEYWORDS:
        pytest.skip("schedules of torch < 2.13 pass their loss no keywords")
    stages, whole = child.stages(case), child.batch(case)
    parts = list(zip(*(part.chunk(child.MICROBATCHES) for part in whole), strict=True))
    count = (whole[1] != -100).sum()
    losses = [child.plain(stages, case, count, *part) for part in parts]

    assert results[0][name]["trained"] == results[0][name]["evaluated"] == []
    trained, evaluated = (results[1][name][key] for key in ("trained", "evaluated"))
    torch.testing.assert_close(trained, [(main + auxiliary).detach() for main, auxiliary in losses], **TIGHT)
    torch.testing.assert_close(evaluated, [main.detach() for main, _ in losses], **TIGHT)

    if case.reduction == "sum":  # over the count of all microbatches: they add up to the batch
        loss = sum(child.plain(stages, case, count, *whole))
        torch.testing.assert_close(sum(trained), loss.detach(), **TIGHT)
    else:  # the schedule averages: microbatches weigh the same, however many tokens they count
        loss = sum(main + auxiliary for main, auxiliary in losses) / child.MICROBATCHES
    loss.backward()
    for stage, rank in zip(stages, results, strict=True):
        expected = {name: parameter.grad for name, parameter in stage.named_parameters()}
        torch.testing.assert_close(rank[name]["gradients"], expected, **TIGHT)
        assert all(gradient.any() for gradient in expected.values())


def test_microbatches_differ_in_packing_and_counts():
    """A loss that mixed up microbatches' packing or counts would be found out."""
    for case in child.CASES.values():
        _, labels, seq_idx = child.batch(case)
        counts = (labels != -100).reshape(child.MICROBATCHES, -1).sum(-1).tolist()
        assert len(set(counts)) > 1
        across = child.further(labels, torch.zeros_like(seq_idx), 1)
        assert (child.further(labels, seq_idx, 1) != across).any()
        if case.packing == "seq_idx":
            assert len(seq_idx.unique(dim=0)) == child.B
