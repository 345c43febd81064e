"""The explanation of a plan: every alternative with its predicted seconds and bytes.

N tokens, H width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

from compiled_loss import checks
from compiled_loss.planner import cost
from compiled_loss.planner import plan as planner
from compiled_loss.planner.chunking import Chunking
from compiled_loss.planner.cost import Strategy
from compiled_loss.planner.plan import Plan

PARTS = (1, 2, 4, 8, 16, 32, 64)  # alternatives are that many chunks of either strategy


@dataclass(frozen=True, kw_only=True, slots=True)
class Alternative:
    """The loss and both gradients in chunks of one size, with the predicted cost.

    `strategy` and `chunk_size` are those of a :class:`Chunking`; `count` chunks; `chunk_bytes` of a chunk's logits,
    `peak_bytes` over the inputs, of compiled code; `seconds` at a device's rates.
    """

    strategy: Strategy
    chunk_size: int
    count: int
    chunk_bytes: int
    peak_bytes: int
    seconds: float


@dataclass(frozen=True, kw_only=True, slots=True)
class Explanation:
    r"""The chunking that was chosen, and the alternatives. It prints as a table.

    `chosen` and each of `alternatives` have a strategy, chunk_size, count, chunk_bytes, peak_bytes and seconds;
    `budget` is the most bytes a chunk's logits may take. Seconds are predictions.

    Example:
        >>> from compiled_loss import Chunking, plan
        >>> found = plan(512, 4096, 128256, chunking=Chunking(memory_budget="64MiB", strategy="tokens"))
        >>> print("\n".join(str(found).splitlines()[:4]))
                     strategy   chunks     logits       peak      time
        over budget  tokens    1 x 512    125 MiB  1,131 MiB    1.9 ms
        chosen       tokens    2 x 261     64 MiB  1,070 MiB    2.8 ms
                     tokens    2 x 256     63 MiB  1,069 MiB    2.8 ms

    """

    chosen: Alternative
    alternatives: tuple[Alternative, ...]
    budget: int | None  # most bytes of a chunk's logits

    def __str__(self) -> str:
        rows = [("", "strategy", "chunks", "logits", "peak", "time")]
        for one in sorted((self.chosen, *self.alternatives), key=lambda a: (a.strategy, -a.chunk_size)):
            over = self.budget is not None and one.chunk_bytes > self.budget
            mark = "chosen" if one is self.chosen else "over budget" if over else ""
            time = f"{one.seconds * 1e3:,.3f} ms" if one.seconds < 1e-3 else f"{one.seconds * 1e3:,.1f} ms"
            chunks = f"{one.count} x {one.chunk_size}"
            rows.append((mark, one.strategy, chunks, _size(one.chunk_bytes), _size(one.peak_bytes), time))
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        return "\n".join("  ".join(_aligned(row, widths)).rstrip() for row in rows)


def plan(
    tokens: int,
    width: int,
    vocab: int,
    *,
    dtype: torch.dtype = torch.bfloat16,
    chunking: Chunking = Chunking(),
    ranks: int = 1,
    device: str = "cuda",
) -> Explanation:
    r"""Explains how a linear loss of these sizes is chunked: the alternatives with their predicted cost.

    Args:
        tokens: N.
        width: H.
        vocab: V; with a vocabulary over ranks, the rank's own part.
        dtype: of hidden states and weight.
        chunking: what the loss would be given. With `max_label_tokens` the plan is for the tokens that count, without
            the copy of their hidden states.
        ranks: how many ranks share the vocabulary.
        device: type of device whose rates are taken: "cuda" for an H100's, "cpu" for two cores'.

    Returns:
        An :class:`Explanation`, of loss and both gradients. Print it.

    Memory:
        None: nothing is asked of a device, nothing allocated.

    Raises:
        ValueError: a size is below 1, `device` is neither "cuda" nor "cpu", or `chunking` is at odds with the sizes or
            the dtype.
        TypeError: a size is no int, or `dtype` is none that gradients are computed in.

    Source:
        The model stands in `compiled_loss/planner/cost.py`. Its rates of a CPU are fitted to the times of two cores; an
        H100's are those of its data sheet, with 20 us a chunk assumed. Read its times as ratios.

    Example:
        >>> from compiled_loss import Chunking, plan
        >>> found = plan(8192, 4096, 128256, chunking=Chunking(memory_budget="512MiB"))
        >>> found.chosen.strategy, found.chosen.count
        ('tokens', 4)

    """
    for name, value in (("tokens", tokens), ("width", width), ("vocab", vocab), ("ranks", ranks)):
        checks.chunking.positive(name, value)
    checks.instance("chunking", chunking, Chunking)
    checks.chunking.device_type(device)
    checks.floating_dtype("dtype", dtype)
    if chunking.accumulate_dtype is not None:
        checks.chunking.accumulator(chunking.accumulate_dtype, dtype)
    tokens = chunking.rows(tokens) or tokens
    made = planner.plan(tokens, width, vocab, dtype, chunking, ranks=ranks, device=device)
    if chunking.budget is not None:
        least = cost.chunk_bytes(made.strategy, 1, tokens, vocab, dtype.itemsize)
        checks.chunking.memory_budget(chunking.budget, "token" if made.strategy == "tokens" else "column", least)
    strategies: tuple[Strategy, ...] = ("tokens", "vocab")

    def costing(one: Plan) -> Alternative:
        size = min(one.chunk, tokens if one.strategy == "tokens" else vocab)
        sizes = (tokens, width, vocab, dtype.itemsize, one.accumulate_dtype.itemsize)
        return Alternative(
            strategy=one.strategy,
            chunk_size=size,
            count=one.count,
            chunk_bytes=cost.chunk_bytes(one.strategy, size, tokens, vocab, dtype.itemsize),
            peak_bytes=cost.peak_bytes(one.strategy, size, *sizes),
            seconds=cost.seconds(one.strategy, size, *sizes, cost.rates(device)),
        )

    chosen = costing(made)
    others = []
    for strategy in strategies if chunking.strategy == "auto" else (chunking.strategy,):
        extent = tokens if strategy == "tokens" else vocab
        for size in dict.fromkeys(-(-extent // parts) for parts in PARTS):
            fixed = Chunking(strategy=strategy, chunk_size=size, accumulate_dtype=chunking.accumulate_dtype)
            one = costing(planner.plan(tokens, width, vocab, dtype, fixed))
            if (one.strategy, one.chunk_size) != (chosen.strategy, chosen.chunk_size):
                others.append(one)
    return Explanation(chosen=chosen, alternatives=tuple(others), budget=chunking.budget)


def _aligned(row: Sequence[str], widths: Sequence[int]) -> Iterator[str]:
    """Yields a row's cells, words aligned to the left and numbers to the right."""
    for i, (cell, width) in enumerate(zip(row, widths, strict=True)):
        yield cell.ljust(width) if i < 2 else cell.rjust(width)


def _size(size: int) -> str:
    for unit, power in (("MiB", 20), ("KiB", 10)):
        if size >= 10 << power:
            return f"{size / 2**power:,.0f} {unit}"
    return f"{size} B"
