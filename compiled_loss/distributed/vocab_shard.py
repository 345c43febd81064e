"""A vocabulary over ranks: the classes of each rank, and a check that all ranks have the same tokens.

N tokens, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple, TypeGuard

import torch
from torch import Tensor
from torch import distributed as dist

from compiled_loss import checks
from compiled_loss.checks.numbers import can_read_values
from compiled_loss.engine.collectives import all_reduced
from compiled_loss.engine.gemm import opaque_copy

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor


@dataclass(frozen=True, slots=True)
class VocabShard:
    """The classes `start` to `stop`, of `vocab_size`, that this rank of `group` has, where tensors are plain.

    The ranks have each class once, in the order of the group. Shards may differ in size, and may be empty. Making one
    is a collective, because the ranks compare their shards: make it once, outside of compiled code.

    `start`: first class of this rank.
    `stop`: the class after its last.
    `vocab_size`: V, of all ranks.
    `group`: the process group over which the vocabulary is sharded, such as mesh.get_group("tp").
    `group_name`, `members`: the group's name and ranks, which are asked of it. Given ones are not compared.

    Example:
        >>> import torch
        >>> from compiled_loss import VocabShard
        >>> torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
        >>> shard = VocabShard.even(10, torch.distributed.group.WORLD)
        >>> shard.start, shard.stop
        (0, 10)
        >>> torch.distributed.destroy_process_group()

    """

    start: int
    stop: int
    vocab_size: int
    group: Any = field(repr=False)
    group_name: str = field(default="", repr=False)
    members: tuple[int, ...] = field(default=(), repr=False)

    def __post_init__(self) -> None:
        if self.group_name:
            return
        checks.sharding.shard(self.start, self.stop, self.vocab_size, self.group)
        object.__setattr__(self, "group_name", self.group.group_name)
        object.__setattr__(self, "members", tuple(dist.get_process_group_ranks(self.group)))
        if dist.get_backend(self.group) != "fake":  # in which no other rank answers
            known: list[Any] = [None] * len(self.members)
            dist.all_gather_object(known, (self.start, self.stop, self.vocab_size), group=self.group)
            checks.sharding.shards(known)

    @staticmethod
    def even(vocab_size: int, group: Any) -> VocabShard:
        """Returns the shard that a DTensor would have: equal shares of the classes, fewer or none on the last ranks."""
        checks.sharding.shard(0, 0, vocab_size, group)
        start, stop = even(vocab_size, group.rank(), group.size())
        return VocabShard(start, stop, vocab_size, group)


class Ranks:
    """A group whose ranks have equal parts of a vocabulary. It is queried once: compiled code cannot query it."""

    def __init__(self, group: Any) -> None:
        checks.sharding.group_of("tp_group", group)
        self.group = group
        self.rank, self.name = 0, ""
        self.members: tuple[int, ...] = (0,)
        if group is not None and group.size() > 1:
            self.rank, self.name = group.rank(), group.group_name
            self.members = tuple(dist.get_process_group_ranks(group))
        self.compared: set[int] = set()

    def shard(self, logits: Tensor) -> VocabShard | None:
        """Returns this rank's part of plain logits over more than one rank; otherwise None."""
        if len(self.members) == 1 or is_sharded(logits):
            return None
        size = logits.shape[-1]
        part = (self.rank * size, (self.rank + 1) * size, len(self.members) * size, self.group)
        if torch.compiler.is_compiling() or size in self.compared:
            return VocabShard(*part, self.name, self.members)
        self.compared.add(size)
        return VocabShard(*part)


class Vocabulary(NamedTuple):
    """A vocabulary of which a rank has the classes from start to stop: all of them, if nothing is sharded."""

    size: int
    start: int
    stop: int
    group: str | None = None
    members: tuple[int, ...] = ()  # its ranks, by which meshes are compared
    token_mesh_dims: tuple[str, ...] = ()  # mesh dimensions over which the tokens are sharded
    token_groups: tuple[tuple[int, ...], ...] = ()  # the ranks along each of these

    @property
    def ranks(self) -> int:
        """The number of ranks that share the vocabulary."""
        return max(1, len(self.members))

    @property
    def share(self) -> int:
        """The number of classes per rank, rounded up: the same on all ranks, so that all make the same plan."""
        return -(-self.size // self.ranks)

    def own(self, vector: Tensor | None) -> Tensor | None:
        """Returns the rank's part of a vector [V] that every rank has."""
        return vector if vector is None or self.group is None else vector[self.start : self.stop]

    def labels(self, labels: Tensor) -> Tensor:
        """Returns labels counted from the rank's first class."""
        return labels if self.start == 0 else labels - self.start

    def check_equal(self, tokens: Tensor) -> None:
        """Raises, on every rank that calls it, unless all have the same tokens and V: in code that can read values."""
        if self.group is not None and can_read_values(tokens):
            least, most = _between_ranks(tokens, self.size, self.group)
            checks.sharding.same(least.tolist(), most.tolist())

    def nan_unless_equal(self, value: Tensor, tokens: Tensor, after: Tensor) -> Tensor:
        """Returns the value, NaN with its gradient where ranks have different tokens: in code that cannot read values.

        The ranks compare their tokens once `after` is computed, so that all collectives of a loss have one order on all
        ranks.
        """
        if self.group is None or can_read_values(tokens):
            return value
        least, most = _between_ranks(tokens, self.size, self.group, [after.detach()])
        return value * torch.where((least == most).all(), 1.0, float("nan")).to(value.dtype)


def is_sharded(value: object) -> TypeGuard[DTensor]:
    """Returns True if the value is a DTensor. There is none before the package of DTensors is imported."""
    package = getattr(dist, "tensor", None)
    return package is not None and isinstance(value, package.DTensor)


def even(size: int, rank: int, ranks: int) -> tuple[int, int]:
    """Returns the first class of a rank, and the class after its last, as a DTensor is split."""
    share = -(-size // ranks)
    return min(rank * share, size), min((rank + 1) * share, size)


def _between_ranks(tokens: Tensor, vocab: int, group: str, after: Sequence[Tensor] = ()) -> tuple[Tensor, Tensor]:
    """Returns the least and the greatest over ranks of (N, V, a hash of the tokens): int64 [3] each, one collective."""
    flat = tokens.reshape(-1)
    if flat.is_floating_point():
        flat = flat.to(torch.float32).view(torch.int32)
    position = torch.arange(flat.shape[0], device=flat.device)
    # Products wrap around, on every device.
    mixed = ((flat.to(torch.int64) * 0x27D4EB2F165667C5) ^ position) * 0x165667B19E3779F9
    mixed = ((mixed ^ (mixed >> 32)).sum() & (2**62 - 1)).reshape(1)  # so that its negative is an int64, too
    mine = torch.cat([torch.full_like(mixed, flat.shape[0]), torch.full_like(mixed, vocab), mixed])
    mine = opaque_copy(torch.cat([-mine, mine]), after)
    (found,) = all_reduced([mine], "max", group)
    return -found[:3], found[3:]
