"""Cuts tensors into regions: boxes that every copy holds whole or not at all. Does no I/O.

Almost every tensor is held whole, or cut along one dimension; those are recognised all at once. A
tensor whose boxes overlap in part, leave gaps, or cut several dimensions is cut in two again and
again, each time at the border that fewest boxes cross, until no border is left inside.

Invariant: the regions of a tensor hold each of its elements once.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from weightbus.consumers.planning.tables import Integers, LayoutTable

__all__ = ("Boxes", "Regions", "cut_regions")

Mask = npt.NDArray[np.bool_]


@dataclass(frozen=True, eq=False)
class Boxes:
    """N boxes of tensors of one layout; none is empty."""

    tensor: Integers
    starts: Integers
    """[N, D]"""
    sizes: Integers
    """[N, D]"""

    def __len__(self) -> int:
        return int(self.tensor.size)

    def __getitem__(self, chosen: Integers) -> Boxes:
        return Boxes(self.tensor[chosen], self.starts[chosen], self.sizes[chosen])

    @classmethod
    def joined(cls, parts: list[Boxes]) -> Boxes:
        return cls(
            np.concatenate([part.tensor for part in parts]),
            np.concatenate([part.starts for part in parts]),
            np.concatenate([part.sizes for part in parts]),
        )


@dataclass(frozen=True, eq=False)
class Regions:
    """Regions, and pairs of one and a box that holds it."""

    boxes: Boxes
    region: Integers
    """[pairs]: index into `boxes`."""
    holder: Integers
    """[pairs]: index of a box that was given."""


def cut_regions(table: LayoutTable, boxes: Boxes) -> Regions:
    """The regions of every tensor that has an element, in order of tensors; pairs ascending."""
    order, begins = _equal_boxes(boxes)
    distinct = boxes[order[begins[:-1]]]
    tiled = _tiled(table, distinct)[distinct.tensor]
    kept = np.flatnonzero(tiled)
    parts = [Regions(distinct[kept], np.arange(kept.size), kept), _unheld(table, distinct)]
    rest = np.flatnonzero(~tiled)
    by_tensor = np.split(rest, np.flatnonzero(np.diff(distinct.tensor[rest])) + 1)
    parts += [_refined(table, distinct, group) for group in by_tensor if group.size]
    cut = Boxes.joined([part.boxes for part in parts])
    firsts = np.cumsum([0, *(len(part.boxes) for part in parts)])
    region = np.concatenate(
        [part.region + first for part, first in zip(parts, firsts, strict=False)]
    )
    of_tensor = np.argsort(cut.tensor, kind="stable")
    place = np.empty_like(of_tensor)
    place[of_tensor] = np.arange(of_tensor.size)
    holder = np.concatenate([part.holder for part in parts])
    counts = np.diff(begins)[holder]
    pairs = np.repeat(place[region], counts)
    rows = order[_ranges(begins[holder], counts)]
    ascending = np.lexsort((rows, pairs))
    return Regions(cut[of_tensor], pairs[ascending], rows[ascending])


def _equal_boxes(boxes: Boxes) -> tuple[Integers, Integers]:
    """An order of boxes by tensor and starts, and where the groups of equal ones begin and end."""
    columns = np.column_stack([boxes.tensor, boxes.starts, boxes.sizes])
    order = np.lexsort(columns.T[::-1])
    changes = np.any(np.diff(columns[order], axis=0), axis=1)
    begins = np.flatnonzero(np.concatenate([[True], changes])) if len(boxes) else order
    return order, np.append(begins, len(boxes))


def _ranges(begins: Integers, counts: Integers) -> Integers:
    """For every count, so many numbers from its begin on, one after the other."""
    firsts = np.cumsum(counts) - counts
    numbers: Integers = np.arange(int(counts.sum())) + np.repeat(begins - firsts, counts)
    return numbers


def _tiled(table: LayoutTable, distinct: Boxes) -> Mask:
    """[T]: whether a tensor's boxes follow each other along one dimension and leave nothing out."""
    tensor = distinct.tensor
    held = np.zeros(len(table.ranks), dtype=np.int64)
    np.add.at(held, tensor, distinct.sizes.prod(axis=1))
    tiled: Mask = held == table.shapes.prod(axis=1)
    if table.dims:
        cut = np.zeros(table.shapes.shape, dtype=np.bool_)
        np.logical_or.at(cut, tensor, distinct.sizes != table.shapes[tensor])
        along = cut.argmax(axis=1)[tensor]
        every = np.arange(tensor.size)
        starts = distinct.starts[every, along]
        ends = starts + distinct.sizes[every, along]
        overlaps = (tensor[1:] == tensor[:-1]) & (starts[1:] < ends[:-1])
        tiled[tensor[1:][overlaps]] = False
    return tiled


def _unheld(table: LayoutTable, distinct: Boxes) -> Regions:
    """Whole tensors of which there is no box."""
    absent = table.shapes.prod(axis=1) > 0
    absent[distinct.tensor] = False
    tensor = np.flatnonzero(absent)
    shapes = table.shapes[tensor]
    nobody = np.empty(0, dtype=np.int64)
    return Regions(Boxes(tensor, np.zeros_like(shapes), shapes), nobody, nobody)


def _refined(table: LayoutTable, distinct: Boxes, group: Integers) -> Regions:
    """Regions of the one tensor that all boxes of `group` are of."""
    tensor = int(distinct.tensor[group[0]])
    starts, sizes = distinct.starts[group], distinct.sizes[group]
    parts = list(_split(table.shapes[tensor], starts, starts + sizes))
    lows, highs = np.array([low for low, _, _ in parts]), np.array([high for _, high, _ in parts])
    boxes = Boxes(np.full(len(parts), tensor), lows, highs - lows)
    region = np.repeat(np.arange(len(parts)), [held.size for _, _, held in parts])
    return Regions(boxes, region, group[np.concatenate([held for _, _, held in parts])])


def _split(
    shape: Integers, starts: Integers, ends: Integers
) -> Iterator[tuple[Integers, Integers, Integers]]:
    """Cut a tensor until no box has a border inside a part: (low, high, holders of the part)."""
    parts = [(np.zeros_like(shape), shape, np.arange(len(starts)))]
    while parts:
        low, high, held = parts.pop()
        border = _best_border(low, high, starts[held], ends[held])
        if border is None:
            yield low, high, held
            continue
        dim, at = border
        middle_high, middle_low = high.copy(), low.copy()
        middle_high[dim] = middle_low[dim] = at
        parts.append((middle_low, high, held[ends[held, dim] > at]))
        parts.append((low, middle_high, held[starts[held, dim] < at]))


def _best_border(
    low: Integers, high: Integers, starts: Integers, ends: Integers
) -> tuple[int, int] | None:
    """(dimension, index) of the border inside that fewest boxes cross; the most central of such."""
    best: tuple[int, int, int, int] | None = None
    for dim in np.flatnonzero((starts > low).any(axis=0) | (ends < high).any(axis=0)).tolist():
        begins, stops = np.sort(starts[:, dim]), np.sort(ends[:, dim])
        borders = np.unique(np.concatenate([begins, stops]))
        borders = borders[(borders > low[dim]) & (borders < high[dim])]
        before = np.searchsorted(begins, borders, side="left")
        crossing = before - np.searchsorted(stops, borders, side="right")
        aside = np.abs(2 * before - len(starts))
        aside[(crossing == 0) & (aside == len(starts))] = -1  # a side that no box reaches into
        choice = np.lexsort((aside, crossing))[0]
        found = (int(crossing[choice]), int(aside[choice]), dim, int(borders[choice]))
        best = found if best is None else min(best, found)
    return best[2:] if best else None
