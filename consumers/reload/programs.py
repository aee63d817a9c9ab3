"""What plans are compiled to for a GPU: tables on the device, made once for each plan.

Owns the tables: those of a plan are kept as long as the plan, those of some cells for good, since
every version asks for the same ones. What a table needs of a version is only where segments and
parameters begin; how they are aligned decides how wide it reads.

Invariant: a plan has all that a copy takes of a segment, or nothing of it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final
from weakref import WeakKeyDictionary

import numpy as np
import numpy.typing as npt
import torch

from weightbus.consumers.planning.gathers import Block, plan_gathers
from weightbus.consumers.planning.pieces import MAX_UNIT_BYTES, IndexedPieces, chosen_pieces
from weightbus.consumers.planning.tables import Integers
from weightbus.consumers.planning.tiles import BoundTiles, TilePlan
from weightbus.consumers.reload.accelerator import Accelerator
from weightbus.consumers.reload.table import Launch, compile_table
from weightbus.schemas.layout import Layout
from weightbus.schemas.needs import Needs
from weightbus.schemas.worker import Cell

__all__ = ("BLOCK_BYTES", "Batch", "Extents", "Program", "Programs")

BLOCK_BYTES: Final = 4 * 2**20
"""Of device memory that copies which transform are gathered into."""

_BLOCK_ALIGNMENT: Final = 256

_TABLES_KEPT: Final = 2
"""Of one plan, or some cells, for segments and parameters that are aligned in different ways."""

_CHOICES_KEPT: Final = 1 << 14
"""Sets of cells, of which a step of an update has two at most; more are compiled every time."""


@dataclass(frozen=True, eq=False)
class Batch:
    """Blocks that are gathered at once."""

    launches: tuple[Launch, ...]
    blocks: tuple[tuple[int, Block], ...]
    """With the byte of the device's block where each begins."""


@dataclass(frozen=True, eq=False)
class Extents:
    """What is used of some segments or parameters."""

    numbers: Integers
    starts: Integers
    """First byte of each."""
    ends: Integers
    """One past the last."""


@dataclass(frozen=True, eq=False)
class Program:
    """A plan on the device: what the kernel runs, for one alignment of segments and parameters.

    Its bases are the segments, the parameters and the blocks.
    """

    tiles: torch.Tensor
    pieces: torch.Tensor
    plain: tuple[Launch, ...]
    """What goes to parameters as it is."""
    batches: tuple[Batch, ...]
    block_offsets: Integers
    cells: Integers
    """Numbers of the cells that it digests, by the place of their sums."""
    is_whole: npt.NDArray[np.bool_]
    """For every cell of the executor: whether it digests all of it."""
    read: Extents
    """Of segments."""
    written: Extents
    """Of parameters."""


@dataclass(frozen=True, eq=False)
class _Choice:
    """Some cells, by what their pieces use."""

    segments: Integers
    parameters: Integers
    programs: dict[bytes, Program]
    """By what the addresses of these leave, the oldest first."""


class Programs:
    """What one executor runs. Not for several threads.

    Raises (all methods):
        PlanError: there are too many tiles.
        CudaFailed: the device has no room for a table.
    """

    def __init__(
        self, layout: Layout, needs: Needs, cells: Sequence[Cell], accelerator: Accelerator
    ) -> None:
        self._accelerator = accelerator
        self._segments, self._parameters = len(layout.segments), len(needs.parameters)
        self._gathers = plan_gathers(layout, needs, cells, BLOCK_BYTES)
        pieces = self._gathers.pieces
        keys = pieces.copy * self._segments + pieces.segment
        order = np.argsort(keys, kind="stable")
        self._keys: Integers = keys[order]
        """Of every piece: its copy and its segment, ascending."""
        self._pieces = chosen_pieces(pieces, order)
        self._cell_bytes = _cell_bytes(pieces, len(cells))
        self._kept: WeakKeyDictionary[TilePlan, dict[bytes, Program]] = WeakKeyDictionary()
        self._choices: dict[tuple[bool, bytes], _Choice] = {}
        """Of cells that are held, or of no copy, by their numbers."""
        is_direct = (self._pieces.cell >= 0) & (self._pieces.parameter < self._parameters)
        widths = (self._pieces.unit_bytes[is_direct], self._gathers.unheld.unit_bytes)
        self.read_widths: tuple[int, ...] = tuple(np.unique(np.concatenate(widths)).tolist())
        """Bytes of the units that cells are read back in, if everything is aligned."""

    def of(self, bound: BoundTiles) -> Program:
        """A plan where it is bound to."""
        return self._program(bound.plan, *_residues(bound))

    def of_plan(self, plan: TilePlan) -> Program:
        """A plan where everything begins at a multiple of the widest unit, as it should."""
        aligned = np.zeros_like(plan.segment_ends), np.zeros_like(plan.parameter_ends)
        return self._program(plan, *aligned)

    def of_cells(self, numbers: Integers, bound: BoundTiles) -> Program:
        """All that is moved of some cells, whatever the plan holds."""
        return self._of_choice(numbers, bound, is_held=True)

    def of_unheld(self, numbers: Integers, bound: BoundTiles) -> Program:
        """Cells of no copy: what is read of segments where others write."""
        return self._of_choice(numbers, bound, is_held=False)

    def _of_choice(self, numbers: Integers, bound: BoundTiles, *, is_held: bool) -> Program:
        """Some cells where they are bound to; compiled if they have not been yet."""
        everything = self._pieces if is_held else self._gathers.unheld
        choice = self._choices.get((is_held, numbers.tobytes()))
        if choice is None:
            pieces = chosen_pieces(everything, np.isin(everything.cell, numbers))
            used = pieces.parameter[is_held & (pieces.parameter < self._parameters)]
            choice = _Choice(np.unique(pieces.segment), np.unique(used), {})
            if len(self._choices) < _CHOICES_KEPT:
                self._choices[is_held, numbers.tobytes()] = choice
        residues, kept = _residues(bound), choice.programs
        key = np.concatenate([residues[0][choice.segments], residues[1][choice.parameters]])
        if key.tobytes() not in kept:
            while len(kept) >= _TABLES_KEPT:
                del kept[next(iter(kept))]
            pieces = chosen_pieces(everything, np.isin(everything.cell, numbers))
            compiled = self._compiled if is_held else self._compiled_unheld
            kept[key.tobytes()] = compiled(pieces, *residues)
        return kept[key.tobytes()]

    def _compiled_unheld(
        self, pieces: IndexedPieces, segment_residues: Integers, _: Integers
    ) -> Program:
        cells = np.unique(pieces.cell)
        table = compile_table(
            pieces,
            (pieces.segment, pieces.segment),
            np.searchsorted(cells, pieces.cell),
            segment_residues[pieces.segment],
            groups=np.zeros(len(pieces), dtype=np.int64),
        )
        (plain,) = table.groups or ((),)
        none = chosen_pieces(pieces, slice(0, 0))
        return Program(
            tiles=self._accelerator.uploaded(table.tiles),
            pieces=self._accelerator.uploaded(table.pieces),
            plain=plain,
            batches=(),
            block_offsets=np.zeros(0, dtype=np.int64),
            cells=cells,
            is_whole=_mask(cells, self._cell_bytes.size),
            read=_extents(pieces.segment, pieces.source, pieces.source_strides, pieces),
            written=_extents(none.parameter, none.destination, none.destination_strides, none),
        )

    def _program(
        self, plan: TilePlan, segment_residues: Integers, parameter_residues: Integers
    ) -> Program:
        """A plan for addresses that leave such residues; compiled if it has not been yet."""
        kept = self._kept.setdefault(plan, {})
        residues = (
            np.where(plan.segment_ends > 0, segment_residues, 0),
            np.where(plan.parameter_ends > 0, parameter_residues, 0),
        )
        odd = np.concatenate(residues)
        key = np.stack([np.flatnonzero(odd), odd[odd > 0]]).tobytes()
        if key not in kept:
            while len(kept) >= _TABLES_KEPT:
                del kept[next(iter(kept))]
            kept[key] = self._compiled(self._pieces_of(plan), *residues)
        return kept[key]

    def _pieces_of(self, plan: TilePlan) -> IndexedPieces:
        segments = self._segments
        keys = np.unique(plan.pieces.copy * segments + plan.pieces.segment)
        first = np.searchsorted(self._keys, keys, side="left")
        counts = np.searchsorted(self._keys, keys, side="right") - first
        within = np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)
        return chosen_pieces(self._pieces, np.repeat(first, counts) + within)

    def _compiled(
        self, pieces: IndexedPieces, segment_residues: Integers, parameter_residues: Integers
    ) -> Program:
        segments, parameters = self._segments, self._parameters
        is_block = pieces.parameter >= parameters
        numbers, block = np.unique(pieces.parameter[is_block], return_inverse=True)
        blocks = [self._gathers.blocks[number - parameters] for number in numbers.tolist()]
        batches, offsets = _batches(blocks)
        groups, targets = np.zeros(len(pieces), dtype=np.int64), segments + pieces.parameter
        groups[is_block] = 1 + batches[block]
        targets[is_block] = segments + parameters + block
        residues = segment_residues[pieces.segment]
        residues[~is_block] |= parameter_residues[pieces.parameter[~is_block]]
        cells = np.unique(pieces.cell[pieces.cell >= 0])
        slots = np.searchsorted(cells, pieces.cell)
        table = compile_table(pieces, (pieces.segment, targets), slots, residues, groups)
        plain, *launches = table.groups or ((),)
        held = _cell_bytes(pieces, self._cell_bytes.size)[cells]
        direct = chosen_pieces(pieces, ~is_block)
        return Program(
            tiles=self._accelerator.uploaded(table.tiles),
            pieces=self._accelerator.uploaded(table.pieces),
            plain=plain,
            batches=tuple(
                Batch(
                    launches[number],
                    tuple((int(offsets[n]), blocks[n]) for n in np.flatnonzero(batches == number)),
                )
                for number in range(len(launches))
            ),
            block_offsets=offsets,
            cells=cells,
            is_whole=_mask(cells[held == self._cell_bytes[cells]], self._cell_bytes.size),
            read=_extents(pieces.segment, pieces.source, pieces.source_strides, pieces),
            written=_extents(
                direct.parameter, direct.destination, direct.destination_strides, direct
            ),
        )


def _batches(blocks: Sequence[Block]) -> tuple[Integers, Integers]:
    """For every block: which batch it is gathered with, and where it begins in the memory."""
    batches, offsets = np.zeros((2, len(blocks)), dtype=np.int64)
    number = used = 0
    for place, block in enumerate(blocks):
        if used + block.size_bytes > BLOCK_BYTES:
            number, used = number + 1, 0
        batches[place], offsets[place] = number, used
        used += -(-block.size_bytes // _BLOCK_ALIGNMENT) * _BLOCK_ALIGNMENT
    return batches, offsets


def _residues(bound: BoundTiles) -> tuple[Integers, Integers]:
    """What is left of the addresses of segments and parameters, divided by the widest unit."""
    return (
        bound.segment_addresses % MAX_UNIT_BYTES,
        bound.parameter_addresses % MAX_UNIT_BYTES,
    )


def _mask(numbers: Integers, count: int) -> npt.NDArray[np.bool_]:
    """[count]: which of so many are among some numbers."""
    mask = np.zeros(count, dtype=np.bool_)
    mask[numbers] = True
    return mask


def _cell_bytes(pieces: IndexedPieces, count: int) -> Integers:
    """[count]: how many bytes of every cell pieces hold."""
    held = np.zeros(count, dtype=np.int64)
    is_digested = pieces.cell >= 0
    sizes = pieces.sizes.prod(axis=1) * pieces.unit_bytes
    np.add.at(held, pieces.cell[is_digested], sizes[is_digested])
    return held


def _extents(
    numbers: Integers, firsts: Integers, strides: Integers, pieces: IndexedPieces
) -> Extents:
    """What pieces use of segments, or of parameters."""
    reaches = (pieces.sizes - 1) * strides
    lows = firsts + np.minimum(reaches, 0).sum(axis=1)
    highs = firsts + np.maximum(reaches, 0).sum(axis=1) + pieces.unit_bytes
    assert np.all(lows >= 0), "checked when it was planned"
    used, place = np.unique(numbers, return_inverse=True)
    starts, ends = np.full(used.size, np.iinfo(np.int64).max), np.zeros(used.size, dtype=np.int64)
    np.minimum.at(starts, place, lows)
    np.maximum.at(ends, place, highs)
    return Extents(used, starts, ends)
