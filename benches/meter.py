"""Times, peaks and errors of all providers of a case, interleaved in one process: `measure` runs in a child of `run`.

A round times every provider once, in turn (A B A B), so that what else the machine does meets all of them; who takes
seconds, and several times as long as the floor, is timed once. CUDA is timed by events. Memory is over the inputs and
comes last, for what makes a CPU's resident set exact slows allocation. Errors are against fp64, of the loss and of the
gradients of 64 tokens and of their labels' classes.
"""

from __future__ import annotations

import os
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from benches.cases import HEADS, WANTS, Case, Inputs, inputs
from benches.providers import FLOOR, Loss, MissingError, find, is_ours
from compiled_loss.measure import PeakMemory

SAMPLE = 64
SLOW = (1.0, 3)  # seconds, and times the floor
Step = Callable[[], Any]


def measure(
    case: dict[str, Any], names: list[str], device: str, rounds: int, seed: int, *, forgiving: bool = False
) -> list[dict[str, Any]]:
    """A row a provider, the floor first. A failure of ours is raised, or with `forgiving` a row."""
    torch.set_num_threads(os.cpu_count() or 1)
    one = Case(**case)
    given = inputs(one, device, seed)
    truth = reference(given, HEADS[one.head].softcap) if one.wants == "gradients" else None
    rows: dict[str, dict[str, Any]] = {FLOOR: {}}
    steps: dict[str, Step] = {FLOOR: floor(one, given)}
    steps[FLOOR]()
    warm = torch.compile(lambda v: (v.exp() * 2).sum(), fullgraph=True)  # the compiler's own start is nobody's
    torch.autograd.grad(warm(given.hidden), given.hidden)
    for name in names:
        rows[name], step = prepared(name, one, given, truth, device, forgiving)
        if step is not None:
            steps[name] = step
        print(f"    {name}: {rows[name]}", file=sys.stderr, flush=True)
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(rounds):
        for name, step in steps.items():
            if not seconds[name] or not is_slow(seconds[name][0], seconds[FLOOR][0]):
                seconds[name].append(timed(step, device))
    for name, samples in seconds.items():
        rows[name]["seconds"] = [round(s, 9) for s in samples]
        rows[name]["ratio"] = round(ratio(samples, seconds[FLOOR]), 4)
        if "first" in rows[name]:
            rows[name]["compile"] = round(rows[name].pop("first") - 2 * statistics.median(samples), 2)
    del steps[FLOOR]
    for name, step in steps.items():
        rows[name]["peak_mib"] = round(peak(step, device) / 2**20, 1)
    return [{"provider": name, **row} for name, row in rows.items()]


def is_slow(seconds: float, floor: float) -> bool:
    return seconds > SLOW[0] and seconds > SLOW[1] * floor


def ratio(seconds: list[float], floor: list[float]) -> float:
    """To the floor: the median over rounds, each with its own floor."""
    return statistics.median(one / least for one, least in zip(seconds, floor, strict=False))


def prepared(
    name: str, case: Case, given: Inputs, truth: Truth | None, device: str, forgiving: bool
) -> tuple[dict[str, Any], Step | None]:
    """What there is to say before it is timed, and the step; a peer's failure is a row."""
    try:
        loss = find(name)(case)
        step = stepping(case, loss, given)
        start = time.perf_counter()
        value, *gradients = step()
        synchronize(device)
        row: dict[str, Any] = {"first": time.perf_counter() - start}
        if truth is not None:
            row["error"] = truth.errors(value, *gradients)
        row["first"] += timed(step, device)  # a second call may compile again
        return row, step
    except MissingError as why:
        return {"missing": str(why)}, None
    except torch.OutOfMemoryError:
        torch.get_device_module(device).empty_cache()
        return {"out_of_memory": True}, None
    except Exception as error:
        if is_ours(name) and not forgiving:
            raise
        text = str(error).strip().splitlines()
        kind = "missing" if isinstance(error, ImportError) else "failed"
        return {kind: f"{type(error).__name__}: {text[0][:200] if text else ''}"}, None


def stepping(case: Case, loss: Loss, given: Inputs) -> Step:
    """What is timed: the loss, and what is asked of it."""
    if case.wants in ("loss", "statistics"):

        def only() -> tuple[Tensor, ...]:
            with torch.no_grad():
                return (loss(given),)

        return only
    upstream = torch.rand_like(given.labels, dtype=torch.float32) if case.wants == "none" else None

    def step() -> tuple[Tensor, ...]:
        value = loss(given)
        return (value.detach(), *torch.autograd.grad(value, (given.hidden, given.weight), upstream))

    return step


def floor(case: Case, given: Inputs) -> Step:
    """The GEMMs alone, of all tokens, into buffers that exist already."""
    h, w = given.hidden.detach(), given.weight.detach()
    x, dh, dw = (torch.empty(size, dtype=h.dtype, device=h.device) for size in ((len(h), len(w)), h.shape, w.shape))
    x.normal_().mul_(1e-3)  # denormal or zero logits would flatter it

    def forward() -> None:
        torch.mm(h, w.t(), out=x)

    def backward() -> None:
        torch.mm(x, w, out=dh)
        torch.mm(x.t(), h, out=dw)

    logits, gradients = WANTS[case.wants]

    def step() -> None:
        for _ in range(logits):
            forward()
        for _ in range(gradients // 2):
            backward()

    return step


def timed(step: Step, device: str) -> float:
    """Seconds."""
    if torch.device(device).type == "cuda":
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        step()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1e3
    synchronize(device)
    before = time.perf_counter()
    step()
    synchronize(device)
    return time.perf_counter() - before


def peak(step: Step, device: str) -> int:
    """Bytes over the inputs."""
    with PeakMemory(torch.device(device)) as watch:
        step()
    return watch.peak


def synchronize(device: str) -> None:
    if device != "cpu":
        torch.accelerator.synchronize()


class Truth(NamedTuple):
    """In fp64: the mean, and the gradients of some tokens and some classes."""

    loss: Tensor
    tokens: Tensor
    d_hidden: Tensor
    classes: Tensor
    d_weight: Tensor

    def errors(self, loss: Tensor, d_hidden: Tensor, d_weight: Tensor) -> dict[str, float]:
        """Relative, by norms."""
        pairs = {
            "loss": (loss, self.loss),
            "hidden": (d_hidden[self.tokens], self.d_hidden),
            "weight": (d_weight[self.classes], self.d_weight),
        }
        return {name: float(f"{((a.double() - b).norm() / b.norm()).item():.3g}") for name, (a, b) in pairs.items()}


@torch.no_grad()
def reference(given: Inputs, softcap: float | None) -> Truth:
    """Rows of logits in blocks, in fp64."""
    active = (given.labels != -100).nonzero().squeeze(-1)
    h, w, y = given.hidden[active].double(), given.weight.double(), given.labels[active]

    def capped(z: Tensor) -> tuple[Tensor, Tensor]:
        """The logits, and their derivative with respect to what they were."""
        if softcap is None:
            return z, torch.ones_like(z)
        t = torch.tanh(z / softcap)
        return softcap * t, 1 - t.square()

    lse, nll = [], []
    for rows, labels in zip(h.split(256), y.split(256), strict=True):
        z, _ = capped(rows @ w.t())
        lse.append(z.logsumexp(-1))
        nll.append(lse[-1] - z.gather(-1, labels.unsqueeze(-1)).squeeze(-1))
    sums, classes = torch.cat(lse), y[:SAMPLE].unique()

    def gradient(rows: Tensor, columns: Tensor, sums: Tensor, is_target: Tensor) -> Tensor:
        z, slope = capped(rows @ columns.t())
        return ((z - sums.unsqueeze(-1)).exp() - is_target.double()) * slope / len(y)

    every = torch.arange(len(w), device=y.device)
    d_hidden = gradient(h[:SAMPLE], w, sums[:SAMPLE], y[:SAMPLE, None] == every) @ w
    d_weight = gradient(h, w[classes], sums, y[:, None] == classes).t() @ h
    return Truth(torch.cat(nll).mean(), active[:SAMPLE], d_hidden, classes, d_weight)
