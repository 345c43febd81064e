"""The training loop, with one of two losses; runs in a child process of its own."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from itertools import chain, islice
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from compiled_loss import linear_cross_entropy
from compiled_loss.demo.child import Event, serve
from compiled_loss.demo.model import Transformer
from compiled_loss.demo.settings import SEED, Settings
from compiled_loss.demo.text import batches
from compiled_loss.measure import PeakMemory

LEARNING_RATE = 3e-3


def materialised(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    """Computes the ordinary loss, which holds all logits."""
    return F.cross_entropy((hidden @ weight.T).float().flatten(0, -2), labels.flatten())


LOSSES = {"F.cross_entropy": materialised, "linear_cross_entropy": linear_cross_entropy}


def train(path: str, loss: str, settings: dict[str, Any]) -> Iterator[Event]:
    """Compiles a step, measures its memory, then trains on the tokens at `path`; each stage is reported as it ends."""
    run = Settings(**settings)
    device = torch.device(run.device)
    torch.manual_seed(SEED)
    model = Transformer(run.vocab, run.width, run.layers).to(device, getattr(torch, run.dtype))
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, fused=True)

    @torch.compile(fullgraph=True)
    def forward(inputs: Tensor, labels: Tensor) -> Tensor:
        return LOSSES[loss](model(inputs), model.embedding.weight, labels)

    def forward_backward(inputs: Tensor, labels: Tensor) -> Tensor:
        optimizer.zero_grad(set_to_none=False)  # allocated gradients belong to the model, not to the step
        value = forward(inputs, labels)
        value.backward()
        return value.detach()

    data = ((inputs.to(device), labels.to(device)) for inputs, labels in batches(torch.load(path), run.tokens))
    first = next(data)
    started = time.perf_counter()
    forward_backward(*first).item()
    cold = time.perf_counter() - started
    peak, warm = measured(device, lambda: forward_backward(*first).item())
    yield {"compile_seconds": cold - warm, "peak": peak}

    for inputs, labels in chain([first], islice(data, run.steps - 1)):
        started = time.perf_counter()
        value = forward_backward(inputs, labels)
        optimizer.step()
        yield {"loss": value.item(), "seconds": time.perf_counter() - started}  # item() waits for the device


def measured(device: torch.device, work: Callable[[], object]) -> tuple[int | None, float]:
    """Returns the peak bytes and seconds of `work`; None for bytes where the system counts no peak.

    Linux counts one, and allocators of accelerators may.
    """
    countable = (
        os.access("/proc/self/clear_refs", os.W_OK)
        if device.type == "cpu"
        else hasattr(torch.get_device_module(device), "max_memory_allocated")
    )
    memory = PeakMemory(device)
    with memory if countable else nullcontext():
        started = time.perf_counter()
        work()
        seconds = time.perf_counter() - started
    return memory.peak if countable else None, seconds


if __name__ == "__main__":
    serve(train)
