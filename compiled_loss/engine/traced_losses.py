"""Losses that users write: traced, checked and differentiated once, then used as a `RowLoss` like the library's own.

C rows of a chunk, V vocabulary. See engine/math/row_losses.py, NOTE [Row losses].
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from compiled_loss.checks import functions as checks
from compiled_loss.engine.kernels import symbolic_rows
from compiled_loss.engine.math import row_losses
from compiled_loss.engine.math.coefficients import Classes
from compiled_loss.engine.math.row_losses import Evaluated, RowGradients, RowLoss
from compiled_loss.engine.math.statistics import NAMES, RowStatistics, TokenStatistics, Wanted, of_rows, wanted
from compiled_loss.engine.transforms import without_autocast

_ROWS = 5  # of the example on which a function is tried


class Input(NamedTuple):
    """An argument of a function besides the statistics: one value per row, or a number if `shape` is None."""

    dtype: torch.dtype
    shape: tuple[int, ...] | None  # of a row
    wants_gradient: bool


class Signature(NamedTuple):
    """The properties of its arguments for which a function is traced."""

    inputs: tuple[Input, ...]
    dtype: torch.dtype  # of the statistics
    device: torch.device
    weighted: bool  # whether rows have weights
    weight_wants_gradient: bool
    vocab: int | None  # of logits [C, V], which a function is given instead of statistics

    def first(self) -> list[Input]:
        """Returns the arguments before the inputs: the statistics, or the logits."""
        if self.vocab is not None:
            return [Input(self.dtype, (self.vocab,), wants_gradient=True)]
        constant = {"correct": torch.bool, "first_argmax": torch.int64}
        return [Input(constant.get(kind, self.dtype), (), kind not in constant) for kind in NAMES]

    def name(self) -> str:
        """Returns the name of the argument by which the user passed the function."""
        return "token_loss" if self.vocab is None else "logits_loss"

    def of_rows(self) -> list[Input]:
        """Returns the inputs that have one value per row."""
        return [one for one in self.inputs if one.shape is not None]


def traced(function: Callable[..., Tensor], signature: Signature) -> str:
    """Defines the `RowLoss` of a function, and returns its name. Raises an error if the function is no row loss."""
    from torch.utils._python_dispatch import _disable_current_modes

    # The caller's modes do not apply here, and do not see these operations.
    with torch.inference_mode(False), torch.enable_grad(), without_autocast(signature.device), _disable_current_modes():
        graph, uses = _loss_of(function, signature)
        _check_rows(graph, signature)
        gradients = _with_gradients(function, signature, uses)
    text = f"{gradients.code}{uses}{signature}"
    digest = hashlib.sha256(text.encode()).hexdigest()[:16]
    if signature.vocab is None:
        used = dict(zip(NAMES, uses, strict=True))
        name = row_losses.user_name(digest, wanted(used))
        row_losses.define(name, _of_statistics(gradients, used, signature))
    else:
        name = row_losses.user_name(digest, Wanted())
        row_losses.define(name, _of_logits(gradients, signature))
    return name


def _loss_of(function: Callable[..., Tensor], signature: Signature) -> tuple[torch.fx.GraphModule, list[bool]]:
    """Returns the function as a graph for a CPU, and for each argument before the inputs whether the graph uses it."""

    def loss(*operands: Tensor) -> Tensor:
        return _called(function, operands, signature)

    graph = _graph(loss, signature._replace(device=torch.device("cpu")), weight=False)
    checks.traced_operators(signature.name(), graph)
    placeholders = [node for node in graph.graph.nodes if node.op == "placeholder"]
    return graph, [bool(node.users) for node in placeholders[: len(signature.first())]]


def _called(function: Callable[..., Tensor], operands: Sequence[Tensor], signature: Signature) -> Tensor:
    if signature.vocab is None:
        count = len(NAMES)
        first = dict(zip(NAMES, operands[:count], strict=True))
        loss = function(TokenStatistics(**first), *operands[count:])  # type: ignore[arg-type]
    else:
        loss = function(*operands)
    checks.result(signature.name(), loss, operands[0].shape[:1])
    return loss.to(signature.dtype)


def _with_gradients(
    function: Callable[..., Tensor], signature: Signature, uses: Sequence[bool]
) -> torch.fx.GraphModule:
    """Returns a graph: (weight, *first, *inputs) -> (weight * loss, loss if weight wants a gradient, *gradients)."""
    wanted = [used and one.wants_gradient for one, used in zip(signature.first(), uses, strict=True)]
    wanted += [one.wants_gradient for one in signature.inputs]

    def evaluated(weight: Tensor, *operands: Tensor) -> tuple[Tensor, ...]:
        at = [v for v, one in zip(operands, wanted, strict=True) if one]

        def loss(*at: Tensor) -> Tensor:
            left = list(at)
            return _called(
                function, [left.pop(0) if one else v for v, one in zip(operands, wanted, strict=True)], signature
            )

        if at:
            value, pullback = torch.func.vjp(loss, *at)  # type: ignore[misc]  # no auxiliary output
            gradients = pullback(weight)
        else:
            value, gradients = loss(), ()
        return value * weight, *([value] if signature.weight_wants_gradient else []), *gradients

    return _graph(evaluated, signature, weight=True)


def _graph(function: Callable[..., Any], signature: Signature, *, weight: bool) -> torch.fx.GraphModule:
    from torch.fx.experimental.proxy_tensor import make_fx

    env, fake, _, count = symbolic_rows(_ROWS)
    kinds = [Input(signature.dtype, (), wants_gradient=False)] if weight else []
    kinds += [*signature.first(), *signature.inputs]
    with fake:
        operands = [
            torch.empty(() if one.shape is None else (count, *one.shape), dtype=one.dtype, device=signature.device)
            for one in kinds
        ]
        with checks.tracing(signature.name()):
            graph = make_fx(function, tracing_mode="fake")(*operands)
    if env.guards:
        checks.number_of_rows(signature.name(), ", ".join([str(guard.expr) for guard in env.guards]))
    return graph


def _check_rows(graph: torch.fx.GraphModule, signature: Signature) -> None:
    """Raises an error unless each row's loss is its own: the same with the other rows and without them.

    It is tried on numbers of several sizes and signs. Integers may be divisors or indices, so not all of them can be
    tried.
    """
    random = torch.Generator("cpu").manual_seed(0)

    def example(one: Input, size: float, integers: tuple[int, int]) -> Tensor:
        shape = () if one.shape is None else (_ROWS, *one.shape)
        if one.dtype.is_floating_point:
            values = torch.rand(shape, generator=random, dtype=torch.float64, device="cpu")
            return (0.1 + 0.8 * values if size == 1 else size * (values - 0.5)).to(one.dtype)
        return torch.randint(*integers, shape, generator=random, device="cpu").to(one.dtype)

    kinds = [*signature.first(), *signature.inputs]
    for size in (1, 4, 100):
        for integers in ((1, 5), (1, 2), (0, 1)):
            operands = [example(one, size, integers) for one in kinds]
            if signature.vocab is None:
                operands[0] = -operands[0].abs()  # log-probabilities
            try:
                with torch.no_grad():
                    _compare_rows(graph, signature, kinds, operands)
                break
            except (RuntimeError, IndexError):
                continue


def _compare_rows(
    graph: torch.fx.GraphModule, signature: Signature, kinds: Sequence[Input], operands: Sequence[Tensor]
) -> None:
    together = graph(*operands)
    for i in range(_ROWS):
        pairs = zip(kinds, operands, strict=True)
        alone = graph(*[v if one.shape is None else v[i : i + 1] for one, v in pairs])
        checks.own_row(signature.name(), together[i : i + 1], alone)


def _of_statistics(graph: torch.fx.GraphModule, used: dict[str, bool], signature: Signature) -> RowLoss:
    first = zip(NAMES, signature.first(), strict=True)
    differentiated = [kind for kind, one in first if used[kind] and one.wants_gradient]

    def evaluate(
        known: RowStatistics, labels: Tensor, classes: Classes, numbers: Sequence[Tensor], inputs: Sequence[Tensor]
    ) -> Evaluated:
        size = classes.last - classes.first
        named = of_rows(known, labels - classes.first, size)
        statistics = [getattr(named, name) for name in NAMES]
        loss, gradients, d_inputs = _evaluated(graph, signature, statistics, labels, classes, numbers, inputs)
        d = dict(zip(differentiated, gradients, strict=True))
        d_nll = -d["logprob"] if "logprob" in d else known.nll.new_zeros(known.nll.shape)
        d_total = d["mean_logit"] / size if "mean_logit" in d else None
        others = d.get("entropy"), d.get("log_sum_sq_probs")
        return Evaluated(loss, RowGradients(d_nll, d.get("logsumexp"), d_total, *others), d_inputs)

    return _row_loss(evaluate, signature, wanted(used))


def _of_logits(graph: torch.fx.GraphModule, signature: Signature) -> RowLoss:
    def evaluate(
        logits: Tensor, labels: Tensor, classes: Classes, numbers: Sequence[Tensor], inputs: Sequence[Tensor]
    ) -> tuple[Tensor, Tensor, tuple[Tensor, ...]]:
        loss, gradients, d_inputs = _evaluated(graph, signature, (logits,), labels, classes, numbers, inputs)
        return loss, gradients[0] if gradients else torch.zeros_like(logits), d_inputs

    return _row_loss(evaluate, signature, Wanted())


def _evaluated(
    graph: torch.fx.GraphModule,
    signature: Signature,
    first: Sequence[Tensor | None],
    labels: Tensor,
    classes: Classes,
    numbers: Sequence[Tensor],
    inputs: Sequence[Tensor],
) -> tuple[Tensor, list[Tensor], tuple[Tensor, ...]]:
    """Returns the losses, the gradients of the statistics or logits, and those of the inputs."""
    numbers, inputs, ignored = list(numbers), list(inputs), labels == classes.ignored
    weight = inputs.pop(0) if signature.weighted else classes.nan_if_invalid(labels, signature.dtype)
    given = [numbers.pop(0) if one.shape is None else inputs.pop(0) for one in signature.inputs]
    loss, *left = graph(weight, *first, *given)
    d_weight = [left.pop(0)] if signature.weight_wants_gradient else []
    count = len(left) - sum([one.wants_gradient for one in signature.inputs])
    d_inputs = [v.masked_fill(_like(ignored, v), 0.0) for v in (*d_weight, *left[count:])]
    return loss.masked_fill(ignored, 0.0), left[:count], tuple(d_inputs)


def _like(rows: Tensor, value: Tensor) -> Tensor:
    return rows.view(-1, *[1] * (value.dim() - 1))


def _row_loss(evaluate: Callable[..., Any], signature: Signature, uses: Wanted) -> RowLoss:
    wants = [signature.weight_wants_gradient] if signature.weighted else []
    wants += [one.wants_gradient for one in signature.of_rows()]
    return RowLoss(
        evaluate,
        uses=uses,
        numbers=len(signature.inputs) - len(signature.of_rows()),
        linear=int(signature.weighted),
        wanted=tuple([i for i, one in enumerate(wants) if one]),
        computed=True,
        of_logits=signature.vocab is not None,
    )
