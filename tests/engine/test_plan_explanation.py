"""The planner's table: what is chosen is what the engine takes, bytes are the arithmetic's, nothing faster fits."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from compiled_loss import Chunking, linear_cross_entropy, plan
from compiled_loss.planner import cost
from compiled_loss.planner import plan as planner

LLAMA = (8192, 4096, 128256)
POWERS = {"tokens": st.sampled_from([512, 2048, 8192, 32768]), "width": st.sampled_from([256, 1024, 4096])}


@pytest.mark.parametrize("chunking", [Chunking(), Chunking(strategy="vocab"), Chunking(memory_budget="64MiB")])
@pytest.mark.parametrize("ranks", [1, 64])
@pytest.mark.parametrize("device", ["cuda", "cpu"])
def test_chosen_is_what_the_engine_takes(chunking, ranks, device):
    found = plan(*LLAMA, chunking=chunking, ranks=ranks, device=device)
    made = planner.plan(*LLAMA, torch.bfloat16, chunking, ranks=ranks, device=device)
    chosen = found.chosen
    assert (chosen.strategy, chosen.chunk_size, chosen.count) == (made.strategy, made.chunk, made.count)


def test_memory_budget_at_the_rates_of_the_device(monkeypatch):
    arguments = (torch.randn(64, 8, requires_grad=True), torch.randn(100, 8), torch.arange(64))
    chunking = Chunking(memory_budget=6400)
    compiled = torch.compile(linear_cross_entropy, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(*arguments, chunking=chunking), linear_cross_entropy(*arguments))
    asked = []
    monkeypatch.setattr(planner, "rates", lambda device: asked.append(device) or cost.H100)
    linear_cross_entropy(*arguments, chunking=chunking)
    assert set(asked) == {"cpu"}
    monkeypatch.undo()
    small = (1024, 256, 65536)
    strategies = {
        d: plan(*small, chunking=Chunking(memory_budget="32MiB"), device=d).chosen.strategy for d in ("cuda", "cpu")
    }
    assert strategies == {"cuda": "vocab", "cpu": "tokens"}
    slower = plan(*LLAMA, device="cpu").chosen.seconds / plan(*LLAMA, device="cuda").chosen.seconds
    assert slower > 100


def test_chunk_and_peak_bytes():
    """8 chunks accumulate in bf16; 16 in fp32, of which backward makes a copy in bf16."""
    found = plan(*LLAMA)
    tokens, width, vocab = LLAMA
    assert found.chosen.chunk_bytes == 1024 * vocab * 2
    assert found.chosen.peak_bytes == 2 * (tokens * width + vocab * width + 1024 * vocab)
    by_count = {(one.strategy, one.count): one for one in found.alternatives}
    assert by_count["tokens", 16].peak_bytes == 2 * tokens * width + (4 + 2) * vocab * width
    assert by_count["vocab", 16].peak_bytes == 2 * (vocab * width + tokens * 8016) + 4 * tokens * width
    assert by_count["vocab", 64].peak_bytes == 2 * vocab * width + (4 + 2) * tokens * width


@pytest.mark.parametrize("chunking", [Chunking(memory_budget="4GiB"), Chunking(chunk_size=100_000)])
def test_chunk_is_no_longer_than_n(chunking):
    chosen = plan(512, *LLAMA[1:], chunking=chunking).chosen
    assert (chosen.count, chosen.chunk_size, chosen.chunk_bytes) == (1, 512, 512 * LLAMA[2] * 2)


def test_max_label_tokens():
    found = plan(*LLAMA, chunking=Chunking(max_label_tokens=0.25))
    assert found.chosen == plan(2048, *LLAMA[1:]).chosen
    assert found.chosen.count == 2


@settings(max_examples=60, deadline=None)
@given(**POWERS, vocab=st.sampled_from([8192, 65536, 128256]), budget=st.integers(1 << 21, 1 << 30))
def test_chosen_is_the_fastest_that_fits(tokens, width, vocab, budget):
    found = plan(tokens, width, vocab, chunking=Chunking(memory_budget=budget))
    assert found.chosen.chunk_bytes <= budget
    within = [one.seconds for one in found.alternatives if one.chunk_bytes <= budget]
    assert all(found.chosen.seconds <= seconds * 1.001 for seconds in within)


def test_hand_computed_seconds():
    """Chunks of 2 of 4 tokens and of 25 of 50 columns: bound by operations, or by memory."""
    device = cost.Rates(half=1.0, single=10.0, memory=100.0, chunk=7.0, overlap=True)
    shape, gemm, passes = (4, 3, 50), 2 * 2 * 3 * 50 / 10.0, cost.PASSES * 4 * 2 * 50
    assert cost.seconds("tokens", 2, *shape, 4, 4, device) == pytest.approx(2 * (3 * gemm + passes / 100 + 7.0))
    slow = device._replace(memory=1.0)
    moved = 4 * (2 * 3 + 2 * 50 + 3 * 50)
    for accumulated in (4, 8):
        added = 4 * (2 * 3 + 2 * 50) + 2 * accumulated * 3 * 50
        found = cost.seconds("tokens", 2, *shape, 4, accumulated, slow)
        assert found == pytest.approx(2 * (2 * moved + added + passes + 7.0))
        found = cost.seconds("tokens", 2, *shape, 4, accumulated, slow._replace(overlap=False))
        assert found == pytest.approx(2 * (3 * gemm + 2 * moved + added + passes + 7.0))
    moved, added = (2 * (25 * 3 + 25 * 4) + times * 3 * 4 for times in (2, 2 * 4))
    found = cost.seconds("vocab", 25, *shape, 2, 4, slow._replace(half=1e9))
    assert found == pytest.approx(2 * (3 * moved + added + cost.PASSES * 2 * 25 * 4 + 7.0))
    assert cost.seconds("vocab", 50, *shape, 2, 2, device._replace(memory=1e9)) == pytest.approx(4 * 2 * 4 * 150 + 7)


def test_table_as_text():
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
        ((1, 1, 1), {"dtype": torch.int8}, TypeError, "dtype: expected float32, bfloat16, .*, got torch.int8"),
        ((1, 1, 1), {"chunking": None}, TypeError, "chunking: expected "),
        ((1, 1, 1), {"device": "cuda:0"}, ValueError, "device: expected 'cuda' or 'cpu', got 'cuda:0'"),
        ((1, 1, 1), {"ranks": -1}, ValueError, "ranks: expected an int >= 1, got -1"),
        (
            LLAMA,
            {"chunking": Chunking(memory_budget=100)},
            ValueError,
            "memory_budget: expected at least 16384 bytes, one col",
        ),
        (LLAMA, {"chunking": Chunking(accumulate_dtype=torch.float16)}, ValueError, "accumulate_dtype: expected "),
    ],
)
def test_plan_errors(sizes, more, error, text):
    with pytest.raises(error, match=text):
        plan(*sizes, **more)
