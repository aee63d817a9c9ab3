"""Every byte of every shard goes through staging once, in its place, in slots of a bounded size."""

from __future__ import annotations

import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.unit.planning.worlds import Bytes, box_of, make_world
from weightbus.consumers.errors import PlanError
from weightbus.consumers.planning.buckets import (
    MIN_BUCKET_BYTES,
    BucketPlan,
    plan_buckets,
)
from weightbus.consumers.planning.cuts import ALIGNMENT_BYTES, count_buckets
from weightbus.consumers.planning.tiles import plan_tiles
from weightbus.schemas.layout import Layout, SegmentSpec, ShardSpec, TensorSpec
from weightbus.schemas.layout_codec import check_layout
from weightbus.schemas.limits import Limits


def staged(plan: BucketPlan, segments: list[Bytes]) -> list[Bytes]:
    """What lies in the slot of every part once its runs are read; 0xEE elsewhere."""
    slots = [np.full(plan.bucket_bytes, 0xEE, dtype=np.uint8) for _ in plan.layout.segments]
    for part, slot in enumerate(slots):
        for run in plan.runs_of(part):
            assert run["part"] == part
            source, size, to = int(run["source"]), int(run["size_bytes"]), int(run["staged"])
            assert np.all(slot[to : to + size] == 0xEE) or not size
            slot[to : to + size] = segments[int(run["segment"])][source : source + size]
    return slots


@settings(max_examples=400, deadline=None)
@given(
    seed=st.integers(0, 2**32),
    bucket_bytes=st.integers(MIN_BUCKET_BYTES, 9000),
    lanes=st.integers(1, 5),
)
def test_every_byte_is_staged_once_in_its_place_when_worlds_are_random(
    seed: int, bucket_bytes: int, lanes: int
) -> None:
    world = make_world(seed)
    for segment in world.segments:
        segment[segment == 0xEE] = 0
    for tensor in world.tensors:
        tensor[tensor == 0xEE] = 0
    plan = plan_buckets(world.layout, bucket_bytes, lanes)
    assert plan.layout.tensors == world.layout.tensors
    assert len(plan.layout.segments) == plan.buckets * lanes
    check_layout(plan.layout, Limits(max_segments=10**6))  # coverage, no overlap, inside
    slots = staged(plan, world.segments)
    for shard in plan.layout.shards:
        spec = world.layout.tensors[shard.tensor]
        box = [(a, a + n) for a, n in zip(shard.starts, shard.sizes, strict=True)]
        expected = box_of(world.tensors[shard.tensor], spec, box)
        found = slots[shard.segment][shard.offset_bytes : shard.offset_bytes + expected.size]
        assert expected.size
        assert np.array_equal(found, expected), (seed, shard)
    assert np.array_equal(plan.runs["staged"] % 256, plan.runs["source"] % 256)
    for needs in world.needs:
        before, after = plan_tiles(world.layout, needs), plan_tiles(plan.layout, needs)
        assert before.source_bytes == after.source_bytes


def one_tensor(shape: tuple[int, ...], dtype: str = "U8") -> Layout:
    size = int(np.prod(shape)) * {"U8": 1, "BF16": 2}[dtype]
    return Layout(
        (TensorSpec("t", dtype, shape),),
        (ShardSpec(0, (0,) * len(shape), shape, 0, 0),),
        (SegmentSpec(size),),
    )


def test_parts_are_of_one_size_when_a_large_tensor_is_cut() -> None:
    plan = plan_buckets(one_tensor((4096, 4096), "BF16"), 1 << 20, lanes=3)
    sizes = [segment.size_bytes for segment in plan.layout.segments]
    assert max(sizes) - min(sizes) <= (1 << 20) // 64 + ALIGNMENT_BYTES, sizes
    assert plan.buckets == -(-len(sizes) // 3)
    assert len(plan.runs) == len(sizes)
    assert all(shard.sizes[1] == 4096 for shard in plan.layout.shards), "cut between rows"
    assert sum(sizes) < 2 * 4096 * 4096 + ALIGNMENT_BYTES * len(sizes)


def test_slots_are_well_used_when_buckets_are_large() -> None:
    layout = one_tensor((1 << 28,))
    plan = plan_buckets(layout, 1 << 24, lanes=1)
    assert plan.buckets == 17, "16 would do without any slack"


def test_close_shards_are_read_in_one_run_when_padding_is_small() -> None:
    tensors = tuple(TensorSpec(f"t{n}", "U8", (100,)) for n in range(30))
    shards = tuple(ShardSpec(n, (0,), (100,), 0, n * 128) for n in range(30))
    near = plan_buckets(Layout(tensors, shards, (SegmentSpec(30 * 128),)), 1 << 20, 1)
    assert near.runs.tolist() == [(0, 0, 0, 0, 29 * 128 + 100)]
    apart = tuple(ShardSpec(n, (0,), (100,), 0, n * 9000) for n in range(30))
    far = plan_buckets(Layout(tensors, apart, (SegmentSpec(30 * 9000),)), 1 << 20, 1)
    assert len(far.runs) == 30
    assert far.runs["size_bytes"].sum() == 3000


def test_plan_is_empty_when_layout_has_no_elements() -> None:
    layout = Layout((TensorSpec("t", "F32", (0, 3)),), (ShardSpec(0, (0, 0), (0, 3), 0, 0),), ())
    for empty in (Layout((), (), ()), layout):
        plan = plan_buckets(empty, 4096, 2)
        assert (plan.buckets, len(plan.runs), plan.layout.shards) == (0, 0, ())


def test_plan_is_refused_when_slots_are_too_small() -> None:
    with pytest.raises(PlanError, match="bucket_bytes is 1023: must be at least 1024"):
        plan_buckets(one_tensor((8,)), 1023, 1)
    with pytest.raises(PlanError, match="lanes is 0"):
        plan_buckets(one_tensor((8,)), 4096, 0)


def test_plan_is_made_soon_when_there_are_140000_tensors() -> None:
    count = 140_000
    tensors = tuple(TensorSpec(f"t{n}", "BF16", (64, 32)) for n in range(count))
    shards = tuple(ShardSpec(n, (0, 0), (64, 32), n % 4, n // 4 * 4096) for n in range(count))
    layout = Layout(tensors, shards, tuple(SegmentSpec(count * 1024) for _ in range(4)))
    start = time.process_time()
    plan = plan_buckets(layout, 16 << 20, 4)
    took_s = time.process_time() - start
    assert took_s < 2.0, took_s
    assert len(plan.runs) <= plan.buckets * 4 + 4


@pytest.mark.parametrize("lanes", [1, 3, 8])
@pytest.mark.parametrize("bucket_bytes", [2**20, 2**22, 3 * 2**20])
def test_buckets_are_as_many_as_are_predicted(bucket_bytes: int, lanes: int) -> None:
    size = 2**30
    layout = Layout(
        tensors=(TensorSpec("t", "U8", (size,)),),
        shards=(ShardSpec(0, (0,), (size,), 0, 0),),
        segments=(SegmentSpec(size),),
    )
    plan = plan_buckets(layout, bucket_bytes, lanes)
    assert plan.buckets - count_buckets(size, bucket_bytes, lanes) in (0, 1)  # alignment of the run
