"""A clipped policy loss with an entropy bonus: fused, by statistics, as trainers write it, and of TRL's fused head.

    python -m benches.policy

One process for all, samples in turn; ratios of medians to the fused loss. The peak is over the inputs, of a process for
each. Results are appended to benches/results, one JSON object a line.
"""

from __future__ import annotations

import argparse
import datetime
import importlib.util
import json
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from compiled_loss import Chunking, linear_policy_loss, linear_token_statistics, policy_loss
from compiled_loss.measure import PeakMemory, run_in_child

RESULTS = Path(__file__).parent / "results"
SHAPES = [(2048, 256, 32768), (1024, 512, 50257)]  # tokens, width, vocab
CHUNKS, BONUS = 8, 0.01
Loss = Callable[..., Tensor]


def fused(h: Tensor, w: Tensor, y: Tensor, old: Tensor, advantages: Tensor) -> Tensor:
    """The token strategy."""
    chunking = Chunking(strategy="tokens", chunk_size=len(y) // CHUNKS)
    return linear_policy_loss(h, w, y, old, advantages, entropy_coefficient=BONUS, chunking=chunking).loss


def by_statistics(h: Tensor, w: Tensor, y: Tensor, old: Tensor, advantages: Tensor) -> Tensor:
    """The vocab strategy, then a plain function."""
    chunking = Chunking(strategy="vocab", chunk_size=len(w) // CHUNKS)
    found = linear_token_statistics(h, w, y, chunking=chunking, wanted=("logprob", "entropy"))
    return policy_loss(found.logprob, old, advantages, entropy=found.entropy, entropy_coefficient=BONUS).loss


def _chunk(h: Tensor, w: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    log_p = (h @ w.t()).log_softmax(-1)
    return log_p.gather(-1, y.unsqueeze(-1)).squeeze(-1), -(log_p.exp() * log_p).sum(-1)


def checkpointed(h: Tensor, w: Tensor, y: Tensor, old: Tensor, advantages: Tensor) -> Tensor:
    """A loop over chunks of tokens, each computed again in backward."""
    pairs = zip(h.chunk(CHUNKS), y.chunk(CHUNKS), strict=True)
    parts = [checkpoint(_chunk, a, w, b, use_reentrant=False) for a, b in pairs]
    logprob, entropy = (torch.cat(rows) for rows in zip(*parts, strict=True))
    return policy_loss(logprob, old, advantages, entropy=entropy, entropy_coefficient=BONUS).loss


def whole(h: Tensor, w: Tensor, y: Tensor, old: Tensor, advantages: Tensor) -> Tensor:
    """All logits at once."""
    logprob, entropy = _chunk(h, w, y)
    return policy_loss(logprob, old, advantages, entropy=entropy, entropy_coefficient=BONUS).loss


def by_trl(h: Tensor, w: Tensor, y: Tensor, old: Tensor, advantages: Tensor) -> Tensor:
    """The log-probabilities of TRL's fused head, in tiles of 32768 columns as its trainers take them."""
    from trl.kernels import ChunkedLogProbFunction

    logprob, entropy, *_ = ChunkedLogProbFunction.apply(h, w, None, y, 1.0, 32768, None, 1.0, ("entropy",))
    return policy_loss(logprob, old, advantages, entropy=entropy, entropy_coefficient=BONUS).loss


PROVIDERS: dict[str, Loss] = {"fused": fused, "statistics": by_statistics, "checkpointed": checkpointed, "whole": whole}
if importlib.util.find_spec("trl") is not None:  # of the extra `peers`
    PROVIDERS["trl"] = by_trl


def inputs(tokens: int, width: int, vocab: int) -> tuple[Tensor, ...]:
    torch.manual_seed(0)
    hidden = torch.randn(tokens, width, requires_grad=True)
    weight = (torch.randn(vocab, width) / width**0.5).requires_grad_()
    labels, advantages = torch.randint(0, vocab, (tokens,)), torch.randn(tokens)
    return hidden, weight, labels, torch.full((tokens,), -10.5), advantages


def step(loss: Loss, given: tuple[Tensor, ...]) -> None:
    torch.autograd.grad(loss(*given), given[:2])


def peak(provider: str, mode: str, shape: list[int]) -> int:
    """Bytes over the inputs, of the second step."""
    given, loss = inputs(*shape), made(provider, mode)
    step(loss, given)
    with PeakMemory(torch.device("cpu")) as memory:
        step(loss, given)
    return int(memory.peak)


def made(provider: str, mode: str) -> Loss:
    loss = PROVIDERS[provider]
    return torch.compile(loss, fullgraph=True, dynamic=False) if mode == "compiled" else loss


def measured(shape: tuple[int, int, int], mode: str, rounds: int) -> list[dict[str, Any]]:
    """A row for each provider."""
    names = [name for name in PROVIDERS if name != "trl" or mode == "eager"]
    given, losses = inputs(*shape), {name: made(name, mode) for name in names}
    exact = torch.autograd.grad(whole(*given), given[:2])
    for loss in losses.values():
        for mine, theirs in zip(torch.autograd.grad(loss(*given), given[:2]), exact, strict=True):
            torch.testing.assert_close(mine, theirs, rtol=1e-3, atol=1e-6)
    seconds: dict[str, list[float]] = {name: [] for name in losses}
    forth = list(losses.items())
    for i in range(rounds):
        for name, loss in reversed(forth) if i % 2 else forth:  # what ran before costs time, too
            start = time.perf_counter()
            step(loss, given)
            seconds[name].append(time.perf_counter() - start)
    medians = {name: statistics.median(times) for name, times in seconds.items()}
    return [
        {
            "provider": name,
            "mode": mode,
            "shape": shape,
            "chunks": CHUNKS,
            "seconds": round(medians[name], 4),
            "fused_to_it": round(medians["fused"] / medians[name], 3),
            "peak_mib": round(
                run_in_child("benches.policy:peak", provider=name, mode=mode, shape=list(shape)) / 2**20, 1
            ),
            "torch": torch.__version__,
            "cpu": platform.processor() or platform.machine(),
            "date": datetime.datetime.now(datetime.timezone.utc).date().isoformat(),
        }
        for name in losses
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--modes", nargs="+", default=["eager", "compiled"], choices=["eager", "compiled"])
    arguments = parser.parse_args()
    path = RESULTS / f"policy-{torch.__version__.partition('+')[0]}-cpu.jsonl"
    for shape in SHAPES:
        for mode in arguments.modes:
            for row in measured(shape, mode, arguments.rounds):
                print(json.dumps(row), flush=True)
                with path.open("a", encoding="utf-8") as file:
                    file.write(json.dumps(row) + "\n")


if __name__ == "__main__":
    main()
