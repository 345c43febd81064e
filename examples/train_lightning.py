"""Lightning with bf16-mixed, a compiled step and gradient accumulation in which all tokens weigh alike.

The training step is what it always was: a mean over the label tokens of its microbatch, here without its logits.

    loss, statistics = self.step(batch["inputs"], batch["labels"])  # torch.compile(fullgraph=True) of the loss below
    return loss

Lightning weighs the microbatches of a step alike, though one may have ten times the labels of another. One callback
makes the gradients those of the mean over all tokens of the step, of all ranks:

    Trainer(precision="bf16-mixed", accumulate_grad_batches=4, callbacks=[LabelTokenMean()])

Entropy and accuracy come from the same pass. Logged with the count of tokens as `batch_size`, which may stay a tensor,
their means over an epoch are means over its tokens.

The task: the next token is a function of the last one, and each row has a prompt, without labels, of another length.

    python examples/train_lightning.py
"""

import argparse
import logging
import warnings

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import nn
from torch.utils.data import DataLoader

from compiled_loss import linear_cross_entropy_with_statistics
from compiled_loss.integrations.lightning import LabelTokenMean

VOCAB, WIDTH, LENGTH = 512, 64, 32
MICROBATCHES, ROWS = 4, 8  # a step's, a microbatch's


class Model(LightningModule):
    def __init__(self, compile):
        super().__init__()
        self.body = nn.Sequential(nn.Embedding(VOCAB, WIDTH), nn.Linear(WIDTH, WIDTH), nn.GELU())
        self.head = nn.Linear(WIDTH, VOCAB, bias=False)
        self.step = torch.compile(self.loss, fullgraph=True, disable=not compile)

    def loss(self, inputs, labels):
        return linear_cross_entropy_with_statistics(self.body(inputs), self.head.weight, labels)

    def training_step(self, batch, batch_idx):
        loss, statistics = self.step(batch["inputs"], batch["labels"])
        count = (batch["labels"] != -100).sum()
        entropy, accuracy = (of_tokens.sum() / count for of_tokens in (statistics.entropy, statistics.correct))
        seen = {"loss": loss, "entropy": entropy, "accuracy": accuracy}
        self.log_dict(seen, batch_size=count, on_step=False, on_epoch=True)
        return loss

    def on_train_epoch_end(self):
        seen = [f"{name} {value:.3f}" for name, value in self.trainer.callback_metrics.items()]
        print(f"step {self.global_step:>4}", *seen, sep="   ", flush=True)

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=1e-2)


def batches(steps):
    """A DataLoader of so many steps' rows: labels are -100 in prompts."""
    following = torch.randperm(VOCAB)
    tokens = torch.randint(VOCAB, (steps * MICROBATCHES * ROWS, 1))
    for _ in range(LENGTH):
        tokens = torch.cat([tokens, following[tokens[:, -1:]]], dim=1)
    prompt = torch.randint(LENGTH, (len(tokens), 1))
    labels = torch.where(torch.arange(LENGTH) < prompt, -100, tokens[:, 1:])
    rows = [{"inputs": row, "labels": label} for row, label in zip(tokens[:, :-1], labels, strict=True)]
    return DataLoader(rows, batch_size=ROWS)


def main():
    devices = ["cuda", "cpu"] if torch.cuda.is_available() else ["cpu"]
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=20, help="of the optimizer in an epoch (default: %(default)s)")
    parser.add_argument("--device", choices=devices, default=devices[0], help="default: %(default)s")
    parser.add_argument("--no-compile", dest="compile", action="store_false", help="run the step eagerly")
    given = parser.parse_args()

    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", module="lightning")  # few workers, few batches: on purpose
    torch.manual_seed(0)
    trainer = Trainer(
        accelerator=given.device,
        devices=1,
        precision="bf16-mixed",
        accumulate_grad_batches=MICROBATCHES,
        gradient_clip_val=1.0,
        callbacks=[LabelTokenMean()],
        max_epochs=5,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(Model(given.compile), batches(given.steps))


if __name__ == "__main__":
    main()
