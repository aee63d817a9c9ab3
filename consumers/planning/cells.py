"""Which rank digests which box, and what the sums of all ranks prove. Does no I/O."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from weightbus.schemas.layout import Layout
from weightbus.schemas.needs import Needs
from weightbus.schemas.worker import Cell

__all__ = ("CellPlan", "Verdict", "plan_cells", "verify_cells")

Sums = npt.NDArray[np.uint64]


@dataclass(frozen=True, eq=False)
class CellPlan:
    """The cells of every rank of one engine for one layout."""

    cells: tuple[tuple[Cell, ...], ...]
    """By rank, in the order in which the rank reports them."""
    regions: tuple[npt.NDArray[np.int64], ...]
    """By rank, for every cell: the number of its box; equal numbers are replicas."""
    region_tensors: npt.NDArray[np.int64]
    """The tensor of every region; ascending."""


@dataclass(frozen=True)
class Verdict:
    """What the digests of all ranks prove."""

    ok: bool
    """They add up to the publisher's (or it offers none) and all replicas agree."""
    digest: str
    """What they add up to."""
    tensors: tuple[str, ...]
    """Names of the tensors known to be at fault, in layout order."""
    reason: str
    """Why not `ok`; else empty."""


def plan_cells(layout: Layout, needs_of_ranks: Sequence[Needs]) -> CellPlan:
    """Cut every tensor into boxes so that each is held whole, or not at all, by every copy.

    Raises:
        PlanError: needs do not fit the layout.
    """
    raise NotImplementedError


def verify_cells(
    layout: Layout,
    plan: CellPlan,
    cell_digests: Sequence[Sums],
    weights_digest: str | None,
    tensor_digests: Sums | None = None,
) -> Verdict:
    """Compare replicas, add up the rest, and compare with the publisher's.

    Raises:
        PlanError: a rank reports another number of cells than it was given.
    """
    raise NotImplementedError
