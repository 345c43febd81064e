"""A callback for Lightning's automatic optimization: one mean over the tokens of a whole step."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor, distributed
from torch.distributed.tensor import DTensor

__all__ = ["LabelTokenMean", "count_labels"]

# The label tokens of a microbatch, roughly. Gradients are summed over tokens in this unit, so that those of fp16 do not
# overflow with a scale that was chosen for the gradients of means. It is a power of two, which costs no rounding.
_TOKENS = 2.0**12


def count_labels(batch: Any) -> Tensor:
    """Returns the number of labels of a batch that are not -100, as an int64 tensor on its device."""
    try:
        labels = batch["labels"]
    except (LookupError, TypeError):
        labels = None
    if not isinstance(labels, Tensor):
        raise TypeError(
            f'batch: expected a Tensor as batch["labels"], got {type(batch).__name__}: '
            "give LabelTokenMean(count=...), from a batch to the number of its label tokens"
        )
    return (labels != -100).sum()


class LabelTokenMean(Callback):
    """Makes a step's gradients those of the mean over all its label tokens, instead of a mean of means.

    Lightning weighs the microbatches of `accumulate_grad_batches` alike, and DDP and FSDP the ranks, however many
    labels each has. The training step stays as it is: it returns the mean over the label tokens of its microbatch.

        Trainer(accumulate_grad_batches=8, callbacks=[LabelTokenMean()])

    Each microbatch's gradients are multiplied by its count as backward begins, and divided by the count of all
    microbatches and ranks before clipping and the optimizer's step. The microbatches after the last full step of an
    epoch are one more step, whose count is its own. Counts stay on the device: nothing waits for it. Gradient norms
    that others read before `on_before_optimizer_step` are not yet divided.

    What `training_step` logs is weighted by its `batch_size`: with `self.log("loss", loss, batch_size=count)` the value
    of an epoch is the mean over its tokens too, and the count may be a tensor.

    Args:
        count: from a batch, as `training_step` gets it, to the number of label tokens that its loss is the mean over,
            as a tensor on the batch's device, or an int. By default those of `batch["labels"]` that are not -100; for a
            model that shifts its labels itself, `lambda batch: (batch["labels"][:, 1:] != -100).sum()`.

    Memory:
        One count. The division is one pass over the gradients, and one all-reduce of 8 bytes where there are ranks.

    Raises:
        ValueError: the module optimizes manually, or the strategy (DeepSpeed's) accumulates by itself, so that the
            hooks which weigh and divide are not called; or the Trainer has two of these callbacks. A count that is not
            one number.
        TypeError: likewise; or a batch whose labels `count` does not find.

    Example:
        >>> import torch
        >>> from compiled_loss.integrations.lightning import LabelTokenMean
        >>> callback = LabelTokenMean()  # Trainer(accumulate_grad_batches=8, callbacks=[callback])
        >>> callback.count({"labels": torch.tensor([[3, -100], [1, 2]])})
        tensor(3)

    """

    def __init__(self, count: Callable[[Any], Tensor | int] = count_labels) -> None:
        self.count = count
        self._microbatch: Tensor | int = 0
        self._step: Tensor | int = 0  # 0 until the step's first backward

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Refuses Trainers that do not call the hooks below exactly once."""
        callbacks: list[Any] = vars(trainer)["callbacks"]  # an attribute that has no annotation
        given = sum(isinstance(callback, LabelTokenMean) for callback in callbacks)
        if given > 1:
            raise ValueError(
                f"LabelTokenMean: expected one among the Trainer's callbacks, got {given}: "
                "remove all but one, for each weighs the gradients"
            )
        if not pl_module.automatic_optimization:
            raise ValueError(
                f"LabelTokenMean: expected automatic optimization, got {type(pl_module).__name__} with "
                "automatic_optimization=False: divide each sum by num_label_tokens where you call manual_backward"
            )
        if trainer.strategy.handles_gradient_accumulation:
            name = type(trainer.strategy).__name__
            raise ValueError(
                f"LabelTokenMean: expected gradients that Lightning accumulates, got {name}, which does so by itself: "
                "use DDP or FSDP"
            )
        self._step = 0

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Counts the batch's label tokens."""
        count = self.count(batch)
        if not isinstance(count, (Tensor, int)):
            raise TypeError(f"count: expected one number of label tokens, got {type(count).__name__}: return a Tensor")
        if isinstance(count, Tensor) and count.numel() != 1:
            raise ValueError(f"count: expected one number of label tokens, got {list(count.shape)}: return their sum")
        self._microbatch = torch.as_tensor(count, device=pl_module.device).reshape(())

    def on_before_zero_grad(
        self, trainer: Trainer, pl_module: LightningModule, optimizer: torch.optim.Optimizer
    ) -> None:
        """Forgets the tokens of gradients that no step has used: an epoch ended within a step."""
        self._step = 0

    def on_before_backward(self, trainer: Trainer, pl_module: LightningModule, loss: Tensor) -> None:
        """Weighs the gradients of a microbatch, and undoes Lightning's own mean over microbatches and ranks."""
        weight = self._microbatch * (trainer.accumulate_grad_batches * trainer.world_size / _TOKENS)
        loss.register_hook(lambda grad: (grad * weight).to(grad.dtype))
        self._step = self._step + self._microbatch

    def on_before_optimizer_step(
        self, trainer: Trainer, pl_module: LightningModule, optimizer: torch.optim.Optimizer
    ) -> None:
        """Divides the gradients by the step's label tokens."""
        tokens, self._step = torch.as_tensor(self._step, device=pl_module.device), 0
        if trainer.world_size > 1:
            distributed.all_reduce(tokens)
        grads = [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
        local = [grad.to_local() if isinstance(grad, DTensor) else grad for grad in grads]
        if local:  # none where no microbatch had a loss
            torch._foreach_div_(local, tokens.clamp(min=1) / _TOKENS)
