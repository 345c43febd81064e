"""The cost of a strategy: seconds at a device's rates, and bytes. Pure.

N tokens, H width, V vocabulary, C rows (token strategy) or columns (vocab strategy) per chunk.

NOTE [Cost model]
Bytes that compiled code holds beyond the inputs, with e bytes per element, and a bytes per accumulated element:

    token strategy    e N H + a V H + e C V      dH, dW, one chunk of logits; dH and dW stay until backward
    vocab strategy    a N H + e V H + e N C      dH, dW, one chunk of logits, in backward; O(N) until then

If a is not e, the copy of the accumulated gradient in the input's dtype takes the place of the chunk at the end, and
the larger of the two counts. Seconds are the sum over chunks of

    each GEMM         its operations and the bytes it moves, at the device's rates: the larger of the two where it loads
                      while it multiplies, as GPUs do, else their sum; the token strategy runs 3 of C rows, which read W
                      twice, and read and write dW; the vocab strategy 4 of C columns, which read the hidden states
                      three times, and read and write dH
    the bodies        PASSES over the chunk's logits, at the memory's rate
    a constant        the further cost of a chunk, in launches and in the operators around it

So the token strategy is faster as long as its chunks have enough rows to feed the GEMMs. The vocab strategy is faster
where a memory budget leaves fewer rows.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

Strategy = Literal["tokens", "vocab"]
PASSES = 4  # three that read, for maximum, sum and gradient, and one that writes; either strategy's


class Rates(NamedTuple):
    """Rates of a device."""

    half: float  # operations per second of GEMMs of 16-bit numbers
    single: float  # the same for fp32
    memory: float  # bytes per second
    chunk: float  # further seconds per chunk
    overlap: bool  # whether a GEMM loads while it multiplies


# Fitted by benches/search.py to benches/results/search-2.13.0-cpu.jsonl: two cores of an AMD EPYC with AVX-512.
CPU = Rates(half=774e9, single=182e9, memory=19.2e9, chunk=0.0, overlap=False)
# SXM, data sheet: bf16 dense, fp32 without TF32. A chunk's constant is assumed: five launches of 4 us. Not measured.
H100 = Rates(half=990e12, single=67e12, memory=3.35e12, chunk=2e-5, overlap=True)


def rates(device: str) -> Rates:
    """Returns the rates of a type of device."""
    return CPU if device == "cpu" else H100


def seconds(
    strategy: Strategy,
    size: int,
    tokens: int,
    width: int,
    vocab: int,
    itemsize: int,
    accumulated: int,
    device: Rates,
) -> float:
    """Returns seconds for the loss and both gradients, in chunks of `size` tokens or columns: NOTE [Cost model]."""
    whole, other, gemms = (tokens, vocab, 3) if strategy == "tokens" else (vocab, tokens, 4)
    operations = 2 * size * width * other / (device.half if itemsize == 2 else device.single)
    chunk = itemsize * (size * width + size * other)
    moved, added = chunk + itemsize * width * other, chunk + 2 * accumulated * width * other

    def gemm(moved: int) -> float:
        loading = moved / device.memory
        return max(operations, loading) if device.overlap else operations + loading

    one = (gemms - 1) * gemm(moved) + gemm(added)
    return (one + PASSES * itemsize * size * other / device.memory + device.chunk) * whole / size


def chunk_bytes(strategy: Strategy, size: int, tokens: int, vocab: int, itemsize: int) -> int:
    """Returns the bytes of a chunk of logits."""
    return size * (vocab if strategy == "tokens" else tokens) * itemsize


def peak_bytes(
    strategy: Strategy, size: int, tokens: int, width: int, vocab: int, itemsize: int, accumulated: int
) -> int:
    """Returns the peak over the inputs in bytes: NOTE [Cost model]."""
    summed, other = (vocab, tokens) if strategy == "tokens" else (tokens, vocab)
    copy = 0 if accumulated == itemsize else summed * width * itemsize
    gradients = width * (accumulated * summed + itemsize * other)
    return gradients + max(copy, chunk_bytes(strategy, size, tokens, vocab, itemsize))
