"""Do any two boxes of one tensor overlap? Pure.

Boxes are split again and again at planes that no box crosses; a grid falls apart into single boxes
after one split per dimension. What cannot be split (a pinwheel) is compared pair by pair. Every
step is paid from one budget, so that no layout can make the search quadratic.
"""

from __future__ import annotations

from collections.abc import Sequence
from operator import lt

from msgspec import Struct

from weightbus.schemas.errors import MessageInvalid

__all__ = ("Box", "StepBudget", "find_overlap")


class Box(Struct, frozen=True, gc=False):
    """Half-open: `starts[d] <= index[d] < ends[d]`; never empty."""

    starts: tuple[int, ...]
    ends: tuple[int, ...]
    shard: int
    """Number of the shard it came from."""


class StepBudget:
    """Steps that may still be taken, shared by all tensors of one layout."""

    def __init__(self, steps: int) -> None:
        self._total = self._left = steps

    def spend(self, steps: int) -> None:
        """Raises `MessageInvalid` once the budget is used up."""
        self._left -= steps
        if self._left < 0:
            limit = f"the search for overlaps must end within {self._total} steps"
            raise MessageInvalid("layout", "shards", "cut too irregularly", limit)


def find_overlap(boxes: Sequence[Box], budget: StepBudget) -> tuple[Box, Box] | None:
    """Two boxes that share an element, or None. All boxes have the same number of dimensions.

    Raises:
        MessageInvalid: `budget` ran out before the answer was known.
    """
    groups = [list(boxes)]
    while groups:
        group = groups.pop()
        if len(group) < 2:
            continue
        parts = _split(group, budget)
        if len(parts) > 1:
            groups.extend(part for part in parts if len(part) > 1)
            continue
        pair = _first_overlapping_pair(group, budget)
        if pair is not None:
            return pair
    return None


def _split(group: list[Box], budget: StepBudget) -> list[list[Box]]:
    """Parts that cannot overlap each other, cut along the first dimension that allows it."""
    for d in range(len(group[0].starts)):
        budget.spend(len(group))
        group.sort(key=lambda box: box.starts[d])
        parts = [[group[0]]]
        reach = group[0].ends[d]
        for box in group[1:]:
            if box.starts[d] >= reach:
                parts.append([box])
            else:
                parts[-1].append(box)
            reach = max(reach, box.ends[d])
        if len(parts) > 1:
            return parts
    return [group]


def _first_overlapping_pair(group: list[Box], budget: StepBudget) -> tuple[Box, Box] | None:
    for n, one in enumerate(group):
        budget.spend(len(group) - n)
        for other in group[n + 1 :]:
            if all(map(lt, one.starts, other.ends)) and all(map(lt, other.starts, one.ends)):
                return one, other
    return None
