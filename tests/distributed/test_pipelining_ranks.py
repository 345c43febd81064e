"""Two stages of two ranks each: losses and all gradients are those of one process and full logits.

The two share the last stage's head as a vocabulary, and every perceptron; or FSDP shards each stage over them, and each
has half of every microbatch. fp64, as in test_pipelining.py.
"""

from functools import partial
from typing import NamedTuple

import pipelining_child as child
import pytest
import ranks
import torch
import torch.distributed as dist
from comparing import TIGHT
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.pipelining import PipelineStage, Schedule1F1B, ScheduleGPipe
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

from compiled_loss import PipelineCausalLMLoss, linear_cross_entropy, multi_token_prediction

pytestmark = [
    pytest.mark.skipif(not dist.is_gloo_available(), reason="needs gloo for processes on CPUs"),
    pytest.mark.xdist_group("pipelining ranks"),
]
PIPELINE, SHARING = 2, 2  # stages, and ranks of each


class Way(NamedTuple):
    """What the stages run under, and how the loss takes the head."""

    case: child.Case
    head: str  # its weight as it lies, "by functions"; gathered, "by shells" or of "FSDP"; or its "logits", DTensors


WAYS = {
    "1F1B, by functions": Way(child.Case(Schedule1F1B, fused=True), "by functions"),
    "GPipe, by functions": Way(child.Case(ScheduleGPipe, fused=True), "by functions"),
    "1F1B, by shells": Way(child.Case(Schedule1F1B, fused=True), "by shells"),
    "GPipe, logits": Way(child.Case(ScheduleGPipe, fused=False), "logits"),
    "1F1B, FSDP": Way(child.Case(Schedule1F1B, fused=True), "FSDP"),
    "GPipe, FSDP": Way(child.Case(ScheduleGPipe, fused=True), "FSDP"),
}
COMPILED = ("1F1B, by functions", "GPipe, by functions")


def by_functions(case, stage, output, labels, num_label_tokens):
    """What PipelineCausalLMLoss does, by functions."""
    main, *per_depth, seq_idx = output
    weight, keywords = stage.lm_head.weight, {"num_label_tokens": num_label_tokens, "chunking": case.loss().chunking}
    loss = linear_cross_entropy(main, weight, labels, reduction="sum", **keywords)
    return loss + multi_token_prediction(
        per_depth, weight, labels, seq_idx=seq_idx, scaling_factor=child.SCALING, **keywords
    )


def split(way, stage, mesh):
    """Perceptrons, and in the last stage the head, over a stage's ranks; or all of it, the head apart."""
    if way.head == "FSDP":
        if hasattr(stage, "lm_head"):
            fully_shard(stage.lm_head, mesh=mesh)
        return fully_shard(stage, mesh=mesh)
    plan = {"lm_head": ColwiseParallel(use_local_output=False)} if hasattr(stage, "lm_head") else {}
    for name, _ in stage.named_modules():
        if name.endswith("perceptron"):
            plan |= {f"{name}.1": ColwiseParallel(), f"{name}.3": RowwiseParallel()}
    return parallelize_module(stage, mesh, plan)


def mine(way, batch, rank):
    """A rank's half of every microbatch, or all of it."""
    if way.head != "FSDP":
        return batch
    return [torch.cat([part.chunk(SHARING)[rank] for part in t.chunk(child.MICROBATCHES)]) for t in batch]


def step(way, mesh, compiled):
    """The losses of a step's microbatches, and this stage's whole gradients."""
    case, rank, fsdp = way.case, mesh["pp"].get_local_rank(), way.head == "FSDP"
    sharing = mesh["sharing"]
    stage = split(way, child.stages(case)[rank], sharing)
    batch = child.batch(case)
    count = (batch[1] != -100).sum()
    tokens, labels, seq_idx = mine(way, batch, sharing.get_local_rank())
    group = sharing.get_group() if fsdp else None
    loss = PipelineCausalLMLoss(case.loss(), stage, scaling_factor=child.SCALING, grad_reduce_group=group)
    if way.head == "by functions":
        loss = partial(by_functions, case, stage)
    if compiled:
        loss = torch.compile(loss, fullgraph=True)
    schedule = case.schedule(
        PipelineStage(stage, rank, PIPELINE, torch.device("cpu"), group=mesh.get_group("pp")),
        child.MICROBATCHES,
        loss_fn=partial(loss, num_label_tokens=count / SHARING if fsdp else count),  # FSDP takes the ranks' mean
        scale_grads=False,
    )
    losses = []
    schedule.step(*((tokens,) if rank == 0 else ()), seq_idx=seq_idx, target=labels, losses=losses)
    gradients = {name: parameter.grad for name, parameter in stage.named_parameters()}
    whole = {name: grad.full_tensor() if isinstance(grad, DTensor) else grad for name, grad in gradients.items()}
    losses = [loss.detach() for loss in losses]
    for part in losses if fsdp else ():
        dist.all_reduce(part.div_(SHARING), group=group)
    return rank, losses, whole


def steps(names, compiled):
    mesh = init_device_mesh("cpu", (PIPELINE, SHARING), mesh_dim_names=("pp", "sharing"))
    found = {}
    for name in names:
        ranks.at(name)
        torch.compiler.reset()
        found[name] = step(WAYS[name], mesh, compiled)
    return found


@pytest.fixture(scope="module")
def eager(tmp_path_factory):
    return ranks.run(steps, PIPELINE * SHARING, tmp_path_factory.mktemp("ranks"), list(WAYS), False, limit=240)


@pytest.fixture(scope="module")
def compiled(tmp_path_factory):
    return ranks.run(steps, PIPELINE * SHARING, tmp_path_factory.mktemp("ranks"), COMPILED, True, limit=900)


def check(name, found):
    case = WAYS[name].case
    stages, batch = child.stages(case), child.batch(case)
    count = (batch[1] != -100).sum()
    parts = zip(*(part.chunk(child.MICROBATCHES) for part in batch), strict=True)
    losses = [sum(child.plain(stages, case, count, *part)).detach() for part in parts]
    sum(child.plain(stages, case, count, *batch)).backward()
    expected = [{name: parameter.grad for name, parameter in stage.named_parameters()} for stage in stages]
    assert [by_name[name][0] for by_name in found] == [0, 0, 1, 1]
    for rank, ours, gradients in (by_name[name] for by_name in found):
        torch.testing.assert_close(ours, losses if rank else [], **TIGHT)
        torch.testing.assert_close(gradients, expected[rank], **TIGHT)


@pytest.mark.parametrize("name", WAYS)
def test_pipeline_step_with_tensor_parallel_or_fsdp(name, eager):
    check(name, eager)


@pytest.mark.slow
@pytest.mark.parametrize("name", COMPILED)
def test_pipeline_step_with_a_compiled_loss(name, compiled):
    check(name, compiled)
