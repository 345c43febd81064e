"""The option for the chunking of a linear loss."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

import torch

from compiled_loss import checks
from compiled_loss.checks import numbers

_WHOLE = 10**9


@dataclass(frozen=True, kw_only=True, slots=True)
class Chunking:
    """Schedule options of the linear losses. They change speed and memory, never the result beyond rounding.

    `strategy`: "tokens" forms gradients in forward, a chunk of tokens at a time (three GEMMs, scalar losses);
    "vocab" streams the vocabulary and recomputes the logits in backward (four GEMMs, any upstream gradient);
    "auto" takes "tokens" wherever it can.

    `chunk_size`: tokens per chunk, with "vocab" classes per chunk; None lets the planner choose. More than 8 chunks of
    bf16 tokens also hold dW in fp32.

    `memory_budget`: the most bytes that a chunk of logits may take, a number or a text such as "512MiB", instead of
    `chunk_size`. The chunk is as large as that allows. With "auto" it also chooses the strategy that is faster within
    it, at the rates of a CPU or a GPU.

    `accumulate_dtype`: dtype in which gradients are summed over chunks: the weight's gradient with the token strategy,
    the hidden states' with the vocab strategy. None is the input's own dtype for fp32, fp64 and up to 8 chunks of bf16,
    and fp32 otherwise.

    `max_label_tokens`: the most tokens of a call (with several depths, of each) that count, as a number or as a
    fraction of its tokens. GEMMs are then for that many tokens only. If more count, eager CPU code raises, and
    elsewhere the loss and its gradients are NaN: no token is dropped. Costs a copy of the hidden states that count, and
    of targets that are probabilities. None computes all tokens.

    `compile`: whether eager calls run a chunk's elementwise work as a compiled kernel; "auto" does on accelerators.
    Under torch.compile it is compiled in any case.

    >>> Chunking(chunk_size=1024)
    Chunking(strategy='auto', chunk_size=1024, memory_budget=None, accumulate_dtype=None, max_label_tokens=None, \
compile='auto')
    """

    strategy: Literal["auto", "tokens", "vocab"] = "auto"
    chunk_size: int | None = None
    memory_budget: int | str | None = None
    accumulate_dtype: torch.dtype | None = None
    max_label_tokens: int | float | None = None
    compile: bool | Literal["auto"] = "auto"

    _parts: int = field(init=False, repr=False, compare=False, default=0)  # of _WHOLE, where a fraction is given

    def __post_init__(self) -> None:
        checks.chunking.chunking(
            self.strategy, self.chunk_size, self.memory_budget, self.accumulate_dtype, self.compile
        )
        checks.chunking.max_label_tokens(self.max_label_tokens)
        if isinstance(self.max_label_tokens, float):  # at once, because Dynamo makes a symbol of a float
            object.__setattr__(self, "_parts", max(1, round(self.max_label_tokens * _WHOLE)))

    @property
    def budget(self) -> int | None:
        """`memory_budget` in bytes."""
        return checks.chunking.size("memory_budget", self.memory_budget)

    def rows(self, tokens: int) -> int | None:
        """Returns the number of rows to compute for so many tokens; None means all of them, as they are."""
        if self.max_label_tokens is None:
            return None
        # Rounded up, except for the rounding of the fraction itself.
        most = -((tokens - 2 * tokens * self._parts) // (2 * _WHOLE)) if self._parts else int(self.max_label_tokens)
        return None if numbers.holds(most >= tokens, otherwise=False) else most


def is_compiled(device: torch.device, compile: bool | str) -> bool:
    """Returns True if bodies are compiled; `compile` is `Chunking`'s, which is for eager calls only."""
    if torch.compiler.is_compiling() or compile != "auto":
        return torch.compiler.is_compiling() or bool(compile)
    return device.type not in ("cpu", "meta")
