"""What a kernel that digests has to gather: copies, cut where cells end. Pure: does no I/O.

A tile of it belongs to one cell or to none, so that one sum per tile will do. Copies that transform
are gathered into blocks of memory of the kernel's own, to be transformed from there. Cells of no
copy are only read.

Invariants: the pieces hold every byte that the copies take, once; each is of one cell or of none.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import msgspec
import numpy as np

from weightbus.consumers.planning.boxes import Box, blocks_of
from weightbus.consumers.planning.destinations import tabulate_writes
from weightbus.consumers.planning.pieces import IndexedPieces, cut_indexed_pieces
from weightbus.consumers.planning.tables import (
    LayoutTable,
    tabulate_copies,
    tabulate_layout,
    tabulate_shards,
)
from weightbus.schemas.dtypes import DTYPE_BYTES
from weightbus.schemas.layout import Layout
from weightbus.schemas.needs import Copy, Needs, ParameterSpec
from weightbus.schemas.worker import Cell

__all__ = ("Block", "Gathers", "part_of_copy", "plan_gathers")


@dataclass(frozen=True)
class Block:
    """A part of a copy that transforms: its elements are gathered in the order of the box."""

    copy: int
    """Index into `Needs.copies`."""
    box: Box
    size_bytes: int


@dataclass(frozen=True, eq=False)
class Gathers:
    """What one rank gathers of one layout."""

    pieces: IndexedPieces
    """None transforms. A parameter that the needs do not have is a block, in the order of
    `blocks`."""
    blocks: tuple[Block, ...]
    unheld: IndexedPieces
    """Of cells of no copy: their destinations are their sources, and their parameters segments."""


def plan_gathers(layout: Layout, needs: Needs, cells: Sequence[Cell], block_bytes: int) -> Gathers:
    """Cut the needs of a rank for a kernel.

    Args:
        needs: have been planned by `plan_tiles`.
        cells: have been checked by `check_cells`.
        block_bytes: largest block.

    Raises:
        PlanError: needs do not fit the layout.
    """
    cells_of: dict[int, list[int]] = {}
    for number, cell in enumerate(cells):
        if cell.copy >= 0 and all(cell.sizes):
            cells_of.setdefault(cell.copy, []).append(number)
    copies: list[Copy] = []
    origins: list[int] = []
    owners: list[int] = []  # cells
    blocks: list[Block] = []
    scratch: list[ParameterSpec] = []
    for number, copy in enumerate(needs.copies):
        if not all(copy.sizes):
            continue
        for owner, part in _parts(copy, cells, cells_of.get(number, ())):
            if copy.transform < 0:
                copies.append(part)
                origins.append(number)
                owners.append(owner)
                continue
            dtype = layout.tensors[copy.tensor].dtype
            box = Box.of(part.starts, part.sizes)
            for inner in blocks_of(box, max(1, block_bytes // DTYPE_BYTES[dtype])):
                copies.append(_gathered(copy.tensor, inner, len(needs.parameters) + len(blocks)))
                origins.append(number)
                owners.append(owner)
                blocks.append(Block(number, inner, inner.elements * DTYPE_BYTES[dtype]))
                scratch.append(ParameterSpec("", dtype, (inner.elements,), (1,)))
    table, origin = tabulate_layout(layout), np.array(origins, dtype=np.int64)
    pieces = _cut(table, Needs((*needs.parameters, *scratch), tuple(copies)), owners)
    return Gathers(replace(pieces, copy=origin[pieces.copy]), tuple(blocks), _unheld(table, cells))


def _unheld(table: LayoutTable, cells: Sequence[Cell]) -> IndexedPieces:
    """Pieces of the cells of no copy."""
    numbers = [n for n, cell in enumerate(cells) if cell.copy < 0 and all(cell.sizes)]
    copies = []
    for place, number in enumerate(numbers):
        cell = cells[number]
        box = Box.of(cell.starts, cell.sizes)
        copies.append(_gathered(cell.tensor, box, place))
    parameters = [
        ParameterSpec("", table.layout.tensors[copy.tensor].dtype, copy.sizes, copy.strides)
        for copy in copies
    ]
    pieces = _cut(table, Needs(tuple(parameters), tuple(copies)), numbers)
    return replace(
        pieces,
        parameter=pieces.segment,
        destination=pieces.source,
        destination_strides=pieces.source_strides,
    )


def _cut(table: LayoutTable, needs: Needs, cells: Sequence[int]) -> IndexedPieces:
    copies = tabulate_copies(table, needs.copies)
    return cut_indexed_pieces(
        table,
        copies,
        tabulate_shards(table),
        tabulate_writes(table, needs, copies),
        np.array(cells, dtype=np.int64),
    )


def part_of_copy(copy: Copy, box: Box) -> Copy:
    """What a copy takes of a box that lies in its own."""
    steps = zip(box.starts, copy.starts, copy.strides, strict=True)
    offset = copy.offset + sum((start - first) * stride for start, first, stride in steps)
    return msgspec.structs.replace(copy, starts=box.starts, sizes=box.sizes, offset=offset)


def _parts(copy: Copy, cells: Sequence[Cell], numbers: Sequence[int]) -> Iterator[tuple[int, Copy]]:
    """A copy, cut: the number of each cell and its part; -1 and each part of no cell."""
    whole = Box.of(copy.starts, copy.sizes)
    rest = [whole]
    for number in numbers:
        box = Box.of(cells[number].starts, cells[number].sizes)
        yield number, copy if box == whole else part_of_copy(copy, box)
        rest = [left for one in rest for left in one.without(box)]
    for box in rest:
        yield -1, copy if box == whole else part_of_copy(copy, box)


def _gathered(tensor: int, box: Box, parameter: int) -> Copy:
    """A box of a tensor, gathered into memory of its own."""
    strides = tuple(math.prod(box.sizes[dim + 1 :]) for dim in range(len(box.sizes)))
    return Copy(tensor, box.starts, box.sizes, parameter, 0, strides)
