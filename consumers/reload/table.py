"""The table of tiles that the gather kernel runs: columns of integers, made once. Does no I/O.

A tile is read at `base[segment] + source`, written at `base[parameter] + destination`. What the
tiles of a piece have in common is in the piece's row. Tiles come in classes, by the width of their
units and by whether they are digested, and are one launch each; within a class they are shuffled.

Invariant: every address, stride and word of a tile is a multiple of what its class takes it for.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final, NamedTuple

import numpy as np

from weightbus.consumers.planning.pieces import IndexedPieces, narrowed_pieces
from weightbus.consumers.planning.tables import Integers
from weightbus.consumers.planning.tiles import cut_tiles

__all__ = ("COMPARE", "MOVE", "READ", "TILE_UNITS", "Launch", "TileTable", "compile_table")

MOVE: Final = 0
"""What the kernel does with tiles: moves them, and digests them on the way."""

READ: Final = 1
"""Digests their destinations; nothing is written, and no source is touched."""

COMPARE: Final = 2
"""Instead of digests: one more than the base of a destination that differs from its source, if one
does; nothing is written."""

TILE_UNITS: Final = 1 << 16
"""Most units of a tile: then `unit * (2^32 // cols + 1) >> 32` is the row of any unit, exactly. It
is if `unit * e < 2^32`, where `e <= cols` is how much the factor's product with `cols` is above
2^32 (Granlund, Montgomery: Division by invariant integers using multiplication, 1994); a tile of
two rows or more has `cols <= TILE_UNITS / 2`."""

_WORD_BYTES = 4


class Launch(NamedTuple):
    """Tiles of one class, one behind the other."""

    unit_bytes: int
    is_digested: bool
    first: int
    tiles: int


@dataclass(frozen=True, eq=False)
class TileTable:
    """What the kernel reads, in 8-byte integers."""

    tiles: Integers
    """[N, 5]: piece, source, destination, `rows << 32 | cols`, index. The index is that of the
    first word, where units are whole words, else of the first byte."""
    pieces: Integers
    """[P, 9]: base of the source, base of the destination; strides of rows and columns of the
    source and of the destination, in units; cell; strides of rows and columns of the index."""
    groups: tuple[tuple[Launch, ...], ...]
    """The launches of every group."""


def compile_table(
    pieces: IndexedPieces,
    bases: tuple[Integers, Integers],
    cells: Integers,
    residues: Integers,
    groups: Integers,
) -> TileTable:
    """Cut pieces into tiles, in the widest units that their addresses allow.

    Args:
        bases: [P] each: number of the base of the source, and of the destination.
        cells: [P]: number of the sum; of no meaning where the piece has no cell.
        residues: [P]: what the two bases leave, divided by `MAX_UNIT_BYTES`, or-ed.
        groups: [P]: 0, 1, ...; launched by themselves.

    Raises:
        PlanError: there are too many tiles.
    """
    edges = residues | pieces.unit_bytes
    pieces = narrowed_pieces(pieces, edges & -edges)
    tiles = cut_tiles(pieces, TILE_UNITS)
    piece, units = tiles["piece"], tiles["unit_bytes"]
    digested = tiles["cell"] >= 0
    words = np.where(pieces.unit_bytes >= _WORD_BYTES, _WORD_BYTES, 1)
    group_count = int(groups.max(initial=-1)) + 1
    kind = (groups[piece] * 9 + units) * 2 + digested
    order = np.argsort(kind, kind="stable")
    kinds, firsts, counts = np.unique(kind[order], return_index=True, return_counts=True)
    launches: list[list[Launch]] = [[] for _ in range(group_count)]
    for one, first, count in zip(kinds.tolist(), firsts.tolist(), counts.tolist(), strict=True):
        launch = Launch(one // 2 % 9, bool(one % 2), first, count)
        launches[one // 18].append(launch)
    common = np.zeros((len(pieces), 9), dtype=np.int64)
    common[:, 0], common[:, 1] = bases
    common[piece, 2] = tiles["source_row"] // units
    common[piece, 3] = tiles["source_col"] // units
    common[piece, 4] = tiles["destination_row"] // units
    common[piece, 5] = tiles["destination_col"] // units
    common[:, 6] = np.where(pieces.cell >= 0, cells, 0)
    common[piece, 7] = tiles["index_row"] // words[piece]
    common[piece, 8] = tiles["index_col"] // words[piece]
    columns = (
        piece,
        tiles["source"],
        tiles["destination"],
        tiles["rows"] << 32 | tiles["cols"],
        tiles["index"] // words[piece],
    )
    return TileTable(
        tiles=np.stack(columns, axis=1)[order],
        pieces=common,
        groups=tuple(map(tuple, launches)),
    )
