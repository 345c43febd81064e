"""Accelerate: FSDP2, and gradient accumulation whose gradients are those of the whole batch on all ranks.

Accelerate weighs the ranks alike, and so do loops that divide by the microbatches, however many labels each has. Count
the labels of a step's microbatches on all ranks first, and divide every sum by that count:

    count = accelerator.reduce(sum((batch["labels"] != -100).sum() for batch in microbatches))
    for i, batch in enumerate(microbatches):
        with accelerator.no_sync(model) if i < last else nullcontext():
            loss = model(**batch, num_label_tokens=count)  # linear_cross_entropy(..., reduction="sum", ...)
            accelerator.backward(loss * accelerator.num_processes)  # ranks' gradients are averaged

The loss is computed in the forward of the model that Accelerate prepares: there FSDP has gathered the head. A model of
transformers does so with `fuse_head(model)`, and `model(**batch, num_items_in_batch=count).loss`.

The task: the next token is a function of the last one, and each row has a prompt, without labels, of another length.
The losses are those of one process, but for rounding; with SGD, for Adam would hide a wrong scale of the gradients.
Without a GPU Accelerate takes DDP, whatever it is asked for.

    torchrun --nproc-per-node 2 examples/train_accelerate.py
    python examples/train_accelerate.py
"""

import argparse
from contextlib import nullcontext

import torch
from accelerate import Accelerator, FullyShardedDataParallelPlugin
from torch import nn
from torch.utils.data import DataLoader

from compiled_loss import linear_cross_entropy

VOCAB, WIDTH, LENGTH = 512, 64, 32
ROWS, MICROBATCH = 64, 8  # a step's, a microbatch's; the ranks share a step's microbatches


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(VOCAB, WIDTH)
        self.block = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.GELU())
        self.head = nn.Linear(WIDTH, VOCAB, bias=False)

    def forward(self, inputs, labels, **normalisation):
        hidden = self.block(self.embedding(inputs))
        return linear_cross_entropy(hidden, self.head.weight, labels, reduction="sum", **normalisation)


def rows(steps):
    """Inputs and labels of so many steps, alike on all ranks."""
    random = torch.Generator().manual_seed(0)
    following = torch.randperm(VOCAB, generator=random)
    tokens = torch.randint(VOCAB, (steps * ROWS, 1), generator=random)
    for _ in range(LENGTH):
        tokens = torch.cat([tokens, following[tokens[:, -1:]]], dim=1)
    prompt = torch.randint(LENGTH, (len(tokens), 1), generator=random)
    labels = torch.where(torch.arange(LENGTH) < prompt, -100, tokens[:, 1:])
    return [{"inputs": row, "labels": label} for row, label in zip(tokens[:, :-1], labels, strict=True)]


def step(accelerator, model, microbatches):
    """Add the gradients of the mean over the label tokens of all microbatches and ranks; that mean."""
    count = accelerator.reduce(sum((batch["labels"] != -100).sum() for batch in microbatches))
    total = torch.zeros((), device=accelerator.device)
    for i, batch in enumerate(microbatches):
        with accelerator.no_sync(model) if i < len(microbatches) - 1 else nullcontext():
            loss = model(**batch, num_label_tokens=count)
            accelerator.backward(loss * accelerator.num_processes)
        total += loss.detach()
    return accelerator.reduce(total)


def train(accelerator, steps):
    """Print the losses of so many optimizer steps."""
    torch.manual_seed(0)
    model = Model()
    optimizer = torch.optim.SGD(model.parameters(), lr=8.0)
    loader = DataLoader(rows(steps), batch_size=MICROBATCH)
    model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
    of_a_rank = ROWS // MICROBATCH // accelerator.num_processes
    for number, microbatches in enumerate(zip(*[iter(loader)] * of_a_rank, strict=True), 1):
        loss = step(accelerator, model, microbatches)
        optimizer.step()
        optimizer.zero_grad()
        if number in (1, steps) or number % max(1, steps // 10) == 0:
            accelerator.print(f"step {number:>4}/{steps}   loss {loss.item():.6f}", flush=True)


def main():
    devices = ["cuda", "cpu"] if torch.cuda.is_available() else ["cpu"]
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=20, help="of the optimizer (default: %(default)s)")
    parser.add_argument("--device", choices=devices, default=devices[0], help="default: %(default)s")
    given = parser.parse_args()

    fsdp = FullyShardedDataParallelPlugin(
        fsdp_version=2, auto_wrap_policy="transformer_based_wrap", transformer_cls_names_to_wrap=["Sequential"]
    )
    accelerator = Accelerator(cpu=given.device == "cpu", fsdp_plugin=fsdp)
    train(accelerator, given.steps)
    accelerator.free_memory()  # DDP's threads first, or the end may hang
    accelerator.end_training()


if __name__ == "__main__":
    main()
