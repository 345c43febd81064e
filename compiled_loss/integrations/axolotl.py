"""A plugin of Axolotl, enabled by a line of its YAML, that fuses the head of the model that it trains."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from axolotl.integrations.base import BasePlugin
from axolotl.utils.logging import get_logger
from pydantic import BaseModel, Field, model_validator

from compiled_loss import checks
from compiled_loss.config.base import chunking_of
from compiled_loss.integrations.transformers import fuse_head

__all__ = ["CompiledLossArgs", "CompiledLossPlugin"]

_LOG = get_logger(__name__)

# Keys of Axolotl's YAML with which another loss is computed, of logits or by other code.
_OTHER_LOSSES = (
    "chunked_cross_entropy",
    "cut_cross_entropy",
    "flash_attn_cross_entropy",
    "liger_cross_entropy",
    "liger_fused_linear_cross_entropy",
    "use_eaft",
    "kd_trainer",
    "rl",
    "reward_model",
    "process_reward_model",
)


class CompiledLossArgs(BaseModel):
    """The keys that the plugin adds to Axolotl's YAML."""

    compiled_loss_chunking: dict[str, Any] | None = Field(
        default=None,
        json_schema_extra={"description": "Arguments of compiled_loss.Chunking, such as {memory_budget: 1GiB}"},
    )
    compiled_loss_token_mean: bool = Field(
        default=False,
        json_schema_extra={"description": "Weigh a step's tokens alike; Axolotl 0.19 weighs its microbatches alike"},
    )

    @model_validator(mode="before")
    @classmethod
    def check_other_losses(cls, data: dict[str, Any]) -> dict[str, Any]:
        """Refuses keys of another loss, and keys that nobody reads; see :class:`CompiledLossPlugin`."""
        for key in _OTHER_LOSSES:
            if data.get(key):
                raise ValueError(
                    f"{key}: expected none beside CompiledLossPlugin, which computes the model's own loss without its "
                    f"logits, got {data[key]!r}: remove it, or the plugin"
                )
        own = [key for key in data if key.startswith("compiled_loss_")]
        checks.modules.fields("CompiledLossPlugin", own, list(CompiledLossArgs.model_fields))
        chunking = data.get("compiled_loss_chunking")
        if chunking is not None and not isinstance(chunking, Mapping):
            raise TypeError(
                "compiled_loss_chunking: expected a mapping of Chunking's fields, such as {memory_budget: 1GiB}, got "
                f"{chunking!r}"
            )
        chunking_of(chunking or {})
        return data


class CompiledLossPlugin(BasePlugin):  # type: ignore[misc]
    """Fuses the head of the model that Axolotl trains: see :func:`compiled_loss.integrations.transformers.fuse_head`.

        plugins:
          - compiled_loss.integrations.axolotl.CompiledLossPlugin
        compiled_loss_chunking:   # if the defaults are not what you want
          memory_budget: 1GiB
        compiled_loss_token_mean: true

    The head is fused once adapters are loaded, so that LoRA on the head is seen. The loss is the one that Axolotl
    computes without the plugin. In Axolotl 0.19 that is, for most models, the mean over microbatches and ranks of their
    means: it never hands `num_items_in_batch` to the model. With `compiled_loss_token_mean` it does, as the Trainer of
    `transformers` would, and the loss is the mean over all label tokens of the step.

    Axolotl 0.19 goes on without a plugin that it cannot import, after a message. The log says "fused the head" where
    this one is at work.

    Raises:
        ValueError: as the YAML is validated, where it asks for another loss (`cut_cross_entropy`,
            `chunked_cross_entropy`, `flash_attn_cross_entropy`, Liger's, EAFT, distillation, `rl`, reward models), or a
            chunking that is none.
        TypeError: likewise; or a key is misspelled; or the model has no head to fuse.

    Example:
        >>> from compiled_loss.integrations.axolotl import CompiledLossArgs
        >>> CompiledLossArgs(compiled_loss_chunking={"memory_budget": "1GiB"}).compiled_loss_chunking
        {'memory_budget': '1GiB'}

    """

    def get_input_args(self) -> str:
        """Returns the name of the class with the keys of the YAML, where Axolotl finds it."""
        return f"{CompiledLossArgs.__module__}.{CompiledLossArgs.__name__}"

    def post_model_load(self, cfg: Any, model: Any) -> None:
        """Fuses the head, after adapters are loaded."""
        fuse_head(model, chunking=chunking_of(cfg.compiled_loss_chunking or {}))
        _LOG.info("CompiledLossPlugin: fused the head of %s", type(model).__name__)

    def post_trainer_create(self, cfg: Any, trainer: Any) -> None:
        """Makes the Trainer tell the model the number of label tokens in a step, if the YAML asks for it."""
        if cfg.compiled_loss_token_mean:
            trainer.model_accepts_loss_kwargs = True
