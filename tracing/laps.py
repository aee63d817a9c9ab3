"""The attempts of one engine, and how it ran through the stages that move bytes. Does no I/O.

Stages that stream overlap, bucket by bucket; a lap says when a stage first and last had something
to do, and how long it was busy in between.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Final

from msgspec import Struct

from weightbus.schemas.base import Stage
from weightbus.tracing.waterfall import BucketRow, StageRow

__all__ = ("MOVING", "Lap", "attempts_of", "busy_s", "end_s", "laps_of")

MOVING: Final[tuple[Stage, ...]] = ("fetch", "h2d", "broadcast", "reload")
"""In the order in which bytes go through them."""

PlacedRow = tuple[int, StageRow]
"""A row, and its place among those of its engine."""


class Lap(Struct, frozen=True, kw_only=True):
    """One moving stage of one rank, or of all: the rows of its lanes taken together."""

    stage: Stage
    rank: int | None
    places: tuple[int, ...]
    """Of its rows."""
    start_s: float
    """Of its first bucket; of a stage whose buckets are not told, when that before it had ended."""
    end_s: float
    first_end_s: float
    """Of its first bucket; of a stage whose buckets are not told, its end."""
    streams: bool
    """Its buckets are told."""
    busy_s: float
    """How long at least one of its buckets was under way."""


def laps_of(rows: Sequence[PlacedRow]) -> list[Lap]:
    """In the order of the stages, those of the rank that was last; of stages that it does not have,
    those of all ranks. `rows` are moving stages of one attempt of one engine."""
    if not rows:
        return []
    _, slowest = max(rows, key=lambda placed: (end_s(placed[1]), -(placed[1].rank or 0)))
    laps: list[Lap] = []
    for stage in MOVING:
        of_stage = [placed for placed in rows if placed[1].stage == stage]
        own = [placed for placed in of_stage if placed[1].rank == slowest.rank]
        if of_stage:
            laps.append(_lap(stage, own or of_stage, laps[-1] if laps else None))
    return laps


def attempts_of(rows: Iterable[StageRow]) -> list[list[StageRow]]:
    """The rows of every attempt of one engine, which come in the order of their starts: those of
    one update; where nobody traced, from one negotiation to the next."""
    rows = list(rows)
    stages = {row.span_id for row in rows}
    attempts: dict[tuple[str, int], list[StageRow]] = {}
    place = ("", 0)
    for row in rows:
        if not row.parent_span_id:
            place = ("", place[1] + (row.stage == "negotiate"))
        elif row.parent_span_id not in stages:
            place = (row.parent_span_id, 0)
        attempts.setdefault(place, []).append(row)
    return list(attempts.values())


def end_s(row: StageRow | BucketRow) -> float:
    """When it ended."""
    return row.start_s + row.duration_s


def busy_s(row: StageRow) -> float:
    """How long at least one of its buckets was under way; its duration, if they are not told."""
    return _covered_s(row.buckets) if row.buckets else row.duration_s


def _lap(stage: Stage, rows: Sequence[PlacedRow], before: Lap | None) -> Lap:
    first_s = min(row.start_s for _, row in rows)
    last_s = max(end_s(row) for _, row in rows)
    buckets = [bucket for _, row in rows for bucket in row.buckets]
    if buckets:
        first_s = min(bucket.start_s for bucket in buckets)
    elif before is not None:
        first_s = max(first_s, min(before.end_s, last_s))
    ranks = {row.rank for _, row in rows}
    return Lap(
        stage=stage,
        rank=ranks.pop() if len(ranks) == 1 else None,
        places=tuple(place for place, _ in rows),
        start_s=first_s,
        end_s=last_s,
        first_end_s=min(map(end_s, buckets), default=last_s),
        streams=bool(buckets),
        busy_s=_covered_s(buckets) if buckets else last_s - first_s,
    )


def _covered_s(buckets: Iterable[BucketRow]) -> float:
    total_s = until_s = 0.0
    for bucket in sorted(buckets, key=lambda bucket: bucket.start_s):
        total_s += max(0.0, end_s(bucket) - max(until_s, bucket.start_s))
        until_s = max(until_s, end_s(bucket))
    return total_s
