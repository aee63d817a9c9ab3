"""Finds the shards of a tensor that hold a part of a box. Pure: does no I/O."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import numpy as np

from weightbus.consumers.planning.boxes import Box
from weightbus.consumers.planning.tables import Integers
from weightbus.schemas.layout import Layout, ShardSpec

__all__ = ("ShardIndex",)


class ShardIndex:
    """The shards of some tensors of one layout, those without elements left out."""

    def __init__(self, layout: Layout, tensors: Iterable[int]) -> None:
        self._shards: dict[int, list[ShardSpec]] = {tensor: [] for tensor in tensors}
        for shard in layout.shards if self._shards else ():
            if shard.tensor in self._shards and all(shard.sizes):
                self._shards[shard.tensor].append(shard)
        self._tables: dict[int, tuple[Integers, Integers]] = {}

    def meeting(self, tensor: int, box: Box) -> Iterator[tuple[ShardSpec, Box]]:
        """The shards that have something in common with a box, and what."""
        shards = self._shards[tensor]
        for number in [0] if len(shards) == 1 else self._near(tensor, box):
            shard = shards[number]
            common = box.intersection(Box.of(shard.starts, shard.sizes))
            if common is not None:
                yield shard, common

    def _near(self, tensor: int, box: Box) -> list[int]:
        """Numbers of the shards that meet a box."""
        if tensor not in self._tables:
            shards = self._shards[tensor]
            dims = len(box.starts)
            starts = np.array([shard.starts for shard in shards], dtype=np.int64)
            sizes = np.array([shard.sizes for shard in shards], dtype=np.int64)
            starts = starts.reshape(len(shards), dims)
            self._tables[tensor] = starts, starts + sizes.reshape(len(shards), dims)
        starts, ends = self._tables[tensor]
        meet = np.logical_and(starts < box.ends, ends > box.starts).all(axis=1)
        numbers: list[int] = np.flatnonzero(meet).tolist()
        return numbers
