"""Copies the tensors of a part into a slot on the same GPU: one kernel for all of them.

Needs Triton; imported only where slots lie on a GPU. Bits are copied as integers, so that every NaN
stays what it is: torch's batched copy takes 16-bit floats through 32 bits.

What the layout says is cut into pieces once. What the trainer's tensors say, their addresses, is
asked every time, and taken to the device when it has changed. Tensors with gaps, those in host
memory, those of another dtype than is published, and those that something is added to are copied
one by one, by torch's own kernels on the same stream.
"""

from __future__ import annotations

import weakref
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import torch
import triton
import triton.language as tl

from weightbus.producers.copying import copy_shard
from weightbus.producers.shards import Part, box_bytes, torch_dtype
from weightbus.schemas.layout import Layout

__all__ = ("GpuCopy", "plan_pieces")

Integers = npt.NDArray[np.int64]

PIECE_BYTES: Final = 128 * 2**10
"""What one program copies; a multiple of all lanes."""

LANES: Final = (16, 8, 4, 2, 1)
"""Bytes that a thread takes at once: the most that the source's address allows."""

BLOCK_LANES: Final = 1024
WARPS: Final = 4

_PIECE_NUMBERS: Final = tl.constexpr(4)


@triton.jit  # type: ignore[untyped-decorator,unused-ignore]
def _copy_pieces(  # type: ignore[no-untyped-def]  # Triton reads annotations, and knows few
    data,
    addresses,
    pieces,
    LANE_BYTES: tl.constexpr,  # noqa: N803
    BLOCK: tl.constexpr,  # noqa: N803
):
    """A piece: number of its source, first byte there, first byte in the data, bytes."""
    piece = pieces + tl.program_id(0).to(tl.int64) * _PIECE_NUMBERS
    here = tl.load(addresses + tl.load(piece)) + tl.load(piece + 1)
    there = data + tl.load(piece + 2)
    size_bytes = tl.load(piece + 3).to(tl.int32)
    if LANE_BYTES == 16:
        source = tl.multiple_of(here.to(tl.pointer_type(tl.int64)), 16)
        target = tl.multiple_of(there.to(tl.pointer_type(tl.int64)), 16)
        lanes = size_bytes // 16 * 2
        done_bytes = lanes * 8
    elif LANE_BYTES == 8:
        source = here.to(tl.pointer_type(tl.int64))
        target = there.to(tl.pointer_type(tl.int64))
        lanes = size_bytes // 8
        done_bytes = lanes * 8
    elif LANE_BYTES == 4:
        source = here.to(tl.pointer_type(tl.int32))
        target = there.to(tl.pointer_type(tl.int32))
        lanes = size_bytes // 4
        done_bytes = lanes * 4
    elif LANE_BYTES == 2:
        source = here.to(tl.pointer_type(tl.int16))
        target = there.to(tl.pointer_type(tl.int16))
        lanes = size_bytes // 2
        done_bytes = lanes * 2
    else:
        source = here.to(tl.pointer_type(tl.int8))
        target = there.to(tl.pointer_type(tl.int8))
        lanes = size_bytes
        done_bytes = lanes
    done = 0
    while done < lanes:
        lane = done + tl.arange(0, BLOCK)
        inside = lane < lanes
        tl.store(target + lane, tl.load(source + lane, mask=inside), mask=inside)
        done += BLOCK
    if LANE_BYTES != 1:
        rest = done_bytes + tl.arange(0, 16)
        inside = rest < size_bytes
        source_bytes = here.to(tl.pointer_type(tl.int8))
        target_bytes = there.to(tl.pointer_type(tl.int8))
        tl.store(target_bytes + rest, tl.load(source_bytes + rest, mask=inside), mask=inside)


class GpuCopy:
    """Copies parts of one layout, on one device. For one thread at a time."""

    def __init__(self, layout: Layout, device: torch.device) -> None:
        self._dtypes = [torch_dtype(layout, shard) for shard in layout.shards]
        self._device = device
        self._pieces = plan_pieces(layout)
        self._part: weakref.ref[Part] | None = None
        self._plain: npt.NDArray[np.bool_] = np.zeros(0, dtype=np.bool_)
        self._lanes: npt.NDArray[np.int8] | None = None
        self._by_lane: dict[int, torch.Tensor] = {}
        self._known: Integers | None = None
        self._addresses = torch.zeros(0, dtype=torch.int64, device=device)

    def prepare(self, part: Part) -> None:
        """Learn where the tensors are; cheapest for the part that was given the last time.

        What is new is taken to the device, and the current stream waited for: it should have
        nothing else to do.

        Args:
            part: of this layout; its tensors lie on this device or in host memory.
        """
        sources, count = part.sources, len(part.sources)
        if self._part is None or self._part() is not part:
            plain = (self._is_plain(part, number) for number in range(count))
            self._plain = np.fromiter(plain, np.bool_, count)
            self._part = weakref.ref(part)
        addresses = np.fromiter((source.data_ptr() for source in sources), np.int64, count)
        self._learn(addresses, _lanes(addresses) * self._plain)

    def start(self, data: torch.Tensor, part: Part) -> None:
        """Queue the copies of the part that was prepared on the current stream.

        Args:
            data: the slot's bytes, on this device, aligned to 16 bytes.
        """
        assert self._part is not None
        assert self._part() is part
        for lane, pieces in self._by_lane.items():
            _copy_pieces[(len(pieces),)](
                data,
                self._addresses,
                pieces,
                LANE_BYTES=lane,
                BLOCK=BLOCK_LANES,
                num_warps=WARPS,
            )
        for number in np.flatnonzero(~self._plain).tolist():
            here = part.sources[number].device == self._device
            copy_shard(data, part, number, non_blocking=here)

    def _is_plain(self, part: Part, number: int) -> bool:
        """Whether the bytes of a source, as they lie in memory, are what is to be copied."""
        source = part.sources[number]
        return (
            number not in part.deltas
            and source.dtype == self._dtypes[number]
            and source.is_contiguous()
            and source.device == self._device
            and not source.is_neg()
            and not source.is_conj()
        )

    def _learn(self, addresses: Integers, lanes: npt.NDArray[np.int8]) -> None:
        """Take to the device what is new."""
        if self._known is None or not np.array_equal(self._known, addresses):
            self._addresses = torch.from_numpy(addresses).to(self._device)
            self._known = addresses
        if self._lanes is None or not np.array_equal(self._lanes, lanes):
            lane_of_piece = lanes[self._pieces[:, 0]]
            self._by_lane = {
                lane: torch.from_numpy(self._pieces[lane_of_piece == lane]).to(self._device)
                for lane in LANES
                if (lane_of_piece == lane).any()
            }
            self._lanes = lanes


def plan_pieces(layout: Layout) -> Integers:
    """[pieces, 4] as the kernel reads them, of shards in their order."""
    sizes = [box_bytes(layout, shard) for shard in layout.shards]
    size_bytes = np.array(sizes, dtype=np.int64)
    offset_bytes = np.array([shard.offset_bytes for shard in layout.shards], dtype=np.int64)
    counts = -(-size_bytes // PIECE_BYTES)
    number = np.repeat(np.arange(len(sizes), dtype=np.int64), counts)
    first = np.arange(len(number), dtype=np.int64) - np.repeat(np.cumsum(counts) - counts, counts)
    first *= PIECE_BYTES
    length = np.minimum(size_bytes[number] - first, PIECE_BYTES)
    return np.stack([number, first, offset_bytes[number] + first, length], axis=1)


def _lanes(addresses: Integers) -> npt.NDArray[np.int8]:
    lanes: npt.NDArray[Any] = np.gcd(addresses, LANES[0]).astype(np.int8)
    return lanes
