"""Losses for the models of Hugging Face `transformers`. Importing this does not import it.

`set_loss_function` makes `causal_lm_loss` a model's `loss_function`; `LinearCausalLMLoss` is for the Trainer's
`compute_loss_func`, and never sees the logits.
"""

from compiled_loss.huggingface.functions import aligned_lm_loss, causal_lm_loss, set_loss_function
from compiled_loss.huggingface.linear import LinearCausalLMLoss

__all__ = ["LinearCausalLMLoss", "aligned_lm_loss", "causal_lm_loss", "set_loss_function"]
