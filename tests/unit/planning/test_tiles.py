"""Tiles move every byte once, to where the needs want it, and nowhere else."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from msgspec import structs
from numpy.lib.stride_tricks import as_strided

from tests.unit.planning.worlds import (
    UNWRITTEN,
    Bytes,
    World,
    box_of,
    expected_parameters,
    make_world,
    memory_bytes,
)
from weightbus.consumers.errors import PlanError
from weightbus.consumers.planning.tiles import (
    MAX_TILES,
    TILE_BYTES,
    TilePlan,
    bind_tiles,
    plan_tiles,
)
from weightbus.schemas.dtypes import DTYPE_BYTES
from weightbus.schemas.layout import Layout, SegmentSpec, ShardSpec, TensorSpec
from weightbus.schemas.needs import Copy, Fill, Needs, ParameterSpec, Transform


def window(
    memory: Bytes, start: int, shape: tuple[int, int], strides: tuple[int, int], unit: int
) -> Bytes:
    """A [rows, cols, unit] view of a tile's side; it must not leave the memory."""
    reach = sum((n - 1) * max(step, 0) for n, step in zip(shape, strides, strict=True))
    below = sum((n - 1) * min(step, 0) for n, step in zip(shape, strides, strict=True))
    assert start + below >= 0
    assert start + reach + unit <= memory.size
    return as_strided(memory[start:], (*shape, unit), (*strides, 1))


def run_tiles(plan: TilePlan, segments: list[Bytes]) -> list[Bytes]:
    """Execute a plan, tile by tile, and check what every tile promises."""
    memories = [np.full(memory_bytes(one), UNWRITTEN, np.uint8) for one in plan.needs.parameters]
    total = 0
    for tile in plan.tiles:
        shape = (int(tile["rows"]), int(tile["cols"]))
        unit, destination_unit = int(tile["unit_bytes"]), int(tile["destination_unit_bytes"])
        assert 0 < math.prod(shape) * max(unit, destination_unit) <= TILE_BYTES
        steps = (int(tile["source_row"]), int(tile["source_col"]))
        source = window(segments[tile["segment"]], int(tile["source"]), shape, steps, unit)
        if tile["transform"] >= 0:
            with np.errstate(invalid="ignore"):
                source = np.ascontiguousarray(source).view("<f4").astype("<f8").view(np.uint8)
        else:
            assert unit == destination_unit
            places = tile["source"], tile["destination"], *steps, tile["destination_row"]
            assert all(place % unit == 0 for place in places)
        steps = (int(tile["destination_row"]), int(tile["destination_col"]))
        memory = memories[tile["parameter"]]
        window(memory, int(tile["destination"]), shape, steps, destination_unit)[...] = source
        total += math.prod(shape) * destination_unit
    widths = [DTYPE_BYTES[parameter.dtype] for parameter in plan.needs.parameters]
    wanted = sum(math.prod(copy.sizes) * widths[copy.parameter] for copy in plan.needs.copies)
    assert total == wanted == plan.destination_bytes
    return memories


def check_world(world: World) -> None:
    for rank, needs in enumerate(world.needs):
        found = run_tiles(plan_tiles(world.layout, needs), world.segments)
        for memory, expected in zip(found, expected_parameters(world, rank), strict=True):
            assert np.array_equal(memory, expected), f"rank {rank}"


def world_of(
    tensor: TensorSpec, shards: list[ShardSpec], parameter: ParameterSpec, *copies: Copy
) -> World:
    """One tensor of random bytes, one segment, one rank with one parameter."""
    item_bytes = DTYPE_BYTES[tensor.dtype]
    content = np.random.default_rng(0)
    data = content.integers(0, 256, math.prod(tensor.shape) * item_bytes, dtype=np.uint8)
    ends = [shard.offset_bytes + math.prod(shard.sizes) * item_bytes for shard in shards]
    segment = np.zeros(max(ends), dtype=np.uint8)
    for shard, end in zip(shards, ends, strict=True):
        box = [(a, a + n) for a, n in zip(shard.starts, shard.sizes, strict=True)]
        segment[shard.offset_bytes : end] = box_of(data, tensor, box)
    layout = Layout((tensor,), tuple(shards), (SegmentSpec(segment.size),))
    return World(layout, [segment], [data], [Needs((parameter,), copies)])


@settings(max_examples=300, deadline=None)
@given(seed=st.integers(0, 2**32))
def test_tiles_move_what_is_needed_when_world_is_random(seed: int) -> None:
    check_world(make_world(seed))


@pytest.mark.parametrize(
    ("sizes", "strides"),
    [
        ((500, 700), (700, 1)),  # one run of bytes
        ((500, 700), (1, 500)),  # transposed
        ((500, 600), (701, 1)),  # a run per row
        ((3, 200_000), (200_000, 1)),  # runs longer than a tile
        ((70_000, 3), (1, 70_000)),  # narrow and transposed
    ],
)
def test_tiles_stay_small_when_a_copy_is_large(
    sizes: tuple[int, int], strides: tuple[int, int]
) -> None:
    tensor = TensorSpec("t", "BF16", sizes)
    memory = 1 + sum((n - 1) * step for n, step in zip(sizes, strides, strict=True))
    parameter = ParameterSpec("p", "BF16", (memory,), (1,))
    world = world_of(
        tensor,
        [ShardSpec(0, (0, 0), sizes, 0, 256)],
        parameter,
        Copy(0, (0, 0), sizes, 0, 0, strides),
    )
    check_world(world)
    plan = plan_tiles(world.layout, world.needs[0])
    assert len(plan.tiles) <= 1.5 * plan.source_bytes / TILE_BYTES + 8


def test_tiles_move_bytes_when_source_is_at_an_odd_byte() -> None:
    tensor = TensorSpec("t", "BF16", (40, 30))
    shards = [ShardSpec(0, (0, 0), (40, 30), 0, 7)]
    for strides in ((30, 1), (1, 40)):
        parameter = ParameterSpec("p", "BF16", (1200,), (1,))
        copy = Copy(0, (0, 0), (40, 30), 0, 0, strides)
        world = world_of(tensor, shards, parameter, copy)
        check_world(world)
        assert set(plan_tiles(world.layout, world.needs[0]).tiles["unit_bytes"]) == {1}


def test_tiles_are_one_piece_when_a_slice_is_contiguous() -> None:
    tensor = TensorSpec("t", "BF16", (8, 4, 16))
    parameter = ParameterSpec("p", "BF16", (2, 64), (64, 1))
    copy = Copy(0, (2, 0, 0), (2, 4, 16), 0, 0, (64, 16, 1))
    world = world_of(tensor, [ShardSpec(0, (0, 0, 0), (8, 4, 16), 0, 0)], parameter, copy)
    (tile,) = plan_tiles(world.layout, world.needs[0]).tiles
    assert (tile["rows"], tile["cols"], tile["unit_bytes"], tile["source"]) == (1, 32, 8, 256)


def test_tiles_of_two_ranks_and_two_calls_are_equal_when_needs_are() -> None:
    world = make_world(5)
    one, two = (plan_tiles(world.layout, world.needs[0]).tiles for _ in range(2))
    assert np.array_equal(one, two)


def test_ranks_take_their_tiles_in_orders_of_their_own() -> None:
    """Else all would read the same part of one trainer's GPU at the same time."""
    rows, width = 64, 2 * TILE_BYTES
    layout = Layout(
        (TensorSpec("t", "U8", (2 * rows, width)),),
        (ShardSpec(0, (0, 0), (2 * rows, width), 0, 0),),
        (SegmentSpec(2 * rows * width),),
    )
    parameter = ParameterSpec("p", "U8", (rows, width), (width, 1))
    orders = []
    for rank in range(2):
        copy = Copy(0, (rank * rows, 0), (rows, width), 0, 0, (width, 1))
        sources = plan_tiles(layout, Needs((parameter,), (copy,))).tiles["source"]
        orders.append(sources - sources.min())
    assert sorted(orders[0].tolist()) == sorted(orders[1].tolist())
    assert np.count_nonzero(orders[0] == orders[1]) < 8, "by chance"
    assert np.abs(np.diff(orders[0])).mean() > rows * width / 6, "neighbours are far apart"


def test_bound_tiles_begin_at_addresses_when_bound() -> None:
    world = make_world(11)
    plan = plan_tiles(world.layout, world.needs[0])
    segments = [1000 * (number + 1) for number in range(len(world.segments))]
    parameters = [10**6 * (number + 1) for number in range(len(plan.needs.parameters))]
    bound = bind_tiles(
        plan,
        segments,
        [len(segment) for segment in world.segments],
        parameters,
        [memory_bytes(parameter) for parameter in plan.needs.parameters],
    )
    assert len(plan.tiles)
    for number, tile in enumerate(plan.tiles):
        assert bound.sources[number] == segments[tile["segment"]] + tile["source"]
        assert bound.destinations[number] == parameters[tile["parameter"]] + tile["destination"]


LAYOUT = Layout(
    (TensorSpec("a.weight", "F32", (4, 6)), TensorSpec("b.weight", "BF16", (4,))),
    (ShardSpec(0, (0, 0), (4, 6), 0, 0), ShardSpec(1, (0,), (4,), 0, 96)),
    (SegmentSpec(104),),
)
PARAMETERS = (ParameterSpec("p", "F32", (4, 6), (6, 1)), ParameterSpec("q", "F32", (4,), (1,)))
WHOLE = Copy(0, (0, 0), (4, 6), 0, 0, (6, 1))


def copies_of(copy: Copy, *others: Copy, **changes: Any) -> Needs:
    return Needs(PARAMETERS, (structs.replace(copy, **changes), *others), (), (CAST,))


CAST = Transform((("neg", ""), ("cast", "F16"), ("cast", "F32")))
LEFT = structs.replace(WHOLE, sizes=(4, 4))
RIGHT = structs.replace(WHOLE, starts=(0, 4), sizes=(4, 2), offset=4)


@pytest.mark.parametrize(
    ("needs", "message"),
    [
        (copies_of(WHOLE, tensor=2), "copy 0 is of tensor 2: the layout has 2 tensors"),
        (copies_of(WHOLE, starts=(0, 1)), "tensor a.weight is copied from .* must lie in shape"),
        (copies_of(WHOLE, sizes=(24,)), "tensor a.weight is copied from .* must lie in shape"),
        (copies_of(WHOLE, strides=(1,)), "tensor a.weight to parameter p .* one stride for each"),
        (copies_of(WHOLE, parameter=2), "tensor a.weight to parameter 2 .* there are 2 parameters"),
        (copies_of(WHOLE, offset=1), "a.weight to parameter p is to elements 1 to 24: .* has 24"),
        (copies_of(WHOLE, strides=(-6, 1)), "parameter p is to elements -18 to 5"),
        (copies_of(WHOLE, strides=(2**62, 1)), "parameter p is too wide: must lie in the"),
        (copies_of(WHOLE, strides=(5, 1)), "parameter p is over its own elements"),
        (copies_of(WHOLE, strides=(0, 1)), "parameter p is over its own elements"),
        (copies_of(WHOLE, transform=1), "F32 into F32: transform 1 is not one of 1"),
        (
            Needs(PARAMETERS, (Copy(1, (0,), (4,), 1, 0, (1,)),)),
            "tensor b.weight to parameter q is BF16 into F32: .* need a transform",
        ),
        (
            Needs(
                (ParameterSpec("p", "BF16", (4,), (1,)),),
                (Copy(1, (0,), (4,), 0, 0, (1,), 0),),
                (),
                (CAST,),
            ),
            "tensor b.weight to parameter p is BF16 into BF16: transform 0 makes F32",
        ),
        (copies_of(LEFT, structs.replace(RIGHT, offset=3)), "parameter p is over elements that"),
        (copies_of(WHOLE, WHOLE), "tensor a.weight to parameter p is over elements that others"),
        (
            Needs(PARAMETERS, (WHOLE,), (Fill(0, 23, (1,), (1,), 0.0),)),
            "fill of parameter p is over elements that others write: .* must be written once",
        ),
    ],
)
def test_plan_is_refused_when_needs_do_not_fit(needs: Needs, message: str) -> None:
    with pytest.raises(PlanError, match=message):
        plan_tiles(LAYOUT, needs)


def test_plan_is_made_when_copies_are_woven_but_apart() -> None:
    by_columns = copies_of(LEFT, RIGHT)
    assert plan_tiles(LAYOUT, by_columns).source_bytes == 96
    rows_in_turns = Needs(
        (ParameterSpec("p", "F32", (48,), (1,)),),
        tuple(structs.replace(WHOLE, offset=offset, strides=(12, 1)) for offset in (0, 6)),
    )
    assert plan_tiles(LAYOUT, rows_in_turns).source_bytes == 192


def test_plan_is_made_when_strides_are_not_nested_but_apart() -> None:
    # Elements 0, 2, 4 and 3, 5, 7: the steps of one dimension reach over the other's.
    needs = Needs(
        (ParameterSpec("p", "F32", (8,), (1,)),), (Copy(0, (0, 0), (2, 3), 0, 0, (3, 2)),)
    )
    assert plan_tiles(LAYOUT, needs).source_bytes == 24


def test_plan_is_refused_when_a_shard_is_missing() -> None:
    half = structs.replace(LAYOUT, shards=(ShardSpec(0, (0, 0), (4, 3), 0, 0),))
    with pytest.raises(PlanError, match=r"a.weight to parameter p is in no shard for 48 of 96"):
        plan_tiles(half, copies_of(WHOLE))


def test_plan_is_refused_when_a_shard_leaves_its_segment() -> None:
    short = structs.replace(LAYOUT, segments=(SegmentSpec(95),))
    with pytest.raises(PlanError, match=r"tensor a.weight is read up to byte 96 of segment 0"):
        plan_tiles(short, copies_of(WHOLE))


def test_plan_is_refused_when_it_takes_too_many_tiles() -> None:
    shape, elements = (64,) * 6, 64**6
    layout = Layout(
        (TensorSpec("t", "U8", shape),),
        (ShardSpec(0, (0,) * 6, shape, 0, 0),),
        (SegmentSpec(elements),),
    )
    reversed_dims = Copy(0, (0,) * 6, shape, 0, 0, tuple(64**dim for dim in range(6)))
    needs = Needs((ParameterSpec("p", "U8", (elements,), (1,)),), (reversed_dims,))
    with pytest.raises(PlanError, match=f"needs is {64**4} tiles: at most {MAX_TILES}"):
        plan_tiles(layout, needs)


def test_binding_is_refused_when_memory_is_shorter_than_the_plan() -> None:
    plan = plan_tiles(LAYOUT, copies_of(WHOLE))
    bind_tiles(plan, [8], [96], [8, 0], [96, 0])
    with pytest.raises(
        PlanError, match="segment 0 is 95 bytes long: the plan takes bytes up to 96"
    ):
        bind_tiles(plan, [8], [95], [8, 0], [96, 0])
    with pytest.raises(PlanError, match="parameter p is 92 bytes long"):
        bind_tiles(plan, [8], [96], [8, 0], [92, 0])
    with pytest.raises(PlanError, match="must be bound to 2"):
        bind_tiles(plan, [8], [96], [8], [96])


def test_plan_is_empty_when_nothing_is_needed() -> None:
    plan = plan_tiles(LAYOUT, Needs((), ()))
    assert (len(plan.tiles), plan.source_bytes) == (0, 0)
    assert bind_tiles(plan, [0], [0], [], []).sources.size == 0
