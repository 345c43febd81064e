"""The lengths of chunks: integers in, a frozen `Plan` out. Pure; asks no device, allocates nothing.

N tokens, H width, V vocabulary, C rows (token strategy) or columns (vocab strategy) per chunk.

NOTE [Default chunk]
The token strategy takes as many rows per chunk as these rules allow:

- at most H: the chunk is then no larger than dW;
- at most max(1024, H / 4): longer chunks are not faster. Ranks on n nodes take n times as many, because a chunk waits
  for two collectives, and the GEMMs of shorter chunks take no longer than that;
- at least MIN_ROWS, even if H is smaller: with fewer rows Inductor splits the reductions of a body over several kernels
  (for sm_90 and 131072 columns, one kernel per chunk at 512 and 1024 rows, and five at 256).

N is then spread evenly over the chunks, in multiples of ROW_MULTIPLE, at which a GPU loads several elements at once.
The vocab strategy takes as many columns as have the same bytes, at least MIN_COLUMNS, in multiples of COLUMN_MULTIPLE.

A loop plans when it runs, and then knows N. Only the choice between the strategies within a memory budget is made
before. It sees N rounded up to a power of two, so that a compiled caller has at most one graph for each power.

NOTE [Accumulator]
A sum over chunks in bf16 rounds once per chunk. The table has the error of dW relative to that of the unchunked loss,
at N=8192 on a CPU (benches/accumulation.py). There an fp32 accumulator adds products that were rounded to bf16; on a
GPU they are not rounded:

    chunks               1    2    4    8   16   32   64  256  1024
    bf16 accumulator   1.0  1.2  1.5  2.0  2.8  3.8  5.5   13    22
    fp32 accumulator   1.0  1.4  1.4  1.4  1.4  1.4  1.4  1.3   1.2

So up to 8 chunks the error is about twice the unchunked loss's. Partial sums of random signs have sqrt(i / K) of the
size of the sum. Together their roundings make sqrt((K + 1) / 2) of one rounding: 2.1 at 8 chunks, where 2.3 was seen.
The unchunked loss makes one rounding anyway, so the error is bounded by twice its error and one rounding. In the
largest element all partial sums may have one sign, which makes (K + 1) / 2: 4.5 at 8 chunks, where 3.7 was seen. An
fp32 accumulator costs four more bytes per element at the peak, two of them for backward's copy, and more traffic per
chunk.
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

MIN_ROWS = 512  # with at least so many rows Inductor writes a reduction over columns as one kernel
RANKS_A_NODE = 8  # ranks that NVLink joins
MIN_COLUMNS = 2048
ROW_MULTIPLE = 16
COLUMN_MULTIPLE = 256
MAX_ROUNDINGS = 8  # additions into a 16-bit accumulator; beyond, it is fp32: NOTE [Accumulator]


@dataclass(frozen=True, kw_only=True, slots=True)
class Plan:
    """A plan: `count` chunks of `chunk` tokens or columns, of which the last one may be shorter."""

    strategy: Strategy
    chunk: int
    count: int
    accumulate_dtype: torch.dtype


class Lengths(NamedTuple):
    """The operands of an operator that determine its chunks; all are known before the number of tokens is."""

    chunk_size: int | None
    memory_budget: int | None
    accumulate_dtype: torch.dtype | None
    columns: int  # of a rank, the same number on all ranks; the sum of both for two heads
    ranks: int
    compiled: bool

    def plan(self, strategy: Strategy, hidden: torch.Tensor) -> Plan:
        """Returns the plan for these hidden states."""
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
    """Returns the strategy and the chunk lengths, and raises the errors that depend on sizes.

    N is used only where there is a memory budget.
    """
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
    """Returns the plan for a rank's [tokens, width] @ [vocab, width].T among the possible `strategies`, the best first.

    `device` is a type of device; a memory budget is spent at its rates.
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
    """Returns the strategy among the possible ones, the best first. It uses N only where a memory budget decides."""
    if chunking.strategy != "auto":
        return chunking.strategy
    if chunking.budget is None or len(strategies) == 1:
        return strategies[0]
    least = [chunk_bytes(s, 1, tokens, vocab, dtype.itemsize) for s in strategies]
    fits = [numbers.holds(size <= chunking.budget, otherwise=False) for size in least]
    fitting = [s for s, one in zip(strategies, fits, strict=True) if one]
    if not fitting:  # an error will name the least budget
        return strategies[int(numbers.holds(least[1] < least[0], otherwise=False))]
    strategy, *others = fitting
    for other in others:  # no min(key=...), which Dynamo does not trace
        times = [_seconds(s, _rounded(tokens), width, vocab, dtype, chunking, device) for s in (strategy, other)]
        strategy = other if times[1] < times[0] else strategy
    return strategy


def _rounded(tokens: int) -> int:
    """Returns N rounded up to the next power of two, at least MIN_ROWS."""
    rounded = MIN_ROWS
    while rounded < tokens:
        rounded *= 2
    return rounded


def _quotient(extent: int, size: int) -> int:
    return -(-extent // size)


def _most(
    strategy: Strategy, tokens: int, width: int, vocab: int, dtype: torch.dtype, chunking: Chunking, ranks: int = 1
) -> int:
    """Returns the most tokens or columns per chunk: NOTE [Default chunk]."""
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
    """Returns the predicted seconds in the longest chunks that are allowed: NOTE [Cost model]."""
    whole = tokens if strategy == "tokens" else vocab
    size = min(whole, _most(strategy, tokens, width, vocab, dtype, chunking))
    accumulated = chunking.accumulate_dtype or _accumulate_dtype(dtype, _quotient(whole, size))
    sizes = (tokens, width, vocab, dtype.itemsize, accumulated.itemsize)
    return seconds(strategy, size, *sizes, rates(device))


def _accumulate_dtype(dtype: torch.dtype, count: int) -> torch.dtype:
    """Returns the input's dtype while its rounding is negligible; never fp16, whose unscaled sums could overflow."""
    if dtype == torch.float16 or (dtype == torch.bfloat16 and count > MAX_ROUNDINGS):
        return torch.float32
    return dtype
