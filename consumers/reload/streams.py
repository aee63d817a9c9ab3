"""How one rank takes a version that comes by once, bucket by bucket: the plan, and the loop.

Does no I/O but through the lanes. `plan_stream` is done once per size of buckets and number of
lanes; per bucket nothing is left to do but to wait, to move and to digest.

Copies that transform, and all cells, are cut at the borders of the parts that go through the lanes:
each is made or digested from one slot, or read back from the parameter right after it was moved
there. Digests add up over any cut.

Invariants: every copy, cell and fill of the needs is dealt with once; a slot is read only until its
bucket is said to be done with; no byte of an undecided parameter is changed.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import msgspec
import numpy as np

from weightbus.consumers.errors import ProofNeeded
from weightbus.consumers.planning.boxes import Box
from weightbus.consumers.planning.buckets import BucketPlan, plan_buckets
from weightbus.consumers.planning.gathers import part_of_copy
from weightbus.consumers.planning.pieces import chosen_pieces
from weightbus.consumers.planning.tables import Integers
from weightbus.consumers.planning.tiles import BoundTiles, TilePlan, bind_tiles, plan_tiles
from weightbus.consumers.reload.deadline import Deadline
from weightbus.consumers.reload.executor import Executor, Sums, make_executor
from weightbus.consumers.reload.shards import ShardIndex
from weightbus.consumers.reload.threads import Threads
from weightbus.consumers.transfer.lanes import Lanes
from weightbus.consumers.transfer.timing import Timing
from weightbus.schemas.base import BucketTimings
from weightbus.schemas.layout import Layout
from weightbus.schemas.needs import Copy, Needs
from weightbus.schemas.worker import Cell

__all__ = ("StreamPlan", "Streamed", "move_stream", "plan_stream")

Chosen = slice | Integers


@dataclass(frozen=True, eq=False)
class Step:
    """What is done with one bucket."""

    moved: TilePlan
    cells: tuple[int, ...]
    """Numbers of the cut cells that are digested with it."""
    undecided: TilePlan | None
    """What of it goes to undecided parameters."""


@dataclass(frozen=True, eq=False, kw_only=True)
class StreamPlan:
    """How one rank takes a layout from buckets of one size through so many lanes."""

    buckets: BucketPlan
    plan: TilePlan
    """Of all buckets, its pieces in their order; without tiles: executors run pieces, or make tiles
    of their own when a part is prepared."""
    steps: tuple[Step, ...]
    """For every bucket."""
    fills: TilePlan
    """What needs no bucket."""
    executor: Executor
    """For the plan and the cut cells, on the parameters' device; every part is prepared."""
    origins: Integers
    """For every cut cell: the number of the cell that it is a part of."""
    cells: int
    """How many cells there are, uncut."""


@dataclass(frozen=True, eq=False)
class Streamed:
    """What came of one version."""

    digests: Sums
    """Of every cell."""
    source_bytes: int
    buckets: BucketTimings = ()
    """From when each was there until it was done with; empty on a GPU, where nothing is timed but
    the whole."""


def plan_stream(
    layout: Layout,
    needs: Needs,
    cells: Sequence[Cell],
    undecided: frozenset[int],
    buckets: tuple[int, int],
    threads: Threads | None = None,
    device: str = "cpu",
) -> StreamPlan:
    """Plan how a rank takes what it needs.

    Args:
        cells: have been checked by `check_cells`.
        undecided: parameters whose bytes must stay what they are.
        buckets: bytes of one slot, and lanes.
        threads: the executor's; None: the caller's own.
        device: the parameters'.

    Raises:
        PlanError: see `plan_buckets` and `plan_tiles`; or nothing writes to the device.
        CudaFailed: the device cannot be used.
    """
    staged = plan_buckets(layout, *buckets)
    cut = _cut_at_parts(staged, needs, cells)
    whole = plan_tiles(staged.layout, cut.needs)
    order = np.lexsort((whole.pieces.source, whole.pieces.segment))
    unfilled = msgspec.structs.replace(cut.needs, fills=())
    plan = replace(whole, tiles=whole.tiles[:0], pieces=chosen_pieces(whole.pieces, order))
    bucket_of = plan.pieces.segment // staged.lanes
    ends = np.searchsorted(bucket_of, np.arange(staged.buckets + 1)).tolist()
    is_undecided = np.isin(plan.pieces.parameter, list(undecided))
    digested: list[list[int]] = [[] for _ in range(staged.buckets)]
    for number, bucket in enumerate(cut.buckets):
        digested[bucket].append(number)
    steps = []
    for bucket, numbers in enumerate(digested):
        pieces = slice(ends[bucket], ends[bucket + 1])
        watched = np.flatnonzero(is_undecided[pieces]) + pieces.start
        steps.append(
            Step(
                moved=_part(plan, unfilled, pieces),
                cells=tuple(numbers),
                undecided=_part(plan, unfilled, watched) if watched.size else None,
            )
        )
    fills = _part(plan, cut.needs, slice(0, 0))
    executor = make_executor(device, staged.layout, cut.needs, cut.cells, threads)
    for part in (fills, *(part for step in steps for part in (step.moved, step.undecided))):
        if part is not None:
            executor.prepare(part)
    return StreamPlan(
        buckets=staged,
        plan=plan,
        steps=tuple(steps),
        fills=fills,
        executor=executor,
        origins=np.array(cut.origins, dtype=np.int64),
        cells=len(cells),
    )


def move_stream(
    plan: StreamPlan,
    memory: tuple[Sequence[int], Sequence[int]],
    lanes: Lanes,
    deadline: Deadline,
    begin: Callable[[], None],
) -> Streamed:
    """Write one version into the parameters, as it comes by.

    Args:
        memory: address and size in bytes of every parameter.
        begin: called before the first byte is written.

    Raises:
        ProofNeeded: an undecided parameter changes; its bytes are still as they were.
        SegmentUnavailable: an owner of a lane has given up, or is gone.
        DeadlineExceeded
    """
    width = plan.buckets.lanes
    segments = plan.buckets.layout.segments
    bound = bind_tiles(
        plan.plan,
        [lanes.address(part // width, part % width) for part in range(len(segments))],
        [segment.size_bytes for segment in segments],
        *memory,
    )
    digests = np.zeros(plan.cells, dtype=np.uint64)
    timing = Timing() if plan.executor.device.type == "cpu" else None
    source_bytes = start_ns = 0
    for bucket, step in enumerate(plan.steps):
        lanes.wait_filled(bucket)
        deadline.check()
        if timing is not None:
            start_ns = time.time_ns()
        if step.undecided is not None:
            _check_unchanged(plan, replace(bound, plan=step.undecided))
        if not bucket:
            begin()
        here = replace(bound, plan=step.moved)
        sums = plan.executor.update(here, step.cells)
        lanes.done(bucket)
        np.add.at(digests, plan.origins[list(step.cells)], sums)
        source_bytes += here.plan.source_bytes
        if timing is not None:
            timing.add(start_ns, here.plan.source_bytes)
    if not plan.steps:
        begin()
    plan.executor.move(replace(bound, plan=plan.fills))
    return Streamed(digests, source_bytes, timing.buckets if timing is not None else ())


def _check_unchanged(plan: StreamPlan, bound: BoundTiles) -> None:
    changed = plan.executor.changed_parameter(bound)
    if changed is not None:
        name = plan.plan.needs.parameters[changed].name
        raise ProofNeeded(f"parameter {name}", "its bytes have proven nothing so far, and change")


@dataclass(frozen=True)
class _Cut:
    """Needs and cells, cut where parts end."""

    needs: Needs
    cells: list[Cell]
    origins: list[int]
    buckets: list[int]
    """Of every cut cell: the bucket that brings it."""


def _cut_at_parts(staged: BucketPlan, needs: Needs, cells: Sequence[Cell]) -> _Cut:
    """Cut copies that transform, and all cells, so that each is in one part; keep the others."""
    transforms = [copy.transform >= 0 for copy in needs.copies]
    tensors = {copy.tensor for copy in needs.copies if copy.transform >= 0}
    shards = ShardIndex(staged.layout, tensors | {cell.tensor for cell in cells})
    copies: list[Copy] = []
    kept = [-1] * len(needs.copies)
    cells_of: dict[int, list[int]] = {}
    cut = _Cut(needs, [], [], [])

    def add(origin: int, box: Box, copy: int, bucket: int) -> None:
        cut.cells.append(Cell(cells[origin].tensor, box.starts, box.sizes, copy))
        cut.origins.append(origin)
        cut.buckets.append(bucket)

    for number, copy in enumerate(needs.copies):
        if not transforms[number]:
            kept[number] = len(copies)
            copies.append(copy)
    for number, cell in enumerate(cells):
        if cell.copy >= 0 and transforms[cell.copy]:
            cells_of.setdefault(cell.copy, []).append(number)
            continue
        kept_copy = kept[cell.copy] if cell.copy >= 0 else -1
        for shard, common in shards.meeting(cell.tensor, Box.of(cell.starts, cell.sizes)):
            add(number, common, kept_copy, shard.segment // staged.lanes)
    for number, copy in enumerate(needs.copies):
        if not transforms[number]:
            continue
        boxes = [
            (origin, Box.of(cells[origin].starts, cells[origin].sizes))
            for origin in cells_of.get(number, ())
        ]
        for origin, box in boxes or [(-1, Box.of(copy.starts, copy.sizes))]:
            for shard, common in shards.meeting(copy.tensor, box):
                if origin >= 0:
                    add(origin, common, len(copies), shard.segment // staged.lanes)
                copies.append(part_of_copy(copy, common))
    return replace(cut, needs=msgspec.structs.replace(needs, copies=tuple(copies)))


def _part(plan: TilePlan, needs: Needs, chosen: Chosen) -> TilePlan:
    """Some of the pieces of a plan."""
    pieces = chosen_pieces(plan.pieces, chosen)
    units = pieces.sizes.prod(axis=1)
    return replace(
        plan,
        needs=needs,
        pieces=pieces,
        source_bytes=int((units * pieces.unit_bytes).sum()),
        destination_bytes=int((units * pieces.destination_unit_bytes).sum()),
    )
