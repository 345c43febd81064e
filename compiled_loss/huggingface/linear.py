"""Losses of the models of Hugging Face `transformers`, without importing it.

`causal_lm_loss` takes the place of a model's `loss_function`; `LinearCausalLMLoss` is for the Trainer's
`compute_loss_func`, and never sees the logits.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from compiled_loss import checks, shell_checks
from compiled_loss.engine.plan import Chunking
from compiled_loss.functional.cross_entropy import cross_entropy, linear_cross_entropy

_SOFTCAPS = ("final_logit_softcapping", "logits_soft_cap", "output_logit_soft_cap")  # Gemma; RecurrentGemma; xLSTM


def causal_lm_loss(
    logits: Tensor,  # [B, S, V]
    labels: Tensor | None,  # [B, S]
    vocab_size: int,
    num_items_in_batch: int | Tensor | None = None,
    ignore_index: int = -100,
    shift_labels: Tensor | None = None,  # [B, S]
    **kwargs: Any,
) -> Tensor:
    """The loss that models of `transformers` call with their logits: `model.loss_function = causal_lm_loss`.

    Args:
        logits: [B, S, V], in the model's dtype: no fp32 copy is made of them.
        labels: [B, S], int64, not shifted: position t predicts label t + 1. Not looked at beside `shift_labels`.
        vocab_size: V.
        num_items_in_batch: divides the sum of the tokens' losses, over all microbatches of a step; None for the mean
            of this one. An int or a one-element tensor.
        ignore_index: label of tokens to ignore.
        shift_labels: [B, S], int64, already aligned to the logits.
        kwargs: not looked at: models pass on all keywords of their forward that they do not know.

    Returns:
        A scalar, fp32 (fp64 for fp64 logits, which `transformers` rounds to fp32). 0 where no label counts, which
        gives NaN there.

    Memory:
        That of :func:`compiled_loss.cross_entropy`: the logits, and in backward their gradient.

    Raises:
        ValueError: the last dimension of the logits is not `vocab_size`, or as in cross_entropy.
        TypeError: a dtype is off.

    Source:
        `ForCausalLMLoss` of transformers 5.23, whose signature and meaning this is.

    Example:
        >>> import torch
        >>> from compiled_loss.huggingface import causal_lm_loss
        >>> labels = torch.tensor([[0, 3, 1, -100]])
        >>> causal_lm_loss(torch.zeros(1, 4, 5), labels, vocab_size=5, num_items_in_batch=4)
        tensor(0.8047)

    """
    checks.tensor("logits", logits)
    checks.logits(logits, logits.shape[-1] if logits.dim() else 0)
    shell_checks.vocab_size(vocab_size, logits)
    targets = labels if shift_labels is None else shift_labels
    return _causal(cross_entropy, (logits,), targets, num_items_in_batch, ignore_index, int(shift_labels is None))


class LinearCausalLMLoss:
    """The loss of a causal model from its last hidden states and its head: for the Trainer's `compute_loss_func`.

    The model must return its hidden states, and should not compute the logits of all positions. `forward_keywords`
    asks for both: `output_hidden_states=True`, and `logits_to_keep=1` for models that have it. In a loop of your own

        loss_fn = LinearCausalLMLoss(model)
        outputs = model(**batch, **loss_fn.forward_keywords)  # without labels
        loss_fn(outputs, labels, num_items_in_batch).backward()

    and with the Trainer

        Trainer(model, compute_loss_func=loss_fn, data_collator=lambda rows: collate(rows) | loss_fn.forward_keywords)

    which then cannot feed `compute_metrics`, for that needs all logits. Labels are not shifted, and are those of whole
    sequences: no context or sequence parallelism. A mixture of experts that returns `aux_loss` has it added as its own
    loss adds it.

    The softcap and the scale of the logits are read from the model's config (`final_logit_softcapping`, Cohere's
    `logit_scale`, Granite's `logits_scaling`). As there are models that do more to their logits, the first eager call
    compares those that the model returned for the last position with the head's, and raises where they differ. A
    compiled call cannot, so make one eager call before `torch.compile(fullgraph=True)`, which transformers 5 needs
    anyway: on the first that asks for hidden states it installs its hooks, under a lock that Dynamo cannot trace.

    The Trainer's `bf16=True` runs the model's forward under autocast, and not this: call it under `torch.autocast` to
    have the head's GEMMs in bf16 too.

    The model is held, and its parameters are not the loss's. Not for a head that is more than its weight and bias
    (LoRA on the head), nor for one that is sharded over ranks.

    Args:
        model: a causal language model of `transformers`: `get_output_embeddings()` is its head, an `nn.Linear`.
        ignore_index: label of tokens to ignore.
        chunking: see :class:`compiled_loss.Chunking`.

    Example:
        >>> import torch
        >>> from types import SimpleNamespace
        >>> from compiled_loss.huggingface import LinearCausalLMLoss
        >>> class Model(torch.nn.Module):
        ...     config = SimpleNamespace(final_logit_softcapping=30.0)
        ...     lm_head = torch.nn.Linear(8, 5, bias=False)
        ...     def get_output_embeddings(self):
        ...         return self.lm_head
        >>> outputs = SimpleNamespace(hidden_states=(torch.zeros(1, 4, 8),))
        >>> loss_fn = LinearCausalLMLoss(Model())
        >>> loss_fn(outputs, torch.tensor([[0, 3, 1, -100]]), num_items_in_batch=4).detach()
        tensor(0.8047)

    """

    forward_keywords: ClassVar[dict[str, Any]] = {"output_hidden_states": True, "logits_to_keep": 1}

    def __init__(self, model: nn.Module, *, ignore_index: int = -100, chunking: Chunking = Chunking()) -> None:
        checks.alignment(1, ignore_index, 1)
        checks.instance("chunking", chunking, Chunking)
        self.model: Any = model
        self.ignore_index = ignore_index
        self.chunking = chunking
        config: Any = self.model.config
        self._config = config.get_text_config() if hasattr(config, "get_text_config") else config
        self.softcap: float | None = next(filter(None, (getattr(self._config, name, None) for name in _SOFTCAPS)), None)
        divisor, factor = (getattr(self._config, name, None) or 1.0 for name in ("logits_scaling", "logit_scale"))
        self.temperature: float = divisor / factor
        self._compared = False
        self._head()

    def __call__(self, outputs: Any, labels: Tensor, num_items_in_batch: int | Tensor | None = None) -> Tensor:
        """The loss of the model's outputs and labels [B, S]: their sum over `num_items_in_batch`, or the mean."""
        head = self._head()
        weight, bias = head.weight, head.bias
        hidden = shell_checks.last_hidden_state(outputs).to(weight)  # fp32 from the Trainer's bf16, of a bf16 model too
        if not self._compared and not torch.compiler.is_compiling():
            self._compare(outputs, hidden, weight, bias)
        keywords = {"bias": bias, "softcap": self.softcap, "temperature": self.temperature, "chunking": self.chunking}
        loss = _causal(
            linear_cross_entropy, (hidden, weight), labels, num_items_in_batch, self.ignore_index, 1, **keywords
        )
        balance = getattr(outputs, "aux_loss", None)
        return loss if balance is None else loss + self._config.router_aux_loss_coef * balance

    def _head(self) -> nn.Linear:
        return shell_checks.linear(self.model.get_output_embeddings())

    @torch.no_grad()
    def _compare(self, outputs: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None) -> None:
        """Raise where the model's logits are not those that the loss is about to be computed of."""
        logits = getattr(outputs, "logits", None)
        if logits is not None:
            own = F.linear(hidden[:, -1], weight, bias)
            if self.softcap is not None:
                own = self.softcap * torch.tanh(own / self.softcap)
            shell_checks.own_logits(own / self.temperature, logits[:, -1], self.softcap, self.temperature)
        self._compared = True


def _causal(
    loss: Any, inputs: Any, labels: Any, count: int | Tensor | None, ignore_index: int, shift: int, **keywords: Any
) -> Tensor:
    """The labels and the count where the model is, and the reduction of `transformers`."""
    checks.tensor("labels", labels)
    device = inputs[0].device
    return loss(  # type: ignore[no-any-return]
        *inputs,
        labels.to(device),
        ignore_index=ignore_index,
        shift=shift,
        reduction="mean" if count is None else "sum",
        num_label_tokens=count.to(device) if isinstance(count, Tensor) else count,
        **keywords,
    )
