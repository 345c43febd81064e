"""The options of a run of the demo, and their defaults."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch

SEED = 0
SEQUENCE = 256  # tokens a sequence
HEAD_WIDTH = 64  # of an attention head
LEAST_VOCAB = 512  # byte-level encoding starts from 256 bytes and a separator
DTYPES = ("float32", "bfloat16")


@dataclass(frozen=True, kw_only=True, slots=True)
class Settings:
    """The options of a run. `tokens` is the number of tokens per step, in sequences of SEQUENCE."""

    device: str
    dtype: str = "float32"
    steps: int = 20
    vocab: int = 32768
    tokens: int = 3072
    width: int = 128
    layers: int = 2

    def __str__(self) -> str:
        return (
            f"{self.device}, {self.dtype}: vocabulary {self.vocab}, width {self.width}, depth {self.layers}, "
            f"{self.steps} steps of {self.tokens} tokens"
        )


def devices() -> list[str]:
    """Returns the kinds of device of this machine, the preferred one first."""
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    return ["cpu"] if accelerator is None else [accelerator.type, "cpu"]


def settings_for(device: str, **given: Any) -> Settings:
    """Returns the device's defaults, replaced by those of `given` that are not None.

    The logits have 2 GiB on CUDA and XPU, and 384 MiB elsewhere. The layers are so few and narrow that they count for
    little.
    """
    settings = Settings(device=device)
    if device in ("cuda", "xpu"):
        settings = replace(settings, dtype="bfloat16", steps=60, tokens=32768, width=256, layers=6)
    return replace(settings, **{name: value for name, value in given.items() if value is not None})
