"""A LightningModule of tokens, tiny, its data, and what a loop without Lightning makes of them."""

import logging
import warnings

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from compiled_loss import linear_cross_entropy_with_statistics

B, S, H, V = 4, 7, 8, 23  # rows a microbatch
MICROBATCHES = 3  # a step's
QUIET = {
    "logger": False,
    "enable_checkpointing": False,
    "enable_progress_bar": False,
    "enable_model_summary": False,
    "accelerator": "cpu",
    "max_epochs": 1,
}


def lightning():
    """The package, or the test is skipped."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        package = pytest.importorskip("lightning.pytorch")
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.ERROR)
    return package


def rows(count=20):
    """Inputs and labels [count, S]; rows ignore other numbers of labels, and a whole microbatch all of them."""
    random = torch.Generator().manual_seed(0)
    inputs, labels = torch.randint(0, V, (2, count, S), generator=random)
    prompt = torch.randint(0, S, (count, 1), generator=random)
    labels = torch.where(torch.arange(S) < prompt, -100, labels)
    labels[B : 2 * B] = -100
    return inputs, labels


def loader():
    """Five microbatches: a step of three, and one of two at the end of the epoch."""
    data = [{"inputs": row, "labels": label} for row, label in zip(*rows(), strict=True)]
    return torch.utils.data.DataLoader(data, batch_size=B)


class Body(nn.Module):
    """Hidden states [..., H] of ids, and a head."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.embedding = nn.Embedding(V, H)
        self.body = nn.Linear(H, H)
        self.head = nn.Linear(H, V, bias=False)

    def hidden(self, inputs):
        return torch.tanh(self.body(self.embedding(inputs)))

    def forward(self, inputs, labels):
        return linear_cross_entropy_with_statistics(self.hidden(inputs), self.head.weight, labels)


def make_module(compile=None, log=True):
    """A LightningModule of it, whose step is compiled with a backend, or is not, and which logs, or does not."""

    class Module(lightning().LightningModule):
        def __init__(self):
            super().__init__()
            self.model = Body()
            self.seen = []
            self.gradients = []

        def configure_model(self):
            self.step = torch.compile(self.model, fullgraph=True, backend=compile) if compile else self.model

        def training_step(self, batch, batch_idx):
            self.seen.append(batch)
            loss, statistics = self.step(batch["inputs"], batch["labels"])
            if log:
                count = (batch["labels"] != -100).sum()
                seen = {"loss": loss, "entropy": statistics.entropy.sum() / count.clamp(min=1)}
                self.log_dict(seen, batch_size=count, on_step=False, on_epoch=True)
            return loss

        def on_before_optimizer_step(self, optimizer):
            whole = (p.grad.full_tensor() if hasattr(p.grad, "full_tensor") else p.grad for p in self.parameters())
            self.gradients.append([gradient.clone() for gradient in whole])

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=0.5)

    return Module()


def plain_steps(steps, dtype, autocast=False, clip=0.0):
    """Of each step, a batch in one piece: gradients before clipping; then the parameters that are left."""
    model = Body().to(dtype)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    gradients = []
    for inputs, labels in steps:
        optimizer.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            logits = model.head(model.hidden(inputs))
        F.cross_entropy(logits.to(dtype).flatten(0, 1), labels.flatten()).backward()
        gradients.append([p.grad.clone() for p in model.parameters()])
        if clip:
            nn.utils.clip_grad_norm_(model.parameters(), clip)
        optimizer.step()
    return gradients, list(model.parameters())
