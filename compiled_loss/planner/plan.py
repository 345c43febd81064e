"""How long the chunks are: integers in, a frozen `Plan` out. Pure; asks no device, allocates nothing.

N tokens, H width, V vocabulary, C rows (token strategy) or columns (vocab strategy) a chunk.

NOTE [Default chunk]
The token strategy takes as many rows per chunk as these rules allow:

- at most H: the chunk is then no larger than dW;
- at most max(1024, H / 4): longer chunks are not faster. Ranks on n nodes take n times as many, because a chunk waits
  for two collectives, and the GEMMs of shorter chunks take no longer than that;
- at least MIN_ROWS, even if H is smaller: with fewer rows Inductor splits the reductions of a body over several kernels
  (for sm_90 and 131072 columns, one kernel per chunk at 512 and 1024 rows, and five at 256).

N is then spread evenly over the chunks, in multiples of ROW_MULTIPLE, at which a GPU loads several elements at once.
The vocab strategy takes as many columns as have the same bytes, at least MIN_COLUMNS, in multiples of COLUMN_MULTIPLE.

A loop plans when it runs, and knows N. Only a choice between the strategies within a memory budget is made before, and
sees N rounded up to a power of two, so that a compiled caller has a graph for each power at most.

NOTE [Accumulator]
A sum over chunks in bf16 rounds once a chunk. The error of dW over that of the unchunked loss, N=8192, on a CPU
(benches/accumulation.py), where an fp32 accumulator adds products that were rounded to bf16; a GPU's does not:

    chunks               1    2    4    8   16   32   64  256  1024
    bf16 accumulator   1.0  1.2  1.5  2.0  2.8  3.8  5.5   13    22
    fp32 accumulator   1.0  1.4  1.4  1.4  1.4  1.4  1.4  1.3   1.2

So up to 8 chunks the error is about twice the unchunked loss's. Partial sums of random signs have sqrt(i / K) of the
sum's size, which makes sqrt((K + 1) / 2) of one rounding: 2.1 at 8 chunks, where 2.3 was seen. With the rounding that
the unchunked loss makes anyway, twice its error and one rounding bound it. In the largest element, where all may have
one sign, it is (K + 1) / 2: 4.5 at 8 chunks, where 3.7 was seen. An fp32 accumulator costs four more bytes an element
at the peak, two of them backward's copy, and more traffic a chunk.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import NamedTuple

import torch

from compiled_loss import checks
from compiled_loss.checks import numbers
from compiled_loss.planner.chunking import Chunking, is_compiled
from compiled_loss.planner.cost import Strategy, chunk_bytes, rates, seconds

MIN_ROWS = 512  # from which on Inductor writes a reduction over columns as one kernel
RANKS_A_NODE = 8  # which NVLink joins
MIN_COLUMNS = 2048
ROW_MULTIPLE = 16
COLUMN_MULTIPLE = 256
MAX_ROUNDINGS = 8  # additions into a 16-bit accumulator; beyond, it is fp32: NOTE [Accumulator]


@dataclass(frozen=True, kw_only=True, slots=True)
class Plan:
    """A plan: `count` chunks of `chunk` tokens or columns, the last one perhaps shorter."""

    strategy: Strategy
    chunk: int
    count: int
    accumulate_dtype: torch.dtype


class Lengths(NamedTuple):
    """What an operator is told of its chunks, all of it known before the number of tokens is."""

    chunk_size: int | None
    memory_budget: int | None
    accumulate_dtype: torch.dtype | None
    columns: int  # of each rank, the same number on all; of two heads those of both
    ranks: int
    compiled: bool

    def plan(self, strategy: Strategy, hidden: torch.Tensor) -> Plan:
        """For these hidden states."""
        return _planned(self, strategy, *hidden.shape, hidden.dtype)


@functools.lru_cache(maxsize=4096)
def _planned(of: Lengths, strategy: Strategy, tokens: int, width: int, dtype: torch.dtype) -> Plan:
    chunking = Chunking(chunk_size=of.chunk_size, memory_budget=of.memory_budget, accumulate_dtype=of.accumulate_dtype)
    return plan(tokens, width, of.columns, dtype, chunking, ranks=of.ranks, strategies=(strategy,))


def lengths(
    tokens: int,
    width: int,
    columns: int,
    dtype: torch.dtype,
    device: torch.device,
    chunking: Chunking,
    *,
    ranks: int,
    strategies: tuple[Strategy, ...],
) -> tuple[Strategy, Lengths]:
    """The strategy, and the errors that only the sizes can tell; N is asked for where there is a budget alone."""
    if chunking.accumulate_dtype is not None:
        checks.chunking.accumulator(chunking.accumulate_dtype, dtype)
    strategy = choose(tokens, width, columns, dtype, chunking, strategies=strategies, device=device.type)
    if chunking.budget is not None:
        least = chunk_bytes(strategy, 1, tokens, columns, dtype.itemsize)
        if numbers.holds(least > chunking.budget, otherwise=False):
            checks.chunking.memory_budget(chunking.budget, "token" if strategy == "tokens" else "column", least)
    how = (chunking.chunk_size, chunking.budget, chunking.accumulate_dtype)
    return strategy, Lengths(*how, columns, ranks, is_compiled(device, chunking.compile))


def plan(
    tokens: int,
    width: int,
    vocab: int,
    dtype: torch.dtype,
    chunking: Chunking,
    *,
    ranks: int = 1,
    strategies: tuple[Strategy, ...] = ("tokens", "vocab"),
    device: str = "cuda",
) -> Plan:
    """The plan for a rank's [tokens, width] @ [vocab, width].T among `strategies`, those that can do it, best first.

    `device` is a type, at whose rates a memory budget is spent.
    """
    strategy = choose(tokens, width, vocab, dtype, chunking, strategies=strategies, device=device)
    extent, multiple = (tokens, ROW_MULTIPLE) if strategy == "tokens" else (vocab, COLUMN_MULTIPLE)
    chunk = _most(strategy, tokens, width, vocab, dtype, chunking, ranks)
    if chunking.chunk_size is None and chunking.budget is None:
        even = _quotient(extent, max(1, _quotient(extent, chunk)))
        chunk = min(extent, _quotient(even, multiple) * multiple)
    count = max(1, _quotient(extent, max(1, chunk)))
    accumulate = chunking.accumulate_dtype or _accumulate_dtype(dtype, count)
    return Plan(strategy=strategy, chunk=chunk, count=count, accumulate_dtype=accumulate)


def choose(
    tokens: int,
    width: int,
    vocab: int,
    dtype: torch.dtype,
    chunking: Chunking,
    *,
    strategies: tuple[Strategy, ...],
    device: str,
) -> Strategy:
    """The strategy among those that can do it, best first; it asks for N only where a memory budget decides."""
    if chunking.strategy != "auto":
        return chunking.strategy
    if chunking.budget is None or len(strategies) == 1:
        return strategies[0]
    least = [chunk_bytes(s, 1, tokens, vocab, dtype.itemsize) for s in strategies]
    fits = [numbers.holds(size <= chunking.budget, otherwise=False) for size in least]
    fitting = [s for s, one in zip(strategies, fits, strict=True) if one]
    if not fitting:  # an error will name the least
        return strategies[int(numbers.holds(least[1] < least[0], otherwise=False))]
    strategy, *others = fitting
    for other in others:  # no min(key=...), which Dynamo does not trace
        times = [_seconds(s, _rounded(tokens), width, vocab, dtype, chunking, device) for s in (strategy, other)]
        strategy = other if times[1] < times[0] else strategy
    return strategy


def _rounded(tokens: int) -> int:
    """N up to the next power of two, MIN_ROWS at least."""
    rounded = MIN_ROWS
    while rounded < tokens:
        rounded *= 2
    return rounded


def _quotient(extent: int, size: int) -> int:
    return -(-extent // size)


def _most(
    strategy: Strategy, tokens: int, width: int, vocab: int, dtype: torch.dtype, chunking: Chunking, ranks: int = 1
) -> int:
    """Most tokens or columns per chunk: NOTE [Default chunk]."""
    other = vocab if strategy == "tokens" else tokens
    if chunking.chunk_size is not None:
        size = chunking.chunk_size
    elif chunking.budget is not None:
        size = max(1, chunking.budget // max(1, other * dtype.itemsize))
    else:
        nodes = _quotient(ranks, RANKS_A_NODE)
        size = max(MIN_ROWS, min(width, nodes * max(1024, width // 4)))
        if strategy == "vocab":
            size = max(MIN_COLUMNS, size * vocab // max(size, tokens))
    return size if strategy == "tokens" else min(vocab, size)


def _seconds(
    strategy: Strategy, tokens: int, width: int, vocab: int, dtype: torch.dtype, chunking: Chunking, device: str
) -> float:
    """In the longest chunks it may take: NOTE [Cost model]."""
    whole = tokens if strategy == "tokens" else vocab
    size = min(whole, _most(strategy, tokens, width, vocab, dtype, chunking))
    accumulated = chunking.accumulate_dtype or _accumulate_dtype(dtype, _quotient(whole, size))
    sizes = (tokens, width, vocab, dtype.itemsize, accumulated.itemsize)
    return seconds(strategy, size, *sizes, rates(device))


def _accumulate_dtype(dtype: torch.dtype, count: int) -> torch.dtype:
    """The input's dtype while its rounding does not show: never for fp16, whose unscaled sums could overflow."""
    if dtype == torch.float16 or (dtype == torch.bfloat16 and count > MAX_ROUNDINGS):
        return torch.float32
    return dtype
