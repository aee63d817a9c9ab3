"""Which rank digests which box, and what the sums of all ranks prove. Does no I/O.

The boxes that copies take of a tensor cut it into *regions*: a copy holds a region whole or not at
all. Every copy reports every region that it holds, as a cell; regions that no copy holds are read
from the source by rank 0. So each element of each tensor is summed once, replicas can be compared,
and the sum over regions is the publisher's digest if every byte came to its place, and otherwise
only by a chance of 1 in 2^64.

Invariants: the regions of a tensor hold each of its elements once; cells of one region are one box.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import numpy.typing as npt

from weightbus.bus.digest import combine, digest_hex
from weightbus.consumers.errors import PlanError
from weightbus.consumers.planning.regions import Boxes, Regions, cut_regions
from weightbus.consumers.planning.tables import (
    Integers,
    LayoutTable,
    tabulate_copies,
    tabulate_layout,
)
from weightbus.schemas.layout import Layout
from weightbus.schemas.needs import Copy, Needs
from weightbus.schemas.worker import Cell

__all__ = ("CellPlan", "Verdict", "plan_cells", "verify_cells")

Sums = npt.NDArray[np.uint64]
Mask = npt.NDArray[np.bool_]


@dataclass(frozen=True, eq=False)
class CellPlan:
    """The cells of every rank of one engine for one layout."""

    cells: tuple[tuple[Cell, ...], ...]
    """By rank, in the order in which the rank reports them: ascending by region."""
    regions: tuple[Integers, ...]
    """By rank, for every cell: the number of its region; equal numbers are replicas."""
    region_tensors: Integers
    """The tensor of every region; ascending."""

    @cached_property
    def region(self) -> Integers:
        """The same for the cells of all ranks, one rank's behind the other's."""
        return np.concatenate(self.regions)

    @cached_property
    def first(self) -> Integers:
        """Of every region, the place of its first cell in there: that of the lowest rank."""
        return np.unique(self.region, return_index=True)[1]


@dataclass(frozen=True)
class Verdict:
    """What the digests of all ranks prove."""

    ok: bool
    """They add up to the publisher's (or it offers none), and all replicas agree."""
    digest: str
    """What they add up to: 16 hexadecimal digits."""
    tensors: tuple[str, ...]
    """Names of the tensors known to be at fault, in layout order."""
    reason: str
    """Why not `ok`; else empty."""


def plan_cells(layout: Layout, needs_of_ranks: Sequence[Needs]) -> CellPlan:
    """Cut every tensor into regions, and tell every rank which of them to digest.

    Args:
        layout: has been checked by `check_layout`.
        needs_of_ranks: of every rank of one engine, in rank order; at least one.

    Raises:
        PlanError: a copy's box does not lie in a tensor of the layout.
    """
    table = tabulate_layout(layout)
    tables = [tabulate_copies(table, needs.copies) for needs in needs_of_ranks]
    copies = np.concatenate([one.number for one in tables])
    ranks = np.repeat(np.arange(len(tables)), [one.number.size for one in tables])
    boxes = Boxes.joined([Boxes(one.tensor, one.starts, one.sizes) for one in tables])
    regions = cut_regions(table, boxes)
    unheld = np.ones(len(regions.boxes), dtype=np.bool_)
    unheld[regions.region] = False
    region = np.concatenate([regions.region, np.flatnonzero(unheld)])
    rank = np.concatenate([ranks[regions.holder], np.zeros(unheld.sum(), dtype=np.int64)])
    copy = np.concatenate([copies[regions.holder], np.full(unheld.sum(), -1)])
    whole = np.concatenate([_same(regions, boxes), np.zeros(unheld.sum(), dtype=np.bool_)])
    cells, numbers = [], []
    for number, needs in enumerate(needs_of_ranks):
        own = np.flatnonzero(rank == number)
        own = own[np.argsort(region[own], kind="stable")]
        numbers.append(region[own])
        cells.append(_cells(table, regions.boxes[region[own]], needs, copy[own], whole[own]))
    return CellPlan(tuple(cells), tuple(numbers), regions.boxes.tensor)


def verify_cells(
    layout: Layout,
    plan: CellPlan,
    cell_digests: Sequence[Sums],
    weights_digest: str | None,
    tensor_digests: Sums | None = None,
) -> Verdict:
    """Compare replicas, add up one of each, and compare the sum with the publisher's.

    Args:
        cell_digests: by rank, in the order of `plan.cells`.
        weights_digest: the publisher's; None: it offers none, and only replicas are compared.
        tensor_digests: the publisher's of every tensor, if they can be had, to name those at fault.

    Raises:
        PlanError: a rank reports another number of cells than it was given, or there are not as
            many ranks, or tensor digests, as there should be.
    """
    _check_counts(layout, plan, cell_digests, tensor_digests)
    region, chosen = plan.region, plan.first
    digests = np.concatenate(cell_digests).astype(np.uint64)
    different = np.flatnonzero(digests != digests[chosen][region])
    sums = np.zeros(len(layout.tensors), dtype=np.uint64)
    np.add.at(sums, plan.region_tensors, digests[chosen])
    digest = digest_hex(combine(sums))
    at_fault = np.zeros(sums.size, dtype=np.bool_)
    reasons = []
    if different.size:
        torn = plan.region_tensors[region[different]]
        at_fault[torn] = True
        reasons.append(_disagreement(layout, plan, int(different[0])))
    if weights_digest is not None and digest != weights_digest:
        reasons.append(f"all ranks add up to {digest}, the publisher's is {weights_digest}")
        if tensor_digests is not None:
            if digest_hex(combine(tensor_digests)) == weights_digest:
                at_fault |= sums != tensor_digests
            else:
                reasons.append("the publisher's digests of tensors do not add up to its own")
    named = tuple(layout.tensors[number].name for number in np.flatnonzero(at_fault).tolist())
    return Verdict(not reasons, digest, named, "; ".join(reasons))


def _same(regions: Regions, boxes: Boxes) -> Mask:
    """For every pair of a region and a box that holds it: whether they are one box."""
    cut, held = regions.boxes[regions.region], boxes[regions.holder]
    same: Mask = ((cut.starts == held.starts) & (cut.sizes == held.sizes)).all(axis=1)
    return same


def _cells(
    table: LayoutTable, boxes: Boxes, needs: Needs, copies: Integers, whole: Mask
) -> tuple[Cell, ...]:
    """The cells of a rank; where a cell is a `whole` copy, it shares the copy's tuples."""
    padding = table.dims - table.ranks[boxes.tensor]
    parts = (
        Cell(
            int(boxes.tensor[at]),
            tuple(boxes.starts[at, padding[at] :].tolist()),
            tuple(boxes.sizes[at, padding[at] :].tolist()),
            int(copies[at]),
        )
        for at in np.flatnonzero(~whole)
    )
    return tuple(
        _cell_of(needs.copies[number], number) if is_whole else next(parts)
        for number, is_whole in zip(copies.tolist(), whole.tolist(), strict=True)
    )


def _cell_of(copy: Copy, number: int) -> Cell:
    return Cell(copy.tensor, copy.starts, copy.sizes, number)


def _disagreement(layout: Layout, plan: CellPlan, position: int) -> str:
    """Which ranks hold different bytes for one region; `position` counts cells over all ranks."""
    region = int(plan.region[position])
    ends = np.cumsum([len(regions) for regions in plan.regions])
    rank = int(np.searchsorted(ends, position, side="right"))
    first = next(n for n, regions in enumerate(plan.regions) if region in regions)
    tensor = layout.tensors[int(plan.region_tensors[region])].name
    return f"replicas of tensor {tensor} disagree: rank {rank} holds other bytes than rank {first}"


def _check_counts(
    layout: Layout, plan: CellPlan, cell_digests: Sequence[Sums], tensor_digests: Sums | None
) -> None:
    if len(cell_digests) != len(plan.cells):
        found = f"reported by {len(cell_digests)} ranks"
        raise PlanError("cell digests", found, f"must be reported by {len(plan.cells)}")
    for rank, (digests, cells) in enumerate(zip(cell_digests, plan.cells, strict=True)):
        if digests.size != len(cells):
            limit = f"the rank has {len(cells)} cells"
            raise PlanError(f"cell digests of rank {rank}", f"{digests.size} long", limit)
    if tensor_digests is not None and tensor_digests.size != len(layout.tensors):
        limit = f"the layout has {len(layout.tensors)} tensors"
        raise PlanError("tensor digests", f"{tensor_digests.size} long", limit)
