"""A layout cut into buckets that go through staging, each in one part per lane. Does no I/O.

Shards are taken in the order of their segments and offsets, as one stream, and the stream is cut
into parts of nearly the same size, each of which fits a slot. Bytes between shards that lie close
together are read along with them, so that a part is read in few runs.

Invariants: every byte of every shard is in one part, once; a part fits a slot; what lies in a slot
is as far from a multiple of `ALIGNMENT_BYTES` as it is in its segment. The result follows from the
arguments alone: all hosts derive the same.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from weightbus.consumers.errors import PlanError
from weightbus.consumers.planning.cuts import ALIGNMENT_BYTES, count_buckets, cut_bytes
from weightbus.consumers.planning.tables import Integers, column, padded, tabulate_layout
from weightbus.schemas.layout import Layout, SegmentSpec, ShardSpec

__all__ = (
    "BUCKETS_VERSION",
    "MIN_BUCKET_BYTES",
    "RUN",
    "BucketPlan",
    "plan_buckets",
)

BUCKETS_VERSION = 1
"""Grows whenever the same arguments are cut in another way: who differs shares no broadcast."""

MIN_BUCKET_BYTES = 1024
"""Smallest slot that can be planned for: alignment alone may take half of it."""

RUN_GAP_BYTES = 4096
"""Bytes between two shards that are read along, rather than begin another run."""

_RUN_PADDING_BYTES = 2 * (ALIGNMENT_BYTES - 1)
"""Most that the alignment of one run takes, before and after it."""

RUN = np.dtype(
    [
        ("part", "<i8"),  # bucket * lanes + lane
        ("segment", "<i8"),  # of the layout that was cut
        ("source", "<i8"),  # byte of the segment
        ("staged", "<i8"),  # byte of the slot
        ("size_bytes", "<i8"),
    ]
)
"""One contiguous run of bytes: from `source` of its segment to `staged` of its part's slot."""


@dataclass(frozen=True, eq=False)
class BucketPlan:
    """How one layout goes through staging: bucket after bucket, a part of each in every lane."""

    layout: Layout
    """The same tensors, their shards cut so that none crosses a part. Its segment number is the
    number of a part, `bucket * lanes + lane`, and as long as what is used of the slot; offsets are
    bytes of the slot. Shards without elements are left out."""
    buckets: int
    """0: there is nothing to move."""
    lanes: int
    bucket_bytes: int
    """Of one slot of one lane."""
    runs: npt.NDArray[np.void]
    """[R] of `RUN`, in order of their parts, and in each of their staged bytes."""
    run_ends: Integers
    """[parts + 1]: part p has the runs from `run_ends[p]` to `run_ends[p + 1]`."""

    def runs_of(self, part: int) -> npt.NDArray[np.void]:
        """[r] of `RUN`, a view: the runs of one part."""
        return self.runs[int(self.run_ends[part]) : int(self.run_ends[part + 1])]

    def part_bytes(self, part: int) -> int:
        """How much of its slot a part takes; 0: there is nothing in it."""
        return self.layout.segments[part].size_bytes


def plan_buckets(layout: Layout, bucket_bytes: int, lanes: int) -> BucketPlan:
    """Cut a layout into buckets of `lanes` parts of at most `bucket_bytes`.

    Args:
        layout: has been checked by `check_layout`.

    Raises:
        PlanError: the slots are too small, or there is no lane.
    """
    if bucket_bytes < MIN_BUCKET_BYTES:
        raise PlanError("bucket_bytes", bucket_bytes, f"must be at least {MIN_BUCKET_BYTES}")
    if lanes < 1:
        raise PlanError("lanes", lanes, "must be at least 1")
    stream = _tabulate(layout)
    buckets = count_buckets(stream.total, bucket_bytes, lanes)
    parts = buckets * lanes
    fragments = _cut(layout, stream, parts, cut_bytes(bucket_bytes))
    part, source = fragments.part, stream.offset[fragments.shard] + fragments.low
    runs, run = _runs(stream, fragments)
    staged = runs["staged"][run] + source - runs["source"][run]
    sizes = np.zeros(parts, dtype=np.int64)
    np.maximum.at(sizes, part, staged + fragments.high - fragments.low)
    assert sizes.max(initial=0) <= bucket_bytes, "a part fits a slot"
    return BucketPlan(
        layout=Layout(
            tensors=layout.tensors,
            shards=tuple(_shards(layout, stream, fragments, staged)),
            segments=tuple(map(SegmentSpec, sizes.tolist())),
        ),
        buckets=buckets,
        lanes=lanes,
        bucket_bytes=bucket_bytes,
        runs=runs,
        run_ends=np.searchsorted(runs["part"], np.arange(parts + 1)),
    )


@dataclass(frozen=True, eq=False)
class _Stream:
    """The shards that hold an element, in the order of their segments and offsets."""

    number: Integers
    """Index into `Layout.shards`."""
    item_bytes: Integers
    segment: Integers
    offset: Integers
    size: Integers
    """In bytes."""
    run: Integers
    """Number of the run of close shards that each is in."""
    position: Integers
    """Where each begins in the stream; a run takes its bytes and the most that alignment may."""
    total: int


@dataclass(frozen=True, eq=False)
class _Fragments:
    """Bytes `low` to `high` of shard `shard` of the stream, in order; each in one part."""

    shard: Integers
    low: Integers
    high: Integers
    part: Integers


def _tabulate(layout: Layout) -> _Stream:
    table = tabulate_layout(layout)
    item_bytes = table.item_bytes[column(layout.shards, "tensor")]
    size = padded(layout.shards, "sizes", table.dims, 1).prod(axis=1) * item_bytes
    segment, offset = column(layout.shards, "segment"), column(layout.shards, "offset_bytes")
    order = np.lexsort((offset, segment))
    order = order[size[order] > 0]
    segment, offset, size = segment[order], offset[order], size[order]
    fresh = np.ones(order.size, dtype=bool)
    fresh[1:] = segment[1:] != segment[:-1]
    fresh[1:] |= offset[1:] - (offset[:-1] + size[:-1]) >= RUN_GAP_BYTES
    run = np.cumsum(fresh) - 1
    first = np.flatnonzero(fresh)
    last = np.append(first[1:], order.size)[: first.size] - 1
    lengths = offset[last] + size[last] - offset[first] + _RUN_PADDING_BYTES
    begins = np.cumsum(lengths) - lengths
    return _Stream(
        number=order,
        item_bytes=item_bytes[order],
        segment=segment,
        offset=offset,
        size=size,
        run=run,
        position=begins[run] + offset - offset[first][run],
        total=int(lengths.sum()),
    )


def _cut(layout: Layout, stream: _Stream, parts: int, most_bytes: int) -> _Fragments:
    """Cut the stream into parts, each where it would be of the same size, or a little before."""
    count = stream.number.size
    wanted = np.arange(1, parts, dtype=np.int64) * stream.total // max(parts, 1)
    shard = np.searchsorted(stream.position, wanted, side="right") - 1
    low = wanted - stream.position[shard]
    between = low >= stream.size[shard]  # in what is read along, or is padding
    low[between] = 0
    shard[between] += 1
    for cut in np.flatnonzero(low):
        item = int(shard[cut])
        sizes = layout.shards[int(stream.number[item])].sizes
        low[cut] -= low[cut] % _step_bytes(sizes, int(stream.item_bytes[item]), most_bytes)
    key = np.append(stream.position, stream.total)[shard] + low
    inside = low > 0
    shards = np.concatenate([np.arange(count), shard[inside]])
    lows = np.concatenate([np.zeros(count, dtype=np.int64), low[inside]])
    order = np.lexsort((lows, shards))
    shards, lows = shards[order], lows[order]
    once = np.ones(order.size, dtype=bool)
    once[1:] = (shards[1:] != shards[:-1]) | (lows[1:] != lows[:-1])
    shards, lows = shards[once], lows[once]
    highs = stream.size[shards]
    followed = np.flatnonzero(shards[1:] == shards[:-1])
    highs[followed] = lows[followed + 1]
    part = np.searchsorted(key, stream.position[shards] + lows, side="right")
    return _Fragments(shard=shards, low=lows, high=highs, part=part)


def _step_bytes(sizes: Sequence[int], item_bytes: int, most_bytes: int) -> int:
    """A shard is cut at multiples of this: of its largest blocks that are not too long."""
    step = item_bytes * math.prod(sizes)
    for size in sizes:
        if step <= most_bytes:
            return step
        step //= size
    # Within a row: a power of two, so that what follows stays aligned.
    return max(item_bytes, min(ALIGNMENT_BYTES, 1 << (most_bytes.bit_length() - 1)))


def _runs(stream: _Stream, fragments: _Fragments) -> tuple[npt.NDArray[np.void], Integers]:
    """The runs of all parts, and the run of every fragment."""
    part, run = fragments.part, stream.run[fragments.shard]
    source = stream.offset[fragments.shard] + fragments.low
    fresh = np.ones(part.size, dtype=bool)
    fresh[1:] = (part[1:] != part[:-1]) | (run[1:] != run[:-1])
    first = np.flatnonzero(fresh)
    last = np.append(first[1:], part.size)[: first.size] - 1
    runs = np.empty(first.size, dtype=RUN)
    runs["part"], runs["source"] = part[first], source[first]
    runs["segment"] = stream.segment[fragments.shard[first]]
    runs["size_bytes"] = source[last] + fragments.high[last] - fragments.low[last] - source[first]
    before = source[first] % ALIGNMENT_BYTES
    taken = -(-(before + runs["size_bytes"]) // ALIGNMENT_BYTES) * ALIGNMENT_BYTES
    begins = np.cumsum(taken) - taken
    of_part = np.searchsorted(runs["part"], runs["part"])  # the first run of each one's part
    runs["staged"] = begins - begins[of_part] + before
    return runs, np.cumsum(fresh) - 1


def _shards(
    layout: Layout, stream: _Stream, fragments: _Fragments, staged: Integers
) -> Iterator[ShardSpec]:
    whole = fragments.high - fragments.low == stream.size[fragments.shard]
    for number, item, low, high, part, offset, is_whole in zip(
        stream.number[fragments.shard].tolist(),
        stream.item_bytes[fragments.shard].tolist(),
        fragments.low.tolist(),
        fragments.high.tolist(),
        fragments.part.tolist(),
        staged.tolist(),
        whole.tolist(),
        strict=True,
    ):
        shard = layout.shards[number]
        if is_whole:
            yield ShardSpec(shard.tensor, shard.starts, shard.sizes, part, offset)
            continue
        place = offset
        for starts, sizes in _boxes(shard.sizes, low // item, high // item):
            inner = tuple(a + b for a, b in zip(shard.starts, starts, strict=True))
            yield ShardSpec(shard.tensor, inner, sizes, part, place)
            place += math.prod(sizes) * item


def _boxes(
    shape: Sequence[int], low: int, high: int
) -> Iterator[tuple[tuple[int, ...], tuple[int, ...]]]:
    """(starts, sizes) of the boxes that elements `low` to `high` of a C-contiguous array are."""
    if not shape:
        yield (), ()
        return
    if low == high:
        return
    inner = tuple(shape[1:])
    row = math.prod(inner)
    first, last = -(-low // row), high // row  # whole rows
    if first > last:  # within one row
        for starts, sizes in _boxes(inner, low - last * row, high - last * row):
            yield (last, *starts), (1, *sizes)
        return
    if low < first * row:
        for starts, sizes in _boxes(inner, low - (first - 1) * row, row):
            yield (first - 1, *starts), (1, *sizes)
    if first < last:
        yield (first, *(0 for _ in inner)), (last - first, *inner)
    if high > last * row:
        for starts, sizes in _boxes(inner, 0, high - last * row):
            yield (last, *starts), (1, *sizes)
