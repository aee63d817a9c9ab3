"""The weights digest by a GPU: the numbers of `weightbus.bus.digest`, of boxes that it can read.

They lie in its own memory, or in host memory that is registered with CUDA.

Needs torch and Triton, hence imported only by producers and consumers, and only where there is a
GPU. Both sides may use it and neither may import the other, as with the digest itself.

`plan_tiles` cuts boxes into tiles once per layout; it is pure. A kernel takes one tile per program:
units of 4, 2 or 1 bytes, whichever the tile's places in its tensor and in the data are aligned to,
are shifted to where they lie in their word, and the products are summed up, without the common
factor MULTIPLIER, which is applied to the sums in the end. One atomic addition per tile; integers
commute, so the sums are the same in any order.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from typing import Final, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
import triton
import triton.language as tl

from weightbus.bus.digest import (
    MULTIPLIER,
    SHIFT,
    STEP,
    WORD_BYTES,
    offsets_of_runs,
    runs_of_box,
)

__all__ = ("Box", "GpuDigest", "TileKind", "plan_tiles")

Sums = npt.NDArray[np.uint64]
Integers = npt.NDArray[np.int64]

TILE_BYTES: Final = 128 * 2**10
"""Of the longest tile: many enough for a whole device, and long enough for one atomic addition."""

LONG_ROW_BYTES: Final = 16 * 2**10
"""Rows from here on are tiles of their own: they need no division."""

BLOCK_UNITS: Final = 1024
WARPS: Final = 4

_STEP: Final = tl.constexpr(STEP)
_SHIFT: Final = tl.constexpr(SHIFT)
_TILE_NUMBERS: Final = tl.constexpr(6)


class Box(NamedTuple):
    """A box of a tensor, its elements in C order without gaps."""

    offset_bytes: int
    """Of its first byte in the data; a multiple of 4."""
    shape: Sequence[int]
    """Of the whole tensor; this and what follows as in `digest_box`."""
    itemsize: int
    starts: Sequence[int]
    sizes: Sequence[int]


class TileKind(NamedTuple):
    """What a kernel is compiled for."""

    unit_bytes: int
    has_rows: bool


@triton.jit(do_not_specialize=["address"])  # type: ignore[untyped-decorator,unused-ignore]
def _digest_tiles(  # type: ignore[no-untyped-def]  # Triton reads annotations, and knows few
    address,
    tiles,
    sums,
    UNIT_BYTES: tl.constexpr,  # noqa: N803
    HAS_ROWS: tl.constexpr,  # noqa: N803
    BLOCK: tl.constexpr,  # noqa: N803
):
    """A tile: offset in the data, units, units of a row, byte of the tensor where it begins, bytes
    of the tensor from row to row, number of its sum."""
    tile = tiles + tl.program_id(0).to(tl.int64) * _TILE_NUMBERS
    here = address + tl.load(tile)
    units = tl.load(tile + 1).to(tl.int32)
    row_units = tl.load(tile + 2).to(tl.int32)
    first_byte = tl.load(tile + 3)
    row_step = tl.load(tile + 4)
    if UNIT_BYTES == 4:
        source = here.to(tl.pointer_type(tl.uint32))
    elif UNIT_BYTES == 2:
        source = here.to(tl.pointer_type(tl.uint16))
    else:
        source = here.to(tl.pointer_type(tl.uint8))
    total = tl.full((BLOCK,), 0, tl.uint64)
    done = 0
    while done < units:
        number = done + tl.arange(0, BLOCK)
        if HAS_ROWS:
            row = number // row_units
            column = number - row * row_units
            place = first_byte + row.to(tl.int64) * row_step + column.to(tl.int64) * UNIT_BYTES
        else:
            place = first_byte + number.to(tl.int64) * UNIT_BYTES
        unit = tl.load(source + number, mask=number < units, other=0).to(tl.uint64)
        if UNIT_BYTES != 4:
            unit = unit << ((place & 3) * 8).to(tl.uint64)
        step = ((place >> 2) + 1).to(tl.uint64) * _STEP
        total += unit * ((step ^ (step >> _SHIFT)) | 1)
        done += BLOCK
    tl.atomic_add(sums + tl.load(tile + 5), tl.sum(total, axis=0).to(tl.int64), sem="relaxed")


class _Tiles(NamedTuple):
    """All of one kind, box after box."""

    kind: TileKind
    table: torch.Tensor
    firsts: Integers
    """Of every box, the first of its tiles; then how many there are."""


class GpuDigest:
    """The tiles of one layout, on one device. For one thread at a time, and one stream."""

    def __init__(self, boxes: Sequence[Box], device: torch.device) -> None:
        """Plan the tiles and take them to the device: 48 bytes per 128 KiB of data, 8 per box.

        Every kernel is run once, on no data, so that one that cannot be compiled or has no memory
        fails here. Waits for the current stream.
        """
        self._count = len(boxes)
        self._sums = torch.zeros(self._count, dtype=torch.int64, device=device)
        self._tiles = []
        for kind, tiles in plan_tiles(boxes).items():
            ordered = tiles[np.argsort(tiles[:, -1], kind="stable")]
            firsts = np.searchsorted(ordered[:, -1], np.arange(self._count + 1))
            table = torch.from_numpy(ordered).to(device)
            self._tiles.append(_Tiles(kind, table, firsts))
            self._launch(kind, self._sums.data_ptr(), torch.zeros_like(table[:1]))

    def start(self, address: int, begin: int = 0, end: int | None = None) -> None:
        """Queue boxes `begin` to `end` (None: the last), each once before `finish`.

        Args:
            address: of the data: a multiple of 4, in memory of this device, or of the host where
                this device reads it at its host address. What is digested stays unchanged until
                the current stream is done.
        """
        assert address % WORD_BYTES == 0
        end = self._count if end is None else end
        self._sums[begin:end].zero_()
        for kind, table, firsts in self._tiles:
            tiles = table[firsts[begin] : firsts[end]]
            if len(tiles):
                self._launch(kind, address, tiles)

    def finish(self) -> Sums:
        """What every box adds to its tensor's digest. Waits for the current stream."""
        return self._sums.cpu().numpy().view(np.uint64) * np.uint64(MULTIPLIER)

    def _launch(self, kind: TileKind, address: int, tiles: torch.Tensor) -> None:
        _digest_tiles[(len(tiles),)](
            address,
            tiles,
            self._sums,
            UNIT_BYTES=kind.unit_bytes,
            HAS_ROWS=kind.has_rows,
            BLOCK=BLOCK_UNITS,
            num_warps=WARPS,
        )


def plan_tiles(boxes: Iterable[Box]) -> dict[TileKind, Integers]:
    """Cut boxes into tiles: kind -> [tiles, 6] as the kernel reads them. Every byte is in one."""
    found = [strip for number, box in enumerate(boxes) for strip in _strips(number, box)]
    strips = np.array(found, dtype=np.int64).reshape(-1, 6)
    rows, row_bytes = strips[:, _ROWS], strips[:, _ROW_BYTES]
    long = (row_bytes >= LONG_ROW_BYTES) & (rows > 1)
    single = np.concatenate([strips[rows == 1], _rows_apart(strips[long])])
    grids = strips[(rows > 1) & ~long]
    tiles: dict[TileKind, list[Integers]] = {}
    for runs, unit_bytes in _by_alignment(single):
        tiles.setdefault(TileKind(unit_bytes, False), []).append(_cut_runs(runs, unit_bytes))
    units = np.gcd.reduce(
        [grids[:, _FIRST], grids[:, _ROW_BYTES], grids[:, _STEP_BYTES], 0 * grids[:, 0] + 4]
    )
    for unit_bytes in (4, 2, 1):
        cut = _cut_grids(grids[units == unit_bytes], unit_bytes)
        tiles.setdefault(TileKind(unit_bytes, True), []).append(cut)
    joined = {kind: np.concatenate(parts) for kind, parts in tiles.items()}
    return {kind: np.ascontiguousarray(part) for kind, part in joined.items() if len(part)}


# A strip: rows of bytes that lie one after the other in the data, and in steps in the tensor.
_OFFSET, _ROWS, _ROW_BYTES, _FIRST, _STEP_BYTES, _NUMBER = range(6)


def _strips(number: int, box: Box) -> Iterator[tuple[int, int, int, int, int, int]]:
    if math.prod(box.sizes) == 0:
        return
    outer, first_byte, run_bytes = runs_of_box(box.shape, box.itemsize, box.starts, box.sizes)
    if not outer:
        yield box.offset_bytes, 1, run_bytes, first_byte, 0, number
        return
    rows, step_bytes = outer[-1]
    count = math.prod(extent for extent, _ in outer[:-1])
    firsts = offsets_of_runs(outer[:-1], first_byte, 0, count).tolist()
    for strip, first in enumerate(firsts):
        offset_bytes = box.offset_bytes + strip * rows * run_bytes
        yield offset_bytes, rows, run_bytes, first, step_bytes, number


def _rows_apart(strips: Integers) -> Integers:
    """Every row of every strip as a strip of its own."""
    rows = strips[:, _ROWS]
    apart = np.repeat(strips, rows, axis=0)
    row = _numbers_within(rows)
    apart[:, _OFFSET] += row * apart[:, _ROW_BYTES]
    apart[:, _FIRST] += row * apart[:, _STEP_BYTES]
    apart[:, _ROWS] = 1
    return apart


def _by_alignment(runs: Integers) -> Iterator[tuple[Integers, int]]:
    """Runs by the unit to read them in: they are aligned to it, in the tensor and in the data. The
    last bytes of an aligned one are a run of their own."""
    phase = (runs[:, _FIRST] | runs[:, _OFFSET]) % WORD_BYTES
    aligned, halves = runs[phase == 0], runs[(phase == 2) & (runs[:, _ROW_BYTES] % 2 == 0)]
    bodies, rests = aligned.copy(), aligned.copy()
    rest_bytes = aligned[:, _ROW_BYTES] % WORD_BYTES
    bodies[:, _ROW_BYTES] -= rest_bytes
    rests[:, _OFFSET] += bodies[:, _ROW_BYTES]
    rests[:, _FIRST] += bodies[:, _ROW_BYTES]
    rests[:, _ROW_BYTES] = rest_bytes
    yield bodies, 4
    yield halves, 2
    yield runs[(phase % 2 == 1) | ((phase == 2) & (runs[:, _ROW_BYTES] % 2 == 1))], 1
    yield rests, 1


def _cut_runs(runs: Integers, unit_bytes: int) -> Integers:
    """Tiles of strips of one row."""
    pieces = -(-runs[:, _ROW_BYTES] // TILE_BYTES)
    tiles = np.repeat(runs, pieces, axis=0)
    done_bytes = _numbers_within(pieces) * TILE_BYTES
    size_bytes = np.minimum(tiles[:, _ROW_BYTES] - done_bytes, TILE_BYTES)
    units = size_bytes // unit_bytes
    places = tiles[:, _OFFSET] + done_bytes, tiles[:, _FIRST] + done_bytes
    return np.stack([places[0], units, units, places[1], 0 * units, tiles[:, _NUMBER]], axis=1)


def _cut_grids(grids: Integers, unit_bytes: int) -> Integers:
    """Tiles of strips of several short rows."""
    rows_at_once = np.maximum(TILE_BYTES // grids[:, _ROW_BYTES], 1)
    pieces = -(-grids[:, _ROWS] // rows_at_once)
    tiles = np.repeat(grids, pieces, axis=0)
    first_row = _numbers_within(pieces) * np.repeat(rows_at_once, pieces)
    rows = np.minimum(tiles[:, _ROWS] - first_row, np.repeat(rows_at_once, pieces))
    row_bytes = tiles[:, _ROW_BYTES]
    return np.stack(
        [
            tiles[:, _OFFSET] + first_row * row_bytes,
            rows * row_bytes // unit_bytes,
            row_bytes // unit_bytes,
            tiles[:, _FIRST] + first_row * tiles[:, _STEP_BYTES],
            tiles[:, _STEP_BYTES],
            tiles[:, _NUMBER],
        ],
        axis=1,
    )


def _numbers_within(counts: Integers) -> Integers:
    """0, 1, ..., counts[0] - 1, 0, 1, ..., counts[1] - 1, ..."""
    ends = np.cumsum(counts)
    return np.arange(int(counts.sum()), dtype=np.int64) - np.repeat(ends - counts, counts)
