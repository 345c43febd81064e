"""A call of a head that gives no logits, and the second one, in which what is asked of them is computed.

NOTE [Called twice]
Where a head is a unit of its own of FSDP2 or ZeRO-3, its weight is there while it is called, and gone after. The loss
of its logits is asked for after. So the loss calls the head again, with what it wants in place of logits, and all hooks
do what they do for any Linear: gather the weight, free it, gather it for backward and reduce its gradient. Where the
weight has stayed, hooks are left out: those of a unit of several modules, as Accelerate makes of norm and head, would
free all of it in backward before the others are done.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import Any

import torch
from torch import Tensor, nn

from compiled_loss.engine.math.statistics import TokenStatistics
from compiled_loss.integrations.transformers import checks
from compiled_loss.integrations.transformers.transform import Transform
from compiled_loss.models.adapters import base_weight, head_operands
from compiled_loss.models.output_head import OutputHead
from compiled_loss.planner.chunking import Chunking

HEAD = "model.get_output_embeddings()"  # in errors
Asked = Callable[[Tensor, OutputHead], Any]  # of hidden states and a head


class HeadCall:
    """A head's logits [..., V] of one call, and what became of them."""

    def __init__(
        self,
        model: str,
        module: nn.Module,
        tokens: torch.Size,
        *,
        chunking: Chunking = Chunking(),
        statistics: Collection[str] = (),
    ) -> None:
        self.model = model
        self.module: Any = module
        self.tokens = tokens  # the shape of all but the classes
        self.chunking = chunking
        self.wanted = statistics
        self.made: list[Any] = []  # deferred logits of the forward that runs, of which one may outlive it
        self.returned = False  # from that forward
        self.asked = False  # for what a loss is made of
        self.statistics: TokenStatistics | None = None

    def weight(self) -> Tensor:
        """[V, H], while the head is called."""
        return base_weight(self.module, HEAD)

    def apply(self, hidden: Tensor, transform: Transform, function: Callable[..., Any]) -> Any:
        """`function(hidden, weight, **keywords)`, where the keywords of our functions say what these logits are."""
        self.asked = True

        def asked(hidden: Tensor, head: OutputHead) -> Any:
            weight, bias = transform.head(head)
            return function(hidden, weight, bias=bias, **transform.keywords())

        return (self.module if _left(self.module) else self.module.forward)(hidden, asked=asked)

    def keep(self, found: TokenStatistics) -> None:
        """Hold the statistics that are wanted, shaped as the head's tokens where they are of all of them."""
        kept: dict[str, Any] = {}
        for name, values in found._asdict().items():
            if name not in self.wanted:
                kept[name] = None
            else:
                kept[name] = values.reshape(self.tokens) if values.numel() == self.tokens.numel() else values
        self.statistics = TokenStatistics(**kept)

    def hold(self, deferred: Any) -> None:
        """Remember deferred logits until the forward has returned: not longer, for they hold this call."""
        if not self.returned:
            self.made.append(deferred)

    def leave(self) -> None:
        """The forward has returned; its output is still to be asked for a loss."""
        self.made, self.returned = [], True

    def release(self) -> None:
        """Hold hidden states and head no longer."""
        for deferred in self.made:
            deferred.release()
        self.leave()
        self.module = None


def answer(module: nn.Module, hidden: Tensor, asked: Asked) -> Any:
    """What is asked of a head's logits, while it is called."""
    return asked(*head_operands(module, HEAD, hidden))


def _left(module: Any) -> bool:
    """Whether the weight has gone since the head was called: with ZeRO-3's hooks, or FSDP2's of the head alone."""
    weight: Any = getattr(module, "weight", None)
    if hasattr(weight, "ds_id"):
        return bool(weight.numel() == 0)
    if not hasattr(weight, "placements") or not hasattr(module, "_get_fsdp_state"):
        return False
    checks.own_unit(len(module._get_fsdp_state()._modules))
    return True
