"""What moves, as strided blocks: the boxes that copies and shards have in common. Does no I/O.

A piece is the box that one copy takes of one shard, with a byte stride per dimension on both sides.
Dimensions that run on into each other on both sides are merged, so that a slice of rows is one run
of bytes whatever its shape was.

Invariant: the pieces of a copy hold every element of it once.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, fields, replace

import numpy as np

from weightbus.consumers.errors import PlanError
from weightbus.consumers.planning.destinations import Writes
from weightbus.consumers.planning.tables import CopyTable, Integers, LayoutTable, ShardTable

__all__ = ("MAX_UNIT_BYTES", "Pieces", "cut_pieces")

MAX_UNIT_BYTES = 8
"""Widest unit that bytes are moved in: the lanes of the GPU's gather kernel (lab/RESULTS.md)."""

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


def cut_pieces(table: LayoutTable, copies: CopyTable, shards: ShardTable, writes: Writes) -> Pieces:
    """Cut every copy at the borders of the shards that hold it.

    Raises:
        PlanError: elements of a copy are in no shard; names the tensor.
    """
    parts = [
        _merged(_intersected(table, copies, shards, writes, copy, shard))
        for copy, shard in _pairs(copies, shards)
    ]
    pieces = Pieces(
        **{
            field.name: np.concatenate([getattr(part, field.name) for part in parts])
            for field in fields(Pieces)
        }
    )
    held = np.zeros(len(writes.windows.needs.copies), dtype=np.int64)
    np.add.at(held, pieces.copy, pieces.sizes.prod(axis=1) * pieces.unit_bytes)
    wanted = copies.sizes.prod(axis=1) * table.item_bytes[copies.tensor]
    missing = wanted - held[copies.number]
    if missing.any():
        number = int(np.argmax(missing != 0))
        lacking = f"in no shard for {missing[number]} of {wanted[number]} bytes"
        raise PlanError(writes.windows.name(number), lacking, "shards must hold every element once")
    return pieces


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
) -> Pieces:
    """What copies and shards have in common, pair by pair; the outermost dimension first."""
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
    return Pieces(
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


def _merged(pieces: Pieces) -> Pieces:
    """The same blocks with as few dimensions as can be, innermost first, in the widest units."""
    count, dims = pieces.sizes.shape
    rows = np.arange(count)
    as_is = pieces.transform < 0
    sizes = np.ones((count, dims + 1), dtype=np.int64)
    sources = np.zeros_like(sizes)
    destinations = np.zeros_like(sizes)
    sizes[:, 0] = np.where(as_is, pieces.unit_bytes, 1)  # a run of bytes, or of elements
    sources[:, 0] = np.where(as_is, 1, pieces.unit_bytes)
    destinations[:, 0] = np.where(as_is, 1, pieces.destination_unit_bytes)
    top = np.zeros(count, dtype=np.int64)  # the dimension that the next one may run on from
    for dim in reversed(range(dims)):
        size, source = pieces.sizes[:, dim], pieces.source_strides[:, dim]
        destination = pieces.destination_strides[:, dim]
        runs_on = source == sizes[rows, top] * sources[rows, top]
        runs_on &= destination == sizes[rows, top] * destinations[rows, top]
        top += (size > 1) & ~runs_on
        where = rows[size > 1], top[size > 1]
        sizes[where] *= size[size > 1]
        fresh = (size > 1) & ~runs_on
        sources[rows[fresh], top[fresh]] = source[fresh]
        destinations[rows[fresh], top[fresh]] = destination[fresh]
    edges = np.bitwise_or.reduce(sources[:, 1:] | destinations[:, 1:], axis=1)
    edges |= sizes[:, 0] | pieces.source | pieces.destination | MAX_UNIT_BYTES
    unit_bytes = np.where(as_is, edges & -edges, pieces.unit_bytes)
    destination_unit_bytes = np.where(as_is, unit_bytes, pieces.destination_unit_bytes)
    sizes[:, 0] = np.where(as_is, sizes[:, 0] // unit_bytes, sizes[:, 0])
    sources[:, 0], destinations[:, 0] = unit_bytes, destination_unit_bytes
    single = sizes[:, 0] == 1  # a unit is no dimension
    for columns, fill in ((sizes, 1), (sources, 0), (destinations, 0)):
        columns[single, :-1] = columns[single, 1:]
        columns[single, -1] = fill
    return replace(
        pieces,
        unit_bytes=unit_bytes,
        destination_unit_bytes=destination_unit_bytes,
        sizes=sizes,
        source_strides=sources,
        destination_strides=destinations,
    )
