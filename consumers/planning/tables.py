"""Layouts and needs as numpy columns, checked against each other. Does no I/O.

Boxes of every number of dimensions share one table: their dimensions stand on the right, and the
columns before them hold an extent of 1 that starts at 0.

Invariant: in a `CopyTable` every tensor exists and every box lies inside its tensor.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain
from operator import attrgetter

import numpy as np
import numpy.typing as npt
from msgspec import Struct

from weightbus.consumers.errors import PlanError
from weightbus.schemas.dtypes import DTYPE_BYTES
from weightbus.schemas.layout import Layout
from weightbus.schemas.needs import Copy

__all__ = (
    "CopyTable",
    "Integers",
    "LayoutTable",
    "ShardTable",
    "column",
    "lengths_of",
    "padded",
    "tabulate_copies",
    "tabulate_layout",
    "tabulate_shards",
)

Integers = npt.NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class LayoutTable:
    """The tensors of a layout: T of them, with D dimensions at most."""

    layout: Layout
    ranks: Integers
    """[T]: number of dimensions."""
    shapes: Integers
    """[T, D]"""
    item_bytes: Integers
    """[T]: size of one element."""

    @property
    def dims(self) -> int:
        """D: columns of every table of boxes of this layout."""
        return int(self.shapes.shape[1])


@dataclass(frozen=True, eq=False)
class ShardTable:
    """Shards that hold an element, in order of their tensors."""

    tensor: Integers
    starts: Integers
    """[S, D]"""
    sizes: Integers
    """[S, D]"""
    segment: Integers
    offset_bytes: Integers


@dataclass(frozen=True, eq=False)
class CopyTable:
    """Copies that move an element, in the order of `Needs.copies`."""

    number: Integers
    """[C]: index into `Needs.copies`."""
    tensor: Integers
    starts: Integers
    """[C, D]"""
    sizes: Integers
    """[C, D]"""
    transform: Integers


def column(things: Sequence[Struct], name: str) -> Integers:
    """[len(things)]: one integer field of each."""
    return np.fromiter(map(attrgetter(name), things), np.int64, len(things))


def padded(things: Sequence[Struct], name: str, columns: int, fill: int) -> Integers:
    """[len(things), columns]: one tuple of each, aligned on the right, with `fill` before it."""
    rows = list(map(attrgetter(name), things))
    lengths = np.fromiter(map(len, rows), np.int64, len(rows))
    values = np.fromiter(chain.from_iterable(rows), np.int64, int(lengths.sum()))
    table = np.full((len(rows), columns), fill, dtype=np.int64)
    table[np.arange(columns) >= columns - lengths[:, None]] = values
    return table


def lengths_of(things: Sequence[Struct], name: str) -> Integers:
    """[len(things)]: how long one tuple of each is."""
    return np.fromiter(map(len, map(attrgetter(name), things)), np.int64, len(things))


def tabulate_layout(layout: Layout) -> LayoutTable:
    """The tensors of a layout, which has been checked by `check_layout`."""
    ranks = lengths_of(layout.tensors, "shape")
    widths = map(DTYPE_BYTES.__getitem__, map(attrgetter("dtype"), layout.tensors))
    return LayoutTable(
        layout=layout,
        ranks=ranks,
        shapes=padded(layout.tensors, "shape", int(ranks.max(initial=0)), 1),
        item_bytes=np.fromiter(widths, np.int64, len(layout.tensors)),
    )


def tabulate_shards(table: LayoutTable) -> ShardTable:
    """The shards of a layout, which has been checked by `check_layout`."""
    shards = table.layout.shards
    tensor = column(shards, "tensor")
    sizes = padded(shards, "sizes", table.dims, 1)
    order = np.argsort(tensor, kind="stable")
    order = order[np.all(sizes, axis=1)[order]]
    return ShardTable(
        tensor=tensor[order],
        starts=padded(shards, "starts", table.dims, 0)[order],
        sizes=sizes[order],
        segment=column(shards, "segment")[order],
        offset_bytes=column(shards, "offset_bytes")[order],
    )


def tabulate_copies(table: LayoutTable, copies: Sequence[Copy]) -> CopyTable:
    """The copies that move anything.

    Raises:
        PlanError: a copy's box does not lie in a tensor of the layout.
    """
    tensor = column(copies, "tensor")
    unknown = np.flatnonzero(tensor >= len(table.layout.tensors))
    if unknown.size:
        number = int(unknown[0])
        limit = f"the layout has {len(table.layout.tensors)} tensors"
        raise PlanError(f"copy {number}", f"of tensor {copies[number].tensor}", limit)
    ranks = table.ranks[tensor]
    bent = (lengths_of(copies, "starts") != ranks) | (lengths_of(copies, "sizes") != ranks)
    _refuse_boxes(table, copies, bent)
    starts = padded(copies, "starts", table.dims, 0)
    sizes = padded(copies, "sizes", table.dims, 1)
    _refuse_boxes(table, copies, np.any(starts + sizes > table.shapes[tensor], axis=1))
    moving = np.flatnonzero(np.all(sizes, axis=1))
    transform = column(copies, "transform")
    return CopyTable(moving, tensor[moving], starts[moving], sizes[moving], transform[moving])


def _refuse_boxes(
    table: LayoutTable, copies: Sequence[Copy], outside: npt.NDArray[np.bool_]
) -> None:
    numbers = np.flatnonzero(outside)
    if numbers.size:
        copy = copies[int(numbers[0])]
        tensor = table.layout.tensors[copy.tensor]
        box = f"copied from {copy.starts} with sizes {copy.sizes}"
        raise PlanError(f"tensor {tensor.name}", box, f"the box must lie in shape {tensor.shape}")
