"""Cells cut every tensor once, and add up to the publisher's digest only if every byte is right."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.unit.planning.worlds import World, box_of, make_world
from weightbus.bus.digest import combine, digest_box, digest_hex, digest_tensor
from weightbus.consumers.errors import PlanError
from weightbus.consumers.planning.cells import CellPlan, Sums, Verdict, plan_cells, verify_cells
from weightbus.schemas.dtypes import DTYPE_BYTES
from weightbus.schemas.layout import Layout, SegmentSpec, ShardSpec, TensorSpec
from weightbus.schemas.needs import Copy, Needs, ParameterSpec
from weightbus.schemas.worker import Cell

Starts = tuple[int, ...]
Sizes = tuple[int, ...]


def digest_of(world: World, cell: Cell, *, flipped: int | None = None) -> int:
    """The digest that an honest rank reports, or one whose bytes have one bit flipped."""
    spec = world.layout.tensors[cell.tensor]
    box = [(start, start + size) for start, size in zip(cell.starts, cell.sizes, strict=True)]
    data = box_of(world.tensors[cell.tensor], spec, box)
    if flipped is not None:
        data = data.copy()
        data[flipped // 8 % data.size] ^= 1 << flipped % 8
    return digest_box(data, spec.shape, DTYPE_BYTES[spec.dtype], cell.starts, cell.sizes)


def honest(world: World, plan: CellPlan) -> list[Sums]:
    return [
        np.array([digest_of(world, cell) for cell in cells], dtype=np.uint64)
        for cells in plan.cells
    ]


def tensor_digests(world: World) -> Sums:
    return np.array([digest_tensor(tensor) for tensor in world.tensors], dtype=np.uint64)


def verify(world: World, plan: CellPlan, digests: list[Sums], *, by_tensor: bool = True) -> Verdict:
    sums = tensor_digests(world)
    return verify_cells(
        world.layout, plan, digests, digest_hex(combine(sums)), sums if by_tensor else None
    )


@settings(max_examples=300, deadline=None)
@given(seed=st.integers(0, 2**32), ranks=st.integers(1, 4))
def test_regions_hold_each_element_once_when_world_is_random(seed: int, ranks: int) -> None:
    world = make_world(seed, ranks)
    plan = plan_cells(world.layout, world.needs)
    assert np.all(np.diff(plan.region_tensors) >= 0)
    box_of_region: dict[int, Cell] = {}
    for cells, regions in zip(plan.cells, plan.regions, strict=True):
        assert len(cells) == len(regions)
        for cell, region in zip(cells, regions.tolist(), strict=True):
            known = box_of_region.setdefault(region, cell)
            assert (known.tensor, known.starts, known.sizes) == (
                cell.tensor,
                cell.starts,
                cell.sizes,
            )
            assert plan.region_tensors[region] == cell.tensor
    assert sorted(box_of_region) == list(range(plan.region_tensors.size))
    painted = [np.zeros(tensor.shape, dtype=np.int64) for tensor in world.layout.tensors]
    for cell in box_of_region.values():
        spans = zip(cell.starts, cell.sizes, strict=True)
        painted[cell.tensor][tuple(slice(start, start + size) for start, size in spans)] += 1
    assert all((tensor == 1).all() for tensor in painted)


@settings(max_examples=300, deadline=None)
@given(seed=st.integers(0, 2**32), ranks=st.integers(1, 4))
def test_cells_hold_each_copy_whole_when_world_is_random(seed: int, ranks: int) -> None:
    world = make_world(seed, ranks)
    plan = plan_cells(world.layout, world.needs)
    for rank, (needs, cells) in enumerate(zip(world.needs, plan.cells, strict=True)):
        held = [0] * len(needs.copies)
        for cell in cells:
            if cell.copy < 0:
                assert rank == 0
                continue
            copy = needs.copies[cell.copy]
            held[cell.copy] += math.prod(cell.sizes)
            assert copy.tensor == cell.tensor
            for dim, start in enumerate(cell.starts):
                assert copy.starts[dim] <= start
                assert start + cell.sizes[dim] <= copy.starts[dim] + copy.sizes[dim]
        assert held == [math.prod(copy.sizes) for copy in needs.copies]


@settings(max_examples=300, deadline=None)
@given(seed=st.integers(0, 2**32), ranks=st.integers(1, 4))
def test_parts_add_up_and_any_fault_is_seen_when_world_is_random(seed: int, ranks: int) -> None:
    world = make_world(seed, ranks)
    plan = plan_cells(world.layout, world.needs)
    digests = honest(world, plan)
    assert verify(world, plan, digests) == Verdict(
        True, digest_hex(combine(tensor_digests(world))), (), ""
    )
    rng = random.Random(seed)
    reported = [(rank, at) for rank, cells in enumerate(plan.cells) for at in range(len(cells))]
    if not reported:
        return
    rank, at = rng.choice(reported)
    cell, right = plan.cells[rank][at], int(digests[rank][at])
    name = world.layout.tensors[cell.tensor].name
    flipped = digest_of(world, cell, flipped=rng.randrange(2**20))
    for fault, wrong in (("flipped", flipped), ("missing", 0), ("doubled", 2 * right % 2**64)):
        if wrong == right:
            continue  # nothing but zeros
        digests[rank][at] = wrong
        for by_tensor in (False, True):
            verdict = verify(world, plan, digests, by_tensor=by_tensor)
            assert not verdict.ok, fault
            assert verdict.tensors in ([(name,)] if by_tensor else [(name,), ()]), fault
        digests[rank][at] = right


def world_of(shape: tuple[int, ...], *boxes_of_ranks: Sequence[tuple[Starts, Sizes]]) -> World:
    """One F32 tensor, and ranks that each copy boxes (starts, sizes) of it."""
    count = math.prod(shape)
    data = np.random.default_rng(0).integers(0, 256, 4 * count, dtype=np.uint8)
    layout = Layout(
        (TensorSpec("t", "F32", shape),),
        (ShardSpec(0, (0,) * len(shape), shape, 0, 0),),
        (SegmentSpec(4 * count),),
    )
    needs = []
    for boxes in boxes_of_ranks:
        copies = [
            Copy(0, starts, sizes, number, 0, (0,) * len(shape))
            for number, (starts, sizes) in enumerate(boxes)
        ]
        parameters = [ParameterSpec(f"p{n}", "F32", (count,), (1,)) for n in range(len(boxes))]
        needs.append(Needs(tuple(parameters), tuple(copies)))
    return World(layout, [data], [data], needs)


def boxes_of(plan: CellPlan, rank: int) -> list[tuple[tuple[int, ...], tuple[int, ...], int]]:
    return [(cell.starts, cell.sizes, cell.copy) for cell in plan.cells[rank]]


def test_cells_are_the_copies_when_ranks_split_one_dimension() -> None:
    world = world_of((8, 6), [((0, 0), (8, 2))], [((0, 2), (8, 2))], [((0, 4), (8, 2))])
    plan = plan_cells(world.layout, world.needs)
    assert [boxes_of(plan, rank) for rank in range(3)] == [
        [((0, 2 * rank), (8, 2), 0)] for rank in range(3)
    ]
    assert [regions.tolist() for regions in plan.regions] == [[0], [1], [2]]


def test_cells_are_replicas_when_ranks_and_tied_copies_hold_the_same_box() -> None:
    whole = ((0,), (8,))
    world = world_of((8,), [whole, whole], [whole])
    plan = plan_cells(world.layout, world.needs)
    assert [regions.tolist() for regions in plan.regions] == [[0, 0], [0]]
    assert [cell.copy for cell in plan.cells[0]] == [0, 1]
    digests = honest(world, plan)
    digests[0][1] ^= np.uint64(1)
    verdict = verify(world, plan, digests, by_tensor=False)
    assert not verdict.ok
    assert verdict.tensors == ("t",)
    assert verdict.reason == "replicas of tensor t disagree: rank 0 holds other bytes than rank 0"


def test_cells_are_refined_when_boxes_overlap_in_part() -> None:
    world = world_of((10,), [((0,), (6,))], [((4,), (6,))])
    plan = plan_cells(world.layout, world.needs)
    assert boxes_of(plan, 0) == [((0,), (4,), 0), ((4,), (2,), 0)]
    assert boxes_of(plan, 1) == [((4,), (2,), 0), ((6,), (4,), 0)]
    assert [regions.tolist() for regions in plan.regions] == [[0, 1], [1, 2]]


@pytest.mark.parametrize(
    ("shape", "one", "other"),
    [
        ((10,), ((0,), (6,)), ((4,), (4,))),
        ((4, 4), ((0, 0), (2, 4)), ((0, 0), (4, 2))),
    ],
)
def test_cells_are_refined_when_overlap_and_gap_have_the_same_size(
    shape: Sizes, one: tuple[Starts, Sizes], other: tuple[Starts, Sizes]
) -> None:
    world = world_of(shape, [one], [other])
    plan = plan_cells(world.layout, world.needs)
    assert verify(world, plan, honest(world, plan)).ok
    held_twice = np.intersect1d(plan.regions[0], plan.regions[1])
    assert held_twice.size == 1
    assert [cell.copy for cell in plan.cells[0]].count(-1) == 1


def test_rank_zero_reads_from_source_when_nobody_needs_a_region() -> None:
    world = world_of((10, 4), [((0, 0), (5, 2))], [((0, 2), (5, 2))])
    plan = plan_cells(world.layout, world.needs)
    assert boxes_of(plan, 0) == [((0, 0), (5, 2), 0), ((5, 0), (5, 4), -1)]
    assert boxes_of(plan, 1) == [((0, 2), (5, 2), 0)]


def test_regions_are_few_when_a_grid_is_cut_in_two_dimensions() -> None:
    boxes = [((3 * row, 2 * col), (3, 2)) for row in range(8) for col in range(8)]
    world = world_of((24, 16), boxes[::2], boxes[1::2])
    assert plan_cells(world.layout, world.needs).region_tensors.size == 64


def test_regions_are_found_when_boxes_form_a_pinwheel() -> None:
    boxes = [((0, 0), (1, 2)), ((0, 2), (2, 1)), ((2, 1), (1, 2)), ((1, 0), (2, 1))]
    world = world_of((3, 3), boxes)
    plan = plan_cells(world.layout, world.needs)
    assert verify(world, plan, honest(world, plan)).ok
    assert sum(math.prod(cell.sizes) for cell in plan.cells[0]) == 9
    assert [cell.copy for cell in plan.cells[0]].count(-1) == 1


def test_verdict_names_tensor_when_two_boxes_are_swapped() -> None:
    world = world_of((8, 6), [((0, 0), (8, 3))], [((0, 3), (8, 3))])
    plan = plan_cells(world.layout, world.needs)
    one, other = (plan.cells[rank][0] for rank in range(2))
    spec, whole = world.layout.tensors[0], world.tensors[0]
    left, right = (box_of(whole, spec, [(0, 8), span]) for span in ((0, 3), (3, 6)))
    swapped = [
        np.array([digest_box(data, spec.shape, 4, cell.starts, cell.sizes)], dtype=np.uint64)
        for data, cell in ((right, one), (left, other))
    ]
    verdict = verify(world, plan, swapped)
    assert not verdict.ok
    assert verdict.tensors == ("t",)
    assert verdict.reason.startswith("all ranks add up to")


def test_verdict_names_nothing_when_publisher_contradicts_itself() -> None:
    world = world_of((8,), [((0,), (8,))])
    plan = plan_cells(world.layout, world.needs)
    verdict = verify_cells(world.layout, plan, honest(world, plan), "0" * 16, tensor_digests(world))
    assert not verdict.ok
    assert verdict.tensors == ()
    assert "do not add up to its own" in verdict.reason


def test_replicas_are_compared_when_publisher_offers_no_digest() -> None:
    whole = ((0,), (8,))
    world = world_of((8,), [whole], [whole])
    plan = plan_cells(world.layout, world.needs)
    digests = honest(world, plan)
    assert verify_cells(world.layout, plan, digests, None).ok
    digests[1] += np.uint64(1)
    verdict = verify_cells(world.layout, plan, digests, None)
    assert (verdict.ok, verdict.tensors) == (False, ("t",))
    assert "rank 1 holds other bytes than rank 0" in verdict.reason


def test_digests_are_refused_when_their_number_is_wrong() -> None:
    world = world_of((8,), [((0,), (8,))])
    plan = plan_cells(world.layout, world.needs)
    sums = honest(world, plan)
    with pytest.raises(PlanError, match="must be reported by 1"):
        verify_cells(world.layout, plan, [*sums, *sums], None)
    with pytest.raises(PlanError, match="rank 0 is 2 long: the rank has 1 cells"):
        verify_cells(world.layout, plan, [np.zeros(2, dtype=np.uint64)], None)
    with pytest.raises(PlanError, match="tensor digests is 3 long: the layout has 1 tensors"):
        verify_cells(world.layout, plan, sums, None, np.zeros(3, dtype=np.uint64))


def test_cells_are_refused_when_a_box_leaves_its_tensor() -> None:
    world = world_of((8,), [((4,), (5,))])
    with pytest.raises(PlanError, match="tensor t is copied from"):
        plan_cells(world.layout, world.needs)


def test_model_is_proven_when_nothing_is_in_it() -> None:
    layout = Layout((), (), ())
    plan = plan_cells(layout, [Needs((), ())])
    assert plan.cells == ((),)
    assert verify_cells(layout, plan, [np.zeros(0, dtype=np.uint64)], "0" * 16).ok
