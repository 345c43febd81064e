"""The loss of a model of Hugging Face `transformers` without its logits, in its own forward: `fuse_head(model)`.

Nothing of `transformers` is imported.
"""

from compiled_loss.integrations.transformers.deferred import DeferredLogits
from compiled_loss.integrations.transformers.fuse import fuse_head, unfuse_head

__all__ = ["DeferredLogits", "fuse_head", "unfuse_head"]
