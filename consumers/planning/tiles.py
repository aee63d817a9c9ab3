"""From a layout and one rank's needs to a table of tiles, and from there to addresses. Does no I/O.

`plan_tiles` is done once per (layout digest, needs digest), `bind_tiles` once per version, in
milliseconds. A tile is a grid of units with a byte stride per row and column on both sides, so that
one loop (a GPU's kernel, a CPU's copy) runs them all, in any order.

Invariants: the tiles of a plan move every byte that the needs name once; no two write the same one;
none moves more than `TILE_BYTES`; none lies outside its segment or its parameter.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import numpy.typing as npt

from weightbus.consumers.errors import PlanError
from weightbus.consumers.planning.destinations import check_destinations, tabulate_writes
from weightbus.consumers.planning.pieces import IndexedPieces, Pieces, cut_pieces
from weightbus.consumers.planning.tables import (
    Integers,
    tabulate_copies,
    tabulate_layout,
    tabulate_shards,
)
from weightbus.schemas.layout import Layout
from weightbus.schemas.needs import Needs

__all__ = (
    "INDEXED_TILE",
    "MAX_TILES",
    "TILE",
    "TILE_BYTES",
    "BoundTiles",
    "TilePlan",
    "bind_tiles",
    "cut_tiles",
    "plan_tiles",
)

TILE_BYTES = 128 * 1024
"""Most bytes that one tile reads or writes: large enough for the speed of the link, small enough to
share a model evenly among the blocks of a kernel (lab/RESULTS.md)."""

MAX_TILES = 1 << 23
"""Needs cut finer than this (1 TiB in whole tiles) go through the engine's own loader."""

TILE = np.dtype(
    [
        ("segment", "<i8"),
        ("source", "<i8"),  # byte of the segment
        ("parameter", "<i8"),
        ("destination", "<i8"),  # byte of the parameter's memory
        ("rows", "<i8"),
        ("cols", "<i8"),
        ("unit_bytes", "<i8"),  # read at once
        ("destination_unit_bytes", "<i8"),  # written at once; differs where a cast is made
        ("source_row", "<i8"),  # bytes from one row to the next
        ("source_col", "<i8"),
        ("destination_row", "<i8"),
        ("destination_col", "<i8"),
        ("copy", "<i8"),  # index into Needs.copies
        ("transform", "<i8"),  # index into Needs.transforms; -1: none
    ]
)
"""One tile, in 8-byte integers, so that the table is also an [N, 14] array of int64."""

INDEXED_TILE = np.dtype(
    [
        *((name, TILE[name]) for name in TILE.names or ()),
        ("piece", "<i8"),  # by number
        ("cell", "<i8"),  # -1: not digested, and has no index
        ("index", "<i8"),  # byte of the tensor
        ("index_row", "<i8"),
        ("index_col", "<i8"),
    ]
)
"""A tile of an indexed piece."""

_COMMON_COLUMNS = (
    "segment",
    "parameter",
    "unit_bytes",
    "destination_unit_bytes",
    "copy",
    "transform",
)
"""Columns that a tile has from its piece."""

_GATHER_COLS = 256
"""Columns of a tile whose units do not lie side by side: about as many as rows, so that a transpose
touches few cache lines on either side."""


@dataclass(frozen=True, eq=False)
class TilePlan:
    """What one rank moves, relative to segments and parameters; the same for every version."""

    needs: Needs
    tiles: npt.NDArray[np.void]
    """[N] of `TILE`, in shuffled order: see `_shuffled`."""
    pieces: Pieces
    """The same bytes as strided blocks, in the order of the copies."""
    segment_ends: Integers
    """One past the last byte read of every segment; 0: none is."""
    parameter_ends: Integers
    """One past the last byte written of every parameter, fills included."""
    source_bytes: int
    """Bytes read."""
    destination_bytes: int
    """Bytes written by copies; differs where a cast is made."""


@dataclass(frozen=True, eq=False)
class BoundTiles:
    """A plan at the addresses of one version. Valid while segments and parameters stay there.

    A tile's addresses are multiples of its units if all segments and parameters begin at multiples
    of `MAX_UNIT_BYTES`, as mapped memory and allocations do, but views of a flat buffer may not.
    """

    plan: TilePlan
    segment_addresses: Integers
    segment_sizes: tuple[int, ...]
    parameter_addresses: Integers
    parameter_sizes: tuple[int, ...]

    @cached_property
    def sources(self) -> Integers:
        """[N]: address where every tile begins to read."""
        tiles = self.plan.tiles
        begins: Integers = self.segment_addresses[tiles["segment"]] + tiles["source"]
        return begins

    @cached_property
    def destinations(self) -> Integers:
        """[N]: address where every tile begins to write."""
        tiles = self.plan.tiles
        begins: Integers = self.parameter_addresses[tiles["parameter"]] + tiles["destination"]
        return begins

    @cached_property
    def piece_sources(self) -> Integers:
        """[P]: address where every piece begins to read."""
        return self.segment_addresses[self.plan.pieces.segment] + self.plan.pieces.source

    @cached_property
    def piece_destinations(self) -> Integers:
        """[P]: address where every piece begins to write."""
        pieces = self.plan.pieces
        return self.parameter_addresses[pieces.parameter] + pieces.destination


def plan_tiles(layout: Layout, needs: Needs) -> TilePlan:
    """Cut everything that one rank needs into tiles of at most `TILE_BYTES`, in shuffled order.

    Args:
        layout: has been checked by `check_layout`.

    Raises:
        PlanError: needs do not fit the layout, an element would be written twice or outside its
            parameter, or there are more than `MAX_TILES`; names the tensor or parameter at fault.
    """
    table = tabulate_layout(layout)
    copies = tabulate_copies(table, needs.copies)
    writes = tabulate_writes(table, needs, copies)
    parameter_ends = check_destinations(writes, copies)
    pieces = cut_pieces(table, copies, tabulate_shards(table), writes)
    units = pieces.sizes.prod(axis=1)
    return TilePlan(
        needs=needs,
        tiles=cut_tiles(pieces),
        pieces=pieces,
        segment_ends=_segment_ends(layout, needs, pieces),
        parameter_ends=parameter_ends,
        source_bytes=int((units * pieces.unit_bytes).sum()),
        destination_bytes=int((units * pieces.destination_unit_bytes).sum()),
    )


def bind_tiles(
    plan: TilePlan,
    segment_addresses: Sequence[int],
    segment_sizes: Sequence[int],
    parameter_addresses: Sequence[int],
    parameter_sizes: Sequence[int],
) -> BoundTiles:
    """Put a plan at the addresses of one version. Sizes are bytes.

    `parameter_addresses` are of each parameter's first element. Nothing is read or written here: to
    read parameters back, any address will do for a segment, and `plan.segment_ends` for the sizes.

    Raises:
        PlanError: there are not as many segments or parameters as in the plan, or a tile would lie
            outside its own.
    """
    _check_ends(plan.segment_ends, segment_sizes, "segment {}".format)
    names = plan.needs.parameters
    _check_ends(plan.parameter_ends, parameter_sizes, lambda n: f"parameter {names[n].name}")
    return BoundTiles(
        plan=plan,
        segment_addresses=np.array(segment_addresses, dtype=np.int64),
        segment_sizes=tuple(segment_sizes),
        parameter_addresses=np.array(parameter_addresses, dtype=np.int64),
        parameter_sizes=tuple(parameter_sizes),
    )


def _segment_ends(layout: Layout, needs: Needs, pieces: Pieces) -> Integers:
    """One past the last byte read of every segment; none may be outside it."""
    reaches = ((pieces.sizes - 1) * pieces.source_strides).sum(axis=1)
    ends = pieces.source + reaches + pieces.unit_bytes
    sizes = np.array([segment.size_bytes for segment in layout.segments], dtype=np.int64)
    outside = np.flatnonzero(ends > sizes[pieces.segment])
    if outside.size:
        piece = int(outside[0])
        tensor = layout.tensors[needs.copies[int(pieces.copy[piece])].tensor]
        segment = int(pieces.segment[piece])
        found = f"read up to byte {ends[piece]} of segment {segment}"
        raise PlanError(f"tensor {tensor.name}", found, f"the segment has {sizes[segment]} bytes")
    segment_ends = np.zeros(sizes.size, dtype=np.int64)
    np.maximum.at(segment_ends, pieces.segment, ends)
    return segment_ends


def _check_ends(ends: Integers, sizes: Sequence[int], name: Callable[[int], str]) -> None:
    """Check that what is read or written of each thing ends inside it."""
    if len(sizes) != ends.size:
        raise PlanError("plan", f"bound to {len(sizes)} sizes", f"must be bound to {ends.size}")
    outside = np.flatnonzero(ends > np.array(sizes, dtype=np.int64))
    if outside.size:
        number = int(outside[0])
        limit = f"the plan takes bytes up to {ends[number]} of it"
        raise PlanError(name(number), f"{sizes[number]} bytes long", limit)


def cut_tiles(pieces: Pieces, most_units: int = TILE_BYTES) -> npt.NDArray[np.void]:
    """Cut pieces into tiles: chunks of two of their dimensions, every index of the others.

    Returns [N] of `TILE`, or of `INDEXED_TILE` if the pieces are indexed, in shuffled order; none
    has more than `most_units`.

    Raises:
        PlanError: there are more than `MAX_TILES`.
    """
    sizes, sources, destinations, indices = _with_rows(pieces)
    cols, rows = sizes[:, 0], sizes[:, 1]
    room = TILE_BYTES // np.maximum(pieces.unit_bytes, pieces.destination_unit_bytes)
    room = np.minimum(room, most_units)
    adjacent = sources[:, 0] == pieces.unit_bytes
    adjacent &= destinations[:, 0] == pieces.destination_unit_bytes
    cols_at_once = np.minimum(cols, room)
    gathered = np.minimum(cols, np.maximum(_GATHER_COLS, room // rows))
    cols_at_once = np.where(adjacent, cols_at_once, np.minimum(gathered, cols_at_once))
    rows_at_once = np.minimum(rows, np.maximum(1, room // cols_at_once))
    radices = sizes.copy()  # how many tiles lie along each dimension
    radices[:, 0] = -(-cols // cols_at_once)
    radices[:, 1] = -(-rows // rows_at_once)
    counts = radices.prod(axis=1)
    total = int(counts.sum())
    if total > MAX_TILES:
        raise PlanError("needs", f"{total} tiles", f"at most {MAX_TILES}")
    order = _shuffled(pieces, total)
    piece = np.repeat(np.arange(len(pieces)), counts)[order]
    left = order - (np.cumsum(counts) - counts)[piece]  # number of the tile in its piece
    indexed = pieces if isinstance(pieces, IndexedPieces) else None
    tiles = np.empty(total, dtype=INDEXED_TILE if indexed is not None else TILE)
    source, destination = pieces.source[piece], pieces.destination[piece]
    place = indexed.index[piece] if indexed is not None else np.zeros_like(piece)
    for dim in range(sizes.shape[1]):
        index = left % radices[piece, dim]
        left //= radices[piece, dim]
        if dim == 0:
            index *= cols_at_once[piece]
            tiles["cols"] = np.minimum(cols_at_once[piece], cols[piece] - index)
        elif dim == 1:
            index *= rows_at_once[piece]
            tiles["rows"] = np.minimum(rows_at_once[piece], rows[piece] - index)
        source += index * sources[piece, dim]
        destination += index * destinations[piece, dim]
        place += index * indices[piece, dim]
    tiles["source"], tiles["destination"] = source, destination
    tiles["source_col"], tiles["source_row"] = sources[piece, 0], sources[piece, 1]
    tiles["destination_col"] = destinations[piece, 0]
    tiles["destination_row"] = destinations[piece, 1]
    for name in _COMMON_COLUMNS:
        tiles[name] = getattr(pieces, name)[piece]
    if indexed is not None:
        tiles["piece"], tiles["cell"], tiles["index"] = piece, indexed.cell[piece], place
        tiles["index_col"], tiles["index_row"] = indices[piece, 0], indices[piece, 1]
    return tiles


def _shuffled(pieces: Pieces, tiles: int) -> Integers:
    """An order of so many tiles, always the same for the same pieces.

    Neighbouring tiles would meet in one memory channel, and ranks that went the same way in one
    GPU. What a rank reads of where decides its order, so that ranks differ; those that need the
    very same take the same order, and meet in the caches.
    """
    seed = zlib.crc32(pieces.source.tobytes(), zlib.crc32(pieces.segment.tobytes()))
    return np.random.default_rng(seed).permutation(tiles)


def _with_rows(pieces: Pieces) -> tuple[Integers, Integers, Integers, Integers]:
    """Sizes and the three sides' strides with at least two dimensions, the widest but the innermost
    second. Without an index, its strides are the source's."""
    missing = max(0, 2 - pieces.sizes.shape[1])
    edges = ((0, 0), (0, missing))
    tables = (
        np.pad(pieces.sizes, edges, constant_values=1),
        np.pad(pieces.source_strides, edges),
        np.pad(pieces.destination_strides, edges),
        np.pad(getattr(pieces, "index_strides", pieces.source_strides), edges),
    )
    everyone = np.arange(len(pieces))
    widest = 1 + tables[0][:, 1:].argmax(axis=1)
    for table in tables:
        second = table[:, 1].copy()
        table[:, 1] = table[everyone, widest]
        table[everyone, widest] = second
    return tables
