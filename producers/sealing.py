"""The parts of all ranks of a trainer -> one checkpoint. Pure: does no I/O.

A plan is made once per set of part layouts; a version only feeds it with placements and digests.
Boxes that several ranks hold alike (replicas) are taken once, from the lowest rank, and their
digests are compared: replicas that differ are a fault of the trainer, and no reader could tell.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from msgspec import structs

from weightbus.producers.digests import Sums
from weightbus.producers.errors import TensorInvalid
from weightbus.schemas.layout import Layout, ShardSpec, TensorSpec
from weightbus.schemas.layout_codec import check_layout
from weightbus.schemas.placement import Placement

__all__ = ("SealPlan", "add_digests", "plan_seal", "seal_placement")

Numbers = np.ndarray[Any, np.dtype[np.int64]]


@dataclass(frozen=True)
class SealPlan:
    """How the parts make one layout."""

    layout: Layout
    """Of the whole checkpoint, checked; tensors in the order in which ranks 0, 1, ... name them."""
    segments: tuple[tuple[int, int], ...]
    """For every segment of the layout: rank, and number in the rank's part."""
    shards: tuple[Numbers, ...]
    """For every rank and shard of its part: number in the layout; of a replica, the kept one's."""
    tensors: Numbers
    """For every shard of the layout: number of its tensor."""


def plan_seal(parts: Sequence[Layout]) -> SealPlan:
    """Merge the layouts of the parts of ranks 0, 1, ...

    Segments that hold nothing but replicas of lower ranks are left out.

    Raises:
        TensorInvalid: two ranks disagree on a tensor, or one gives a box twice; or there is none.
        MessageInvalid: boxes of the parts overlap, or leave elements out.
    """
    specs, renumbered = _merge_tensors(parts)
    if not specs:
        raise TensorInvalid("number 0", "absent", "a checkpoint holds at least one tensor")
    numbers_of_box: dict[tuple[int, tuple[int, ...], tuple[int, ...]], int] = {}
    segments: dict[tuple[int, int], int] = {}
    shards: list[ShardSpec] = []
    shards_of_part = []
    for rank, part in enumerate(parts):
        numbers = []
        for shard in part.shards:
            tensor = renumbered[rank][shard.tensor]
            number = numbers_of_box.setdefault((tensor, shard.starts, shard.sizes), len(shards))
            numbers.append(number)
            if number == len(shards):
                segment = segments.setdefault((rank, shard.segment), len(segments))
                shards.append(structs.replace(shard, tensor=tensor, segment=segment))
        if len(set(numbers)) < len(numbers):
            ((twice, _),) = Counter(numbers).most_common(1)
            name = specs[shards[twice].tensor].name
            raise TensorInvalid(name, f"on rank {rank}", "must not be given twice")
        shards_of_part.append(np.array(numbers, dtype=np.int64))
    used = tuple(segments) or ((0, 0),)
    layout = Layout(specs, tuple(shards), tuple(parts[r].segments[n] for r, n in used))
    check_layout(layout)
    tensors = np.array([shard.tensor for shard in shards], dtype=np.int64)
    return SealPlan(layout, used, tuple(shards_of_part), tensors)


def seal_placement(plan: SealPlan, placements: Sequence[Placement]) -> Placement:
    """The checkpoint's placement from those of the parts of ranks 0, 1, ..."""
    return tuple(placements[rank][segment] for rank, segment in plan.segments)


def add_digests(plan: SealPlan, shard_digests: Sequence[Sums]) -> Sums:
    """The digest of every tensor from the partial digests of the parts of ranks 0, 1, ...

    Raises:
        TensorInvalid: ranks hold the same box with different bytes.
    """
    kept = np.zeros(len(plan.layout.shards), dtype=np.uint64)
    seen = np.zeros(len(plan.layout.shards), dtype=np.bool_)
    for rank, (numbers, digests) in enumerate(zip(plan.shards, shard_digests, strict=True)):
        differs = seen[numbers] & (kept[numbers] != digests)
        if differs.any():
            spec = plan.layout.tensors[plan.tensors[numbers[differs][0]]]
            value = f"held by several ranks, and on rank {rank} it differs from a lower rank's"
            raise TensorInvalid(spec.name, value, "replicas must be equal")
        kept[numbers] = digests
        seen[numbers] = True
    sums = np.zeros(len(plan.layout.tensors), dtype=np.uint64)
    np.add.at(sums, plan.tensors, kept)
    return sums


def _merge_tensors(parts: Sequence[Layout]) -> tuple[tuple[TensorSpec, ...], list[list[int]]]:
    """All tensors; and for every rank, for every tensor of its part: its number among all."""
    numbers: dict[str, int] = {}
    specs: list[TensorSpec] = []
    renumbered = []
    for rank, part in enumerate(parts):
        for spec in part.tensors:
            number = numbers.setdefault(spec.name, len(specs))
            if number == len(specs):
                specs.append(spec)
            elif specs[number] != spec:
                known = specs[number]
                value = f"{spec.dtype} {spec.shape} on rank {rank}"
                limit = f"is {known.dtype} {known.shape} on a lower rank"
                raise TensorInvalid(spec.name, value, limit)
        renumbered.append([numbers[spec.name] for spec in part.tensors])
    return tuple(specs), renumbered
