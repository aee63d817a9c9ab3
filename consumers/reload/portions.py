"""A plan cut into portions: what is fetched and moved in one step. Does no I/O.

Portions follow the order of the segments, so that files are read from front to back, and a deadline
is looked at between them. Invariant: every chosen copy and fill is in exactly one portion, whole.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, fields, replace
from typing import Final

import msgspec
import numpy as np
import numpy.typing as npt

from weightbus.consumers.planning.pieces import Pieces
from weightbus.consumers.planning.tiles import TilePlan
from weightbus.consumers.reload.executor import PORTION_BYTES
from weightbus.consumers.reload.staging import ByteRange
from weightbus.schemas.needs import Needs

__all__ = ("Portion", "cut_portions", "part_of_plan")

Mask = npt.NDArray[np.bool_]
Integers = npt.NDArray[np.int64]

_GAP_BYTES: Final = 64 * 1024
"""Ranges of a file that are closer than this are read as one: it costs less than another call."""


@dataclass(frozen=True, eq=False)
class Portion:
    """One step of an update."""

    plan: TilePlan
    ranges: tuple[ByteRange, ...]
    """What it reads: in order, and apart from each other."""


def part_of_plan(plan: TilePlan, parameters: Iterable[int]) -> TilePlan:
    """All of a plan that is written to some parameters; numbers stay what they were."""
    chosen = np.zeros(len(plan.needs.parameters), dtype=np.bool_)
    chosen[list(parameters)] = True
    fills = tuple(fill for fill in plan.needs.fills if chosen[fill.parameter])
    return _with(
        plan,
        msgspec.structs.replace(plan.needs, fills=fills),
        chosen[plan.pieces.parameter],
        chosen[plan.tiles["parameter"]],
    )


def cut_portions(plan: TilePlan, portion_bytes: int = PORTION_BYTES) -> tuple[Portion, ...]:
    """A plan in the order of its segments, at most about `portion_bytes` of them at a time."""
    portion_of = _portion_of_copies(plan, portion_bytes)
    without_fills = msgspec.structs.replace(plan.needs, fills=())
    portions = []
    for number in range(max(1, int(portion_of.max(initial=0)) + 1)):
        part = _with(
            plan,
            without_fills if number else plan.needs,
            portion_of[plan.pieces.copy] == number,
            portion_of[plan.tiles["copy"]] == number,
        )
        portions.append(Portion(part, _ranges(part.pieces)))
    return tuple(portions)


def _with(plan: TilePlan, needs: Needs, pieces_kept: Mask, tiles_kept: Mask) -> TilePlan:
    pieces = Pieces(
        **{field.name: getattr(plan.pieces, field.name)[pieces_kept] for field in fields(Pieces)}
    )
    written = np.zeros(plan.parameter_ends.size, dtype=np.bool_)
    written[pieces.parameter] = True
    written[[fill.parameter for fill in needs.fills]] = True
    read = np.zeros(plan.segment_ends.size, dtype=np.bool_)
    read[pieces.segment] = True
    units = pieces.sizes.prod(axis=1)
    return replace(
        plan,
        needs=needs,
        tiles=plan.tiles[tiles_kept],
        pieces=pieces,
        segment_ends=np.where(read, plan.segment_ends, 0),
        parameter_ends=np.where(written, plan.parameter_ends, 0),
        source_bytes=int((units * pieces.unit_bytes).sum()),
        destination_bytes=int((units * pieces.destination_unit_bytes).sum()),
    )


def _portion_of_copies(plan: TilePlan, portion_bytes: int) -> Integers:
    """[copies of the needs]: the number of each one's portion; those of no piece are in none."""
    pieces = plan.pieces
    portion_of = np.full(len(plan.needs.copies), -1, dtype=np.int64)
    spans = np.zeros(portion_of.size, dtype=np.int64)
    np.add.at(spans, pieces.copy, _reaches(pieces))
    in_order = pieces.copy[np.lexsort((pieces.source, pieces.segment))]
    copies, first = np.unique(in_order, return_index=True)
    used = number = 0
    for copy in copies[np.argsort(first)].tolist():
        span = int(spans[copy])
        if used and used + span > portion_bytes:
            used, number = 0, number + 1
        used += span
        portion_of[copy] = number
    return portion_of


def _reaches(pieces: Pieces) -> Integers:
    """[P]: bytes of the segment from a piece's first to its last."""
    reaches: Integers = ((pieces.sizes - 1) * pieces.source_strides).sum(axis=1)
    return reaches + pieces.unit_bytes


def _ranges(pieces: Pieces) -> tuple[ByteRange, ...]:
    """The bytes that pieces read, as few ranges."""
    order = np.lexsort((pieces.source, pieces.segment))
    segments = pieces.segment[order].tolist()
    starts = pieces.source[order].tolist()
    ends = (pieces.source + _reaches(pieces))[order].tolist()
    ranges: list[ByteRange] = []
    for segment, start, end in zip(segments, starts, ends, strict=True):
        last = ranges[-1] if ranges else None
        if last and last.segment == segment and start <= last.end + _GAP_BYTES:
            ranges[-1] = last._replace(end=max(last.end, end))
        else:
            ranges.append(ByteRange(segment, start, end))
    return tuple(ranges)
