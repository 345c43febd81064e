"""What is measured: a head, tokens, a dtype, how many tokens are masked, and what is asked of the loss.

N tokens, H width, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor


class Head(NamedTuple):
    width: int
    vocab: int
    softcap: float | None = None


HEADS = {
    "Llama-3 8B": Head(4096, 128256),
    "Gemma-2 2B": Head(2304, 256000, 30.0),
    "Gemma-2 9B": Head(3584, 256000, 30.0),
    "Qwen-3 8B": Head(4096, 151936),
    "DeepSeek-V3": Head(7168, 129280),
    "1024 x 32768": Head(1024, 32768),
    "256 x 65536": Head(256, 65536),
    "2048 x 8192": Head(2048, 8192),
    "8 x 64": Head(8, 64),
    "256 x 16384": Head(256, 16384),
    "256 x 262144": Head(256, 262144),
}

# What is asked of the loss, and the GEMMs of 2 N H V operations that takes at least: of logits, and of gradients.
WANTS = {
    "gradients": (1, 2),  # the mean and both gradients
    "loss": (1, 0),  # the mean alone
    "none": (1, 2),  # each token's loss, and both gradients of any weights of them
    "statistics": (1, 0),  # log-probability, log-sum-exp, entropy, correctness
    "distillation": (2, 2),  # forward KL from a teacher's head as wide, and both gradients
    "soft": (2, 2),  # cross-entropy with a teacher's head as wide, and both gradients
    "multi-token": (2, 4),  # two depths of the same hidden states, other labels, and all gradients
}


@dataclass(frozen=True, kw_only=True)
class Case:
    head: str
    tokens: int
    dtype: str = "bfloat16"
    masked: float = 0.0
    wants: str = "gradients"

    @property
    def counting(self) -> int:
        """Tokens that are not masked."""
        return self.tokens - round(self.masked * self.tokens)

    def __str__(self) -> str:
        masked = f", {self.masked:.0%} masked" if self.masked else ""
        return f"{self.head}, N={self.tokens} {self.dtype}, {self.wants}{masked}"


class Inputs(NamedTuple):
    hidden: Tensor  # [N, H]
    weight: Tensor  # [V, H]
    labels: Tensor  # [N]
    teacher_hidden: Tensor | None  # [N, H]
    teacher_weight: Tensor | None  # [V, H]


def inputs(case: Case, device: str, seed: int = 0) -> Inputs:
    """Logits of unit scale; labels, and which of them are masked, at random."""
    torch.manual_seed(seed)
    width, vocab, _ = HEADS[case.head]
    dtype = getattr(torch, case.dtype)

    def normal(rows: int, scale: float = 1.0) -> Tensor:
        return (torch.randn(rows, width, device=device) * scale).to(dtype)

    hidden, weight = normal(case.tokens), normal(vocab, width**-0.5)
    labels = torch.randint(0, vocab, (case.tokens,), device=device)
    labels[torch.randperm(case.tokens, device=device)[case.counting :]] = -100
    taught = case.wants in ("distillation", "soft")
    teacher = (normal(case.tokens), normal(vocab, width**-0.5)) if taught else (None, None)
    return Inputs(hidden.requires_grad_(), weight.requires_grad_(), labels, *teacher)


MASKED = (0.0, 0.5, 0.7, 0.9, 0.95)


def _cpu() -> list[Case]:
    """The grid in both dtypes, of as many tokens as ten minutes allow."""
    return [
        Case(head=head, tokens=tokens, dtype=dtype)
        for head, tokens in {"1024 x 32768": 512, "256 x 65536": 1024, "2048 x 8192": 1024}.items()
        for dtype in ("float32", "bfloat16")
    ]


def _gpu() -> list[Case]:
    grid = [
        Case(head=head, tokens=tokens)
        for head in ("Llama-3 8B", "Qwen-3 8B", "Gemma-2 2B")
        for tokens in (8192, 32768, 512)
    ]
    llama = Case(head="Llama-3 8B", tokens=8192)
    kinds = [replace(llama, wants=wants) for wants in WANTS if wants != "gradients"]
    masked = [replace(llama, masked=masked) for masked in MASKED[1:]]
    return [*grid, *kinds, *masked, Case(head="DeepSeek-V3", tokens=8192)]


def _masked() -> list[Case]:
    return [Case(head="2048 x 8192", tokens=2048, dtype="float32", masked=masked) for masked in MASKED]


def _wants() -> list[Case]:
    return [Case(head="256 x 65536", tokens=1024, dtype="float32", wants=wants) for wants in WANTS]


def _sizes() -> list[Case]:
    """In tokens, and in classes."""
    tokens = [Case(head="256 x 65536", tokens=tokens, dtype="float32") for tokens in (256, 512, 1024, 2048, 4096)]
    classes = [Case(head=head, tokens=1024, dtype="float32") for head in ("256 x 16384", "256 x 262144")]
    return [*tokens, *classes]


SUITES = {
    "cpu": _cpu(),
    "gpu": _gpu(),
    "masked": _masked(),
    "wants": _wants(),
    "sizes": _sizes(),
    "overhead": [Case(head="8 x 64", tokens=8, dtype="float32")],  # what a call costs besides its GEMMs
}
