"""Checks of sharded arguments. Facts that may differ between ranks are gathered from all ranks, so that all raise."""

from __future__ import annotations

from collections.abc import Sequence

import torch


def shard(start: int, stop: int, vocab_size: int, group: object) -> None:
    """Raises unless a rank's classes are some of the vocabulary's."""
    for name, value in (("start", start), ("stop", stop), ("vocab_size", vocab_size)):
        if isinstance(value, bool) or not isinstance(value, int):
            raise TypeError(f"{name}: expected an int, got {type(value).__name__}")
    if vocab_size < 1:
        raise ValueError(f"vocab_size: expected V >= 1, got {vocab_size}")
    if not 0 <= start <= stop <= vocab_size:
        raise ValueError(f"start, stop: expected 0 <= start <= stop <= V = {vocab_size}, got {start} and {stop}")
    if not callable(getattr(group, "size", None)) or not hasattr(group, "group_name"):
        raise TypeError(f"group: expected a process group, got {type(group).__name__}: mesh.get_group(dim) of a mesh")


def shards(known: Sequence[tuple[int, int, int]]) -> None:
    """Raises unless the (start, stop, vocab_size) of a group's ranks, in their order, are one vocabulary."""
    text = ", ".join(f"{start}:{stop} of {vocab}" for start, stop, vocab in known)
    if len({vocab for *_, vocab in known}) > 1:
        raise ValueError(f"vocab_size: expected the same on every rank of the group, got by rank {text}")
    ends = [0, *(stop for _, stop, _ in known)]
    if ends[:-1] != [start for start, *_ in known] or ends[-1] != known[0][2]:
        raise ValueError(
            f"start, stop: expected that the {len(known)} ranks of the group have each class of the vocabulary once, "
            f"in their order, got by rank {text}"
        )


def rows_of_shard(name: str, rows: int, start: int, stop: int) -> None:
    """Raises unless a rank's tensor has as many classes as its part of the vocabulary."""
    if rows != stop - start:
        raise ValueError(f"{name}: expected {stop - start} classes, {start} to {stop} of the vocabulary, got {rows}")


def no_vocab_shard(name: str) -> None:
    """Raises an error: a DTensor says itself how it is sharded."""
    raise ValueError(f"vocab_shard: expected None beside a DTensor, which says itself how it is sharded, got {name}")


def placement(name: str, got: object, dimension: str, expected: str) -> None:
    """Raises an error: no loss can use a DTensor that is placed like this."""
    raise ValueError(f"{name}: expected {expected}, got {got} over mesh dimension {dimension}")


def strided(name: str) -> None:
    """Raises an error: a tensor that fully_shard shards has to be gathered first."""
    raise ValueError(
        f"{name}: expected Shard over one mesh dimension, got one that fully_shard shards as well: "
        "call unshard() of its module first"
    )


def one_dimension(name: str, dimensions: Sequence[str]) -> None:
    """Raises an error: the vocabulary is sharded over more than one mesh dimension."""
    raise ValueError(f"{name}: expected the vocabulary sharded over one mesh dimension, got {', '.join(dimensions)}")


def mesh(name: str, dimensions: Sequence[str], members: tuple[int, ...]) -> None:
    """Raises an error: the mesh has no dimension along the ranks that share the vocabulary."""
    raise ValueError(
        f"{name}: expected a mesh that has the ranks {', '.join(map(str, members))} along a dimension, "
        f"got one of the dimensions {', '.join(dimensions)} without"
    )


def alike(name: str, like: str, got: tuple[int, int], expected: tuple[int, int]) -> None:
    """Raises unless two tensors have the same classes on a rank."""
    if got != expected:
        raise ValueError(
            f"{name}: expected the classes {expected[0]} to {expected[1]} on this rank, as {like} has, "
            f"got {got[0]} to {got[1]}: shard both alike"
        )


def same(least: Sequence[int], most: Sequence[int]) -> None:
    """Raises unless (N, V, a hash of the tokens) is the same on all ranks, given its least and greatest values."""
    for name, low, high in zip(("tokens", "classes"), least, most, strict=False):
        if low != high:
            raise ValueError(
                f"{name}: expected as many on every rank that shares the vocabulary, got from {low} to {high}"
            )
    if least != most:
        raise ValueError(
            "labels, position_mask: expected the same tokens on all ranks that share the vocabulary, but they differ. "
            "A weight that fully_shard holds is no vocabulary shard: call unshard() of its module first"
        )


def whole(name: str, group: str | None, shape: str = "[V', H']") -> None:
    """Raises where rows are to be picked from a weight or a bias that other ranks hold."""
    if group is not None:
        raise ValueError(
            f"{name}: expected the whole {shape} on every rank beside draft_to_target, got a shard: give the chosen "
            "rows, sharded like weight, without draft_to_target"
        )


def token_mesh_dims(reduction: str, dimensions: Sequence[str]) -> None:
    """Raises where a mean would be over this rank's tokens only."""
    if dimensions and reduction == "mean":
        raise ValueError(
            f"num_label_tokens: expected the count of all ranks, for the tokens are sharded over "
            f"{', '.join(dimensions)}, got None: a mean would divide by each rank's own. A loss that has a reduction "
            "takes the count with reduction='sum'"
        )


def transforms() -> None:
    """Raises an error: functorch's transforms do not work over ranks."""
    raise NotImplementedError(
        "torch.func: expected a vocabulary on one rank, got one over several: use autograd, with backward()"
    )


def group_of(name: str, value: object) -> None:
    """Raises unless `value` is a process group or None. Compiled code does not check it."""
    if value is None or torch.compiler.is_compiling():
        return
    if not callable(getattr(value, "size", None)):
        raise TypeError(f"{name}: expected a process group or None, got {type(value).__name__}")
