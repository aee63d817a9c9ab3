"""Moves bytes into parameters in main memory, and digests what was moved. Owns no memory but scratch."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from weightbus.consumers.planning.tiles import BoundTiles
from weightbus.schemas.layout import Layout
from weightbus.schemas.needs import Needs
from weightbus.schemas.worker import Cell

__all__ = ("CpuExecutor",)


class CpuExecutor:
    """Runs bound tiles of one (layout, needs, cells) on the CPU."""

    def __init__(self, layout: Layout, needs: Needs, cells: Sequence[Cell]) -> None:
        raise NotImplementedError

    def move(self, bound: BoundTiles) -> int:
        """Copy, transform and fill. Returns bytes read from the segments."""
        raise NotImplementedError

    def digest_cells(self, bound: BoundTiles) -> npt.NDArray[np.uint64]:
        """The digest of every cell: of what `move` wrote, or (transforms, copy -1) of what it read."""
        raise NotImplementedError

    def read_back(self, bound: BoundTiles) -> tuple[npt.NDArray[np.uint64], tuple[int, ...]]:
        """The digest of every cell read back from the parameters now, and the unreadable cells."""
        raise NotImplementedError
