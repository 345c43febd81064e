"""Contract of the planner: every token or column in exactly one chunk, budgets obeyed, sizes as the NOTEs say."""

import dataclasses

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import bfloat16, float16, float32, float64
from torch.utils._python_dispatch import TorchDispatchMode

from compiled_loss import Chunking
from compiled_loss.planner.plan import COLUMN_MULTIPLE, MAX_ROUNDINGS, MIN_COLUMNS, MIN_ROWS, ROW_MULTIPLE, Plan, plan

DTYPES = st.sampled_from([float16, bfloat16, float32, float64])
SIZES = {
    "tokens": st.one_of(st.integers(0, 3000), st.integers(0, 200_000)),
    "width": st.one_of(st.integers(1, 1000), st.integers(1, 20_000)),
    "vocab": st.one_of(st.integers(1, 3000), st.integers(1, 300_000)),
    "dtype": DTYPES,
}


def covers(made, tokens, vocab):
    """Every chunk but the last has `chunk` rows or columns, the last has one at least: none twice, none missing."""
    whole = tokens if made.strategy == "tokens" else vocab
    assert made.count >= 1
    assert made.count * made.chunk >= whole
    assert (made.count - 1) * made.chunk < max(whole, 1)


def most_rows(width, ranks=1):
    """NOTE [Default chunk]: C <= H, at most max(1024, H / 4) for each node of 8 ranks, at least MIN_ROWS."""
    return max(MIN_ROWS, min(width, (ranks + 7) // 8 * max(1024, width // 4)))


@settings(max_examples=300, deadline=None)
@given(**SIZES, ranks=st.sampled_from([1, 2, 3, 8, 64]))
@example(tokens=0, width=1, vocab=1, dtype=float32, ranks=1)
@example(tokens=513, width=768, vocab=50_257, dtype=bfloat16, ranks=1)
@example(tokens=131_073, width=512, vocab=32_000, dtype=bfloat16, ranks=1)
@example(tokens=200_000, width=512, vocab=32_000, dtype=bfloat16, ranks=1)
def test_default_chunks_of_tokens(tokens, width, vocab, dtype, ranks):
    made = plan(tokens, width, vocab, dtype, Chunking(), ranks=ranks)
    assert made.strategy == "tokens"
    covers(made, tokens, vocab)
    if tokens <= MIN_ROWS:
        assert (made.count, made.chunk) == (1, tokens)
    # The chunk [C, V] has `most` rows, so no larger than dW [V, H] where H >= MIN_ROWS; then N is split evenly.
    most = most_rows(width, ranks)
    assert made.chunk < most + ROW_MULTIPLE
    assert made.chunk == tokens or (made.chunk % ROW_MULTIPLE == 0 and made.chunk > most // 2)


@settings(max_examples=200, deadline=None)
@given(**SIZES)
@example(tokens=1, width=1, vocab=1, dtype=float32)
@example(tokens=8192, width=512, vocab=MIN_COLUMNS + 1, dtype=float32)
def test_default_chunks_of_vocab(tokens, width, vocab, dtype):
    made = plan(tokens, width, vocab, dtype, Chunking(strategy="vocab"))
    covers(made, tokens, vocab)
    # The bytes of the token strategy's chunk, or MIN_COLUMNS; then evened out, and rounded up to a multiple.
    assert made.chunk < max(MIN_COLUMNS, most_rows(width) * vocab / max(tokens, 1)) + COLUMN_MULTIPLE
    assert made.chunk == vocab or (made.chunk % COLUMN_MULTIPLE == 0 and made.chunk > MIN_COLUMNS // 2)


@settings(max_examples=100, deadline=None)
@given(**SIZES, size=st.integers(1, 20_000))
def test_chunk_size_is_obeyed(tokens, width, vocab, dtype, size):
    rows = plan(tokens, width, vocab, dtype, Chunking(chunk_size=size))
    columns = plan(tokens, width, vocab, dtype, Chunking(strategy="vocab", chunk_size=size))
    assert (rows.strategy, rows.chunk, columns.chunk) == ("tokens", size, min(size, vocab))
    covers(rows, tokens, vocab)
    covers(columns, tokens, vocab)


@settings(max_examples=200, deadline=None)
@given(**SIZES, strategy=st.sampled_from(["auto", "tokens", "vocab"]), budget=st.integers(1, 2**33))
def test_memory_budget_is_obeyed(tokens, width, vocab, dtype, strategy, budget):
    made = plan(tokens, width, vocab, dtype, Chunking(strategy=strategy, memory_budget=budget))
    covers(made, tokens, vocab)
    least = dtype.itemsize * (vocab if made.strategy == "tokens" else tokens)
    if budget < least:
        assert made.chunk == 1  # refused by the caller: see test_errors
    else:
        assert least * made.chunk <= budget


@settings(max_examples=100, deadline=None)
@given(**SIZES, size=st.one_of(st.none(), st.integers(1, 5000)), strategy=st.sampled_from(["tokens", "vocab"]))
def test_accumulate_dtype(tokens, width, vocab, dtype, size, strategy):
    made = plan(tokens, width, vocab, dtype, Chunking(strategy=strategy, chunk_size=size))
    own = dtype in (float32, float64) or (dtype == bfloat16 and made.count <= MAX_ROUNDINGS)
    assert made.accumulate_dtype == (dtype if own else float32)
    asked = plan(tokens, width, vocab, dtype, Chunking(strategy=strategy, chunk_size=size, accumulate_dtype=float64))
    assert asked == dataclasses.replace(made, accumulate_dtype=float64)


def test_accumulate_dtype_at_the_limit():
    assert MAX_ROUNDINGS == 8
    for tokens, dtype, expected in ((80, bfloat16, bfloat16), (81, bfloat16, float32), (10, float16, float32)):
        assert plan(tokens, 64, 100, dtype, Chunking(chunk_size=10)).accumulate_dtype == expected


@pytest.mark.parametrize(
    ("sizes", "strategy", "chunk", "count", "accumulate"),
    [
        # H/4 = 1024 rows; 8192 / 1024 chunks, the most that bf16 sums.
        ((8192, 4096, 131072, bfloat16), "tokens", 1024, 8, bfloat16),
        ((8192, 4096, 131072, float16), "tokens", 1024, 8, float32),
        # 5 chunks of 1000, rounded up to a multiple of 16.
        ((5000, 4096, 131072, bfloat16), "tokens", 1008, 5, bfloat16),
        # Llama 3 405B: H/4 = 4096 rows.
        ((16384, 16384, 128256, bfloat16), "tokens", 4096, 4, bfloat16),
        # Gemma 2 2B: H = 2304, 1024 rows; 16 chunks.
        ((16384, 2304, 256000, bfloat16), "tokens", 1024, 16, float32),
        # GPT-2: C <= H = 768, so ceil(8192 / 768) = 11 chunks of ceil(8192 / 11) = 745.
        ((8192, 768, 50257, float32), "tokens", 752, 11, float32),
        # H < MIN_ROWS: the kernels win.
        ((4096, 64, 32000, bfloat16), "tokens", 512, 8, bfloat16),
        # Up to MIN_ROWS tokens there is one chunk.
        ((512, 4096, 131072, bfloat16), "tokens", 512, 1, bfloat16),
        ((1, 4096, 131072, bfloat16), "tokens", 1, 1, bfloat16),
        # The bytes of 1024 rows of 8192: an eighth of the columns.
        ((8192, 4096, 131072, bfloat16), "vocab", 16384, 8, bfloat16),
        # 16 000 columns are an exact sixteenth, and no multiple of 256: 16 128, of which 16 are still needed.
        ((16384, 2304, 256000, bfloat16), "vocab", 16128, 16, float32),
        # 768 of 8192 rows are 4711 of 50257 columns: 11 chunks of 4569, rounded up to 4608.
        ((8192, 768, 50257, float32), "vocab", 4608, 11, float32),
        # 512 of 131072 rows are 125 of 32000 columns, MIN_COLUMNS = 2048 is more: 16 chunks of 2000.
        ((131072, 64, 32000, bfloat16), "vocab", 2048, 16, float32),
        # A few tokens need no chunks.
        ((16, 4096, 131072, bfloat16), "vocab", 131072, 1, bfloat16),
    ],
)
def test_production_shapes(sizes, strategy, chunk, count, accumulate):
    expected = Plan(strategy=strategy, chunk=chunk, count=count, accumulate_dtype=accumulate)
    assert plan(*sizes, Chunking(), strategies=(strategy,)) == expected


@pytest.mark.parametrize(("ranks", "chunk"), [(1, 1024), (8, 1024), (9, 2048), (24, 2736), (32, 4096), (64, 4096)])
def test_nodes_take_longer_chunks(ranks, chunk):
    """And so wait for each other less often; up to H = 4096 rows, the bytes of dW."""
    assert plan(8192, 4096, 131072 // ranks, bfloat16, Chunking(), ranks=ranks).chunk == chunk


@pytest.mark.parametrize(
    ("sizes", "budget", "strategy", "chunk"),
    [
        # Ample: three GEMMs beat four. 256 MiB are 1024 rows of 131072 in bf16.
        ((8192, 4096, 131072, bfloat16), 1 << 28, "tokens", 1024),
        # 2 MiB are 8 rows, for each of which W is moved twice and dW twice, or 1024 columns.
        ((1024, 4096, 131072, bfloat16), 1 << 21, "vocab", 1024),
        # 2 MiB are 16 columns of 65536 tokens, or 1024 rows of 1024.
        ((65536, 4096, 1024, bfloat16), 1 << 21, "tokens", 1024),
        # As many tokens as classes: fewer GEMMs again.
        ((4096, 1024, 4096, float32), 1 << 20, "tokens", 64),
    ],
)
def test_auto_takes_the_cheaper_strategy_within_a_budget(sizes, budget, strategy, chunk):
    made = plan(*sizes, Chunking(memory_budget=budget))
    assert (made.strategy, made.chunk) == (strategy, chunk)
    for only in ("tokens", "vocab"):  # where only one is possible, it is taken, cheaper or not
        assert plan(*sizes, Chunking(memory_budget=budget), strategies=(only,)).strategy == only


def test_strategies_are_in_order_of_preference():
    sizes = (8192, 4096, 131072, bfloat16)
    assert plan(*sizes, Chunking(), strategies=("tokens", "vocab")).strategy == "tokens"
    assert plan(*sizes, Chunking(), strategies=("vocab", "tokens")).strategy == "vocab"
    assert plan(*sizes, Chunking(), strategies=("vocab",)).strategy == "vocab"
    for name in ("tokens", "vocab"):  # asked for by name
        assert plan(*sizes, Chunking(strategy=name)).strategy == name


def test_planning_runs_no_tensor_operation():
    """Integers in, integers out: no tensor, no device, the same answer every time."""

    class Refuse(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            raise AssertionError(f"planning ran {func}")

    sizes = (8192, 4096, 131072, bfloat16)
    with Refuse(), torch.device("meta"):
        for chunking in (Chunking(), Chunking(memory_budget=1 << 21), Chunking(strategy="vocab", chunk_size=100)):
            made = [plan(*sizes, chunking) for _ in range(2)]
            assert made[0] == made[1]
            assert all(type(getattr(made[0], name)) is int for name in ("chunk", "count"))
