"""Copies a part's tensors into a block in host memory, and has digested what has been written.

Blocking; runs in a worker thread. Every tensor goes straight into its place in the mapped block,
whatever its strides, device and dtype, and is digested there.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Final

import torch

from weightbus.producers.copying import Copier, HostCopier
from weightbus.producers.devices import wait_after
from weightbus.producers.digesting import Digester
from weightbus.producers.digests import Sums
from weightbus.producers.shards import Part, box_bytes
from weightbus.schemas.layout import Layout

__all__ = ("write_part",)

_BATCH_BYTES: Final = 64 * 2**20
_BATCH_SHARDS: Final = 4096


def write_part(
    part: Part,
    data: memoryview,
    digester: Digester,
    check_cancelled: Callable[[], None],
    copier: Copier | None = None,
    copied: Callable[[], None] = lambda: None,
    *,
    beside: bool = True,
) -> Sums:
    """Copy every shard of `part` into `data`; returns the partial digest of each, in layout order.

    `digester`, which is made for `data` and closed here, digests batches of shards while later ones
    are copied, or if not `beside` all of them after the last copy. `copied` is called once all is
    copied: the trainer may touch its tensors again, as it may when this has ended.
    `check_cancelled` is called between batches; what it raises is passed on.

    Raises:
        CudaFailed: a device failed.
        CudaTimeout: it may go on copying to `data`, or reading it, whatever else has failed.
    """
    copier = copier or HostCopier(part)
    target = torch.frombuffer(data, dtype=torch.uint8)
    try:
        for begin, end in _batches(part.layout):
            check_cancelled()
            copier.copy(target, part, begin, end)
            if beside:
                digester.start(begin, end, copier)
        copier.mark()()
        copied()
        for begin, end in () if beside else _batches(part.layout):
            check_cancelled()
            digester.start(begin, end, copier)
        return digester.finish()
    except BaseException as error:
        digester.cancel()
        wait_after(error, copier.mark, digester.mark)
        raise
    finally:
        digester.close()


def _batches(layout: Layout) -> Iterator[tuple[int, int]]:
    """Ranges of shard numbers, each of a bounded number of bytes (or one shard) and shards."""
    begin = batch_bytes = 0
    for number, shard in enumerate(layout.shards):
        size_bytes = box_bytes(layout, shard)
        full = batch_bytes + size_bytes > _BATCH_BYTES or number - begin >= _BATCH_SHARDS
        if full and number > begin:
            yield begin, number
            begin, batch_bytes = number, 0
        batch_bytes += size_bytes
    if begin < len(layout.shards):
        yield begin, len(layout.shards)
