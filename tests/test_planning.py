"""The planner's table: what is chosen is what a call takes, its bytes those of the arithmetic, nothing faster fits."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from compiled_loss import Chunking, plan
from compiled_loss.engine import cost
from compiled_loss.engine import plan as planner

LLAMA = (8192, 4096, 128256)
POWERS = {"tokens": st.sampled_from([512, 2048, 8192, 32768]), "width": st.sampled_from([256, 1024, 4096])}


@pytest.mark.parametrize("chunking", [Chunking(), Chunking(strategy="vocab"), Chunking(memory_budget="64MiB")])
@pytest.mark.parametrize("ranks", [1, 64])
def test_what_is_chosen_is_what_a_call_takes(chunking, ranks):
    found = plan(*LLAMA, chunking=chunking, ranks=ranks)
    made = planner.plan(*LLAMA, torch.bfloat16, chunking, ranks=ranks)
    chosen = found.chosen
    assert (chosen.strategy, chosen.chunk_size, chosen.count) == (made.strategy, made.chunk, made.count)


def test_bytes():
    """8 chunks accumulate in bf16, 16 in fp32."""
    found = plan(*LLAMA)
    tokens, width, vocab = LLAMA
    assert found.chosen.chunk_bytes == 1024 * vocab * 2
    assert found.chosen.peak_bytes == 2 * (tokens * width + vocab * width + 1024 * vocab)
    by_count = {(one.strategy, one.count): one for one in found.alternatives}
    assert by_count["tokens", 16].peak_bytes == 2 * (tokens * width + 512 * vocab) + 4 * vocab * width
    assert by_count["vocab", 16].peak_bytes == 2 * (vocab * width + tokens * 8016) + 4 * tokens * width


@settings(max_examples=60, deadline=None)
@given(**POWERS, vocab=st.sampled_from([8192, 65536, 128256]), budget=st.integers(1 << 21, 1 << 30))
def test_nothing_that_fits_is_faster(tokens, width, vocab, budget):
    found = plan(tokens, width, vocab, chunking=Chunking(memory_budget=budget))
    assert found.chosen.chunk_bytes <= budget
    within = [one.seconds for one in found.alternatives if one.chunk_bytes <= budget]
    assert all(found.chosen.seconds <= seconds * 1.001 for seconds in within)


def test_seconds_by_hand():
    """Two chunks of 2 of 4 tokens: GEMMs are bound by operations but the last, which reads and writes dW."""
    device = cost.Rates(half=1.0, single=10.0, memory=100.0, chunk=7.0)
    gemm = 2 * 2 * 3 * 50 / 10.0
    moved = 4 * (2 * 3 + 2 * 50 + 2 * 3 * 50) / 100.0
    bodies = cost.PASSES * 4 * 2 * 50 / 100.0
    assert gemm > moved
    assert cost.seconds("tokens", 2, 4, 3, 50, 4, device) == pytest.approx(2 * (3 * gemm + bodies + 7.0))
    slow = device._replace(memory=1.0)
    moved, added = (4 * (2 * 3 + 2 * 50 + times * 3 * 50) for times in (1, 2))
    bodies = cost.PASSES * 4 * 2 * 50
    assert cost.seconds("tokens", 2, 4, 3, 50, 4, slow) == pytest.approx(2 * (2 * moved + added + bodies + 7.0))
    assert cost.seconds("vocab", 50, 4, 3, 50, 2, device._replace(memory=1e9)) == pytest.approx(4 * 2 * 4 * 150 + 7)


def test_a_table():
    text = str(plan(*LLAMA, chunking=Chunking(memory_budget="512MiB")))
    assert text.count("chosen") == 1
    assert text.count("over budget") == 4
    assert "4 x 2092" in text
    widths = {len(line) for line in text.splitlines()}
    assert len(widths) == 1
    assert "vocab" not in str(plan(*LLAMA, chunking=Chunking(strategy="tokens")))


@pytest.mark.parametrize(
    ("sizes", "more", "error", "text"),
    [
        ((0, 1, 1), {}, ValueError, "tokens: expected an int >= 1, got 0"),
        ((1, 2.0, 1), {}, TypeError, "width: expected an int >= 1, got float"),
        ((1, 1, 1), {"ranks": -1}, ValueError, "ranks: expected an int >= 1, got -1"),
        (
            LLAMA,
            {"chunking": Chunking(memory_budget=100)},
            ValueError,
            "memory_budget: expected at least 256512 bytes",
        ),
        (LLAMA, {"chunking": Chunking(accumulate_dtype=torch.float16)}, ValueError, "accumulate_dtype: expected "),
    ],
)
def test_errors(sizes, more, error, text):
    with pytest.raises(error, match=text):
        plan(*sizes, **more)
