"""What one rank of many runs: peak, collectives and their bytes as documented, and on every rank in the same order.

Code alone is proved here, with torch's fake group and no GPU; test_sharding.py proves the numbers.
"""

import pytest
from inspected_ranks import Part, cached, distilled, exchanged, linear, logits

from compiled_loss import Chunking
from compiled_loss.inspection import inspect
from compiled_loss.inspection.network import Collective
from compiled_loss.testing import assert_assembles, assert_peak_below, assert_single_graph

pytestmark = pytest.mark.xdist_group("GPU ranks")
N, H, V = 8192, 4096, 262144  # bf16
CHUNKS = 4
FP32, BF16 = 4, 2
AGREED = 6 * 8  # by which ranks compare what they have


def collectives(found):
    """Their bytes, in order, of each pass."""
    return [[each.size for each in one.collectives] for one in found.passes]


@pytest.mark.parametrize(
    ("world", "chunks", "size"),
    [
        (8, 4, N // 4),
        (64, 2, None),  # the default's: H rows
        pytest.param(64, 4, N // 4, marks=pytest.mark.slow),
        pytest.param(64, 1, N, marks=pytest.mark.slow),
    ],
)
def test_tokens_strategy(world, chunks, size):
    """Two collectives a chunk of rows and one of 48 bytes forward, and one of dH back."""
    own = V // world
    chunking = Chunking(strategy="tokens", chunk_size=size)
    inputs = f"bf16[{N},{H}]:grad", f"bf16[{own},{H}]:grad", f"int64[{N}]:0..{V - 1}"
    found = inspect(linear(Part(V, world, world - 1), chunking), *inputs)
    assert_single_graph(found)
    assert_assembles(found, ["cuda:sm_90"])
    rows = N // chunks
    assert collectives(found) == [[*[FP32 * rows, 2 * FP32 * rows] * chunks, AGREED], [BF16 * N * H]]
    outputs, chunk, turn = BF16 * (N * H + own * H), BF16 * rows * own, BF16 * rows * H
    assert_peak_below(found, int(1.05 * (outputs + max(chunk + turn, BF16 * N * H))))
    assert found.saved_bytes <= outputs + 64 * N


@pytest.mark.parametrize("world", [pytest.param(8, marks=pytest.mark.slow), 64])
def test_vocab_strategy(world):
    """Three collectives forward, one of 48 bytes, and one back, however many chunks there are."""
    own = V // world
    chunking = Chunking(strategy="vocab", chunk_size=own // CHUNKS)
    inputs = f"bf16[{N},{H}]:grad", f"bf16[{own},{H}]:grad", f"int64[{N}]:0..{V - 1}"
    found = inspect(linear(Part(V, world, 0), chunking), *inputs)
    assert_single_graph(found)
    assert_assembles(found, ["cuda:sm_90"])
    assert collectives(found) == [[FP32 * N, 2 * FP32 * N, AGREED], [BF16 * N * H]]
    outputs, chunk = BF16 * (N * H + own * H), BF16 * N * own // CHUNKS
    assert_peak_below(found, int(1.05 * (outputs + max(chunk, BF16 * N * H))))
    assert found.saved_bytes <= 64 * N


def test_teacher_topk():
    """Three collectives a chunk of rows, the top's of [rows, k], and one of 48 bytes; logits and a copy of them."""
    world, k, own = 8, 64, V // 8
    inputs = (f"bf16[{N},{H}]:grad", f"bf16[{own},{H}]:grad", f"bf16[{N},{k}]", f"int64[{N},{k}]:0..{V - 1}")
    call = cached(Part(V, world, 3), Chunking(chunk_size=N // CHUNKS), "sum")
    found = inspect(call, *inputs, f"int64[{N}]:0..{V - 1}", assemble=False)
    assert_single_graph(found)
    rows = N // CHUNKS
    assert collectives(found) == [[*[FP32 * rows * k, FP32 * rows, 3 * FP32 * rows] * CHUNKS, AGREED], [BF16 * N * H]]
    outputs, chunk, turn = BF16 * (N * H + own * H), BF16 * rows * own, BF16 * rows * H
    assert_peak_below(found, int(1.05 * (outputs + max(2 * chunk + turn, BF16 * N * H))))
    assert found.saved_bytes <= outputs + 64 * N


def test_every_kind_of_collective():
    """Of 8 rows of 128 bytes; who waits for a tensor holds no second one."""
    found = inspect(exchanged(Part(8, 8, 3)), "f32[4,8]", backward=False, assemble=False)
    assert found.forward.collectives == (
        Collective(kind="all-gather", size=8 * 128, ranks=8),
        Collective(kind="reduce-scatter", size=8 * 128, ranks=8),
        Collective(kind="broadcast", size=128, ranks=8),
    )
    assert found.forward.peak_bytes == (1 + 8) * 128
    assert len(found.forward.launches) == 5
    assert found.sent_bytes == 2 * 7 * 128
    assert found.communication_seconds() is None  # the model has no broadcast


def test_logits():
    """Three collectives forward, one of 48 bytes, none back; nothing of [N, V] but logits and their gradient."""
    world, own = 8, V // 8
    found = inspect(logits(Part(V, world, 0)), f"bf16[{N},{own}]:grad", f"int64[{N}]:0..{V - 1}")
    assert_single_graph(found)
    assert_assembles(found, ["cuda:sm_90"])
    assert collectives(found) == [[FP32 * N, 2 * FP32 * N, AGREED], []]
    assert found.forward.peak_bytes <= 64 * N
    assert_peak_below(found, int(1.05 * BF16 * N * own))


@pytest.mark.parametrize(
    "name",
    [
        "tokens",
        *(pytest.param(n, marks=pytest.mark.slow) for n in ("vocab", "distillation, sum", "distillation, none")),
        *(pytest.param(n, marks=pytest.mark.slow) for n in ("cached teacher, sum", "cached teacher, none")),
    ],
)
def test_order_of_collectives_on_ranks_of_different_shapes(name):
    """Of 7 classes over 4 ranks one has 2, one 1 or none: an order of its own, and ranks would wait for ever."""
    tokens, width, orders = 12, 6, []
    for vocab, rank in ((7, 0), (7, 3), (5, 0), (5, 3)):
        start = min(vocab, -(-vocab // 4) * rank)
        own = min(vocab, start + -(-vocab // 4)) - start
        chunking = Chunking(strategy="vocab", chunk_size=1) if name == "vocab" else Chunking(chunk_size=5)
        head = (f"f32[{tokens},{width}]:grad", f"f32[{own},{width}]:grad")
        labels = f"int64[{tokens}]:0..{vocab - 1}"
        part = Part(vocab, 4, rank)
        if name.startswith("distillation"):
            teacher = (f"f32[{tokens},{width}]", f"f32[{own},{width}]")
            found = inspect(distilled(part, chunking, name[-4:].strip()), *head, *teacher, labels, assemble=False)
        elif name.startswith("cached"):
            top = (f"f32[{tokens},3]", f"int64[{tokens},3]:0..{vocab - 1}")
            found = inspect(cached(part, chunking, name[-4:].strip()), *head, *top, labels, assemble=False)
        else:
            found = inspect(linear(part, chunking), *head, labels, assemble=False)
        orders.append(collectives(found))
    assert orders[0] == orders[1] == orders[2] == orders[3]
    chunks, each = {"tokens": (3, 2), "vocab": (1, 2)}.get(name, (3, 3))
    assert len(orders[0][0]) == chunks * each + 1
    assert len(orders[0][1]) == (chunks + 1 if name == "cached teacher, none" else 1)  # each looks its top up again
