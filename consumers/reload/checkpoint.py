"""Reads whole checkpoint tensors out of open segments, into memory of our own.

What an engine's own loader is given, and what no rank needs but the digest sums up, goes this way:
the loader may keep or change what it gets, and the digest is taken of the very bytes it got.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch

from weightbus.consumers.errors import PlanError
from weightbus.consumers.reload.dtypes import TORCH_DTYPES
from weightbus.consumers.transfer.segments import OpenSegment
from weightbus.schemas.layout import Layout, ShardSpec

__all__ = ("Checkpoint", "bytes_of")


class Checkpoint:
    """The tensors of one version, by number.

    Args:
        shards_of: as made by `shards_by_tensor`.
        segments: open, in the layout's order.
    """

    def __init__(
        self,
        layout: Layout,
        shards_of: Sequence[Sequence[ShardSpec]],
        segments: Sequence[OpenSegment],
    ) -> None:
        self._layout, self._shards_of, self._segments = layout, shards_of, segments

    def tensor(self, number: int) -> torch.Tensor:
        """A private copy of one whole tensor, in main memory.

        Raises:
            PlanError: torch has no such dtype.
            SegmentUnavailable: a segment ended too early.
        """
        spec = self._layout.tensors[number]
        if spec.dtype not in TORCH_DTYPES:
            raise PlanError(f"dtype of {spec.name}", spec.dtype, "this torch does not know it")
        tensor = torch.empty(spec.shape, dtype=TORCH_DTYPES[spec.dtype], device="cpu")
        if tensor.numel():
            whole = bytes_of(tensor).reshape(*spec.shape, tensor.itemsize)
            for shard in self._shards_of[number]:
                self._read(shard, whole)
        return tensor

    def _read(self, shard: ShardSpec, whole: npt.NDArray[np.uint8]) -> None:
        """Put one shard into its box of the tensor; the last dimension is an element's bytes."""
        ends = (start + size for start, size in zip(shard.starts, shard.sizes, strict=True))
        box = whole[tuple(slice(s, e) for s, e in zip(shard.starts, ends, strict=True))]
        target = box if box.flags.c_contiguous else np.empty(box.shape, dtype=np.uint8)
        self._segments[shard.segment].read_into(target.reshape(-1).data, shard.offset_bytes)
        if target is not box:
            box[...] = target


def bytes_of(tensor: torch.Tensor) -> npt.NDArray[np.uint8]:
    """The bytes of a contiguous tensor in main memory, not empty; shares them."""
    array: npt.NDArray[np.uint8] = tensor.reshape(-1).view(torch.uint8).numpy()
    return array


def shards_by_tensor(layout: Layout) -> list[list[ShardSpec]]:
    """For every tensor of a layout, its shards."""
    shards: list[list[ShardSpec]] = [[] for _ in layout.tensors]
    for shard in layout.shards:
        shards[shard.tensor].append(shard)
    return shards
