"""torchtitan's losses and ours in their place, loss and both gradients: time and peak.

    python -m benches.torchtitan_loss            # a table, and raw results appended to benches/results

Each dtype is a process. Rounds of all losses are interleaved; the peak is over what the process held before the step.
"""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from benches.run import RESULTS, machine
from compiled_loss import Chunking
from compiled_loss.measure import PeakMemory, run_in_child

BATCH, LENGTH, WIDTH, VOCAB = 2, 1024, 512, 32768
ROUNDS = 5
CHUNKED = "ChunkedLossWrapper, 8 chunks"


def losses(head: nn.Linear) -> dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]]:
    """Functions of hidden states, labels and their number."""
    from torchtitan.components.loss import ChunkedLossWrapper, CrossEntropyLoss

    from compiled_loss.integrations.torchtitan import LinearCrossEntropyLoss

    whole = CrossEntropyLoss.Config().build(compile_config=None)
    found = {"CrossEntropyLoss": lambda hidden, labels, count: whole(head(hidden), labels, count)[0]}
    configs = {
        CHUNKED: ChunkedLossWrapper.Config(),
        "ours": LinearCrossEntropyLoss.Config(),
        "ours, its kernels compiled": LinearCrossEntropyLoss.Config(chunking=Chunking(compile=True)),
    }
    for name, config in configs.items():
        loss = config.build(compile_config=None)
        loss.set_lm_head(head)
        found[name] = lambda hidden, labels, count, loss=loss: loss(hidden, labels, count)[0]
    return found


def measured(dtype: str) -> dict[str, Any]:
    """Seconds and bytes of steps of each loss, and how far the losses are apart."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    head = nn.Linear(WIDTH, VOCAB, bias=False, dtype=getattr(torch, dtype))
    labels, count = torch.randint(0, VOCAB, (BATCH, LENGTH)), torch.tensor(BATCH * LENGTH)
    states = torch.randn(BATCH, LENGTH, WIDTH, dtype=head.weight.dtype)
    functions = losses(head)

    def step(name: str) -> tuple[float, float, int]:
        hidden, head.weight.grad = states.clone().requires_grad_(), None
        with PeakMemory(torch.device("cpu")) as memory:
            start = time.perf_counter()
            loss = functions[name](hidden, labels, count)
            loss.backward()
            seconds = time.perf_counter() - start
        return loss.item(), seconds, memory.peak

    for name in functions:
        step(name)
    rounds = [{name: step(name) for name in functions} for _ in range(ROUNDS)]
    return {
        "loss": {name: rounds[0][name][0] for name in functions},
        "seconds": {name: [found[name][1] for found in rounds] for name in functions},
        "peak": {name: min(found[name][2] for found in rounds) for name in functions},
    }


def main() -> None:
    """Measure, print, and append what was measured."""
    about = machine("cpu") | {"shape": [BATCH, LENGTH, WIDTH, VOCAB]}
    path = RESULTS / f"torchtitan_loss-{torch.__version__.replace('+', '-')}.jsonl"
    print("dtype, loss, time over ChunkedLossWrapper's, peak in MiB, loss")
    for dtype in ("float32", "bfloat16"):
        found = run_in_child("benches.torchtitan_loss:measured", dtype=dtype)
        with path.open("a") as results:
            results.write(json.dumps(about | {"dtype": dtype} | found) + "\n")
        for name, seconds in found["seconds"].items():
            pairs = zip(seconds, found["seconds"][CHUNKED], strict=True)
            ratio = statistics.median(one / other for one, other in pairs)
            print(f"{dtype:10} {name:30} {ratio:6.2f} {found['peak'][name] >> 20:6} {found['loss'][name]:.6f}")


if __name__ == "__main__":
    main()
