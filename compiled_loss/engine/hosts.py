"""How a body of `bodies.py` is run: as a nested region, as a compiled operator, or plainly.

NOTE [Hosts]
Traced into the user's graph as ordinary code, a chunk loop is undone: the compiler merges the logits GEMM of forward
with its recomputation in backward, saves every chunk's logits and fuses all chunks into one kernel that needs them all.
So a body is behind a wall:

- region:   `nested_compile_region`, under torch.compile on torch >= 2.13. Compiled once, called once a chunk, and the
            whole loss stays visible in Inductor's graph. (On 2.11 a region inside an autograd Function returns every
            intermediate: right numbers, several times the memory.)
- lone:     a region for a chunk of its own size. Dynamo inlines what is called once, and ordinary code is undone: its
            logits kept for backward, its gradient written twice beside them. So it is called twice, and the compiler
            drops the call whose results nobody takes. (torch._dynamo.config.inline_single_use_invoke_subgraph.)
- traced:   ordinary code after all, on the same torch, for logits that exist already. There is no loop to undo, and of
            a region that is called twice in a graph Inductor 2.13 wrote the result over its input, the caller's logits;
            with varying shapes Dynamo 2.13 and 2.15 could not trace the second call.
- operator: an opaque operator whose implementation is itself compiled: eager calls that want generated kernels, and
            torch.compile on torch 2.11 and 2.12.
- plain:    eager torch, a block of rows at a time so that fp32 temporaries stay small.

Regions only return new tensors. One that writes its input was seen to be dropped by Inductor, its write with it, in
backward on 2.13 and wherever its result went unused: the loss right, the gradients silently wrong.
"""

from __future__ import annotations

import functools
import types
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from compiled_loss.engine import bodies, divergence_bodies, probability_bodies
from compiled_loss.engine.divergences import Pair

Body = Callable[..., bodies.Output]
Host = Callable[..., bodies.Output]  # (body, source, weight, *operands, group=None) -> the body's outputs

_ONE = (
    bodies.fold,
    bodies.gradient,
    bodies.fold_and_gradient,
    bodies.statistics_and_gradient,
    bodies.all_statistics_and_gradient,
)
_TWO = (*(body for kind in divergence_bodies.BODIES.values() for body in kind), divergence_bodies.target_gradient)
_PROBABILITIES: tuple[Body, ...] = (
    probability_bodies.fold_beside_probabilities,
    probability_bodies.gradient_beside_probabilities,
    probability_bodies.gradient_of_probabilities,
)
_BODIES: dict[str, Body] = {b.__name__: b for b in (*_ONE, *_TWO, *_PROBABILITIES)}
assert len(_BODIES) == len((*_ONE, *_TWO, *_PROBABILITIES)), "two bodies of one name"
_REGIONS = {name: torch.compiler.nested_compile_region(body) for name, body in _BODIES.items()}
REGIONS_WORK = tuple(int(part) for part in torch.__version__.split(".")[:2]) >= (2, 13)
_BLOCK = 1 << 20  # logits in a plain host's block: 4 MiB a temporary in fp32
_FOLDS = (
    bodies.fold,
    probability_bodies.fold_beside_probabilities,
    *(kind.fold for kind in divergence_bodies.BODIES.values()),
)
# Bodies whose gradient is not the logits', and the operand that it is like.
_OTHERS = {
    divergence_bodies.target_gradient: 4,
    probability_bodies.gradient_of_probabilities: len(bodies.Head._fields) + 2,
}
# Operands after the first, the labels, that have no rows.
_ROWLESS = {b.__name__: len(bodies.Head._fields) for b in _ONE} | {b.__name__: len(Pair._fields) for b in _TWO}
_ROWLESS |= {b.__name__: len(bodies.Head._fields) + 1 for b in _PROBABILITIES}


def choose(device: torch.device, compile: bool | str, *, loop: bool = True) -> Host:
    """The host for a call on `device`, in a loop over chunks or not; `compile` is `Chunking`'s: of eager calls only."""
    if torch.compiler.is_compiling():
        if not REGIONS_WORK:
            return operator
        return region if loop else traced
    wanted = device.type not in ("cpu", "meta") if compile == "auto" else compile
    return operator if wanted else plain


def region(
    body: Body, source: Tensor, weight: Tensor | None, *operands: Tensor | None, group: str | None = None
) -> bodies.Output:
    """The body as a subgraph of the graph being traced."""
    outputs: bodies.Output = _REGIONS[body.__name__](source, weight, *operands, **_over(group))
    return outputs


def traced(
    body: Body, source: Tensor, weight: Tensor | None, *operands: Tensor | None, group: str | None = None
) -> bodies.Output:
    """The body as a part of the graph being traced."""
    return body(source, weight, *operands, **_over(group))


def lone(
    body: Body, source: Tensor, weight: Tensor | None, *operands: Tensor | None, group: str | None = None
) -> bodies.Output:
    """The body as a subgraph although nothing else calls it: NOTE [Hosts]."""
    region(body, source, weight, *operands, group=group)
    return region(body, source, weight, *operands, group=group)


def of_chunk(run: Host, alone: bool) -> Host:
    """The host for a chunk; `alone` where no other is of its size."""
    return lone if alone and run is region else run


def operator(
    body: Body, source: Tensor, weight: Tensor | None, *operands: Tensor | None, group: str | None = None
) -> bodies.Output:
    """The body as an opaque operator."""
    return tuple(run_body(body.__name__, source, weight, list(operands), group))


def _over(group: str | None) -> dict[str, str]:
    """The keyword of bodies that reduce over ranks."""
    return {} if group is None else {"group": group}


@torch.library.custom_op("compiled_loss::run_body", mutates_args=())
def run_body(
    body: str, source: Tensor, weight: Tensor | None, operands: Sequence[Tensor | None], group: str | None
) -> list[Tensor]:
    """The outputs of a compiled body; they never alias an input."""
    key = (body, source.device.type, source.dtype, source.dim(), *(v is not None for v in (weight, *operands)), group)
    # Detached: Dynamo would compile again for each pattern of requires_grad.
    rest = [None if v is None else v.detach() for v in (weight, *operands)]
    with torch.no_grad():
        return list(_compiled(key)(source.detach(), *rest, **_over(group)))


@run_body.register_fake
def _(
    body: str, source: Tensor, weight: Tensor | None, operands: Sequence[Tensor | None], group: str | None
) -> list[Tensor]:
    return list(_BODIES[body](source, weight, *operands, **_over(group)))


@functools.cache
def _compiled(key: tuple[object, ...]) -> Body:
    """A compiled body for one combination of options: Dynamo counts recompiles by code object, so each gets its own."""
    body = _BODIES[str(key[0])]
    assert isinstance(body, types.FunctionType)
    own = types.FunctionType(body.__code__.replace(), body.__globals__, body.__name__, None, body.__closure__)
    own.__kwdefaults__ = body.__kwdefaults__
    return torch.compile(own, fullgraph=True)


def plain(
    body: Body, source: Tensor, weight: Tensor | None, *operands: Tensor | None, group: str | None = None
) -> bodies.Output:
    """The body in eager torch. A gradient overwrites the logits where they are those of our own GEMM.

    Over a group a chunk is one block, or ranks with fewer columns would reduce less often than others.
    """
    if group is not None:
        return body(source, weight, *operands, **_over(group))
    logits = source if weight is None else source @ weight.t()
    if body in _TWO:
        labels, *scalars, _, target = operands[:5]
        target_weight = Pair(*operands[1:4]).head(weight)
        if target_weight is not None and target is not None:
            target = target @ target_weight.t()
        operands = (labels, *scalars, None, target, *operands[5:])
    if body in _FOLDS:
        return _by_rows(body, logits, None, operands)
    formed = operands[_OTHERS[body]] if body in _OTHERS else logits
    out = torch.empty_like(formed) if weight is None else logits  # type: ignore[arg-type]
    return (out, *_by_rows(body, logits, out, operands))


def _by_rows(body: Body, logits: Tensor, out: Tensor | None, operands: Sequence[Tensor | None]) -> bodies.Output:
    """Row outputs of the body, run on blocks of rows; its gradient goes to `out`."""
    rowless = _ROWLESS[body.__name__]

    def part(rows: int | slice) -> bodies.Output:
        mine = [v if v is None or 0 < i <= rowless else v[rows] for i, v in enumerate(operands)]
        if logits.dim() > 2:
            return _by_rows(body, logits[rows], None if out is None else out[rows], mine)
        outputs = body(logits[rows], None, *mine)
        if out is None:
            return outputs
        out[rows] = outputs[0]
        return outputs[1:]

    if logits.dim() > 2:  # not flattened: any strides, and no copy
        parts, join = [part(i) for i in range(logits.shape[0])], torch.stack
    else:
        step = max(1, _BLOCK // max(1, logits.shape[1]))
        parts, join = [part(slice(i, i + step)) for i in range(0, max(1, logits.shape[0]), step)], torch.cat
    return tuple([join(values) for values in zip(*parts, strict=True)])
