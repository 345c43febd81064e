"""Run in two processes by test_pipelining.py: a transformer in two stages, under torch's own schedules.

B sequences, S positions, H width, V vocabulary, D depths of multi-token prediction.
"""

from functools import partial
from typing import NamedTuple

import ranks
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.pipelining import PipelineStage, Schedule1F1B, ScheduleGPipe
from torch.nn import functional as F

from compiled_loss import Chunking, FusedLinearCrossEntropy, MaskedCrossEntropy, PipelineCausalLMLoss

B, S, H, V, D = 8, 7, 12, 29, 2
MICROBATCHES = 4
SCALING = 0.3
CU_SEQLENS = (0, 3, 7)  # of every row, where a case has them
PASSES_KEYWORDS = tuple(int(part) for part in torch.__version__.split(".")[:2]) >= (2, 13)


class Case(NamedTuple):
    """A schedule, and a loss of what the last stage emits."""

    schedule: type
    fused: bool  # the stage emits hidden states, not logits
    reduction: str = "sum"  # over `num_label_tokens`
    packing: str = "seq_idx"  # at the end of the stage's output; or "cu_seqlens", of the loss
    keywords: bool = False  # `num_label_tokens` comes through the schedule

    def loss(self):
        if not self.fused:
            return MaskedCrossEntropy(reduction=self.reduction)
        strategy, chunk_size = {ScheduleGPipe: ("tokens", 5), Schedule1F1B: ("vocab", 8)}[self.schedule]  # of 14, of V
        chunking = Chunking(strategy=strategy, chunk_size=chunk_size)
        return FusedLinearCrossEntropy(reduction=self.reduction, chunking=chunking)


CASES = {
    "GPipe, hidden": Case(ScheduleGPipe, fused=True),
    "GPipe, logits": Case(ScheduleGPipe, fused=False),
    "1F1B, hidden": Case(Schedule1F1B, fused=True),
    "1F1B, logits": Case(Schedule1F1B, fused=False),
    "mean, hidden": Case(ScheduleGPipe, fused=True, reduction="mean"),
    "mean, logits": Case(Schedule1F1B, fused=False, reduction="mean"),
    "cu_seqlens, hidden": Case(ScheduleGPipe, fused=True, packing="cu_seqlens"),
    "cu_seqlens, logits": Case(Schedule1F1B, fused=False, packing="cu_seqlens"),
    "keyword, hidden": Case(Schedule1F1B, fused=True, keywords=True),
    "keyword, logits": Case(ScheduleGPipe, fused=False, keywords=True),
}


class Block(nn.Module):
    """Attention within each packed sub-sequence, and a perceptron."""

    def __init__(self):
        super().__init__()
        self.norm = nn.RMSNorm(H)
        self.qkv = nn.Linear(H, 3 * H)
        self.perceptron = nn.Sequential(nn.RMSNorm(H), nn.Linear(H, 2 * H), nn.GELU(), nn.Linear(2 * H, H))

    def forward(self, hidden, seq_idx):
        seen = (seq_idx[:, :, None] == seq_idx[:, None, :]).tril()
        query, key, value = self.qkv(self.norm(hidden)).chunk(3, dim=-1)
        hidden = hidden + F.scaled_dot_product_attention(query, key, value, attn_mask=seen)
        return hidden + self.perceptron(hidden)


class First(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(V, H)
        self.block = Block()

    def forward(self, tokens, seq_idx):
        return self.block(self.embedding(tokens), seq_idx)


class Last(nn.Module):
    def __init__(self, case):
        super().__init__()
        self.case = case
        self.block = Block()
        self.depths = nn.ModuleList(Block() for _ in range(D))
        self.lm_head = nn.Linear(H, V, bias=False)

    def forward(self, hidden, seq_idx):
        states = [self.block(hidden, seq_idx)]
        for depth in self.depths:
            states.append(depth(states[-1], seq_idx))
        main, *per_depth = states
        tail = [seq_idx] if self.case.packing == "seq_idx" else []
        return (main if self.case.fused else self.lm_head(main), *per_depth, *tail)


def stages(case):
    """Both stages, the same in every process; fp64, so that what is compared differs by rounding alone."""
    torch.manual_seed(1)
    return First().double(), Last(case).double()


def batch(case):
    """Tokens, labels and seq_idx [B, S]: rows are packed in different ways, and microbatches count different tokens."""
    generator = torch.Generator().manual_seed(2)
    tokens, labels = torch.randint(0, V, (2, B, S), generator=generator)
    labels = torch.where(torch.rand(B, S, generator=generator) < 0.25, -100, labels)
    if case.packing == "cu_seqlens":
        starts = torch.zeros(B, S, dtype=torch.int32)
        starts[:, list(CU_SEQLENS[1:-1])] = 1
    else:
        starts = (torch.rand(B, S, generator=generator) < 0.3).int()
    return tokens, labels, starts.cumsum(-1, dtype=torch.int32)


def further(labels, seq_idx, ahead):
    """Labels of `ahead` positions later within the same packed sub-sequence."""
    targets = torch.full_like(labels, -100)
    for b in range(labels.shape[0]):
        for t in range(labels.shape[1] - ahead):
            if seq_idx[b, t] == seq_idx[b, t + ahead]:
                targets[b, t] = labels[b, t + ahead]
    return targets


def plain(stages, case, count, tokens, labels, seq_idx):
    """The main loss and that of multi-token prediction, by their formulas."""
    first, last = stages
    main, *per_depth = last(first(tokens, seq_idx), seq_idx)[: 1 + D]

    def cross_entropy(logits, targets):
        loss = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction=case.reduction)
        return loss / count if case.reduction == "sum" else loss

    depths = [
        cross_entropy(states @ last.lm_head.weight.t(), further(labels, seq_idx, k + 1))
        for k, states in enumerate(per_depth)
    ]
    logits = main @ last.lm_head.weight.t() if case.fused else main
    return cross_entropy(logits, labels), SCALING / D * sum(depths)


def step(case, rank):
    """What this process knows of one step, and of an evaluation after it: losses, and its stage's gradients."""
    stage = stages(case)[rank]
    tokens, labels, seq_idx = batch(case)
    count = (labels != -100).sum()
    loss = PipelineCausalLMLoss(case.loss(), stage, scaling_factor=SCALING)
    if case.packing == "cu_seqlens":
        loss.cu_seqlens = torch.tensor(CU_SEQLENS)
    inputs, given = ((tokens,) if rank == 0 else ()), {"seq_idx": seq_idx, "target": labels}
    if case.keywords:
        given["loss_kwargs"] = {"num_label_tokens": int(count)}
    elif case.reduction == "sum":
        loss = partial(loss, num_label_tokens=count)
    pipeline_stage = PipelineStage(stage, rank, 2, torch.device("cpu"))
    schedule = case.schedule(pipeline_stage, MICROBATCHES, loss_fn=loss, scale_grads=case.reduction == "mean")
    trained, evaluated = [], []
    schedule.step(*inputs, losses=trained, **given)
    gradients = {name: parameter.grad.clone() for name, parameter in stage.named_parameters()}
    stage.eval()
    schedule.eval(*inputs, losses=evaluated, **given)
    return {
        "trained": [value.detach() for value in trained],
        "evaluated": [value.detach() for value in evaluated],
        "gradients": gradients,
    }


def steps():
    """Every case, on this rank of the two."""
    found = {}
    for name, case in CASES.items():
        if PASSES_KEYWORDS or not case.keywords:
            ranks.at(name)
            found[name] = step(case, dist.get_rank())
    return found
