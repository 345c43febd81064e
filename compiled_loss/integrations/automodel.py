"""Losses of this library inside NeMo Automodel's own recipes.

NOTE [Automodel's inspections]
Its recipes check for classes of their own: a loss that takes hidden states, one that may see the logits of a model that
cannot leave them out, one whose head has to be checked. The classes here are both: they compute our losses, and they
are Automodel's by class.
Their names are not in Automodel's registry, which knows a loss by its name alone. A `_target_` called
FusedLinearCrossEntropy, whoever wrote it, silently becomes Automodel's own.
"""

from collections.abc import Mapping
from typing import Any

from nemo_automodel.components.loss import chunked_ce, masked_ce

from compiled_loss.compat import linear, modules
from compiled_loss.config.base import chunking_of


class CompiledLinearCrossEntropy(linear.FusedLinearCrossEntropy, chunked_ce.ChunkedCrossEntropy):
    """:class:`compiled_loss.FusedLinearCrossEntropy`, which recipes give hidden states and the checked head's weight.

    A head with a bias, or logits that are capped or scaled in another way than the loss's, is an error when the recipe
    starts, and so is a model that cannot return hidden states. `chunking` may be a mapping of its fields.
    """

    def __init__(self, *args: Any, **keywords: Any) -> None:
        if isinstance(keywords.get("chunking"), Mapping):
            keywords["chunking"] = chunking_of(keywords["chunking"])
        super().__init__(*args, **keywords)


class CompiledMaskedCrossEntropy(modules.MaskedCrossEntropy, masked_ce.MaskedCrossEntropy):
    """:class:`compiled_loss.MaskedCrossEntropy`, which recipes leave in place where they replace other losses."""


class CompiledTEParallelCrossEntropy(modules.TEParallelCrossEntropy):
    """:class:`compiled_loss.TEParallelCrossEntropy` by a name that recipes do not replace."""
