"""What a worker believes of the cells that it is told to digest. Pure: does no I/O."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod

from weightbus.consumers.errors import PlanError
from weightbus.schemas.layout import Layout
from weightbus.schemas.needs import Needs
from weightbus.schemas.worker import Cell

__all__ = ("check_cells",)


def check_cells(cells: Sequence[Cell], layout: Layout, needs: Needs) -> None:
    """Every cell lies in its tensor and, if it has one, in its copy.

    The cells of a copy that transforms must hold all of it: it is moved cell by cell.

    Raises:
        PlanError: names the cell.
    """
    left = {
        number: prod(copy.sizes) for number, copy in enumerate(needs.copies) if copy.transform >= 0
    }
    for number, cell in enumerate(cells):
        _check_cell(f"cell {number}", cell, layout, needs)
        if cell.copy in left:
            left[cell.copy] -= prod(cell.sizes)
    for copy, missing in left.items():
        if missing and missing != prod(needs.copies[copy].sizes):
            raise PlanError(f"cells of copy {copy}", f"{missing} elements short", "must hold all")


def _check_cell(thing: str, cell: Cell, layout: Layout, needs: Needs) -> None:
    if cell.tensor >= len(layout.tensors):
        raise PlanError(thing, f"of tensor {cell.tensor}", f"there are {len(layout.tensors)}")
    sizes = layout.tensors[cell.tensor].shape
    starts: tuple[int, ...] = (0,) * len(sizes)
    if cell.copy >= 0:
        if cell.copy >= len(needs.copies) or needs.copies[cell.copy].tensor != cell.tensor:
            raise PlanError(thing, f"of copy {cell.copy}", f"must be one of tensor {cell.tensor}")
        starts, sizes = needs.copies[cell.copy].starts, needs.copies[cell.copy].sizes
    inside = len(cell.starts) == len(cell.sizes) == len(starts) and all(
        start <= first and first + extent <= start + size
        for first, extent, start, size in zip(cell.starts, cell.sizes, starts, sizes, strict=True)
    )
    if not inside:
        found = f"{cell.sizes} from {cell.starts}"
        raise PlanError(thing, found, f"must lie in {sizes} from {starts}")
