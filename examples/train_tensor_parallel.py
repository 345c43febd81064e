"""FSDP2 and tensor parallelism at once: the batch over some ranks; heads, sequences and the vocabulary over others.

The head [V, width] is split over "tp", and FSDP splits each part over "dp". The loss takes the weight outside of its
Module, so FSDP gathers it first; a DTensor is left, Shard(0) over "tp". Hidden states come as SequenceParallel leaves
them, Shard(1) over "tp". No rank holds logits of the whole vocabulary, nor of all its tokens at once:

    hidden = model(inputs)  # [B, S, width]
    model.lm_head.unshard()
    loss = linear_cross_entropy(hidden, model.lm_head.weight, labels, reduction="sum", num_label_tokens=count)
    (loss * dp).backward()  # FSDP takes the mean of the ranks' gradients

Rare words have no label, so ranks have different numbers of them; the count is that of the whole batch. The text is the
sources of Python's standard library. The losses are those of one process without torchrun, but for rounding; with SGD,
for Adam would hide a wrong scale of the gradients.

    torchrun --nproc-per-node 4 examples/train_tensor_parallel.py
    python examples/train_tensor_parallel.py
"""

import argparse
import os
import re
from collections import Counter

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Replicate, Shard
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, SequenceParallel, parallelize_module
from torch.nn import functional as F

from compiled_loss import linear_cross_entropy
from compiled_loss.demo.model import rotate, rotations
from compiled_loss.demo.text import sources  # of the standard library: text that every machine has

VOCAB, WIDTH, HEAD_WIDTH = 4096, 128, 32
ROWS, LENGTH = 32, 64  # of the whole batch


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.attention_norm, self.mlp_norm = nn.RMSNorm(WIDTH), nn.RMSNorm(WIDTH)
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH, bias=False), nn.Linear(WIDTH, WIDTH, bias=False)
        self.up, self.down = nn.Linear(WIDTH, 4 * WIDTH, bias=False), nn.Linear(4 * WIDTH, WIDTH, bias=False)

    def forward(self, hidden, cos, sin):
        heads = self.qkv(self.attention_norm(hidden)).unflatten(-1, (-1, 3, HEAD_WIDTH))  # this rank's
        query, key, value = heads.transpose(1, 2).unbind(3)
        attended = F.scaled_dot_product_attention(rotate(query, cos, sin), rotate(key, cos, sin), value, is_causal=True)
        hidden = hidden + self.out(attended.transpose(1, 2).flatten(-2))
        return hidden + self.down(F.gelu(self.up(self.mlp_norm(hidden))))


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(VOCAB, WIDTH)
        self.blocks = nn.ModuleList(Block() for _ in range(2))
        self.norm = nn.RMSNorm(WIDTH)
        self.lm_head = nn.Linear(WIDTH, VOCAB, bias=False)
        self.register_buffer("turns", torch.stack(rotations(LENGTH, HEAD_WIDTH)))

    def forward(self, tokens):
        hidden = self.embedding(tokens)
        for block in self.blocks:
            hidden = block(hidden, *self.turns)
        return self.norm(hidden)


def parallelize(model, mesh):
    # Between them hidden states stay DTensors: a compiled block of torch 2.13 loses the gradient of a plain tensor
    # whose collective is still under way.
    scattered = {"output_layouts": Shard(1), "use_local_output": False}
    plan = {
        "embedding": RowwiseParallel(input_layouts=Replicate(), **scattered),
        "blocks.*.*_norm": SequenceParallel(),
        "blocks.*.qkv": ColwiseParallel(input_layouts=Shard(1)),
        "blocks.*.out": RowwiseParallel(**scattered),
        "blocks.*.up": ColwiseParallel(input_layouts=Shard(1)),
        "blocks.*.down": RowwiseParallel(**scattered),
        "norm": SequenceParallel(),
        "lm_head": ColwiseParallel(),
    }
    parallelize_module(model, mesh["tp"], plan)
    for part in (*model.blocks, model.lm_head, model):
        fully_shard(part, mesh=mesh["dp"])


def text():
    """The standard library's words, as tokens [T]; rare words share the last."""
    words = re.findall(r"\w+|\n\s*|[^\w\s]", "\n".join(sources(1_000_000)))
    number = {word: i for i, (word, _) in enumerate(Counter(words).most_common(VOCAB - 1))}
    return torch.tensor([number.get(word, VOCAB - 1) for word in words])


def main():
    devices = ["cuda", "cpu"] if torch.cuda.is_available() else ["cpu"]
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=100, help="of the optimizer (default: %(default)s)")
    parser.add_argument("--tp", type=int, default=2, help="ranks that share a vocabulary (default: %(default)s)")
    parser.add_argument("--device", choices=devices, default=devices[0], help="default: %(default)s")
    parser.add_argument("--compile", choices=("all", "loss", "nothing"), default="all", help="default: %(default)s")
    given = parser.parse_args()

    distributed = dist.is_torchelastic_launched()
    if given.device == "cuda":
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    torch.manual_seed(0)  # every rank makes the same model and the same batches
    model = Model().to(given.device)
    for block in model.blocks:
        block.compile(fullgraph=True, disable=given.compile != "all")
    loss_of = torch.compile(linear_cross_entropy, fullgraph=True, disable=given.compile == "nothing")

    dp, tp, row, first = 1, 1, 0, True
    if distributed:
        dist.init_process_group("nccl" if given.device == "cuda" else "gloo")
        dp, tp = dist.get_world_size() // given.tp, given.tp
        mesh = init_device_mesh(given.device, (dp, tp), mesh_dim_names=("dp", "tp"))
        row, first = mesh["dp"].get_local_rank(), dist.get_rank() == 0
        parallelize(model, mesh)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.2, momentum=0.9, nesterov=True)
    tokens, generator = text(), torch.Generator().manual_seed(1)
    if first:
        print(f"{ROWS} x {LENGTH} tokens over {dp}, a vocabulary of {VOCAB} over {tp}")
        print(f"logits of a rank that are never held: [{ROWS * LENGTH // dp}, {VOCAB // tp}]")
        print(f"compiling {given.compile} ...", flush=True)

    for number in range(1, given.steps + 1):
        starts = torch.randint(len(tokens) - LENGTH, (ROWS, 1), generator=generator)
        windows = tokens[starts + torch.arange(LENGTH + 1)].to(given.device)
        labels = windows[:, 1:].where(windows[:, 1:] != VOCAB - 1, -100)
        count = (labels != -100).sum()
        inputs, labels = (values.chunk(dp)[row] for values in (windows[:, :-1], labels))

        hidden = model(inputs)
        if distributed:
            model.lm_head.unshard()
        loss = loss_of(hidden, model.lm_head.weight, labels, reduction="sum", num_label_tokens=count)
        optimizer.zero_grad()
        (loss * dp).backward()
        optimizer.step()
        if number in (1, given.steps) or number % max(1, given.steps // 10) == 0:
            if distributed:
                dist.all_reduce(loss.detach(), group=mesh.get_group("dp"))
            if first:
                print(f"step {number:>4}/{given.steps}   loss {loss:.6f}", flush=True)
    if distributed:
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
