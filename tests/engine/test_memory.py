"""Contract 5: real peaks on the CPU, in child processes. Bounds are sums of tensors, 5% and 16 MiB; none is tuned."""

import os
import sys
from pathlib import Path

import pytest

from compiled_loss.measure import run_in_child

pytestmark = [
    pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs Linux's /proc to measure real memory"),
    pytest.mark.xdist_group("memory"),  # one at a time: these are hundreds of MiB each
]
TOKENS, WIDTH, VOCAB, MIB = 4096, 256, 32768, 1 << 20
OUTPUTS = 4 * (TOKENS * WIDTH + VOCAB * WIDTH)
ENVIRONMENT = {"PYTHONPATH": os.pathsep.join(sys.path), "PYTHONWARNINGS": "ignore"}
CHUNKS = {
    ("tokens", "dW"): WIDTH,
    ("tokens", "dW / 8"): WIDTH // 8,
    ("vocab", "dW"): VOCAB * WIDTH // TOKENS,
    ("vocab", "dW / 8"): VOCAB * WIDTH // TOKENS // 8,
}


def measured(strategy, chunk, mode, **others):
    return run_in_child(
        "memory_child:measure",
        environment=ENVIRONMENT,
        strategy=strategy,
        chunk=chunk,
        mode=mode,
        **{"tokens": TOKENS, "width": WIDTH, "vocab": VOCAB, **others},
    )


def chunk_bytes(strategy, chunk):
    return 4 * chunk * (TOKENS if strategy == "vocab" else VOCAB)


@pytest.mark.parametrize(
    ("strategy", "size"),
    [pytest.param(*case, marks=[pytest.mark.slow] * (case != ("tokens", "dW")), id="-".join(case)) for case in CHUNKS],
)
def test_peak_compiled(strategy, size):
    chunk = CHUNKS[strategy, size]
    memory = measured(strategy, chunk, "compiled")
    assert memory["peak"] <= 1.05 * (OUTPUTS + chunk_bytes(strategy, chunk)) + 16 * MIB
    assert memory["kept"] <= (OUTPUTS if strategy == "tokens" else 0) + 16 * MIB


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["eager", "eager, compiled bodies"])
@pytest.mark.parametrize(("strategy", "size"), [("tokens", "dW"), ("vocab", "dW")], ids=str)
def test_peak_eager(strategy, size, mode):
    chunk = CHUNKS[strategy, size]
    most = OUTPUTS + chunk_bytes(strategy, chunk)
    if strategy == "tokens":
        most = max(most, 2 * OUTPUTS)  # eager backward cannot scale a saved dW in place
    assert measured(strategy, chunk, mode)["peak"] <= 1.05 * most + 16 * MIB


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["tokens", "vocab"])
def test_peak_with_fp32_accumulator(strategy):
    """16 chunks accumulate in fp32: counted once beside the outputs."""
    chunk = (TOKENS if strategy == "tokens" else VOCAB) // 16
    memory = measured(strategy, chunk, "compiled", dtype="bfloat16")
    accumulator = 4 * (VOCAB if strategy == "tokens" else TOKENS) * WIDTH
    assert memory["peak"] <= 1.05 * (OUTPUTS // 2 + accumulator + chunk_bytes(strategy, chunk) // 2) + 16 * MIB


@pytest.mark.slow
def test_naive_loop_exceeds_the_bound():
    """A test of the test, at half of the vocabulary."""
    vocab, chunk = VOCAB // 2, CHUNKS["vocab", "dW"]
    memory = measured("naive", chunk, "compiled", vocab=vocab)
    outputs = 4 * (TOKENS * WIDTH + vocab * WIDTH)
    assert memory["peak"] > 1.5 * (1.05 * (outputs + chunk_bytes("vocab", chunk)) + 16 * MIB)


@pytest.mark.slow
def test_peak_eager_at_half_of_the_vocabulary():
    vocab, chunk = VOCAB // 2, CHUNKS["tokens", "dW"]
    outputs, logits = 4 * (TOKENS * WIDTH + vocab * WIDTH), 4 * chunk * vocab
    memory = measured("tokens", chunk, "eager", vocab=vocab)
    assert memory["peak"] <= 1.05 * max(outputs + logits, 2 * outputs) + 16 * MIB


@pytest.mark.parametrize(
    ("loss", "shape", "compiled"),
    [
        ("probabilities", (4096, 8192), False),
        pytest.param("probabilities", (4096, 8192), True, marks=pytest.mark.slow),
        ("labels", (16, 1024, 64, 32), False),
        pytest.param("labels", (16, 1024, 64, 32), True, marks=pytest.mark.slow),
        pytest.param("probabilities", (16, 1024, 64, 32), False, marks=pytest.mark.slow),
        pytest.param("probabilities", (16, 1024, 64, 32), True, marks=pytest.mark.slow),
        pytest.param("statistics", (16, 1024, 64, 32), False, marks=pytest.mark.slow),
        pytest.param("statistics", (4096, 8192), True, marks=pytest.mark.slow),
    ],
)
def test_peak_on_logits(loss, shape, compiled):
    """Gradients alone, wherever the classes lie: logits of 128 MiB are neither copied nor kept twice."""
    shown = {"loss": loss, "shape": shape, "compiled": compiled}
    memory = run_in_child("memory_child:measure_logits", environment=ENVIRONMENT, **shown)
    assert memory["kept"] <= 16 * MIB
    assert memory["peak"] <= 1.05 * memory["gradients"] + 16 * MIB


def test_peak_counts_free_heap_once():
    """One block of 16 MiB after another, and two together."""
    assert run_in_child("memory_child:measure_heap", environment=ENVIRONMENT) == [16, 32]
