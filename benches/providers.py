"""Who is measured: each is made lazily from a case, and is a function of its inputs that returns a loss.

What a provider cannot do raises `MissingError`, which becomes a row of its own.
"""

from __future__ import annotations

import functools
import types
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

import compiled_loss as ours
from benches.cases import HEADS, Case, Inputs
from compiled_loss import Chunking

Loss = Callable[[Inputs], Tensor]


class MissingError(Exception):
    """Not installed, or not made for this."""


def _needs(condition: object, why: str) -> None:
    if not condition:
        raise MissingError(why)


def _gradients_only(case: Case) -> None:
    _needs(case.wants in ("gradients", "loss"), f"has no {case.wants}")


# --- ours -------------------------------------------------------------------------------------------------------------


def _ours(case: Case, *, eager: bool = False, mode: str | None = None, **chunking: Any) -> Loss:
    """With masked tokens it is told how many count."""
    if case.masked:
        chunking["max_label_tokens"] = case.counting
    how = {"chunking": Chunking(**chunking)}
    softcap = HEADS[case.head].softcap

    def loss(h: Tensor, w: Tensor, y: Tensor, th: Tensor | None, tw: Tensor | None) -> Tensor:
        if case.wants == "statistics":
            return ours.linear_token_statistics(h, w, y, softcap=softcap, **how).logprob
        if case.wants == "distillation":
            return ours.linear_distillation(h, w, th, tw, y, **how)
        if case.wants == "soft":
            return ours.linear_soft_cross_entropy(h, w, y != -100, teacher_hidden=th, teacher_weight=tw, **how)
        if case.wants == "multi-token":
            return ours.multi_token_prediction([h, 2 * h], w, y, targets=[y, y.flip(0)], softcap=softcap, **how)
        reduction = "none" if case.wants == "none" else "mean"
        return ours.linear_cross_entropy(h, w, y, softcap=softcap, reduction=reduction, **how)

    if eager:
        return lambda given: loss(*given)
    # Dynamo counts recompilations by code object, so each gets its own.
    own = types.FunctionType(loss.__code__.replace(), globals(), loss.__name__, None, loss.__closure__)
    compiled = torch.compile(own, fullgraph=True, mode=mode)

    def step(given: Inputs) -> Tensor:
        if mode is not None:
            torch.compiler.cudagraph_mark_step_begin()  # a graph may write over the results of the step before
        return compiled(*given)

    return step


def _vocab(case: Case, **how: Any) -> Loss:
    _needs(case.wants in ("gradients", "loss", "statistics"), "is the default, or chunks over tokens")
    return _ours(case, strategy="vocab", **how)


# --- what one would write ---------------------------------------------------------------------------------------------


def _plain(case: Case) -> Callable[..., Tensor]:
    softcap = HEADS[case.head].softcap

    def logits(h: Tensor, w: Tensor) -> Tensor:
        z = (h @ w.t()).float()
        return z if softcap is None else softcap * torch.tanh(z / softcap)

    def loss(h: Tensor, w: Tensor, y: Tensor, th: Tensor | None, tw: Tensor | None) -> Tensor:
        if case.wants == "statistics":
            log_p = logits(h, w).log_softmax(-1)
            entropy = -(log_p.exp() * log_p).sum(-1)
            return log_p.gather(-1, y.unsqueeze(-1)).squeeze(-1) + 0 * entropy
        if case.wants in ("distillation", "soft"):
            assert th is not None and tw is not None
            p, log_q = (th @ tw.t()).float().softmax(-1), (h @ w.t()).float().log_softmax(-1)
            rows = -(p * log_q).sum(-1) if case.wants == "soft" else F.kl_div(log_q, p, reduction="none").sum(-1)
            return torch.where(y != -100, rows, 0.0).sum() / (y != -100).sum()
        reduction = "none" if case.wants == "none" else "mean"
        value = F.cross_entropy(logits(h, w), y, reduction=reduction)
        if case.wants == "multi-token":
            value = (value + F.cross_entropy(logits(2 * h, w), y.flip(0))) * 0.05
        return value

    return loss


def _eager(case: Case) -> Loss:
    loss = _plain(case)
    return lambda given: loss(*given)


def _compiled(case: Case) -> Loss:
    compiled = torch.compile(_plain(case), fullgraph=True)
    return lambda given: compiled(*given)


def _auto_chunker(case: Case) -> Loss:
    _gradients_only(case)
    _needs(hasattr(torch._inductor.config, "auto_chunker"), "torch has none")
    compiled = torch.compile(_plain(case), fullgraph=True, options={"auto_chunker.enable": True})
    return lambda given: compiled(*given)


# --- peers ------------------------------------------------------------------------------------------------------------


def _torch(case: Case) -> Loss:
    _gradients_only(case)
    _needs(hasattr(F, "linear_cross_entropy"), "torch >= 2.13 has it")
    _needs(HEADS[case.head].softcap is None, "has no softcap")
    options = torch.nn.LinearCrossEntropyOptions(allow_retain_graph=True)  # without it fullgraph fails
    compiled = torch.compile(lambda h, w, y: F.linear_cross_entropy(h, w, y, options=options), fullgraph=True)
    return lambda given: compiled(*given[:3])


def _liger(case: Case) -> Loss:
    _gradients_only(case)
    from liger_kernel.transformers.functional import liger_fused_linear_cross_entropy as peer

    return lambda given: peer(*given[:3], softcap=HEADS[case.head].softcap)


def _cce(case: Case, how: str) -> Loss:
    _gradients_only(case)
    from cut_cross_entropy import linear_cross_entropy as peer

    return lambda given: peer(*given[:3], softcap=HEADS[case.head].softcap, impl=how)


def _quack(case: Case) -> Loss:
    _gradients_only(case)
    _needs(HEADS[case.head].softcap is None, "has no softcap")
    from quack.linear_cross_entropy import chunked_linear_cross_entropy as peer

    return lambda given: peer(*given[:3])


# By default they take the token strategy, but for reduction "none".
OURS: dict[str, Callable[..., Loss]] = {"defaults": _ours, "vocab": _vocab}
PLAIN: dict[str, Callable[[Case], Loss]] = {"F.cross_entropy, compiled": _compiled, "F.cross_entropy, eager": _eager}
PEERS: dict[str, Callable[[Case], Loss]] = {
    "F.linear_cross_entropy": _torch,
    "Inductor's auto chunker": _auto_chunker,
    "Liger Kernel": _liger,
    "cut-cross-entropy": functools.partial(_cce, how="cce"),
    "cut-cross-entropy, exact": functools.partial(_cce, how="cce_exact"),
    "cut-cross-entropy, torch_compile": functools.partial(_cce, how="torch_compile"),
    "quack": _quack,
}
PROVIDERS = OURS | PLAIN | PEERS
# By name alone: they are slower, need CUDA graphs, or compile for minutes.
MODES: dict[str, Callable[[Case], Loss]] = {}
for _name, _maker in OURS.items():
    MODES[f"{_name}, eager"] = functools.partial(_maker, eager=True)
    MODES |= {f"{_name}, {mode}": functools.partial(_maker, mode=mode) for mode in ("reduce-overhead", "max-autotune")}
FLOOR = "bare GEMMs"


def sized(strategy: str, chunk_size: int) -> str:
    """The name of ours with chunks of a size."""
    return f"{strategy}, {chunk_size} a chunk"


def find(name: str) -> Callable[[Case], Loss]:
    """Who is called so."""
    strategy, _, size = name.partition(", ")
    if size.endswith(" a chunk"):
        return functools.partial(_ours, strategy=strategy, chunk_size=int(size.split()[0]))
    return (PROVIDERS | MODES)[name]


def is_ours(name: str) -> bool:
    return name in OURS | MODES or name.endswith(" a chunk")
