"""A training step of a small Llama of `transformers`, with its own loss and with `fuse_head`: time and peak.

    python -m benches.fused_heads                       # a table, and raw results appended to benches/results
    python -m benches.fused_heads bfloat16 --mode eager # a case

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
from compiled_loss import Chunking
from compiled_loss.measure import PeakMemory, run_in_child

SIZES = {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 2, "num_attention_heads": 4}
VOCAB, BATCH, LENGTH = 32768, 4, 256
ROUNDS = 5
HEADS = {"own": None, "fused": Chunking(), "fused, its kernels compiled": Chunking(compile=True)}
MODES = ("eager", "compiled")


def measured(dtype: str, compiled: bool) -> dict[str, Any]:
    """Seconds and bytes of steps of both, and how far their losses are apart."""
    os.environ |= {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_VERBOSITY": "error"}
    from transformers import LlamaConfig, LlamaForCausalLM

    from compiled_loss.integrations.transformers import fuse_head

    torch.set_num_threads(1)
    ids = torch.randint(0, VOCAB, (BATCH, LENGTH), generator=torch.Generator().manual_seed(0))
    steps: dict[str, Any] = {}
    for head, chunking in HEADS.items():
        torch.manual_seed(0)
        config = LlamaConfig(vocab_size=VOCAB, tie_word_embeddings=False, **SIZES)
        model = LlamaForCausalLM(config).to(getattr(torch, dtype)).train()
        if chunking is not None:
            fuse_head(model, chunking=chunking)
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
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("dtypes", nargs="*", default=["float32", "bfloat16"])
    parser.add_argument("--mode", choices=MODES, action="append")
    given = parser.parse_args()
    about = machine("cpu") | {"model": SIZES | {"vocab_size": VOCAB}, "tokens": [BATCH, LENGTH]}
    path = RESULTS / f"fused_heads-{torch.__version__.replace('+', '-')}.jsonl"
    print("dtype, mode, loss, time over its own, peak in MiB, losses apart")
    for dtype in given.dtypes:
        for mode in given.mode or MODES:
            found = run_in_child("benches.fused_heads:measured", dtype=dtype, compiled=mode == "compiled")
            with path.open("a") as results:
                results.write(json.dumps(about | {"dtype": dtype, "mode": mode} | found) + "\n")
            for head in HEADS:
                pairs = zip(found["seconds"][head], found["seconds"]["own"], strict=True)
                ratio = statistics.median(mine / own for mine, own in pairs)
                apart = abs(found["loss"]["own"] - found["loss"][head])
                print(f"{dtype:10} {mode:9} {head:28} {ratio:6.2f} {found['peak'][head] >> 20:6} {apart:8.1e}")


if __name__ == "__main__":
    main()
