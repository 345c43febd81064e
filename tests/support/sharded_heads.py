"""Run on ranks by test_sharded_heads.py: heads with a bias, found in models as torch's parallelism leaves them."""

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module
from torch.nn import functional as F

from compiled_loss import FusedLinearCrossEntropy, PipelineCausalLMLoss, calculate_loss

B, S, H, V = 4, 5, 8, 18
COUNT = 15  # of label tokens, over all ranks
FACTOR = 0.3


class Model(nn.Module):
    def __init__(self, dtype=torch.float64):
        super().__init__()
        torch.manual_seed(0)
        self.body = nn.Linear(H, H, dtype=dtype)
        self.further = nn.Linear(H, H, dtype=dtype)
        self.lm_head = nn.Linear(H, V, dtype=dtype)
        nn.init.normal_(self.lm_head.bias)

    def get_output_embeddings(self):
        return self.lm_head

    def forward(self, x):
        hidden = torch.tanh(self.body(x))
        return hidden, torch.tanh(self.further(hidden))


def batch():
    """Of all ranks."""
    random = torch.Generator().manual_seed(1)
    labels = torch.randint(0, V, (B, S), generator=random)
    labels[:, -1] = -100
    labels[1, 2] = -100
    assert (labels != -100).sum() == COUNT
    return torch.randn(B, S, H, generator=random, dtype=torch.float64), labels


def expected():
    """Loss and gradients of one process, by plain torch."""
    model, (x, labels) = Model(), batch()
    hidden, further = model(x)
    ahead = torch.cat([labels[:, 1:], torch.full((B, 1), -100)], 1)
    main, auxiliary = (
        F.cross_entropy(model.lm_head(h).flatten(0, 1), y.flatten(), reduction="sum") / COUNT
        for h, y in ((hidden, labels), (further, ahead))
    )
    (main + FACTOR * auxiliary).backward()
    return (main + FACTOR * auxiliary).item(), {name: p.grad for name, p in model.named_parameters()}


def errors(model, loss, group):
    """Against one process, relative to it: the loss summed over the ranks, and every gradient."""
    total = loss.detach().double().clone()
    if group is not None:
        dist.all_reduce(total, group=group)
    theirs, gradients = expected()
    found = {"loss": abs(total.item() - theirs) / theirs}
    for name, parameter in model.named_parameters():
        grad = parameter.grad.full_tensor() if isinstance(parameter.grad, DTensor) else parameter.grad
        found[name] = ((grad.double() - gradients[name]).norm() / gradients[name].norm()).item()
    return found


def data_parallel(how):
    """FSDP2, over one dimension or replicated over another, with or without a mixed-precision policy."""
    ranks, rank = dist.get_world_size(), dist.get_rank()
    if how == "hsdp":
        mesh = init_device_mesh("cpu", (2, ranks // 2), mesh_dim_names=("replicate", "shard"))
        group = mesh._flatten("dp").get_group()
    else:
        mesh = init_device_mesh("cpu", (ranks,), mesh_dim_names=("dp",))
        group = mesh.get_group()
    model, keywords = Model(), {}
    if how.startswith("bf16"):
        model = Model().float()
        keywords["mp_policy"] = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    for part in (model.body, model.further, model.lm_head, model):
        fully_shard(part, mesh=mesh, **keywords)
    x, labels = (v.chunk(ranks)[rank] for v in batch())
    loss_fn = FusedLinearCrossEntropy()
    stage = model(x.to(model.body.weight.dtype))
    if how == "bf16, gathered":
        head = model.lm_head
        weight, bias = (loss_fn.materialize_lm_weight(v, grad_reduce_group=group) for v in (head.weight, head.bias))
        given = {"lm_weight": weight, "lm_bias": bias, "num_label_tokens": COUNT, "grad_reduce_group": group}
        ahead = torch.cat([labels[:, 1:], torch.full((len(labels), 1), -100)], 1)
        loss = calculate_loss(loss_fn, hidden_states=stage[0], labels=labels, **given)
        loss = loss + FACTOR * calculate_loss(loss_fn, hidden_states=stage[1], labels=ahead, **given)
    else:
        pipeline = PipelineCausalLMLoss(loss_fn, model, FACTOR, grad_reduce_group=group)
        loss = pipeline(stage, labels, num_label_tokens=COUNT)
    (loss * ranks).backward()  # FSDP takes the ranks' mean
    assert all(p.grad.dtype == p.dtype for p in model.parameters())
    return errors(model, loss, group)


def tensor_parallel(how):
    """A vocabulary over ranks, weight and bias alike; the style's hooks stand on the head, or another's forward."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),), mesh_dim_names=("tp",))
    model = Model()
    parallelize_module(model, mesh, {"lm_head": ColwiseParallel(use_local_output=False)})
    assert model.lm_head._forward_hooks or model.lm_head._forward_pre_hooks
    if how == "transformers":

        def tp_forward(x):
            raise AssertionError("the weight alone is used")

        tp_forward.__module__ = "transformers.distributed.tensor_parallel"
        model.lm_head.forward = tp_forward
    x, labels = batch()
    loss = PipelineCausalLMLoss(FusedLinearCrossEntropy(), model, FACTOR)
    if how == "compiled":
        loss.compile(fullgraph=True, backend="aot_eager")
    found = loss(model(x), labels, num_label_tokens=COUNT)
    found.backward()
    return errors(model, found, None)


def gathered_in(dtype):
    """The dtypes of a gathered weight and of its gradient, and the mean of two ranks' gradients."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),), mesh_dim_names=("dp",))
    head = nn.Linear(4, 6, bias=False)
    fully_shard(head, mesh=mesh)
    weight = FusedLinearCrossEntropy.materialize_lm_weight(head.weight, grad_reduce_group=mesh.get_group(), dtype=dtype)
    weight.backward(torch.full_like(weight, 1.0 if dist.get_rank() else 2**-8))
    return weight.dtype, head.weight.grad.dtype, head.weight.grad.full_tensor().unique().tolist()
