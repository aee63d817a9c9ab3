"""Boxes of a tensor: what two have in common, what one leaves of another, how to cut one small.

Pure. A box without dimensions is the one element of a scalar; no box here is empty.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

__all__ = ("Box", "blocks_of")


class Box(NamedTuple):
    """Half-open: `starts[d] <= index[d] < ends[d]`."""

    starts: tuple[int, ...]
    ends: tuple[int, ...]

    @classmethod
    def of(cls, starts: Sequence[int], sizes: Sequence[int]) -> Box:
        return cls(tuple(starts), tuple(map(int.__add__, starts, sizes)))

    @property
    def sizes(self) -> tuple[int, ...]:
        return tuple(map(int.__sub__, self.ends, self.starts))

    @property
    def elements(self) -> int:
        return math.prod(self.sizes)

    def intersection(self, other: Box) -> Box | None:
        """The elements that are in both; None: there are none."""
        common = Box(
            tuple(map(max, self.starts, other.starts)), tuple(map(min, self.ends, other.ends))
        )
        return common if all(map(int.__lt__, common.starts, common.ends)) else None

    def without(self, other: Box) -> list[Box]:
        """The elements that are not in `other`, as at most two boxes per dimension."""
        common = self.intersection(other)
        if common is None:
            return [self]
        rest, starts, ends = [], list(self.starts), list(self.ends)
        for dim, (start, end) in enumerate(zip(common.starts, common.ends, strict=True)):
            for low, high in ((starts[dim], start), (end, ends[dim])):
                if low < high:
                    part = Box(tuple(starts), tuple(ends))
                    rest.append(part.replaced(dim, low, high))
            starts[dim], ends[dim] = start, end
        return rest

    def replaced(self, dim: int, start: int, end: int) -> Box:
        """The same box but for one dimension."""
        starts = (*self.starts[:dim], start, *self.starts[dim + 1 :])
        return Box(starts, (*self.ends[:dim], end, *self.ends[dim + 1 :]))


def blocks_of(box: Box, most: int) -> Iterator[Box]:
    """Cut a box, in order of its elements, into boxes of at most `most` (at least 1) elements."""
    if box.elements <= most:
        yield box
        return
    dim = next(d for d, size in enumerate(box.sizes) if size > 1)
    row = math.prod(box.sizes[dim + 1 :])
    step = max(1, most // row)
    for start in range(box.starts[dim], box.ends[dim], step):
        part = box.replaced(dim, start, min(start + step, box.ends[dim]))
        yield from blocks_of(part, most)
