"""Cuts the pieces of a plan into jobs that threads can do side by side. Pure: does no I/O.

Pieces of small copies are put together, in the order of the copies; those of large copies come by
themselves, in windows. What has been moved ought to be still in a cache when it is digested: a
job's in that of its core, a window's in that of the socket. If nothing is digested, jobs are long.

Invariant: every piece that is moved as it is, is in exactly one small job or one window.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final

import numpy as np
import numpy.typing as npt

from weightbus.consumers.planning.pieces import Pieces
from weightbus.consumers.planning.tables import Integers

__all__ = ("JOB_BYTES", "WINDOW_BYTES", "PieceJobs", "cut_run", "plan_jobs")

JOB_BYTES: Final = 2**20
"""Moved by one thread before it digests, if it digests; copies that are larger are cut."""

WINDOW_BYTES: Final = 32 * 2**20
"""Of large copies that are moved before their cells are digested, unless one is larger."""

_JOBS_PER_THREAD: Final = 4
"""If nothing is digested: few, for a `memcpy` gains by length, yet enough to share them evenly."""


@dataclass(frozen=True, eq=False)
class PieceJobs:
    """The pieces of one plan that are moved as they are, by number."""

    size_bytes: Integers
    """Of every piece of the plan, read."""
    is_run: npt.NDArray[np.bool_]
    """For every piece of the plan: whether its bytes lie side by side on both sides."""
    small: tuple[Integers, ...]
    """Pieces that one thread moves, all of each copy."""
    large: tuple[Integers, ...]
    """Pieces that all threads move, all of each copy."""


def plan_jobs(pieces: Pieces, threads: int, *, is_digested: bool) -> PieceJobs:
    """Put whole copies together, in their order."""
    unit_bytes, inner = pieces.unit_bytes, pieces.sizes[:, 0]
    is_run = (pieces.source_strides[:, 0] == unit_bytes) | (inner == 1)
    is_run &= (pieces.destination_strides[:, 0] == unit_bytes) | (inner == 1)
    is_run &= (pieces.sizes[:, 1:] == 1).all(axis=1)
    size_bytes: Integers = pieces.sizes.prod(axis=1) * unit_bytes
    as_is = np.flatnonzero(pieces.transform < 0)
    as_is = as_is[np.argsort(pieces.copy[as_is], kind="stable")]
    job_bytes, window_bytes = JOB_BYTES, WINDOW_BYTES
    if not is_digested:
        window_bytes = max(1, int(size_bytes.sum()))
        job_bytes = window_bytes if threads == 1 else window_bytes // (threads * _JOBS_PER_THREAD)
        job_bytes = max(job_bytes, JOB_BYTES)
    copies, first = np.unique(pieces.copy[as_is], return_index=True)
    total = np.add.reduceat(size_bytes[as_is], first) if copies.size else first
    is_large = np.repeat(total > job_bytes, np.diff(first, append=as_is.size))
    return PieceJobs(
        size_bytes=size_bytes,
        is_run=is_run,
        small=_grouped(as_is[~is_large], pieces.copy, size_bytes, job_bytes),
        large=_grouped(as_is[is_large], pieces.copy, size_bytes, window_bytes),
    )


def _grouped(
    numbers: Integers, copy: Integers, size_bytes: Integers, group_bytes: int
) -> tuple[Integers, ...]:
    """Pieces, in the order of their copies, in groups of whole copies that begin within the same
    `group_bytes`."""
    if not numbers.size:
        return ()
    copies = copy[numbers]
    begins = np.flatnonzero(np.diff(copies, prepend=-1))
    before = np.cumsum(size_bytes[numbers]) - size_bytes[numbers]
    group = before[begins] // group_bytes
    return tuple(np.split(numbers, begins[np.flatnonzero(np.diff(group)) + 1]))


def cut_run(size_bytes: int, threads: int) -> Iterator[tuple[int, int]]:
    """(begin, end) of the parts of so many bytes that threads move: one for each, if they are
    worth it."""
    step = max(JOB_BYTES, -(-size_bytes // threads))
    for begin in range(0, size_bytes, step):
        yield begin, min(begin + step, size_bytes)
