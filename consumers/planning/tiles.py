"""From a layout and one rank's needs to a table of tiles, and from there to addresses. Does no I/O."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from weightbus.schemas.layout import Layout
from weightbus.schemas.needs import Needs

__all__ = ("BoundTiles", "TilePlan", "bind_tiles", "plan_tiles")


@dataclass(frozen=True, eq=False)
class TilePlan:
    """What one rank moves, relative to segments and parameters; the same for every version."""

    tiles: npt.NDArray[np.void]
    tile_bytes: int
    """Bytes read by all tiles."""


@dataclass(frozen=True, eq=False)
class BoundTiles:
    """A plan at the addresses of one version. Valid while segments and parameters stay there."""

    plan: TilePlan


def plan_tiles(layout: Layout, needs: Needs) -> TilePlan:
    """Cut everything that one rank needs into tiles of at most 128 KiB, in shuffled order.

    Raises:
        PlanError: names the tensor or parameter at fault.
    """
    raise NotImplementedError


def bind_tiles(
    plan: TilePlan,
    segment_addresses: Sequence[int],
    segment_sizes: Sequence[int],
    parameter_addresses: Sequence[int],
    parameter_sizes: Sequence[int],
) -> BoundTiles:
    """Put a plan at the addresses of one version. Sizes are bytes.

    `parameter_addresses` are of each parameter's first element.

    Raises:
        PlanError: a tile would lie outside its segment or parameter.
    """
    raise NotImplementedError
