"""Every loss beside its unchunked form: graphs, what it keeps for backward, real peak memory, error against fp64.

    python -m benches.losses                      # appended to benches/results, and printed as a table
    python -m benches.losses --only distillation

On a CPU, N=2048 H=128 V=16384, both forms compiled, each in a process of its own; a teacher's head is half as wide.
Memory is over the inputs, in fp32. Errors are of loss and gradients together, relative, at N=224 H=32 V=448, the larger
of two seeds. The unchunked form is `compiled_loss.reference`. Results are one JSON object a line.
"""

from __future__ import annotations

import argparse
import datetime
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import compiled_loss as ours
from compiled_loss import Chunking, reference
from compiled_loss.measure import PeakMemory, run_in_child
from compiled_loss.testing import count_graphs

RESULTS = Path(__file__).parent / "results"
LARGE, SMALL = (2048, 128, 16384), (224, 32, 448)
Call = Callable[..., Tensor]


def inputs(shape: tuple[int, int, int], dtype: torch.dtype, seed: int = 0) -> dict[str, Tensor]:
    """Of all losses, by name; the same numbers in each dtype."""
    tokens, width, vocab = shape
    torch.manual_seed(seed)
    values = {
        "hidden": torch.randn(tokens, width),
        "weight": torch.randn(vocab, width) * 0.2,
        "teacher_hidden": torch.randn(tokens, width // 2),
        "teacher_weight": torch.randn(vocab, width // 2) * 0.3,
    }
    values = {name: v.bfloat16().to(dtype) for name, v in values.items()}  # numbers that every dtype holds
    labels = torch.where(torch.rand(tokens) < 0.1, -100, torch.randint(0, vocab, (tokens,)))
    return values | {"labels": labels, "mask": labels != -100}


def logits(given: dict[str, Tensor], who: str = "") -> Tensor:
    return (given[f"{who}hidden"] @ given[f"{who}weight"].t()).detach()


def top(given: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    values, indices = logits(given, "teacher_").float().log_softmax(-1).topk(16)
    return values.to(given["hidden"].dtype), indices


def cases(given: dict[str, Tensor]) -> dict[str, tuple[Call, Call, tuple[Tensor, ...]]]:
    """{name: (ours, unchunked, the inputs that get gradients)}; the rest is bound."""
    head, labels, taught = (given["hidden"], given["weight"]), given["labels"], logits(given, "teacher_")
    tokens, vocab = labels.numel(), given["weight"].shape[0]
    rows, columns = Chunking(chunk_size=tokens // 8), Chunking(strategy="vocab", chunk_size=vocab // 8)
    teacher = (given["teacher_hidden"], given["teacher_weight"])

    def on_head(chunking: Chunking, name: str = "linear_cross_entropy") -> tuple[Call, Call, tuple[Tensor, ...]]:
        return (
            lambda h, w: getattr(ours, name)(h, w, labels, chunking=chunking),
            lambda h, w: reference.cross_entropy(reference.token_logits(h, w), labels),
            head,
        )

    found = {"linear_cross_entropy, tokens": on_head(rows), "linear_cross_entropy, vocab": on_head(columns)}
    found["cross_entropy"] = (
        lambda z: ours.cross_entropy(z, labels),
        lambda z: reference.cross_entropy(z, labels),
        (logits(given),),
    )
    found["masked_cross_entropy"] = (
        lambda z: ours.masked_cross_entropy(z, labels, given["mask"], reduction="mean"),
        lambda z: reference.cross_entropy(z, labels, mask=given["mask"]),
        (logits(given),),
    )
    for divergence in ("forward_kl", "reverse_kl", "jsd"):
        found[f"linear_distillation, {divergence}"] = (
            lambda h, w, d=divergence: ours.linear_distillation(h, w, *teacher, labels, divergence=d, chunking=rows),
            lambda h, w, d=divergence: reference.linear_distillation(h, w, *teacher, labels, divergence=d),
            head,
        )
        found[f"distillation, {divergence}"] = (
            lambda z, d=divergence: ours.distillation(z, taught, labels, divergence=d),
            lambda z, d=divergence: reference.distillation(z, taught, labels, divergence=d),
            (logits(given),),
        )
    cached = {"teacher_topk": top(given)}
    found["linear_distillation, cached teacher"] = (
        lambda h, w: ours.linear_distillation(h, w, None, None, labels, chunking=rows, **cached),
        lambda h, w: reference.linear_distillation(h, w, None, None, labels, **cached),
        head,
    )
    found["distillation, cached teacher"] = (
        lambda z: ours.distillation(z, None, labels, **cached),
        lambda z: reference.distillation(z, None, labels, **cached),
        (logits(given),),
    )
    probabilities = taught.softmax(-1)
    found["masked_soft_cross_entropy"] = (
        lambda z: ours.masked_soft_cross_entropy(z, probabilities, given["mask"]),
        lambda z: reference.masked_soft_cross_entropy(z, probabilities, given["mask"]),
        (logits(given),),
    )
    soft = {"teacher_hidden": teacher[0], "teacher_weight": teacher[1]}
    found["linear_soft_cross_entropy"] = (
        lambda h, w: ours.linear_soft_cross_entropy(h, w, given["mask"], chunking=rows, **soft),
        lambda h, w: reference.linear_soft_cross_entropy(h, w, given["mask"], **soft),
        head,
    )
    targets = [ours.multi_token_targets(labels, k) for k in range(2)]
    found["multi_token_prediction"] = (
        lambda h, w: ours.multi_token_prediction([h, 2 * h], w, labels, targets=targets, chunking=rows),
        lambda h, w: reference.multi_token_prediction([h, 2 * h], w, labels, targets=targets),
        head,
    )
    return found


def memory(name: str, which: int) -> dict[str, int]:
    """Graphs, and bytes: kept between forward and backward, and the peak; in a fresh process."""
    torch.set_num_threads(2)
    *calls, tensors = cases(inputs(LARGE, torch.float32))[name]
    tensors = tuple(v.clone().requires_grad_() for v in tensors)
    compiled = torch.compile(calls[which], fullgraph=True)

    def step(watch: PeakMemory) -> int:
        start = watch.now()
        loss = compiled(*tensors)
        kept = watch.now() - start
        torch.autograd.grad(loss, tensors)
        return kept

    watch = PeakMemory(torch.device("cpu"))
    step(watch)
    with watch:
        kept = step(watch)
    return {"graphs": count_graphs(calls[which], [tensors]), "kept": kept, "peak": watch.peak}


def error(name: str, which: int, dtype: torch.dtype) -> float:
    """Of loss and gradients against the unchunked form in fp64, relative to their norms: the largest."""
    worst = 0.0
    for seed in range(2):
        results = []
        for form, kind in ((which, dtype), (1, torch.float64)):
            given = inputs(SMALL, dtype, seed)
            given = {k: v.to(kind) if v.is_floating_point() else v for k, v in given.items()}
            *calls, tensors = cases(given)[name]
            if kind == torch.float64:  # the very inputs, which rounding has seen
                *_, rounded = cases(inputs(SMALL, dtype, seed))[name]
                tensors = tuple(v.to(kind) for v in rounded)
            tensors = tuple(v.requires_grad_() for v in tensors)
            loss = calls[form](*tensors)
            results.append([v.double() for v in (loss.detach(), *torch.autograd.grad(loss, tensors))])
        worst = max(worst, *(((a - b).norm() / b.norm()).item() for a, b in zip(*results, strict=True)))
    return worst


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", maxsplit=1)[0])
    parser.add_argument("--only", default="", help="losses whose names contain this")
    given = parser.parse_args()
    version = torch.__version__.split("+")[0]
    path = RESULTS / f"losses-{version}-cpu.jsonl"
    print(
        "| loss | graphs | kept MiB, ours : unchunked | peak MiB | error fp32 | error bf16 |\n|---|---|---|---|---|---|"
    )
    for name in cases(inputs(SMALL, torch.float32)):
        if given.only not in name:
            continue
        row: dict[str, Any] = {"loss": name, "torch": version, "date": datetime.date.today().isoformat()}
        row["shape"] = "x".join(map(str, LARGE))
        for which, form in enumerate(("ours", "unchunked")):
            row[form] = run_in_child("benches.losses:memory", name=name, which=which)
            row[form] |= {f"error_{d}": error(name, which, getattr(torch, d)) for d in ("float32", "bfloat16")}
        with path.open("a") as file:
            file.write(json.dumps(row) + "\n")
        a, b = row["ours"], row["unchunked"]
        sizes = [f"{a[key] / 2**20:.0f} : {b[key] / 2**20:.0f}" for key in ("kept", "peak")]
        errors = [f"{a[key]:.1e} : {b[key]:.1e}" for key in ("error_float32", "error_bfloat16")]
        print(f"| {name} | {a['graphs']} | {' | '.join(sizes + errors)} |", flush=True)


if __name__ == "__main__":
    main()
