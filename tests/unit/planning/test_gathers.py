"""What a digesting kernel is given: every byte once, each of one cell, in units it can digest."""

from __future__ import annotations

import itertools
import random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.unit.planning.worlds import Bytes, World, box_of, make_world, memory_bytes
from weightbus.consumers.planning.gathers import Gathers, plan_gathers
from weightbus.consumers.planning.pieces import IndexedPieces, narrowed_pieces
from weightbus.consumers.planning.tiles import cut_tiles
from weightbus.schemas.dtypes import DTYPE_BYTES
from weightbus.schemas.layout import Layout, SegmentSpec, ShardSpec, TensorSpec
from weightbus.schemas.needs import Copy, Needs, ParameterSpec
from weightbus.schemas.worker import Cell

BLOCK_BYTES = 64


def halves(needs: Needs, rng: random.Random) -> list[Cell]:
    """Cells that hold copies whole, by halves, by one half, or not at all."""
    cells = []
    for number, copy in enumerate(needs.copies):
        wide = [dim for dim, size in enumerate(copy.sizes) if size > 1]
        if not wide or rng.random() < 0.3:
            if rng.random() < 0.7:
                cells.append(Cell(copy.tensor, copy.starts, copy.sizes, number))
            continue
        dim = rng.choice(wide)
        middle = rng.randrange(1, copy.sizes[dim])
        for begin, end in ((0, middle), (middle, copy.sizes[dim])):
            starts, sizes = list(copy.starts), list(copy.sizes)
            starts[dim], sizes[dim] = starts[dim] + begin, end - begin
            if rng.random() < 0.7:
                cells.append(Cell(copy.tensor, tuple(starts), tuple(sizes), number))
    return cells


def memories_of(needs: Needs, gathers: Gathers) -> tuple[list[Bytes], list[Bytes]]:
    """Of parameters, then of blocks: how often each byte is written, and with what."""
    sizes = [memory_bytes(one) for one in needs.parameters]
    sizes += [block.size_bytes for block in gathers.blocks]
    return [np.zeros(n, np.uint8) for n in sizes], [np.zeros(n, np.uint8) for n in sizes]


def run(pieces: IndexedPieces, world: World, needs: Needs, gathers: Gathers) -> list[Bytes]:
    """Write what the tiles say; check their place in their tensors on the way."""
    times, memories = memories_of(needs, gathers)
    for tile in cut_tiles(pieces, 256):
        names = tile.dtype.names
        t = {name: int(tile[name]) for name in names}
        tensor = needs.copies[t["copy"]].tensor
        unit = t["unit_bytes"]
        assert t["rows"] * t["cols"] <= 256
        assert t["source"] % unit == 0
        assert t["destination"] % unit == 0
        for row, col in itertools.product(range(t["rows"]), range(t["cols"])):
            source = t["source"] + row * t["source_row"] + col * t["source_col"]
            data = world.segments[t["segment"]][source : source + unit]
            target = t["destination"] + row * t["destination_row"] + col * t["destination_col"]
            memories[t["parameter"]][target : target + unit] = data
            times[t["parameter"]][target : target + unit] += 1
            if t["cell"] >= 0:
                index = t["index"] + row * t["index_row"] + col * t["index_col"]
                assert index % min(unit, 4) == 0
                assert np.array_equal(world.tensors[tensor][index : index + unit], data)
    assert all(int(one.max(initial=0)) <= 1 for one in times)
    return memories


def check(world: World, needs: Needs, pieces: IndexedPieces, gathers: Gathers) -> None:
    memories = run(pieces, world, needs, gathers)
    for copy in needs.copies:
        if copy.transform >= 0 or not all(copy.sizes):
            continue
        spec = world.layout.tensors[copy.tensor]
        item = DTYPE_BYTES[spec.dtype]
        box = [(start, start + size) for start, size in zip(copy.starts, copy.sizes, strict=True)]
        elements = box_of(world.tensors[copy.tensor], spec, box).reshape(-1, item)
        places = np.full(copy.sizes, copy.offset)
        for dim, stride in enumerate(copy.strides):
            steps = stride * np.arange(copy.sizes[dim])
            places += steps.reshape([-1 if d == dim else 1 for d in range(len(copy.sizes))])
        found = memories[copy.parameter].reshape(-1, item)[places.reshape(-1)]
        assert np.array_equal(found, elements)
    for block, memory in zip(gathers.blocks, memories[len(needs.parameters) :], strict=True):
        spec = world.layout.tensors[needs.copies[block.copy].tensor]
        box = list(zip(block.box.starts, block.box.ends, strict=True))
        assert np.array_equal(memory, box_of(world.tensors[spec_number(world, spec)], spec, box))
        assert block.size_bytes <= BLOCK_BYTES


def spec_number(world: World, spec: object) -> int:
    return next(n for n, one in enumerate(world.layout.tensors) if one is spec)


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 2**32))
def test_pieces_hold_every_byte_of_every_copy_once_and_know_its_place(seed: int) -> None:
    world, rng = make_world(seed, ranks=2), random.Random(seed)
    for needs in world.needs:
        cells = halves(needs, rng)
        gathers = plan_gathers(world.layout, needs, cells, BLOCK_BYTES)
        check(world, needs, gathers.pieces, gathers)
        widths = np.array([1, 2, 4, 8])
        chosen = widths[np.random.default_rng(seed).integers(0, 4, len(gathers.pieces))]
        narrow = narrowed_pieces(gathers.pieces, chosen)
        assert np.array_equal(narrow.unit_bytes, np.minimum(gathers.pieces.unit_bytes, chosen))
        check(world, needs, narrow, gathers)


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 2**32))
def test_pieces_of_a_cell_are_its_box(seed: int) -> None:
    world, rng = make_world(seed, ranks=1), random.Random(seed)
    (needs,) = world.needs
    cells = halves(needs, rng)
    pieces = plan_gathers(world.layout, needs, cells, BLOCK_BYTES).pieces
    held = np.zeros(len(cells), dtype=np.int64)
    sizes = pieces.sizes.prod(axis=1) * pieces.unit_bytes
    np.add.at(held, pieces.cell[pieces.cell >= 0], sizes[pieces.cell >= 0])
    for cell, size_bytes in zip(cells, held.tolist(), strict=True):
        item = DTYPE_BYTES[world.layout.tensors[cell.tensor].dtype]
        assert size_bytes == item * int(np.prod(cell.sizes, dtype=np.int64))


@pytest.mark.parametrize(("dtype", "unit_bytes"), [("U8", 1), ("BF16", 2), ("F32", 8), ("F64", 8)])
def test_units_are_narrow_only_where_a_cell_cuts_words(dtype: str, unit_bytes: int) -> None:
    item = DTYPE_BYTES[dtype]
    layout = Layout(
        (TensorSpec("t", dtype, (4, 9)),),
        (ShardSpec(0, (0, 0), (4, 1), 0, 0), ShardSpec(0, (0, 1), (4, 8), 0, 64)),
        (SegmentSpec(64 + 32 * item),),
    )
    columns = Copy(0, (0, 1), (4, 8), 0, 0, (8, 1))
    needs = Needs((ParameterSpec("p", dtype, (4, 8), (8, 1)),), (columns,))
    (run,) = plan_gathers(layout, needs, (), BLOCK_BYTES).pieces.sizes.tolist()
    assert run[0] == 4 * item
    digested = plan_gathers(layout, needs, [Cell(0, (0, 1), (4, 8), 0)], BLOCK_BYTES).pieces
    assert digested.unit_bytes.tolist() == [unit_bytes]
    assert digested.index.tolist() == [item]
