"""Moves bytes into parameters in main memory, and digests what was moved.

Reads and writes raw addresses: those that `bind_tiles` has checked. Owns no memory but one block of
staging while it runs. Instead of single tiles it runs the pieces that they were cut from: a CPU
gains nothing from small ones.

Invariant: a cell's digest is of the very bytes that were written, or that were cast and written: it
is read back from the parameter, or taken of the private copy from which the cast was made.
"""

from __future__ import annotations

import ctypes
import math
from collections.abc import Iterable, Iterator, Sequence

import numpy as np
import numpy.typing as npt

from weightbus.bus.digest import digest_box
from weightbus.consumers.planning.boxes import Box, blocks_of
from weightbus.consumers.planning.pieces import Pieces
from weightbus.consumers.planning.tables import Integers
from weightbus.consumers.planning.tiles import BoundTiles
from weightbus.consumers.reload.shards import ShardIndex
from weightbus.consumers.reload.transforms import filled_bytes, transformed_bytes
from weightbus.schemas.dtypes import DTYPE_BYTES
from weightbus.schemas.layout import Layout, ShardSpec, TensorSpec
from weightbus.schemas.needs import Copy, Needs
from weightbus.schemas.worker import Cell

__all__ = ("BLOCK_BYTES", "CpuExecutor")

BLOCK_BYTES = 4 * 2**20
"""Largest block that is staged or gathered at once."""

Bytes = npt.NDArray[np.uint8]
Sums = npt.NDArray[np.uint64]
Window = npt.NDArray[np.unsignedinteger]
"""A strided view of raw memory, an unsigned integer per element or unit."""

_MASK = 2**64 - 1


class CpuExecutor:
    """Runs bound plans of one layout and one rank's needs, and digests the rank's cells.

    Not for several threads at once. Torn reads are the caller's to look for, after `move`.

    Args:
        layout: has been checked by `check_layout`.
        needs: the plan's; the numbers of copies and parameters are the same.
        cells: what shall be digested; if a copy that transforms has any, they hold all of its box.
    """

    def __init__(self, layout: Layout, needs: Needs, cells: Sequence[Cell]) -> None:
        self._layout, self._needs, self._cells = layout, needs, tuple(cells)
        self._cells_of: dict[int, list[int]] = {}
        """For every copy that transforms: the numbers of its cells."""
        for number, cell in enumerate(self._cells):
            if self._is_transformed(cell.copy):
                self._cells_of.setdefault(cell.copy, []).append(number)
        staged = {copy.tensor for copy in needs.copies if copy.transform >= 0}
        staged |= {cell.tensor for cell in self._cells if cell.copy < 0}
        self._shards = ShardIndex(layout, staged)
        self._digests = np.zeros(len(self._cells), dtype=np.uint64)

    def move(self, bound: BoundTiles) -> int:
        """Write everything that the plan holds into the parameters. Returns the bytes it read.

        Raises:
            PlanError: torch cannot do a transform or a fill; parameters may have been written.
        """
        memories = _Memories(bound)
        self._move_pieces(bound, memories)
        pieces = bound.plan.pieces
        for number in np.unique(pieces.copy[pieces.transform >= 0]).tolist():
            self._transform(number, memories)
        for fill in bound.plan.needs.fills:
            element = filled_bytes(self._needs.parameters[fill.parameter].dtype, fill.value)
            offset, strides = _in_bytes(fill.offset, fill.strides, element.size)
            parameter = memories.parameter(fill.parameter)
            window = parameter.window(offset, fill.sizes, strides, element.size)
            window[...] = element.view(window.dtype)[0]
        return bound.plan.source_bytes

    def changed_parameter(self, bound: BoundTiles) -> int | None:
        """A parameter that `move(bound)` would make another one of; None: it changes no byte.

        Looks at what is copied, not at fills: they are the same in every version.
        """
        memories = _Memories(bound)
        pieces = bound.plan.pieces
        for number in np.flatnonzero(pieces.transform < 0).tolist():
            source, held = _windows(pieces, number, memories)
            if not np.array_equal(source, held):
                return int(pieces.parameter[number])
        for number in np.unique(pieces.copy[pieces.transform >= 0]).tolist():
            copy = self._needs.copies[number]
            for _, made, held in self._made(number, _box(copy), memories):
                if not np.array_equal(made, held):
                    return int(copy.parameter)
        return None

    def digest_cells(self, bound: BoundTiles, numbers: Iterable[int] | None = None) -> Sums:
        """The digests of cells, in order, of what `move(bound)` has just written; None: of all.

        `bound` may be a portion of the plan: then the numbers are of cells of its copies.
        """
        memories = _Memories(bound)
        chosen = range(len(self._cells)) if numbers is None else tuple(numbers)
        for number in chosen:
            cell = self._cells[number]
            if cell.copy < 0:
                self._digests[number] = self._digest_source(cell, memories)
            elif not self._is_transformed(cell.copy):
                self._digests[number] = self._digest_parameter(cell, memories)
        return self._digests[list(chosen)]

    def read_back(self, bound: BoundTiles) -> tuple[Sums, tuple[int, ...]]:
        """The digest of every cell as the parameters hold it now; no segment need be there.

        Cells that cannot be read back (transformed, or of no copy) are 0; their numbers follow.
        """
        memories = _Memories(bound)
        digests = np.zeros(len(self._cells), dtype=np.uint64)
        unreadable = []
        for number, cell in enumerate(self._cells):
            if cell.copy < 0 or self._is_transformed(cell.copy):
                unreadable.append(number)
            else:
                digests[number] = self._digest_parameter(cell, memories)
        return digests, tuple(unreadable)

    def _is_transformed(self, copy: int) -> bool:
        return copy >= 0 and self._needs.copies[copy].transform >= 0

    def _move_pieces(self, bound: BoundTiles, memories: _Memories) -> None:
        """Copy what is moved as it is: runs of bytes by `memmove`, the rest as strided blocks."""
        pieces = bound.plan.pieces
        unit_bytes, inner = pieces.unit_bytes, pieces.sizes[:, 0]
        runs = (pieces.source_strides[:, 0] == unit_bytes) | (inner == 1)
        runs &= (pieces.destination_strides[:, 0] == unit_bytes) | (inner == 1)
        runs &= (pieces.sizes[:, 1:] == 1).all(axis=1)
        as_is = pieces.transform < 0
        chosen = as_is & runs
        for source, destination, size_bytes in _joined(
            bound.piece_sources[chosen],
            bound.piece_destinations[chosen],
            (inner * unit_bytes)[chosen],
        ):
            ctypes.memmove(destination, source, size_bytes)
        for number in np.flatnonzero(as_is & ~runs).tolist():
            source_window, target = _windows(pieces, number, memories)
            np.copyto(target, source_window)

    def _transform(self, number: int, memories: _Memories) -> None:
        """Stage a copy block by block; digest what was staged, and write what it becomes."""
        copy = self._needs.copies[number]
        tensor = self._layout.tensors[copy.tensor]
        cells = self._cells_of.get(number, [])
        boxes = [_box(self._cells[cell]) for cell in cells] or [_box(copy)]
        digests = [0] * len(boxes)
        for index, box in enumerate(boxes):
            for (staged, block), made, window in self._made(number, box, memories):
                digests[index] += _digest(staged, tensor, block)
                window[...] = made
        for cell, digest in zip(cells, digests, strict=False):
            self._digests[cell] = digest & _MASK

    def _made(
        self, number: int, box: Box, memories: _Memories
    ) -> Iterator[tuple[tuple[Bytes, Box], Window, Window]]:
        """A box of a copy that transforms, block by block: what is read, what it becomes, and the
        window of the parameter that it goes to."""
        copy = self._needs.copies[number]
        dtype = self._layout.tensors[copy.tensor].dtype
        for block in blocks_of(box, BLOCK_BYTES // DTYPE_BYTES[dtype]):
            staged = self._staged(copy.tensor, block, memories)
            made = transformed_bytes(staged, dtype, self._needs.transforms[copy.transform])
            window = self._written(copy, block, memories)
            yield (staged, block), made.view(window.dtype).reshape(window.shape), window

    def _digest_source(self, cell: Cell, memories: _Memories) -> int:
        """The digest of a cell that no rank needs, as the segments hold it."""
        tensor = self._layout.tensors[cell.tensor]
        blocks = blocks_of(_box(cell), BLOCK_BYTES // DTYPE_BYTES[tensor.dtype])
        staged = ((self._staged(cell.tensor, block, memories), block) for block in blocks)
        return sum(_digest(data, tensor, block) for data, block in staged) & _MASK

    def _digest_parameter(self, cell: Cell, memories: _Memories) -> int:
        """The digest of a cell as its parameter holds it."""
        copy, tensor = self._needs.copies[cell.copy], self._layout.tensors[cell.tensor]
        window = self._written(copy, _box(cell), memories)
        if window.flags.c_contiguous:
            return _digest(_bytes(window), tensor, _box(cell))
        total = 0
        for block in blocks_of(_box(cell), BLOCK_BYTES // window.itemsize):
            gathered = np.ascontiguousarray(self._written(copy, block, memories))
            total += _digest(_bytes(gathered), tensor, block)
        return total & _MASK

    def _staged(self, tensor: int, box: Box, memories: _Memories) -> Bytes:
        """A private copy of a box of a tensor, out of all shards that hold a part of it."""
        item_bytes = DTYPE_BYTES[self._layout.tensors[tensor].dtype]
        staged = np.empty(box.sizes, dtype=f"u{item_bytes}")
        for shard, common in self._shards.meeting(tensor, box):
            strides = [math.prod(shard.sizes[dim + 1 :]) for dim in range(len(shard.sizes))]
            offset, strides = _in_bytes(_offset(common, _box(shard), strides), strides, item_bytes)
            segment = memories.segment(shard.segment)
            source = segment.window(shard.offset_bytes + offset, common.sizes, strides, item_bytes)
            spans = zip(common.starts, common.ends, box.starts, strict=True)
            staged[tuple(slice(start - base, end - base) for start, end, base in spans)] = source
        return _bytes(staged)

    def _written(self, copy: Copy, box: Box, memories: _Memories) -> Window:
        """The window of a parameter that holds a box of a copy."""
        item_bytes = DTYPE_BYTES[self._needs.parameters[copy.parameter].dtype]
        first = copy.offset + _offset(box, _box(copy), copy.strides)
        offset, strides = _in_bytes(first, copy.strides, item_bytes)
        return memories.parameter(copy.parameter).window(offset, box.sizes, strides, item_bytes)


class _Memory:
    """Raw memory from an address on. Whoever bound the plan keeps it mapped."""

    def __init__(self, address: int, size_bytes: int) -> None:
        self._bytes = memoryview((ctypes.c_char * size_bytes).from_address(address)).cast("B")

    def window(
        self, offset: int, sizes: Sequence[int], strides: Sequence[int], item_bytes: int
    ) -> Window:
        """A writable view; offset and strides are bytes. ValueError if it leaves the memory."""
        return np.ndarray(sizes, f"u{item_bytes}", self._bytes, offset, strides)


class _Memories:
    """The segments and parameters of a bound plan; those that are not used cost nothing."""

    def __init__(self, bound: BoundTiles) -> None:
        self._bound = bound
        self._segments: dict[int, _Memory] = {}
        self._parameters: dict[int, _Memory] = {}

    def segment(self, number: int) -> _Memory:
        found = self._segments.get(number)
        if found is None:
            address = int(self._bound.segment_addresses[number])
            found = _Memory(address, int(self._bound.segment_sizes[number]))
            self._segments[number] = found
        return found

    def parameter(self, number: int) -> _Memory:
        found = self._parameters.get(number)
        if found is None:
            address = int(self._bound.parameter_addresses[number])
            found = _Memory(address, int(self._bound.parameter_sizes[number]))
            self._parameters[number] = found
        return found


def _windows(pieces: Pieces, number: int, memories: _Memories) -> tuple[Window, Window]:
    """Where a piece is read, and where it is written."""
    shape, unit = pieces.sizes[number, ::-1].tolist(), int(pieces.unit_bytes[number])
    segment = memories.segment(int(pieces.segment[number]))
    strides = pieces.source_strides[number, ::-1].tolist()
    source = segment.window(int(pieces.source[number]), shape, strides, unit)
    parameter = memories.parameter(int(pieces.parameter[number]))
    strides = pieces.destination_strides[number, ::-1].tolist()
    target = parameter.window(int(pieces.destination[number]), shape, strides, unit)
    return source, target


def _joined(
    sources: Integers, destinations: Integers, sizes: Integers
) -> Iterator[tuple[int, int, int]]:
    """Runs of bytes; those that run on from the one before on both sides are one."""
    fresh = np.ones(sizes.size, dtype=np.bool_)
    fresh[1:] = sources[:-1] + sizes[:-1] != sources[1:]
    fresh[1:] |= destinations[:-1] + sizes[:-1] != destinations[1:]
    first = np.flatnonzero(fresh)
    joined = np.add.reduceat(sizes, first) if first.size else sizes
    return zip(sources[first].tolist(), destinations[first].tolist(), joined.tolist(), strict=True)


def _box(thing: Cell | Copy | ShardSpec) -> Box:
    return Box.of(thing.starts, thing.sizes)


def _offset(box: Box, within: Box, strides: Sequence[int]) -> int:
    """Elements from the first of `within` to the first of `box`."""
    steps = zip(box.starts, within.starts, strides, strict=True)
    return sum((start - base) * stride for start, base, stride in steps)


def _in_bytes(offset: int, strides: Sequence[int], item_bytes: int) -> tuple[int, list[int]]:
    return offset * item_bytes, [stride * item_bytes for stride in strides]


def _bytes(contiguous: Window) -> Bytes:
    return contiguous.reshape(-1).view(np.uint8)


def _digest(data: Bytes, tensor: TensorSpec, box: Box) -> int:
    return digest_box(data, tensor.shape, DTYPE_BYTES[tensor.dtype], box.starts, box.sizes)
