"""Which bytes are read from which source, in which batches. Does no I/O.

Several sources hold the same bytes. What one receiver wants at a time is cut into shares, one for
each source, equal but for an alignment; which source gets which share turns with the receiver and
from call to call, so that receivers that want the same bytes ask different sources for them.

Invariants: every byte that is wanted is read once, from one source that has it; a batch has at most
`MAX_ENTRIES` reads and `batch_bytes`; the shares of two sources differ by less than one batch.
Bytes that lie between two reads, the same few at both ends, are read along (`GAP_BYTES`): memory
between two reads of one call belongs to the call.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import numpy.typing as npt

from weightbus.consumers.errors import PlanError

__all__ = ("GAP_BYTES", "MIN_SHARE_BYTES", "READ", "Batch", "Reads", "as_reads", "plan_reads")

GAP_BYTES = 64 * 2**10
"""Reading so many bytes more takes about as long as one read more: with mooncake's TCP on 2 cores a
read more in a batch takes 22 to 39 us, at 2.1 to 2.5 GB/s, which is 56 to 81 KB; measured by
`python -m benchmarks.reads`."""

MIN_SHARE_BYTES = 4 * 2**20
"""A smaller share is not worth another source: each costs two more reads, of its generation."""

MAX_ENTRIES = 256
"""Reads in one batch."""

BATCH_BYTES = 16 * 2**20
"""Of one batch: 6 ms at 2.7 GB/s. One read of 64 MiB is slower, 2.4 GB/s."""

ALONE_BYTES = 2**20
"""A read of so much is a batch of its own: the transfer engine says for certain that nothing of it
is under way any more when it fails, which of several reads it does not."""

_CUT_BYTES = 4096
"""Shares are cut at multiples of it, counted from the first byte that is wanted."""

READ = np.dtype(
    [
        ("segment", "<i8"),
        ("source", "<i8"),  # byte of the segment
        ("address", "<i8"),  # where it goes, in this process
        ("size_bytes", "<i8"),
    ]
)
"""One contiguous run of bytes."""

Reads = npt.NDArray[np.void]


@dataclass(frozen=True, eq=False)
class Batch:
    """Reads that are made at once, all from one source."""

    source: int
    reads: Reads
    """[r] of `READ`."""

    @property
    def size_bytes(self) -> int:
        return int(self.reads["size_bytes"].sum())


def plan_reads(
    reads: Reads,
    sources: int,
    turn: int = 0,
    *,
    gap_bytes: int = GAP_BYTES,
    batch_bytes: int = BATCH_BYTES,
) -> tuple[Batch, ...]:
    """Spread `reads` over the sources 0, 1, ...; each of these has every byte of them.

    Args:
        reads: [n] of `READ`, in any order; no two go to the same byte.
        turn: share i is source (i + turn)'s: give each receiver, and each of its calls, another.

    Returns: the batches of every source, in the order in which they are to be read.

    Raises:
        PlanError: there is no source, or two reads go to the same byte.
    """
    if sources < 1:
        raise PlanError("number of sources", sources, "must be at least 1")
    runs = _join(reads[reads["size_bytes"] > 0], gap_bytes)
    if not len(runs):
        return ()
    total = int(runs["size_bytes"].sum())
    shares = max(1, min(sources, total // MIN_SHARE_BYTES))
    cuts = [total * share // shares // _CUT_BYTES * _CUT_BYTES for share in range(1, shares)]
    begins, ends = [0, *cuts], [*cuts, total]
    batches: list[Batch] = []
    for share, (begin, end) in enumerate(zip(begins, ends, strict=True)):
        source = (share + turn) % sources
        for start in range(begin, end, batch_bytes):
            part = _take(runs, start, min(start + batch_bytes, end))
            batches += [Batch(source, some) for some in _split(part)]
    return tuple(batches)


def as_reads(reads: Sequence[tuple[int, int, int, int]]) -> Reads:
    """[n] of `READ` from tuples in the order of its fields."""
    return np.array([tuple(read) for read in reads], dtype=READ)


def _split(part: Reads) -> Iterator[Reads]:
    """At most `MAX_ENTRIES` at a time, and each that is large by itself."""
    large = np.flatnonzero(part["size_bytes"] >= ALONE_BYTES)
    edges = np.unique(np.concatenate(([0, len(part)], large, large + 1))).tolist()
    for begin, end in pairwise(edges):
        for first in range(begin, end, MAX_ENTRIES):
            yield part[first : min(first + MAX_ENTRIES, end)]


def _join(reads: Reads, gap_bytes: int) -> Reads:
    """Runs in the order of their addresses: reads that follow each other closely, at both ends."""
    reads = reads[np.argsort(reads["address"], kind="stable")]
    if len(reads) < 2:
        return reads
    before, after = reads[:-1], reads[1:]
    gaps = after["address"] - (before["address"] + before["size_bytes"])
    if gaps.min() < 0:
        at = int(after["address"][int(gaps.argmin())])
        raise PlanError("address of a read", f"{at:#x}", "must not be another's, too")
    joined = (
        (gaps <= gap_bytes)
        & (before["segment"] == after["segment"])
        & (before["source"] + before["size_bytes"] + gaps == after["source"])
    )
    firsts = np.flatnonzero(np.concatenate(([True], ~joined)))
    lasts = np.append(firsts[1:], len(reads)) - 1
    runs = reads[firsts]
    ends = reads["address"] + reads["size_bytes"]
    runs["size_bytes"] = ends[lasts] - runs["address"]
    return runs


def _take(runs: Reads, begin: int, end: int) -> Reads:
    """Bytes `begin` to `end` of the runs laid end to end."""
    ends = np.cumsum(runs["size_bytes"])
    first = int(np.searchsorted(ends, begin, side="right"))
    last = int(np.searchsorted(ends, end, side="left"))
    part = runs[first : last + 1].copy()
    begins = ends[first : last + 1] - part["size_bytes"]
    skipped = np.maximum(begin - begins, 0)
    part["size_bytes"] = np.minimum(ends[first : last + 1], end) - begins - skipped
    part["source"] += skipped
    part["address"] += skipped
    return part
