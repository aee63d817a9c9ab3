"""Copies a part's tensors into a slot and digests what has been written.

Blocking; runs in a worker thread. No temporaries: every tensor goes by one `copy_` straight into
its place in the mapped block, whatever its strides and device, and is digested there.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Final

import numpy as np
import torch

from weightbus.bus.digest import digest_box
from weightbus.producers.digests import Sums
from weightbus.producers.shards import Part
from weightbus.schemas.dtypes import DTYPE_BYTES
from weightbus.schemas.layout import Layout, ShardSpec

__all__ = ("write_part",)

_BATCH_BYTES: Final = 64 * 2**20
_BATCH_SHARDS: Final = 4096


def write_part(
    part: Part, data: memoryview, threads: int, check_cancelled: Callable[[], None]
) -> Sums:
    """Copy every shard of `part` into `data`; returns the partial digest of each, in layout order.

    While one batch of shards is copied, `threads` threads digest those before it. When it returns
    the trainer may touch its tensors again. `check_cancelled` is called between batches; what it
    raises is passed on.
    """
    for device in {source.device for source in part.sources if source.device.type != "cpu"}:
        torch.get_device_module(device).synchronize(device)
    target = torch.frombuffer(data, dtype=torch.uint8)
    written = target.numpy()
    with (
        torch.no_grad(),
        ThreadPoolExecutor(threads, thread_name_prefix="weightbus-digest") as pool,
    ):
        try:
            digests = []
            for begin, end in _batches(part.layout):
                check_cancelled()
                shards = part.layout.shards[begin:end]
                for shard, source in zip(shards, part.sources[begin:end], strict=True):
                    _place_of(target, shard, source).copy_(source)
                digests.append(pool.submit(_digest_shards, part.layout, shards, written))
            sums = [digest for batch in digests for digest in batch.result()]
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
    return np.array(sums, dtype=np.uint64)


def _place_of(target: torch.Tensor, shard: ShardSpec, source: torch.Tensor) -> torch.Tensor:
    size_bytes = source.numel() * source.element_size()
    place = target[shard.offset_bytes : shard.offset_bytes + size_bytes]
    return place.view(source.dtype).view(source.shape)


def _digest_shards(
    layout: Layout, shards: Sequence[ShardSpec], written: np.ndarray[Any, np.dtype[np.uint8]]
) -> list[int]:
    digests = []
    for shard in shards:
        spec = layout.tensors[shard.tensor]
        itemsize = DTYPE_BYTES[spec.dtype]
        end = shard.offset_bytes + _size_bytes(layout, shard)
        box = written[shard.offset_bytes : end]
        digests.append(digest_box(box, spec.shape, itemsize, shard.starts, shard.sizes))
    return digests


def _batches(layout: Layout) -> Iterator[tuple[int, int]]:
    """Ranges of shard numbers, each of a bounded number of bytes (or one shard) and shards."""
    begin = batch_bytes = 0
    for number, shard in enumerate(layout.shards):
        size_bytes = _size_bytes(layout, shard)
        full = batch_bytes + size_bytes > _BATCH_BYTES or number - begin >= _BATCH_SHARDS
        if full and number > begin:
            yield begin, number
            begin, batch_bytes = number, 0
        batch_bytes += size_bytes
    if begin < len(layout.shards):
        yield begin, len(layout.shards)


def _size_bytes(layout: Layout, shard: ShardSpec) -> int:
    itemsize = DTYPE_BYTES[layout.tensors[shard.tensor].dtype]
    for size in shard.sizes:
        itemsize *= size
    return itemsize
