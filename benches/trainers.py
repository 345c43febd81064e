"""Trainers of TRL with this library's head and with their own: curves, time of a step, peak memory.

    python -m benches.trainers [--steps 5] [--rounds 2] [--only SFT]

A model of random weights with a head of 32768 x 128, and 512 tokens a step, of which 480 count. Both trainers take the
same steps. "Largest difference" is that of all that they log, relative to the largest value of its curve, or to 1.
"Time" is ours over theirs: CPU time of a step in one thread, medians of rounds that alternate, without each round's
first step. "Peak" is ours over theirs, over what is held before training. Needs the extra 'integrations'. Results are
appended to benches/results, one JSON object a line.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from benches.run import RESULTS, machine
from compiled_loss.measure import PeakMemory, run_in_child

SIZES = {"vocab_size": 32768, "hidden_size": 128, "intermediate_size": 256, "head_dim": 64}
PROMPT, ANSWER = 8, 120
OPTIONS: dict[str, dict[str, Any]] = {  # 512 tokens each
    "SFT": {"per_device_train_batch_size": 4},
    "DPO": {"per_device_train_batch_size": 2},
    "KTO": {"per_device_train_batch_size": 4},
    "GRPO": {"max_completion_length": ANSWER},
    "RLOO": {"max_completion_length": ANSWER, "learning_rate": 1e-3},  # its ratios are of sums of 120 tokens
    "Distillation": {"max_completion_length": ANSWER},
    "GKD": {"per_device_train_batch_size": 4, "max_new_tokens": ANSWER, "lmbda": 0.0, "max_length": 256},
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--only", choices=OPTIONS, nargs="*", default=list(OPTIONS))
    options = parser.parse_args()
    about = machine("cpu")
    about["versions"] |= {name: metadata.version(name) for name in ("trl", "transformers", "accelerate")}
    print("| trainer | steps | largest difference | time | peak |\n| --- | --- | --- | --- | --- |")
    for name in options.only:
        row = run_in_child("benches.trainers:measured", name=name, steps=options.steps, rounds=options.rounds)
        ours, theirs = row["peak_mib"]
        ratio = statistics.median(row["seconds"][0]) / statistics.median(row["seconds"][1])
        print(f"| {name} | {row['steps']} | {row['difference']:.1e} | {ratio:.2f} | {ours / theirs:.2f} |", flush=True)
        with (RESULTS / f"trainers-{torch.__version__.split('+')[0]}-cpu.jsonl").open("a") as lines:
            lines.write(json.dumps(row | {"sizes": SIZES, "tokens": 4 * (PROMPT + ANSWER)} | about) + "\n")


def measured(name: str, steps: int, rounds: int) -> dict[str, Any]:
    """A row; of each pair the first is ours."""
    sys.path.insert(0, str(Path(__file__).parents[1] / "tests" / "support"))
    from transformers import TrainerCallback
    from trl_trainers import REWARDED, answering, curves, model, quiet, rows, saved, trainer

    from compiled_loss.integrations.trl import fuse_trainer

    class Clock(TrainerCallback):  # type: ignore[misc]
        def __init__(self) -> None:
            self.seconds: list[float] = []

        def on_step_begin(self, *_: Any, **__: Any) -> None:
            self.began = time.process_time()

        def on_step_end(self, *_: Any, **__: Any) -> None:
            self.seconds.append(time.process_time() - self.began)

    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder, quiet():
        saved(folder, model(**SIZES))
        data = rows(16, (PROMPT,), (ANSWER,))
        pair = [trainer(name, folder, folder, data=data, max_steps=steps, **OPTIONS[name]) for _ in range(2)]
        for made in pair:
            if name in (*REWARDED, "Distillation"):
                answering(made.model, ANSWER, first=3)  # that do not end before
        fuse_trainer(pair[0])
        logged = [curves(made) for made in pair]
        difference = max(
            ((logged[0][key] - theirs).abs().max() / theirs.abs().max().clamp(min=1)).item()
            for key, theirs in logged[1].items()
        )
        clocks = [Clock(), Clock()]
        for made, clock in zip(pair, clocks, strict=True):
            made.add_callback(clock)
        taken: list[list[float]] = [[], []]
        for _ in range(rounds):
            for made, clock, seconds in zip(pair, clocks, taken, strict=True):
                made.train()
                seconds += clock.seconds[1:]
                clock.seconds.clear()
        peaks = []
        for made in pair:
            made.args.max_steps = 1
            made.model.zero_grad(set_to_none=True)
            with PeakMemory(torch.device("cpu")) as memory:
                made.train()
            peaks.append(round(memory.peak / 2**20, 1))
    samples = [[round(s, 6) for s in seconds] for seconds in taken]
    return {"trainer": name, "steps": steps, "difference": difference, "seconds": samples, "peak_mib": peaks}


if __name__ == "__main__":
    main()
