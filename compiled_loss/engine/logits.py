"""Row statistics of logits that exist already: one pass forward, one back, and no further [N, V] tensor is kept."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from compiled_loss import checks
from compiled_loss.engine import execution, gemm
from compiled_loss.engine.execution import Execution
from compiled_loss.engine.math import bodies
from compiled_loss.engine.math.bodies import Upstream
from compiled_loss.engine.math.coefficients import Classes
from compiled_loss.engine.math.problem import Head, slack
from compiled_loss.engine.math.statistics import RowStatistics, State, Wanted, finish, initial_state
from compiled_loss.engine.operators import composite, none, unpack
from compiled_loss.engine.transforms import without_autocast
from compiled_loss.planner.chunking import is_compiled


class Given(NamedTuple):
    """Logits that exist already, the parameters of their transform, and labels."""

    logits: Tensor  # [..., V], two dimensions or more, any strides
    class_weights: Tensor | None  # [V]
    scales: Tensor | None
    labels: Tensor  # [...]
    inverse_temperature: Tensor | None  # [...]

    @property
    def head(self) -> Head:
        """The head without its weight."""
        return Head(None, self.class_weights, self.scales)


def statistics(given: Given, classes: Classes, wanted: Wanted, group: str | None, compile: bool | str) -> RowStatistics:
    """Returns the statistics of NOTE [Relative statistics].

    All but `correct` and `argmax` are differentiable with respect to the logits.
    """
    options = Execution(group, is_compiled(given.logits.device, compile))
    return RowStatistics.of(_statistics(given, classes, wanted, options), wanted)


def plain_statistics(
    logits: Tensor, labels: Tensor, head: Head, inverse_temperature: Tensor | None, wanted: Wanted
) -> RowStatistics:
    """Computes the statistics by ordinary autograd, for functorch's transforms: any derivative, no memory promise."""
    state = initial_state(logits, labels.shape, wanted)
    return finish(state.replaced(bodies.fold(logits, labels, *head, inverse_temperature, *state)))


class _Logits(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *args: Any) -> tuple[Tensor | None, ...]:
        given, classes, wanted, options, _ = unpack(args, Given, Classes, Wanted, Execution)
        logits, labels = given.logits, given.labels
        state = initial_state(logits, labels.shape, wanted)
        found = execution.given(
            bodies.fold,
            logits,
            (labels, given.inverse_temperature, *state),
            given.head,
            lambda: state.map(torch.empty_like).present(),
            compiled=options.compiled,
        )
        state = state.replaced(found).all_reduced(options.group)
        ctx.save_for_backward(*given, *state)
        ctx.set_materialize_grads(False)
        ctx.moved, ctx.classes, ctx.compiled = not logits.is_contiguous(), classes, options.compiled
        return tuple(finish(state, slack(given.head, given.inverse_temperature)))

    @staticmethod
    def backward(
        ctx: Any,
        g_nll: Tensor | None,
        g_lse: Tensor | None,
        g_total: Tensor | None,
        g_entropy: Tensor | None,
        g_squares: Tensor | None,
        *_constants: None,
    ) -> tuple[Tensor | None, ...]:
        checks.first_derivative()
        given, state, _ = unpack(ctx.saved_tensors, Given, State)
        logits = given.logits
        with without_autocast(logits.device):  # backward may be called under autocast
            upstream = Upstream.of(state, g_nll, g_lse, g_total, g_entropy, g_squares)
            if ctx.moved:  # else Inductor writes out a long expression twice, in its own layout and in the logits'
                upstream = upstream.map(lambda v: gemm.opaque_copy(v, []))
            (d,) = execution.given(
                bodies.gradient,
                logits,
                (given.labels, given.inverse_temperature, state.maximum, *upstream),
                given.head,
                lambda: [torch.empty_like(logits)],
                compiled=ctx.compiled,
                classes=ctx.classes,
                moved=ctx.moved or None,
            )
            return *none(Given)._replace(logits=d), *none(Classes), *none(Wanted), *none(Execution)


@composite("logits_statistics", Given, Classes, Wanted, Execution)
def _statistics(given: Given, classes: Classes, wanted: Wanted, options: Execution) -> list[Tensor]:
    """Returns the statistics that are wanted."""
    found = _Logits.apply(*given, *classes, *wanted, *options)
    return [v for v in found if v is not None]
