"""Moves bytes into parameters in main memory, and digests what was moved.

Reads and writes raw addresses: those that `bind_tiles` has checked. Owns no memory but one block of
staging while it runs. Instead of single tiles it runs the pieces that they were cut from: a CPU
gains nothing from small ones.

The work is cut by bytes into jobs for the threads of the worker. A job moves some whole copies and
digests their cells while they are in the core's own cache; larger copies are cut, and digested once
they have been moved, a window at a time.

Invariants: a cell's digest is of the very bytes that were written, or that were cast and written:
it is read back from the parameter, or taken of the private copy from which the cast was made.
Nothing is read or written any more once a method has returned or raised.
"""

from __future__ import annotations

import ctypes
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from itertools import chain

import numpy as np
import numpy.typing as npt
import torch

from weightbus.bus.digest import digest_box, digest_tensor
from weightbus.consumers.planning.boxes import Box, blocks_of
from weightbus.consumers.planning.pieces import Pieces
from weightbus.consumers.planning.tables import Integers
from weightbus.consumers.planning.tiles import BoundTiles, TilePlan
from weightbus.consumers.reload.executor import Executor, Sums
from weightbus.consumers.reload.jobs import JOB_BYTES, PieceJobs, cut_run, plan_jobs
from weightbus.consumers.reload.shards import ShardIndex
from weightbus.consumers.reload.threads import Threads
from weightbus.consumers.reload.transforms import filled_bytes, transformed_bytes
from weightbus.schemas.dtypes import DTYPE_BYTES
from weightbus.schemas.layout import Layout, ShardSpec, TensorSpec
from weightbus.schemas.needs import Copy, Needs
from weightbus.schemas.worker import Cell

__all__ = ("BLOCK_BYTES", "CpuExecutor")

BLOCK_BYTES = 4 * 2**20
"""Largest block that is staged or gathered at once, or that one thread digests."""

Bytes = npt.NDArray[np.uint8]
Window = npt.NDArray[np.unsignedinteger]
"""A strided view of raw memory, an unsigned integer per element or unit."""

_MASK = 2**64 - 1


class CpuExecutor(Executor):
    """Runs bound plans on parameters in main memory.

    Args:
        layout: has been checked by `check_layout`.
        needs: the plans'; the numbers of copies and parameters are the same.
        cells: what shall be digested; if a copy that transforms has any, they hold all of its box.
        threads: None: the caller's own.
    """

    device = torch.device("cpu")

    def __init__(
        self,
        layout: Layout,
        needs: Needs,
        cells: Sequence[Cell],
        threads: Threads | None = None,
    ) -> None:
        self._threads = threads or Threads()
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

    def prepare(self, plan: TilePlan) -> None:
        """Nothing: pieces are run as they are."""

    def move(self, bound: BoundTiles) -> int:
        self.update(bound, ())
        return bound.plan.source_bytes

    def update(self, bound: BoundTiles, numbers: Iterable[int]) -> Sums:
        memories = _Memories(bound)
        chosen = list(numbers)
        cells_of: dict[int, list[int]] = {}
        rest = []
        for number in chosen:
            copy = self._cells[number].copy
            if copy < 0:
                rest.append(number)
            elif not self._is_transformed(copy):
                cells_of.setdefault(copy, []).append(number)
        self._move_pieces(bound, memories, cells_of)
        pieces = bound.plan.pieces
        for number in np.unique(pieces.copy[pieces.transform >= 0]).tolist():
            self._transform(number, memories)
        for fill in bound.plan.needs.fills:
            element = filled_bytes(self._needs.parameters[fill.parameter].dtype, fill.value)
            offset, strides = _in_bytes(fill.offset, fill.strides, element.size)
            parameter = memories.parameter(fill.parameter)
            window = parameter.window(offset, fill.sizes, strides, element.size)
            window[...] = element.view(window.dtype)[0]
        rest += chain.from_iterable(cells_of.values())
        self._digest_cells(rest, memories)
        return self._digests[chosen]

    def changed_parameter(self, bound: BoundTiles) -> int | None:
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
        chosen = list(range(len(self._cells)) if numbers is None else numbers)
        plain = [n for n in chosen if not self._is_transformed(self._cells[n].copy)]
        self._digest_cells(plain, _Memories(bound))
        return self._digests[chosen]

    def read_back(self, bound: BoundTiles) -> tuple[Sums, tuple[int, ...]]:
        cells = enumerate(self._cells)
        unreadable = {n for n, cell in cells if cell.copy < 0 or self._is_transformed(cell.copy)}
        readable = [n for n in range(len(self._cells)) if n not in unreadable]
        digests = np.zeros(len(self._cells), dtype=np.uint64)
        digests[readable] = self.digest_cells(bound, readable)
        return digests, tuple(sorted(unreadable))

    def _is_transformed(self, copy: int) -> bool:
        return copy >= 0 and self._needs.copies[copy].transform >= 0

    def _move_pieces(
        self, bound: BoundTiles, memories: _Memories, cells_of: dict[int, list[int]]
    ) -> None:
        """Copy what is moved as it is; digest cells of its copies, and take them out of `cells_of`.

        All cells of a small copy are digested by the thread that moves it.
        """
        pieces = bound.plan.pieces
        jobs = plan_jobs(pieces, self._threads.count, is_digested=bool(cells_of))
        calls: list[Callable[[], None]] = []
        for chosen in jobs.small:
            cells: list[int] = []
            for copy in np.unique(pieces.copy[chosen]).tolist() if cells_of else ():
                if all(self._cell_bytes(cell) <= JOB_BYTES for cell in cells_of.get(copy, ())):
                    cells += cells_of.pop(copy, ())
            calls.append(partial(self._do_job, bound, memories, jobs, chosen, cells))
        self._threads.run(calls)
        for window in jobs.large:
            self._threads.run(list(self._parts_of_window(bound, memories, jobs, window)))
            copies = np.unique(pieces.copy[window]).tolist()
            self._digest_cells([c for n in copies for c in cells_of.pop(n, ())], memories)

    def _do_job(
        self,
        bound: BoundTiles,
        memories: _Memories,
        jobs: PieceJobs,
        chosen: Integers,
        cells: Sequence[int],
    ) -> None:
        """Move some pieces, and digest some cells of theirs."""
        is_run = jobs.is_run[chosen]
        runs = chosen[is_run]
        for source, destination, size_bytes in _joined(
            bound.piece_sources[runs], bound.piece_destinations[runs], jobs.size_bytes[runs]
        ):
            ctypes.memmove(destination, source, size_bytes)
        for number in chosen[~is_run].tolist():
            source_window, target = _windows(bound.plan.pieces, number, memories)
            np.copyto(target, source_window)
        for number in cells:
            cell = self._cells[number]
            self._digests[number] = self._digest_parameter(cell, _box(cell), memories)

    def _parts_of_window(
        self, bound: BoundTiles, memories: _Memories, jobs: PieceJobs, window: Integers
    ) -> Iterator[Callable[[], object]]:
        """Calls that move pieces, large ones by parts."""
        count = self._threads.count
        runs = window[jobs.is_run[window]]
        for source, destination, size_bytes in _joined(
            bound.piece_sources[runs], bound.piece_destinations[runs], jobs.size_bytes[runs]
        ):
            for begin, end in cut_run(size_bytes, count):
                yield partial(ctypes.memmove, destination + begin, source + begin, end - begin)
        for number in window[~jobs.is_run[window]].tolist():
            source_window, target = _windows(bound.plan.pieces, number, memories)
            most = max(JOB_BYTES // target.itemsize, -(-target.size // count))
            for part in blocks_of(Box.of((0,) * target.ndim, target.shape), most):
                chosen = tuple(map(slice, part.starts, part.ends))
                yield partial(np.copyto, target[chosen], source_window[chosen])

    def _cell_bytes(self, number: int) -> int:
        cell = self._cells[number]
        return math.prod(cell.sizes) * DTYPE_BYTES[self._layout.tensors[cell.tensor].dtype]

    def _digest_cells(self, numbers: Sequence[int], memories: _Memories) -> None:
        """Digest cells that no copy transforms; large ones by parts, small ones many at a time."""
        calls: list[Callable[[], list[tuple[int, int]]]] = []
        parts: list[tuple[int, Box]] = []
        used = 0
        for number in numbers:
            cell = self._cells[number]
            item_bytes = DTYPE_BYTES[self._layout.tensors[cell.tensor].dtype]
            box = _box(cell)
            for part in blocks_of(box, BLOCK_BYTES // item_bytes) if box.elements else ():
                parts.append((number, part))
                used += part.elements * item_bytes
                if used >= JOB_BYTES:
                    calls.append(partial(self._digest_parts, parts, memories))
                    parts, used = [], 0
        calls.append(partial(self._digest_parts, parts, memories))
        self._digests[list(numbers)] = 0
        for digests in self._threads.run(calls):
            for number, digest in digests:
                self._digests[number] = int(self._digests[number]) + digest & _MASK

    def _digest_parts(
        self, parts: Sequence[tuple[int, Box]], memories: _Memories
    ) -> list[tuple[int, int]]:
        """The digests of parts of cells, with the numbers of those cells."""
        digests = []
        for number, box in parts:
            cell = self._cells[number]
            if cell.copy >= 0:
                digest = self._digest_parameter(cell, box, memories)
            else:
                staged = self._staged(cell.tensor, box, memories)
                digest = _digest(staged, self._layout.tensors[cell.tensor], box)
            digests.append((number, digest))
        return digests

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

    def _digest_parameter(self, cell: Cell, box: Box, memories: _Memories) -> int:
        """The digest of a part of a cell as its parameter holds it."""
        copy, tensor = self._needs.copies[cell.copy], self._layout.tensors[cell.tensor]
        window = self._written(copy, box, memories)
        if window.flags.c_contiguous:
            return _digest(_bytes(window), tensor, box)
        total = 0
        for block in blocks_of(box, BLOCK_BYTES // window.itemsize):
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
    if box.sizes == tensor.shape:
        return digest_tensor(data)
    return digest_box(data, tensor.shape, DTYPE_BYTES[tensor.dtype], box.starts, box.sizes)
