"""A pipeline of two processes: multi-token prediction, packed sequences, and logits that are never held.

Rank 0 has the embedding and a block, rank 1 a block, the blocks of multi-token prediction (MTP) and the head. The last
stage returns (hidden, *one hidden per depth, seq_idx), `PipelineCausalLMLoss` makes the loss of it, and a schedule of
`torch.distributed.pipelining` does the rest:

    loss = PipelineCausalLMLoss(FusedLinearCrossEntropy(), last_stage, scaling_factor=0.3)
    schedule = Schedule1F1B(stage, MICROBATCHES, loss_fn=partial(loss, num_label_tokens=count), scale_grads=False)

- Packing. `seq_idx`, int32 [B, S], says which sequence of its row a token is in. As a keyword of `step` the schedule
  splits it like the tokens, for both ranks; at the end of the output it reaches the loss with its own microbatch.
  Attention stays within a sequence, and no depth of MTP predicts a token of the next one.
- Normalisation. Microbatches differ in how many labels they have. Their sums, each divided by the labels of the whole
  batch, add up to its mean, gradients too; `scale_grads=False` keeps the schedule from dividing once more. The count is
  a tensor, filled before each step; on torch >= 2.13 `step(..., loss_kwargs={"num_label_tokens": count})` does as well.
- Evaluation. With the model in `eval()` the loss is the main one alone.

The task: each sequence counts up from a number of its own. That number follows from nothing and has no label; the loss
of the others falls from log(61) = 4.1 and MTP's share to 0, which it could not if a depth were asked for tokens of the
next sequence.

Run:  python examples/pipelined.py
"""

import argparse
import tempfile
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.pipelining import PipelineStage, Schedule1F1B
from torch.nn import functional as F

from compiled_loss import FusedLinearCrossEntropy, PipelineCausalLMLoss

VOCAB, WIDTH, LENGTH, DEPTHS = 61, 64, 32, 2
MICROBATCHES, ROWS = 4, 8  # rows a microbatch


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm = nn.RMSNorm(WIDTH)
        self.qkv = nn.Linear(WIDTH, 3 * WIDTH)
        self.mlp = nn.Sequential(nn.RMSNorm(WIDTH), nn.Linear(WIDTH, 4 * WIDTH), nn.GELU(), nn.Linear(4 * WIDTH, WIDTH))

    def forward(self, hidden, seq_idx):
        seen = (seq_idx[:, :, None] == seq_idx[:, None, :]).tril()  # the past, of the same sequence
        query, key, value = self.qkv(self.norm(hidden)).chunk(3, dim=-1)
        hidden = hidden + F.scaled_dot_product_attention(query, key, value, attn_mask=seen)
        return hidden + self.mlp(hidden)


class FirstStage(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(VOCAB, WIDTH)
        self.position = nn.Embedding(LENGTH, WIDTH)
        self.block = Block()

    def forward(self, tokens, seq_idx):
        return self.block(self.embedding(tokens) + self.position.weight, seq_idx)


class LastStage(nn.Module):
    def __init__(self):
        super().__init__()
        self.block = Block()
        self.depths = nn.ModuleList(Block() for _ in range(DEPTHS))
        self.lm_head = nn.Linear(WIDTH, VOCAB, bias=False)  # found by its name; all depths share it

    def forward(self, hidden, seq_idx):
        states = [self.block(hidden, seq_idx)]
        for depth in self.depths:  # each goes on from the one before
            states.append(depth(states[-1], seq_idx))
        return (*states, seq_idx)


def batch(generator):
    """Tokens, labels and seq_idx, [MICROBATCHES * ROWS, LENGTH] each."""
    shape = (MICROBATCHES * ROWS, LENGTH + 1)
    starts = torch.rand(shape, generator=generator) < 0.1
    starts[:, 0] = True
    seq_idx = starts.cumsum(-1, dtype=torch.int32)
    origin = torch.where(starts, torch.arange(shape[1]), 0).cummax(-1).values
    first = torch.randint(VOCAB, shape, generator=generator).gather(-1, origin)
    tokens = (first + torch.arange(shape[1]) - origin) % VOCAB
    labels = torch.where(starts, -100, tokens)
    # Contiguous, as the stages of torch 2.11 compare strides.
    return tokens[:, :-1].contiguous(), labels[:, 1:].contiguous(), seq_idx[:, :-1].contiguous()


def train(rank, rendezvous, steps):
    """One process of the two: each has a part of the model, and both make the same batches."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=rendezvous, rank=rank, world_size=2)
    torch.manual_seed(rank)
    generator = torch.Generator().manual_seed(2)
    model = (FirstStage, LastStage)[rank]()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)

    count = torch.zeros((), dtype=torch.int64)
    loss = partial(PipelineCausalLMLoss(FusedLinearCrossEntropy(), model, scaling_factor=0.3), num_label_tokens=count)
    stage = PipelineStage(model, rank, 2, torch.device("cpu"))
    schedule = Schedule1F1B(stage, MICROBATCHES, loss_fn=loss, scale_grads=False)

    def run(step):
        """The sum of the microbatches' losses, on the last rank; on the first there are none."""
        tokens, labels, seq_idx = batch(generator)
        inputs = (tokens,) if rank == 0 else ()
        count.copy_((labels != -100).sum())
        losses = []
        step(*inputs, seq_idx=seq_idx, target=labels, losses=losses)
        return sum(losses)

    for number in range(steps):
        optimizer.zero_grad()
        total = run(schedule.step)
        optimizer.step()
        if rank == 1 and (number % max(1, steps // 10) == 0 or number == steps - 1):
            print(f"step {number + 1:>4}/{steps}  loss with MTP {total:.3f}  {count} labels", flush=True)

    model.eval()
    total = run(schedule.eval)
    if rank == 1:
        print(f"evaluation: loss {total:.3f}, without MTP")
    dist.destroy_process_group()


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=50, help="optimizer steps (default: %(default)s)")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:  # the processes meet at a file: no port to collide
        rendezvous = (Path(folder) / "rendezvous").as_uri()
        torch.multiprocessing.spawn(train, (rendezvous, given.steps), nprocs=2)


if __name__ == "__main__":
    main()
