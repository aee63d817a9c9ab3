"""The kernel's table: rows by one multiplication, units that fit, classes apart."""

from __future__ import annotations

import random

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.unit.planning.test_gathers import halves
from tests.unit.planning.worlds import make_world
from weightbus.consumers.planning.gathers import plan_gathers
from weightbus.consumers.reload.table import TILE_UNITS, compile_table


def test_row_of_every_unit_is_exact_when_a_tile_is_as_large_as_can_be() -> None:
    source = random.Random(0)
    widths = [*range(2, 300), *(source.randrange(2, TILE_UNITS // 2 + 1) for _ in range(300))]
    units = np.arange(TILE_UNITS, dtype=np.uint64)
    for cols in [*widths, TILE_UNITS // 2, TILE_UNITS // 2 - 1]:
        inverse = np.uint64(2**32 // cols + 1)
        assert inverse < 2**32
        assert np.array_equal((units * inverse) >> np.uint64(32), units // np.uint64(cols)), cols


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 2**32))
def test_tiles_are_aligned_to_the_units_of_their_class_when_bases_are_not(seed: int) -> None:
    world, rng = make_world(seed, ranks=1), random.Random(seed)
    (needs,) = world.needs
    cells = halves(needs, rng)
    pieces = plan_gathers(world.layout, needs, cells, 64).pieces
    count = len(pieces)
    segments = np.array([rng.randrange(8) for _ in world.segments])
    parameters = np.array(
        [rng.randrange(8) for _ in range(int(pieces.parameter.max(initial=0)) + 1)]
    )
    residues = segments[pieces.segment] | parameters[pieces.parameter]
    groups = np.array([rng.randrange(3) for _ in range(count)], dtype=np.int64)
    table = compile_table(pieces, (pieces.segment, pieces.parameter), pieces.cell, residues, groups)
    launched = [(group, one) for group, some in enumerate(table.groups) for one in some]
    assert sum(one.tiles for _, one in launched) == len(table.tiles)
    assert (
        sorted(one.first for _, one in launched)
        == np.cumsum(
            [0, *(one.tiles for _, one in sorted(launched, key=lambda pair: pair[1].first))]
        ).tolist()[:-1]
    )
    moved = 0
    for group, launch in launched:
        for piece, source, destination, grid, _ in table.tiles[launch.first :][: launch.tiles]:
            assert groups[piece] == group
            assert (pieces.cell[piece] >= 0) == launch.is_digested
            assert (segments[pieces.segment[piece]] + source) % launch.unit_bytes == 0
            assert (parameters[pieces.parameter[piece]] + destination) % launch.unit_bytes == 0
            assert (grid >> 32) * (grid & 0xFFFFFFFF) <= TILE_UNITS
            moved += int((grid >> 32) * (grid & 0xFFFFFFFF)) * launch.unit_bytes
    assert moved == int((pieces.sizes.prod(axis=1) * pieces.unit_bytes).sum())
