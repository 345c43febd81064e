"""A weight that fully_shard shards, gathered once for all losses that take it."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch import distributed as dist

from compiled_loss import checks
from compiled_loss.distributed.dtensor import mesh_dimension, mesh_groups
from compiled_loss.distributed.vocab_shard import is_sharded

_COMPUTED = (torch.float32, torch.bfloat16, torch.float16)


def materialize(weight: Tensor, group: Any, dtype: torch.dtype | None = None) -> Tensor:
    """Returns a weight that fully_shard shards, gathered over `group` or all its mesh; its gradient is the ranks' mean.

    There is one gather and, in backward, one reduce-scatter, however many losses take the result. If `dtype` is
    narrower than the weight's, the weight is gathered in `dtype`, and its gradient is reduced in its own.
    """
    if not isinstance(weight, Tensor):
        return weight
    narrow = weight.dtype
    if dtype in _COMPUTED and narrow.is_floating_point and dtype.itemsize < narrow.itemsize:
        narrow = dtype
    if not is_sharded(weight):
        return weight.to(narrow)
    groups = mesh_groups(weight)
    members = {*()} if group is None else {*dist.get_process_group_ranks(group)}
    gathered = [group is None or {*theirs} <= members for theirs in groups]
    sizes = [len(theirs) for theirs, here in zip(groups, gathered, strict=True) if here]
    if group is not None and (not any(gathered) or math.prod(sizes) != len(members)):
        if not any(gathered) and all(len({*theirs} & members) == 1 for theirs in groups):
            return weight.to(narrow)  # gathered before
        checks.sharding.mesh(
            "grad_reduce_group", [mesh_dimension(weight, i) for i in range(len(groups))], tuple(sorted(members))
        )
    placements = [dist.tensor.Replicate() if here else p for here, p in zip(gathered, weight.placements, strict=True)]
    gradients = [dist.tensor.Partial("avg") if here else p for here, p in zip(gathered, weight.placements, strict=True)]
    if narrow == weight.dtype:
        whole = weight.redistribute(placements=placements)
    else:
        whole = weight.redistribute(placements=placements, forward_dtype=narrow, backward_dtype=weight.dtype)
    left = [i for i, here in enumerate(gathered) if not here]
    local = whole.to_local(grad_placements=gradients)
    if not left:
        return local
    mesh = weight.device_mesh[tuple(mesh_dimension(weight, i) for i in left)]
    return dist.tensor.DTensor.from_local(
        local,
        mesh,
        [weight.placements[i] for i in left],
        run_check=False,
        shape=weight.shape,
        stride=weight.stride(),
    )
