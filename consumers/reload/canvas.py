"""Who wrote which bytes of a storage last. Does no I/O.

Writes are painted, in order, on an array that holds the number of the last writer of every *unit*:
the longest run of bytes that no window cuts. Memory needed is 4 bytes per unit.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import numpy.typing as npt
from numpy.lib.stride_tricks import as_strided

from weightbus.consumers.reload.memory import ByteWindow

__all__ = ("Canvas",)

Box = tuple[tuple[int, int], ...]
"""(start, extent) of every dimension."""


class Canvas:
    """What a sequence of writes leaves in one storage.

    Args:
        writes: in the order they were made.
        windows: all others that will be asked about.
    """

    def __init__(self, writes: Sequence[ByteWindow], windows: Sequence[ByteWindow]) -> None:
        self._writes = writes
        runs = [run for run in map(_Runs.of, (*writes, *windows)) if run.length]
        self._base = min((run.offset for run in runs), default=0)
        self._unit = math.gcd(*(n for run in runs for n in run.borders(self._base))) or 1
        end = max((run.end for run in runs), default=0)
        self._painted = np.full((end - self._base) // self._unit, -1, dtype=np.int32)
        for number, window in enumerate(writes):
            self._units(window)[...] = number
        painted = self._painted[self._painted >= 0]
        self._held = np.bincount(painted, minlength=len(writes))

    def lacking_bytes(self, window: ByteWindow) -> int:
        """How many bytes of a window nobody wrote."""
        return int(np.count_nonzero(self._units(window) < 0)) * self._unit

    def is_whole(self, number: int) -> bool:
        """Whether nothing of a write was overwritten, not even by itself."""
        return int(self._held[number]) == self._units(self._writes[number]).size

    def is_hidden(self, number: int) -> bool:
        """Whether all of a write was overwritten, or it wrote nothing."""
        return not self._held[number]

    def visible(self, number: int) -> Iterator[ByteWindow]:
        """What is left of a write, in boxes."""
        window = self._writes[number]
        runs = _Runs.of(window)
        steps = (*runs.strides, self._unit)
        for box in _boxes(self._units(window) == number):
            offset = sum(start * step for (start, _), step in zip(box, steps, strict=True))
            *outer, (_, units) = box
            yield ByteWindow(
                offset=runs.offset + offset,
                sizes=(*(extent for _, extent in outer), units * self._unit // window.itemsize),
                strides=(*runs.strides, window.itemsize),
                itemsize=window.itemsize,
            )

    def _units(self, window: ByteWindow) -> npt.NDArray[np.int32]:
        """A window's units; writable. The last dimension is along its runs."""
        runs = _Runs.of(window)
        if not runs.length:
            return self._painted[:0]
        shape = (*runs.sizes, runs.length // self._unit)
        item = self._painted.itemsize
        strides = (*(step // self._unit * item for step in runs.strides), item)
        return as_strided(self._painted[(runs.offset - self._base) // self._unit :], shape, strides)


@dataclass(frozen=True)
class _Runs:
    """A window as runs of contiguous bytes, as long as they can be; length 0: it is empty."""

    offset: int
    length: int
    sizes: tuple[int, ...]
    strides: tuple[int, ...]

    @classmethod
    def of(cls, window: ByteWindow) -> _Runs:
        if 0 in window.sizes:
            return cls(window.offset, 0, (), ())
        dims = [pair for pair in zip(window.sizes, window.strides, strict=True) if pair[0] > 1]
        dims.sort(key=lambda pair: pair[1], reverse=True)
        length = window.itemsize
        while dims and dims[-1][1] == length:
            length *= dims.pop()[0]
        return cls(window.offset, length, tuple(n for n, _ in dims), tuple(s for _, s in dims))

    @property
    def end(self) -> int:
        reach = ((size - 1) * step for size, step in zip(self.sizes, self.strides, strict=True))
        return self.offset + sum(reach) + self.length

    def borders(self, base: int) -> tuple[int, ...]:
        """Numbers that a unit must divide."""
        return (self.offset - base, self.length, *self.strides)


def _boxes(mask: npt.NDArray[np.bool_]) -> Iterator[Box]:
    """Cut the true elements of a mask into boxes: along the first dimension where it changes."""
    if not mask.any():
        return
    if mask.ndim == 0:
        yield ()
        return
    changes = (mask[1:] != mask[:-1]).any(axis=tuple(range(1, mask.ndim)))
    starts = [0, *(np.flatnonzero(changes) + 1).tolist(), len(mask)]
    for start, end in pairwise(starts):
        for box in _boxes(mask[start]):
            yield (start, end - start), *box
