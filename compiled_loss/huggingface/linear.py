"""The loss of a causal model of `transformers` from its last hidden states and its head."""

from __future__ import annotations

import contextlib
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from compiled_loss import checks as arguments
from compiled_loss.functional.cross_entropy import linear_cross_entropy
from compiled_loss.huggingface import checks, families
from compiled_loss.huggingface.callers import caller
from compiled_loss.huggingface.comparison import compare
from compiled_loss.huggingface.functions import reduced
from compiled_loss.models.output_head import OutputHead, output_head
from compiled_loss.planner.chunking import Chunking


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

    What the model does to its logits is read from its class's forward, with the values of its config: a softcap
    (`final_logit_softcapping` and the like), a scale (Cohere's `logit_scale`, Granite's `logits_scaling` and others).
    As there are models that do more, the first eager call, the second, fourth, eighth and so on compare the logits that
    the model returned with the head's, and raise where they differ by more than their dtypes explain. A compiled call
    cannot, so make one eager call before `torch.compile(fullgraph=True)`, which transformers 5 needs anyway: on the
    first that asks for hidden states it installs its hooks, under a lock that Dynamo cannot trace.

    Whether the model's loss is this one is read there too. It must be that of its `loss_function`, of logits and
    labels, and an auxiliary loss of experts times a number: a loss of its own (Bart's decoders, XLNet) or with more in
    it (Bamba's z-loss) is an error.

    The Trainer does not apply its `label_smoothing_factor` beside a `compute_loss_func`: `label_smoothing` does, and a
    Trainer that calls with another is an error. Its `bf16=True` runs the model's forward under autocast, and not this:
    call it under `torch.autocast` to have the head's GEMMs in bf16 too.

    The count of a step's labels that the Trainer gives divides the sum, also for models that do not take it themselves
    (`accepts_loss_kwargs = False`), whose own losses would be means of microbatches.

    The model is held, and its parameters are not the loss's. Not for a head that is more than its weight and bias
    (LoRA on the head, quantised, offloaded), nor for one whose rows other ranks hold.

    Args:
        model: a causal language model of `transformers`, also inside of PEFT, `torch.compile` or data parallelism:
            `get_output_embeddings()` is its head.
        ignore_index: label of tokens to ignore.
        label_smoothing: from 0 to 1, as the Trainer's `label_smoothing_factor`.
        chunking: see :class:`compiled_loss.Chunking`.

    Raises:
        ValueError: the model's loss or its logits are others, or the head is not here as a whole.
        TypeError: the head is more than a weight and a bias.

    Example:
        >>> import torch
        >>> from types import SimpleNamespace
        >>> from compiled_loss.huggingface import LinearCausalLMLoss
        >>> class Model(torch.nn.Module):
        ...     lm_head = torch.nn.Linear(8, 5, bias=False)
        ...     def get_output_embeddings(self):
        ...         return self.lm_head
        >>> outputs = SimpleNamespace(hidden_states=(torch.zeros(1, 4, 8),))
        >>> loss_fn = LinearCausalLMLoss(Model())
        >>> loss_fn(outputs, torch.tensor([[0, 3, 1, -100]]), num_items_in_batch=4).detach()
        tensor(0.8047)

    """

    forward_keywords: ClassVar[dict[str, Any]] = {"output_hidden_states": True, "logits_to_keep": 1}

    def __init__(
        self,
        model: nn.Module,
        *,
        ignore_index: int = -100,
        label_smoothing: float = 0.0,
        chunking: Chunking = Chunking(),
    ) -> None:
        arguments.alignment(1, ignore_index, 1)
        arguments.instance("chunking", chunking, Chunking)
        arguments.terms(label_smoothing, 0.0)
        self.model: Any = model
        self.ignore_index = ignore_index
        self.label_smoothing = label_smoothing
        self.chunking = chunking
        self._inner = families.innermost(model)
        checks.causal(self._inner)
        self._own = families.own_loss(self._inner)
        if self._own.labels or self._own.calls:
            parts = families.unknown_parts(self._inner, self._own)
            checks.calls_loss_function(self._inner, self._own.calls, parts)
            checks.known_loss(self._inner, parts)
        self._shift = families.shift(self._inner)
        checks.same_shift(self._inner, self._shift, families.SHIFTS)
        self.softcap, self.temperature = families.transform(self._inner)
        self._calls = 0
        with contextlib.suppress(ValueError):  # a weight that is not here now may be when this is called
            self._head()

    def __call__(self, outputs: Any, labels: Tensor, num_items_in_batch: int | Tensor | None = None) -> Tensor:
        """The loss of the model's outputs and labels [B, S]: their sum over `num_items_in_batch`, or the mean."""
        head = self._head()
        checks.whole(head.weight)
        hidden = families.last_hidden_state(self._inner, outputs)
        checks.width(hidden, head.weight)
        hidden = hidden.to(head.weight)  # fp32 from the Trainer's bf16, of a bf16 model too
        if not torch.compiler.is_compiling():
            self._calls += 1
            if self._calls & (self._calls - 1) == 0:
                self._look(outputs, hidden, head)
        loss = reduced(
            linear_cross_entropy,
            (hidden, head.weight),
            labels,
            num_items_in_batch,
            self.ignore_index,
            self._shift,
            bias=head.bias,
            softcap=self.softcap,
            temperature=self.temperature,
            label_smoothing=self.label_smoothing,
            chunking=self.chunking,
        )
        balance = getattr(outputs, "aux_loss", None)
        return loss if balance is None else loss + families.balance(self._inner, self._own) * balance.to(loss.device)

    def _head(self) -> OutputHead:
        return output_head(checks.has_head(self._inner))

    def _look(self, outputs: Any, hidden: Tensor, head: OutputHead) -> None:
        """Raises where the Trainer wants a different loss, or the model's logits are not its head's."""
        trainer = caller("compute_loss", "compute_loss_func")
        if trainer is not None:
            checks.smoothing(trainer.args.label_smoothing_factor, self.label_smoothing)
        logits = getattr(outputs, "logits", None)
        if logits is not None:
            compare(logits, hidden, head, families.Transform(self.softcap, self.temperature))
