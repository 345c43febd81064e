"""Each rank's own tensors, from tensors that are sharded over ranks, and their gradients in backward.

N tokens, H width, V vocabulary. Losses and the engine see plain tensors and a `Vocabulary`.

NOTE [Layouts]
The vocabulary is sharded over at most one group of ranks. It is the mesh dimension over which a weight is Shard(0), or
logits are Shard(-1), or the group of a `VocabShard`. All ranks of this group see the same tokens:

- a plain tensor is taken as replicated over the group; its gradient is complete on every rank;
- a DTensor that is Shard over tokens there is gathered, and its gradient is reduce-scattered; a Replicate one gets its
  gradient as a Partial, which the layer below reduces when it must.

Over every other mesh dimension a weight is Replicate, and a DTensor of hidden states may be Shard over tokens. Then a
rank's loss is the part of its own tokens, and the weight's gradient is a Partial. A plain tensor is there the rank's
own, as DDP and FSDP take it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor
from torch import distributed as dist

from compiled_loss import checks
from compiled_loss.distributed.vocab_shard import VocabShard, Vocabulary, even, is_sharded
from compiled_loss.engine.collectives import all_reduced
from compiled_loss.engine.operators import composite
from compiled_loss.engine.transforms import traced

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor


def vocabulary(weight: Tensor, vocab_shard: VocabShard | None, name: str = "weight") -> Vocabulary:
    """Returns the rank's part of the vocabulary of a weight."""
    checks.tensor(name, weight)
    return _vocabulary(name, weight, 0, vocab_shard)


def head_layout(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    vocab_shard: VocabShard | None,
    names: tuple[str, str] = ("hidden", "weight"),
    bias_name: str = "bias",
) -> Vocabulary:
    """Returns the rank's part of a head's vocabulary. Raises unless all layouts are supported. Nothing is computed."""
    for name, value in zip(names, (hidden, weight), strict=True):
        checks.tensor(name, value)
    if bias is not None:
        checks.tensor(bias_name, bias)
    if vocab_shard is None and not (is_sharded(hidden) or is_sharded(weight) or is_sharded(bias)):
        size = weight.shape[0] if weight.dim() else 0
        return Vocabulary(size, 0, size)
    part = _vocabulary(names[1], weight, 0, vocab_shard)
    over = _tokens(names[0], hidden, part, None) if is_sharded(hidden) else {}
    if bias is not None and is_sharded(bias):
        theirs = _vocabulary(bias_name, bias, 0, None)
        checks.sharding.alike(bias_name, names[1], theirs[1:3], part[1:3])
    _sized(names[1], weight, 0, part)
    return part._replace(token_mesh_dims=tuple(over.values()), token_groups=tuple(over))


def own_head(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, part: Vocabulary
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Returns the rank's own hidden states, weight and bias."""
    own = None if bias is None else _own(bias, part.token_groups)
    return _states(hidden, part), _own(weight, part.token_groups), own


def logits_layout(name: str, value: Tensor, dim: int, vocab_shard: VocabShard | None) -> Vocabulary:
    """Returns the rank's part of the vocabulary, which is dimension `dim` of logits.

    Raises unless the layout is supported. Nothing is computed.
    """
    checks.tensor(name, value)
    if vocab_shard is None and not is_sharded(value):
        size = value.shape[dim] if value.dim() else 0
        return Vocabulary(size, 0, size)
    part = _vocabulary(name, value, dim, vocab_shard, of_head=False)
    over = _tokens(name, value, part, dim) if is_sharded(value) else {}
    _sized(name, value, dim, part)
    return part._replace(token_mesh_dims=tuple(over.values()), token_groups=tuple(over))


def own(value: Tensor) -> Tensor:
    """Returns the rank's own part; its gradient is laid out as the value is."""
    return value.to_local(grad_placements=value.placements) if is_sharded(value) else value


def own_shape(value: Tensor, part: Vocabulary) -> torch.Size:
    """Returns the shape of the rank's own part of a tensor of tokens, before the part is taken."""
    if not is_sharded(value):
        return value.shape
    shape, mesh = list(value.shape), value.device_mesh
    for i, (members, placement) in enumerate(zip(mesh_groups(value), value.placements, strict=True)):
        if members != part.members and isinstance(placement, dist.tensor.Shard):
            start, stop = even(shape[placement.dim], mesh.get_local_rank(i), mesh.size(i))
            shape[placement.dim] = stop - start
    return torch.Size(shape)


def own_rows(value: Tensor, part: Vocabulary, dim: int) -> torch.Size:
    """Returns the shape of the rank's own logits without `dim`, the dimension of their classes."""
    shape = list(own_shape(value, part))
    del shape[dim : dim + 1]
    return torch.Size(shape)


def own_logits_shape(value: Tensor, part: Vocabulary, dim: int) -> torch.Size:
    """Returns the shape of the rank's own logits, whose classes are the dimension `dim`."""
    if not is_sharded(value):
        return value.shape
    shape = list(own_shape(value, part))
    shape[dim] = part.stop - part.start
    return torch.Size(shape)


def check_whole(name: str, value: Tensor) -> None:
    """Raises unless every rank has all classes."""
    if is_sharded(value):
        shape = "[V']" if value.dim() == 1 else "[V', H']"
        checks.sharding.whole(name, _vocabulary(name, value, 0, None).group, shape)


def classes_of(value: Tensor, part: Vocabulary) -> int:
    """Returns the number of classes in a vector as it was given: all in a DTensor, else the rank's own."""
    return part.size if is_sharded(value) else part.stop - part.start


def check_beside(name: str, value: Tensor, like: str, part: Vocabulary, dim: int, *, of_head: bool = False) -> None:
    """Raises unless a target has the same classes on this rank."""
    if is_sharded(value):
        theirs = _vocabulary(name, value, dim % value.dim(), None, of_head=of_head)
        checks.sharding.alike(name, like, theirs[1:3], part[1:3])
    elif part.group is not None:
        _sized(name, value, dim, part)


def check_rows(name: str, value: Tensor) -> None:
    """Raises unless a rank's own rows can be taken."""
    if is_sharded(value):
        for i, placement in enumerate(value.placements):
            if placement.is_partial():
                checks.sharding.placement(name, placement, mesh_dimension(value, i), "Shard or Replicate")


def rows(value: Tensor, part: Vocabulary) -> Tensor:
    """Returns the rank's own rows of a tensor of tokens."""
    if not is_sharded(value):
        return value
    placements = [
        dist.tensor.Replicate() if members == part.members else placement
        for members, placement in zip(mesh_groups(value), value.placements, strict=True)
    ]
    return value.redistribute(placements=placements).to_local(grad_placements=placements)


def local(value: Tensor) -> Tensor:
    """Returns the rank's own part as it is, without its gradient's placements."""
    return value.to_local() if is_sharded(value) else value


def replicated(value: Tensor, part: Vocabulary) -> Tensor:
    """Returns a DTensor of hidden states gathered over the ranks that share the vocabulary; any other as it is."""
    if not is_sharded(value):
        return value
    placements = zip(mesh_groups(value), value.placements, strict=True)
    return value.redistribute(placements=[dist.tensor.Replicate() if g == part.members else p for g, p in placements])


def whole(value: Any) -> Any:
    """Returns the whole of a DTensor without gradient; any other value as it is."""
    return value.full_tensor() if is_sharded(value) else value


class _Replicated(torch.autograd.Function):
    """A tensor that is equal on all ranks of a group, and that each rank uses for its part of the loss."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, group: str) -> Tensor:
        ctx.group = group
        return value.view_as(value)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, None]:
        checks.first_derivative()
        return all_reduced([g], "sum", ctx.group)[0], None


class _Shared(NamedTuple):
    value: Tensor
    group: str


@composite("replicated", _Shared)
def _replicated(shared: _Shared) -> tuple[Tensor]:
    return (_Replicated.apply(*shared),)


def mesh_groups(value: DTensor) -> list[tuple[int, ...]]:
    """Returns the ranks of the groups along a mesh. Group names would not do: they differ between equal meshes."""
    mesh = value.device_mesh
    return [tuple(dist.get_process_group_ranks(mesh.get_group(i))) for i in range(mesh.ndim)]


def mesh_dimension(value: DTensor, i: int) -> str:
    """Returns the name of a mesh's dimension, or its number."""
    names = value.device_mesh.mesh_dim_names
    return str(i) if names is None else names[i]


def _vocabulary(
    name: str, value: Tensor, dim: int, vocab_shard: VocabShard | None, *, of_head: bool = True
) -> Vocabulary:
    """Returns the rank's part of the dimension `dim` of a tensor; a head's other dimension may not be sharded."""
    part = _part(name, value, dim, vocab_shard, of_head=of_head)
    if part.group is not None and traced():
        checks.sharding.transforms()
    return part


def _part(name: str, value: Tensor, dim: int, vocab_shard: VocabShard | None, *, of_head: bool) -> Vocabulary:
    if not is_sharded(value):
        if vocab_shard is None:
            return Vocabulary(value.shape[dim], 0, value.shape[dim])
        checks.instance("vocab_shard", vocab_shard, VocabShard)
        over = (vocab_shard.group_name, vocab_shard.members) if len(vocab_shard.members) > 1 else ()
        return Vocabulary(vocab_shard.vocab_size, vocab_shard.start, vocab_shard.stop, *over)
    if vocab_shard is not None:
        checks.sharding.no_vocab_shard(name)
    mesh, size = value.device_mesh, value.shape[dim]
    sharded = []
    for i, placement in enumerate(value.placements):
        if mesh.size(i) == 1 or placement.is_replicate():
            continue
        if placement.is_partial():
            checks.sharding.placement(name, placement, mesh_dimension(value, i), "Shard or Replicate")
        if type(placement) is not dist.tensor.Shard:
            checks.sharding.strided(name)
        elif placement.dim == dim:
            sharded.append(i)
        elif of_head:
            checks.sharding.placement(
                name, placement, mesh_dimension(value, i), "Shard(0), over the vocabulary, or Replicate"
            )
    if len(sharded) > 1:
        checks.sharding.one_dimension(name, [mesh_dimension(value, i) for i in sharded])
    if not sharded:
        return Vocabulary(size, 0, size)
    (i,) = sharded
    start, stop = even(size, mesh.get_local_rank(i), mesh.size(i))
    return Vocabulary(size, start, stop, mesh.get_group(i).group_name, mesh_groups(value)[i])


def _states(hidden: Tensor, part: Vocabulary) -> Tensor:
    """Returns the rank's hidden states."""
    if not is_sharded(hidden):
        return hidden if part.group is None else _replicated(_Shared(hidden, part.group))[0]
    placements, gradients = list(hidden.placements), list(hidden.placements)
    for i, theirs in enumerate(mesh_groups(hidden)):
        if theirs == part.members:
            placements[i], gradients[i] = dist.tensor.Replicate(), dist.tensor.Partial()
    return hidden.redistribute(placements=placements).to_local(grad_placements=gradients)


def _tokens(name: str, value: DTensor, part: Vocabulary, classes: int | None) -> dict[tuple[int, ...], str]:
    """Returns the groups over which the tokens of [..., H], or of logits, are sharded, and their mesh dimensions.

    `classes` is the dimension of logits that is V.
    """
    whole = value.dim() - 1 if classes is None else classes
    groups = mesh_groups(value)
    dimensions = [mesh_dimension(value, i) for i in range(len(groups))]
    if part.group is not None and part.members not in groups:
        checks.sharding.mesh(name, dimensions, part.members)
    over: dict[tuple[int, ...], str] = {}
    for i, placement in enumerate(value.placements):
        if value.device_mesh.size(i) == 1 or placement.is_replicate():
            continue
        if groups[i] == part.members and (classes is not None or placement.is_partial()):
            continue
        if type(placement) is not dist.tensor.Shard or placement.dim == whole:
            checks.sharding.placement(name, placement, dimensions[i], "Replicate, or Shard over tokens")
        if groups[i] != part.members:
            over[groups[i]] = dimensions[i]
    return over


def _own(value: Tensor, token_groups: tuple[tuple[int, ...], ...]) -> Tensor:
    """Returns the rank's own part of a parameter, whose gradient is summed over ranks with different tokens."""
    if not is_sharded(value):
        return value
    gradients = [
        dist.tensor.Partial() if group in token_groups else placement
        for group, placement in zip(mesh_groups(value), value.placements, strict=True)
    ]
    return value.to_local(grad_placements=gradients)


def _sized(name: str, value: Tensor, dim: int, part: Vocabulary) -> None:
    if value.dim() and not is_sharded(value):
        checks.sharding.rows_of_shard(name, value.shape[dim], part.start, part.stop)
