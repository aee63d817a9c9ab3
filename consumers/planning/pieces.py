"""What moves, as strided blocks: the boxes that copies and shards have in common. Does no I/O.

A piece is the box that one copy takes of one shard, with a byte stride per dimension on both sides.
Dimensions that run on into each other on both sides are merged, so that a slice of rows is one run
of bytes whatever its shape was. What is digested while it is moved has a third side: where its
bytes lie in their tensor.

Invariant: the pieces of a copy hold every element of it once.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields, replace
from typing import TypeVar

import numpy as np
import numpy.typing as npt

from weightbus.consumers.errors import PlanError
from weightbus.consumers.planning.destinations import Writes
from weightbus.consumers.planning.tables import CopyTable, Integers, LayoutTable, ShardTable

__all__ = (
    "MAX_UNIT_BYTES",
    "IndexedPieces",
    "Pieces",
    "chosen_pieces",
    "cut_indexed_pieces",
    "cut_pieces",
    "narrowed_pieces",
)

MAX_UNIT_BYTES = 8
"""Widest unit that bytes are moved in: the lanes of the GPU's gather kernel (lab/RESULTS.md)."""

_WORD_BYTES = 4
"""Of a digest (bus/digest.py)."""

_PAIRS_AT_ONCE = 1 << 20
"""Pairs of a copy and a shard that are looked at in one go; bounds the memory of planning."""


@dataclass(frozen=True, eq=False)
class Pieces:
    """P strided blocks of D dimensions, the innermost first; unused ones have extent 1, stride 0.

    A piece is read at `source + sum(i[d] * source_strides[d])` of its segment, a unit of
    `unit_bytes` at a time, and written alike, `destination_unit_bytes` at a time. Where nothing is
    transformed the units are the widest that all offsets and strides are multiples of, up to
    `MAX_UNIT_BYTES`; elsewhere they are elements.
    """

    copy: Integers
    """Index into `Needs.copies`."""
    transform: Integers
    """Index into `Needs.transforms`; -1: none."""
    segment: Integers
    source: Integers
    """Byte of the segment where the piece begins."""
    parameter: Integers
    destination: Integers
    """Byte of the parameter's memory that its first unit goes to."""
    unit_bytes: Integers
    destination_unit_bytes: Integers
    sizes: Integers
    """[P, D]: in units."""
    source_strides: Integers
    """[P, D]: in bytes."""
    destination_strides: Integers
    """[P, D]: in bytes; may be negative."""

    def __len__(self) -> int:
        return int(self.copy.size)


@dataclass(frozen=True, eq=False)
class IndexedPieces(Pieces):
    """Pieces that know their place in their tensors, to be digested while they are moved.

    In a piece of a cell, a unit of 4 bytes or more holds whole words of the tensor's digest, and a
    narrower one lies in a single word.
    """

    cell: Integers
    """What the piece belongs to, by number; -1: it is not digested, and has no index."""
    index: Integers
    """Byte of the tensor that is the piece's first."""
    index_strides: Integers
    """[P, D]: in bytes."""


SomePieces = TypeVar("SomePieces", bound=Pieces)
Mask = npt.NDArray[np.bool_]


def cut_pieces(table: LayoutTable, copies: CopyTable, shards: ShardTable, writes: Writes) -> Pieces:
    """Cut every copy at the borders of the shards that hold it.

    Raises:
        PlanError: elements of a copy are in no shard; names the tensor.
    """
    parts = [
        _merged(_intersected(table, copies, shards, writes, copy, shard)[0])
        for copy, shard in _pairs(copies, shards)
    ]
    pieces = _joined(parts)
    _check_held(pieces, table, copies, writes)
    return pieces


def cut_indexed_pieces(
    table: LayoutTable, copies: CopyTable, shards: ShardTable, writes: Writes, cells: Integers
) -> IndexedPieces:
    """The same for copies of which none transforms, with every piece's place in its tensor.

    Args:
        cells: for every copy of the needs, what it is digested for; -1: nothing.

    Raises:
        PlanError: elements of a copy are in no shard; names the tensor.
    """
    parts = [
        _merged(_indexed(table, cells, *_intersected(table, copies, shards, writes, copy, shard)))
        for copy, shard in _pairs(copies, shards)
    ]
    pieces = _joined(parts)
    _check_held(pieces, table, copies, writes)
    return pieces


def chosen_pieces(pieces: SomePieces, chosen: slice | Integers | Mask) -> SomePieces:
    """Some of the pieces."""
    kind = type(pieces)
    return kind(**{field.name: getattr(pieces, field.name)[chosen] for field in fields(kind)})


def narrowed_pieces(pieces: SomePieces, unit_bytes: Integers) -> SomePieces:
    """The same blocks in units of at most `unit_bytes` [P], powers of two; none is transformed.

    Parts of units that do not lie side by side become a dimension of their own.
    """
    narrow = np.minimum(pieces.unit_bytes, unit_bytes)
    parts = pieces.unit_bytes // narrow
    sides = _sides(pieces)
    folds = (pieces.sizes[:, 0] == 1) | (parts == 1)
    folds |= np.all([strides[:, 0] == pieces.unit_bytes for strides, _ in sides.values()], axis=0)
    folded, inner = folds[:, None], np.where(parts == 1, 0, narrow)

    def widened(columns: Integers, first: Integers, fill: int) -> Integers:
        kept = np.pad(columns[:, 1:], ((0, 0), (1, 1)), constant_values=fill)
        added = np.pad(columns, ((0, 0), (1, 0)))
        kept[:, 0] = added[:, 0] = first
        chosen: Integers = np.where(folded, kept, added)
        return chosen

    strides_of = {
        name: widened(strides, np.where(parts == 1, strides[:, 0], inner), 0)
        for name, (strides, _) in sides.items()
    }
    sizes = widened(pieces.sizes, np.where(folds, pieces.sizes[:, 0] * parts, parts), 1)
    return replace(
        pieces, unit_bytes=narrow, destination_unit_bytes=narrow, sizes=sizes, **strides_of
    )


def _joined(parts: Sequence[SomePieces]) -> SomePieces:
    kind = type(parts[0])
    names = [field.name for field in fields(kind)]
    return kind(**{name: np.concatenate([getattr(part, name) for part in parts]) for name in names})


def _check_held(pieces: Pieces, table: LayoutTable, copies: CopyTable, writes: Writes) -> None:
    held = np.zeros(len(writes.windows.needs.copies), dtype=np.int64)
    np.add.at(held, pieces.copy, pieces.sizes.prod(axis=1) * pieces.unit_bytes)
    wanted = copies.sizes.prod(axis=1) * table.item_bytes[copies.tensor]
    missing = wanted - held[copies.number]
    if missing.any():
        number = int(np.argmax(missing != 0))
        lacking = f"in no shard for {missing[number]} of {wanted[number]} bytes"
        raise PlanError(writes.windows.name(number), lacking, "shards must hold every element once")


def _pairs(copies: CopyTable, shards: ShardTable) -> Iterator[tuple[Integers, Integers]]:
    """Every copy with every shard of its tensor, as indices, a million or so at a time."""
    first = np.searchsorted(shards.tensor, copies.tensor, side="left")
    counts = np.searchsorted(shards.tensor, copies.tensor, side="right") - first
    ends = np.cumsum(counts)
    begin = 0
    while True:
        done = int(ends[begin - 1]) if begin else 0
        end = max(int(np.searchsorted(ends, done + _PAIRS_AT_ONCE, side="right")), begin + 1)
        some = slice(begin, end)
        copy = np.repeat(np.arange(counts.size)[some], counts[some])
        within = np.arange(copy.size) - np.repeat(ends[some] - counts[some] - done, counts[some])
        yield copy, first[copy] + within
        begin = end
        if begin >= counts.size:
            return


def _intersected(
    table: LayoutTable,
    copies: CopyTable,
    shards: ShardTable,
    writes: Writes,
    copy: Integers,
    shard: Integers,
) -> tuple[Pieces, Integers, Integers]:
    """What copies and shards have in common, pair by pair; the outermost dimension first.

    With the tensor of each, and where it starts in there [P, D].
    """
    lows = np.maximum(copies.starts[copy], shards.starts[shard])
    highs = np.minimum(
        copies.starts[copy] + copies.sizes[copy], shards.starts[shard] + shards.sizes[shard]
    )
    meet = np.all(lows < highs, axis=1)
    lows, highs, copy, shard = lows[meet], highs[meet], copy[meet], shard[meet]
    unit_bytes = table.item_bytes[copies.tensor[copy]]
    destination_unit_bytes = writes.item_bytes[copy]
    source_strides = np.empty_like(lows)
    step = unit_bytes
    for dim in reversed(range(table.dims)):
        source_strides[:, dim] = step
        step = step * shards.sizes[shard, dim]
    first_dim = writes.strides.shape[1] - table.dims
    destination_strides = writes.strides[copy, first_dim:] * destination_unit_bytes[:, None]
    from_source = ((lows - shards.starts[shard]) * source_strides).sum(axis=1)
    from_destination = ((lows - copies.starts[copy]) * destination_strides).sum(axis=1)
    pieces = Pieces(
        copy=copies.number[copy],
        transform=copies.transform[copy],
        segment=shards.segment[shard],
        source=shards.offset_bytes[shard] + from_source,
        parameter=writes.parameter[copy],
        destination=writes.offset[copy] * destination_unit_bytes + from_destination,
        unit_bytes=unit_bytes,
        destination_unit_bytes=destination_unit_bytes,
        sizes=highs - lows,
        source_strides=source_strides,
        destination_strides=destination_strides,
    )
    return pieces, copies.tensor[copy], lows


def _indexed(
    table: LayoutTable, cells: Integers, pieces: Pieces, tensor: Integers, lows: Integers
) -> IndexedPieces:
    """Pieces with their place in their tensors."""
    cell = cells[pieces.copy]
    strides = np.empty_like(lows)
    step = table.item_bytes[tensor]
    for dim in reversed(range(table.dims)):
        strides[:, dim] = step
        step = step * table.shapes[tensor, dim]
    of_pieces = {field.name: getattr(pieces, field.name) for field in fields(Pieces)}
    return IndexedPieces(
        **of_pieces,
        cell=cell,
        index=np.where(cell >= 0, (lows * strides).sum(axis=1), 0),
        # without a cell, strides that never keep dimensions apart
        index_strides=np.where(cell[:, None] >= 0, strides, pieces.source_strides),
    )


def _sides(pieces: Pieces) -> dict[str, tuple[Integers, Integers]]:
    """Strides by the name of their field, each with the units that they step over."""
    sides = {
        "source_strides": (pieces.source_strides, pieces.unit_bytes),
        "destination_strides": (pieces.destination_strides, pieces.destination_unit_bytes),
    }
    if isinstance(pieces, IndexedPieces):
        sides["index_strides"] = (pieces.index_strides, pieces.unit_bytes)
    return sides


def _merged(pieces: SomePieces) -> SomePieces:
    """The same blocks with as few dimensions as can be, innermost first, in the widest units."""
    count, dims = pieces.sizes.shape
    rows = np.arange(count)
    as_is = pieces.transform < 0
    sizes = np.ones((count, dims + 1), dtype=np.int64)
    sizes[:, 0] = np.where(as_is, pieces.unit_bytes, 1)  # a run of bytes, or of elements
    sides = _sides(pieces)
    merged = {name: np.zeros_like(sizes) for name in sides}
    for name, (_, unit_bytes) in sides.items():
        merged[name][:, 0] = np.where(as_is, 1, unit_bytes)
    top = np.zeros(count, dtype=np.int64)  # the dimension that the next one may run on from
    for dim in reversed(range(dims)):
        size = pieces.sizes[:, dim]
        runs_on = np.ones(count, dtype=np.bool_)
        for name, (strides, _) in sides.items():
            runs_on &= strides[:, dim] == sizes[rows, top] * merged[name][rows, top]
        top += (size > 1) & ~runs_on
        where = rows[size > 1], top[size > 1]
        sizes[where] *= size[size > 1]
        fresh = (size > 1) & ~runs_on
        for name, (strides, _) in sides.items():
            merged[name][rows[fresh], top[fresh]] = strides[fresh, dim]
    edges = merged["source_strides"] | merged["destination_strides"]
    edges = np.bitwise_or.reduce(edges[:, 1:], axis=1)
    edges |= sizes[:, 0] | pieces.source | pieces.destination | MAX_UNIT_BYTES
    widest = edges & -edges
    if isinstance(pieces, IndexedPieces):
        words = np.bitwise_or.reduce(merged["index_strides"][:, 1:], axis=1)
        words |= pieces.index | _WORD_BYTES
        words &= -words
        is_bound = (pieces.cell >= 0) & (words < _WORD_BYTES)
        widest = np.where(is_bound, np.minimum(widest, words), widest)
    unit_bytes = np.where(as_is, widest, pieces.unit_bytes)
    destination_unit_bytes = np.where(as_is, unit_bytes, pieces.destination_unit_bytes)
    sizes[:, 0] = np.where(as_is, sizes[:, 0] // unit_bytes, sizes[:, 0])
    for name in sides:
        is_source = name != "destination_strides"
        merged[name][:, 0] = unit_bytes if is_source else destination_unit_bytes
    single = sizes[:, 0] == 1  # a unit is no dimension
    for columns, fill in ((sizes, 1), *((strides, 0) for strides in merged.values())):
        columns[single, :-1] = columns[single, 1:]
        columns[single, -1] = fill
    return replace(
        pieces,
        unit_bytes=unit_bytes,
        destination_unit_bytes=destination_unit_bytes,
        sizes=sizes,
        **merged,
    )
