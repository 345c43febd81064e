"""Trainers of TRL 1.16 with the log-probabilities, entropies and divergences of this library: one call before training.

TRL's SFT, DPO, KTO, GRPO, RLOO and distillation trainers have a fused head of their own, which this library's replaces.
Losses, clipping, accumulation and logging stay the trainer's code.
"""

from compiled_loss.integrations.trl.trainers import fuse_trainer, unfuse_trainer

__all__ = ["fuse_trainer", "unfuse_trainer"]
