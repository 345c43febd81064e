"""A call of a head that returns no logits, and the second call, which computes what is asked of them.

NOTE [Called twice]
If a head is a unit of its own of FSDP2 or ZeRO-3, its weight is there while it is called, and gone afterwards. The loss
of its logits is asked for afterwards. So the loss calls the head a second time, and gives it the function to compute in
place of logits. All hooks then do what they do for any Linear: they gather the weight, free it, gather it for backward
and reduce its gradient. If the weight has stayed, hooks are left out. Hooks of a unit of several modules, such as the
unit of norm and head that Accelerate makes, would free all of the unit in backward before the other modules are done.
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
Asked = Callable[[Tensor, OutputHead], Any]  # a function of hidden states and a head


class HeadCall:
    """The logits [..., V] of one call of a head, with what was asked of them."""

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
        self.made: list[Any] = []  # deferred logits of the running forward, of which one may outlive it
        self.returned = False  # whether that forward has returned
        self.asked = False  # whether a term of a loss was asked for
        self.statistics: TokenStatistics | None = None

    def weight(self) -> Tensor:
        """Returns the weight [V, H], while the head is called."""
        return base_weight(self.module, HEAD)

    def apply(self, hidden: Tensor, transform: Transform, function: Callable[..., Any]) -> Any:
        """Returns `function(hidden, weight, **keywords)`, with our functions' keywords for these logits."""
        self.asked = True

        def asked(hidden: Tensor, head: OutputHead) -> Any:
            weight, bias = transform.head(head)
            return function(hidden, weight, bias=bias, **transform.keywords())

        return (self.module if _left(self.module) else self.module.forward)(hidden, asked=asked)

    def keep(self, found: TokenStatistics) -> None:
        """Keeps the statistics that are wanted, in the shape of the head's tokens if they are of all of them."""
        kept: dict[str, Any] = {}
        for name, values in found._asdict().items():
            if name not in self.wanted:
                kept[name] = None
            else:
                kept[name] = values.reshape(self.tokens) if values.numel() == self.tokens.numel() else values
        self.statistics = TokenStatistics(**kept)

    def hold(self, deferred: Any) -> None:
        """Remembers deferred logits until the forward has returned; not longer, because they hold this call."""
        if not self.returned:
            self.made.append(deferred)

    def leave(self) -> None:
        """Marks that the forward has returned; its output is still to be asked for a loss."""
        self.made, self.returned = [], True

    def release(self) -> None:
        """Drops the hidden states and the head."""
        for deferred in self.made:
            deferred.release()
        self.leave()
        self.module = None


def answer(module: nn.Module, hidden: Tensor, asked: Asked) -> Any:
    """Returns the answer to what is asked of a head's logits, while the head is called."""
    return asked(*head_operands(module, HEAD, hidden))


def _left(module: Any) -> bool:
    """Returns True if the weight has gone since the head's call: by hooks of ZeRO-3, or of FSDP2 on the head alone."""
    weight: Any = getattr(module, "weight", None)
    if hasattr(weight, "ds_id"):
        return bool(weight.numel() == 0)
    if not hasattr(weight, "placements") or not hasattr(module, "_get_fsdp_state"):
        return False
    checks.own_unit(len(module._get_fsdp_state()._modules))
    return True
