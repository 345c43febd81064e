"""A training step of a small Llama of `transformers`, with its own loss and with `fuse_head`: time and peak.

    python -m benches.fused_heads            # a table, and raw results appended to benches/results

Each case is a process. Rounds of both are interleaved; the peak is over what the process held before the step.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time
from typing import Any

import torch

from benches.run import RESULTS, machine
from compiled_loss.measure import PeakMemory, run_in_child

SIZES = {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 2, "num_attention_heads": 4}
VOCAB, BATCH, LENGTH = 32768, 4, 256
ROUNDS = 5
HEADS = ("own", "fused")


def measured(dtype: str, compiled: bool) -> dict[str, Any]:
    """Seconds and bytes of steps of both, and how far their losses are apart."""
    os.environ |= {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_VERBOSITY": "error"}
    from transformers import LlamaConfig, LlamaForCausalLM

    from compiled_loss.integrations.transformers import fuse_head

    torch.set_num_threads(1)
    ids = torch.randint(0, VOCAB, (BATCH, LENGTH), generator=torch.Generator().manual_seed(0))
    steps: dict[str, Any] = {}
    for head in HEADS:
        torch.manual_seed(0)
        config = LlamaConfig(vocab_size=VOCAB, tie_word_embeddings=False, **SIZES)
        model = LlamaForCausalLM(config).to(getattr(torch, dtype)).train()
        if head == "fused":
            fuse_head(model)
        steps[head] = (torch.compile(model, fullgraph=True) if compiled else model, model)

    def step(head: str) -> tuple[float, float, int]:
        called, model = steps[head]
        model.zero_grad(set_to_none=True)
        with PeakMemory(torch.device("cpu")) as memory:
            start = time.perf_counter()
            loss = called(input_ids=ids, labels=ids).loss
            loss.backward()
            seconds = time.perf_counter() - start
        model.zero_grad(set_to_none=True)
        return float(loss), seconds, memory.peak

    for head in HEADS:
        step(head)
    rounds = [{head: step(head) for head in HEADS} for _ in range(ROUNDS)]
    return {
        "loss": {head: rounds[0][head][0] for head in HEADS},
        "seconds": {head: [found[head][1] for found in rounds] for head in HEADS},
        "peak": {head: min(found[head][2] for found in rounds) for head in HEADS},
    }


def main() -> None:
    """Measure, print, and append what was measured."""
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    about = machine("cpu") | {"model": SIZES | {"vocab_size": VOCAB}, "tokens": [BATCH, LENGTH]}
    path = RESULTS / f"fused_heads-{torch.__version__.replace('+', '-')}.jsonl"
    print(f"{'dtype':10} {'':9} {'time ratio':>10} {'own MiB':>8} {'fused MiB':>9} {'losses apart':>12}")
    for dtype in ("float32", "bfloat16"):
        for compiled in (False, True):
            found = run_in_child("benches.fused_heads:measured", dtype=dtype, compiled=compiled)
            with path.open("a") as results:
                results.write(json.dumps(about | {"dtype": dtype, "compiled": compiled} | found) + "\n")
            ratios = [fused / own for own, fused in zip(*(found["seconds"][head] for head in HEADS), strict=True)]
            own, fused = (found["peak"][head] >> 20 for head in HEADS)
            apart = abs(found["loss"]["own"] - found["loss"]["fused"])
            name = "compiled" if compiled else "eager"
            print(f"{dtype:10} {name:9} {statistics.median(ratios):10.2f} {own:8} {fused:9} {apart:12.1e}")


if __name__ == "__main__":
    main()
