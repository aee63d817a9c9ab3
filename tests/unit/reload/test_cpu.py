"""The executor leaves in memory what the needs say, and digests exactly that."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from msgspec import structs

from tests.unit.planning.worlds import (
    UNWRITTEN,
    Bytes,
    World,
    box_of,
    expected_parameters,
    make_world,
    memory_bytes,
)
from weightbus.bus.digest import digest_box, digest_tensor
from weightbus.consumers.errors import PlanError
from weightbus.consumers.planning.tiles import BoundTiles, bind_tiles, plan_tiles
from weightbus.consumers.reload.cpu import BLOCK_BYTES, CpuExecutor
from weightbus.consumers.reload.dtypes import TORCH_DTYPES
from weightbus.schemas.dtypes import DTYPE_BYTES
from weightbus.schemas.layout import Layout, SegmentSpec, ShardSpec, TensorSpec
from weightbus.schemas.needs import Copy, Fill, Needs, ParameterSpec, Transform, UnaryOp
from weightbus.schemas.worker import Cell


def address_of(memory: Bytes) -> int:
    return int(memory.ctypes.data)


def bind(layout: Layout, needs: Needs, segments: list[Bytes], memories: list[Bytes]) -> BoundTiles:
    return bind_tiles(
        plan_tiles(layout, needs),
        [address_of(segment) for segment in segments],
        [segment.size for segment in segments],
        [address_of(memory) for memory in memories],
        [memory.size for memory in memories],
    )


def new_memories(needs: Needs) -> list[Bytes]:
    return [np.full(memory_bytes(one), UNWRITTEN, np.uint8) for one in needs.parameters]


def cells_of(needs: Needs) -> list[Cell]:
    """One cell per copy that holds anything."""
    return [
        Cell(copy.tensor, copy.starts, copy.sizes, number)
        for number, copy in enumerate(needs.copies)
        if all(copy.sizes)
    ]


def digest_of_cell(world: World, cell: Cell) -> int:
    spec = world.layout.tensors[cell.tensor]
    box = [(start, start + size) for start, size in zip(cell.starts, cell.sizes, strict=True)]
    data = box_of(world.tensors[cell.tensor], spec, box)
    return digest_box(data, spec.shape, DTYPE_BYTES[spec.dtype], cell.starts, cell.sizes)


@settings(max_examples=300, deadline=None)
@given(seed=st.integers(0, 2**32))
def test_parameters_and_digests_are_right_when_world_is_random(seed: int) -> None:
    world = make_world(seed)
    for rank, needs in enumerate(world.needs):
        unneeded = [
            Cell(number, (0,) * len(spec.shape), spec.shape, -1)
            for number, spec in enumerate(world.layout.tensors)
            if all(spec.shape)
        ]
        cells = [*cells_of(needs), *unneeded]
        memories = new_memories(needs)
        bound = bind(world.layout, structs.replace(needs, fills=()), world.segments, memories)
        executor = CpuExecutor(world.layout, needs, cells)
        assert executor.move(bound) == bound.plan.source_bytes
        for memory, expected in zip(memories, expected_parameters(world, rank), strict=True):
            assert np.array_equal(memory, expected), f"rank {rank}"
        digests = executor.digest_cells(bound).tolist()
        assert digests == [digest_of_cell(world, cell) for cell in cells]
        found, unreadable = executor.read_back(bound)
        for number, cell in enumerate(cells):
            readable = cell.copy >= 0 and needs.copies[cell.copy].transform < 0
            assert (number not in unreadable) == readable
            assert found[number] == (digests[number] if readable else 0)


def one_copy(
    dtype: str,
    shape: tuple[int, ...],
    target: str,
    strides: tuple[int, ...],
    *ops: tuple[UnaryOp, str],
    data: Bytes | None = None,
) -> tuple[Layout, Needs, Bytes]:
    """A layout of one tensor, needs of one copy of it, and the tensor's bytes."""
    count = math.prod(shape)
    layout = Layout(
        (TensorSpec("t", dtype, shape),),
        (ShardSpec(0, (0,) * len(shape), shape, 0, 0),),
        (SegmentSpec(count * DTYPE_BYTES[dtype]),),
    )
    copy = Copy(0, (0,) * len(shape), shape, 0, 0, strides, 0 if ops else -1)
    parameter = ParameterSpec("p", target, (count,), (1,))
    needs = Needs((parameter,), (copy,), (), (Transform(ops),) if ops else ())
    if data is None:
        size = layout.segments[0].size_bytes
        data = np.random.default_rng(0).integers(0, 256, size, dtype=np.uint8)
    return layout, needs, data


@pytest.mark.parametrize(
    ("dtype", "ops"),
    [
        ("F32", (("cast", "BF16"),)),
        ("F32", (("cast", "F16"),)),
        ("F64", (("cast", "F32"),)),
        ("F16", (("cast", "F32"),)),
        ("BF16", (("cast", "F8_E4M3"),)),
        ("F8_E5M2", (("cast", "BF16"),)),
        ("I64", (("cast", "I32"),)),
        ("BF16", (("cast", "F32"), ("exp", ""), ("neg", ""))),
        ("F32", (("neg", ""),)),
    ],
)
def test_transform_is_bit_identical_to_torch_when_source_is_random(
    dtype: str, ops: tuple[tuple[UnaryOp, str], ...]
) -> None:
    targets = [name for op, name in ops if op == "cast"]
    target = targets[-1] if targets else dtype
    layout, needs, data = one_copy(dtype, (37, 53), target, (1, 37), *ops)
    (memory,) = new_memories(needs)
    CpuExecutor(layout, needs, []).move(bind(layout, needs, [data], [memory]))
    values = torch.from_numpy(data).view(TORCH_DTYPES[dtype]).view(37, 53)
    for op, name in ops:
        if op == "cast":
            values = torch.empty_like(values, dtype=TORCH_DTYPES[name]).copy_(values)
        else:
            values = values.neg() if op == "neg" else values.exp()
    expected = values.t().contiguous().view(-1).view(torch.uint8).numpy()
    assert np.array_equal(memory, expected)


@pytest.mark.parametrize("ops", [(), (("cast", "BF16"),)])
@pytest.mark.parametrize("transposed", [False, True])
def test_large_copy_is_moved_and_digested_when_it_spans_blocks(
    ops: tuple[tuple[UnaryOp, str], ...], transposed: bool
) -> None:
    shape = (1025, 2049)
    assert 4 * math.prod(shape) > 2 * BLOCK_BYTES
    strides = (1, 1025) if transposed else (2049, 1)
    whole = np.random.default_rng(1).standard_normal(math.prod(shape), dtype=np.float32)
    target = "BF16" if ops else "F32"
    layout, needs, data = one_copy("F32", shape, target, strides, *ops, data=whole.view(np.uint8))
    (memory,) = new_memories(needs)
    bound = bind(layout, needs, [data], [memory])
    executor = CpuExecutor(layout, needs, cells_of(needs))
    executor.move(bound)
    assert executor.digest_cells(bound).tolist() == [digest_tensor(data)]
    values = torch.from_numpy(whole).view(shape).to(TORCH_DTYPES[target])
    values = values.t().contiguous() if transposed else values
    assert np.array_equal(memory, values.reshape(-1).view(torch.uint8).numpy())


def test_digest_of_transformed_cell_is_of_what_was_read_when_source_changes_later() -> None:
    layout, needs, data = one_copy("F32", (100,), "F64", (1,), ("cast", "F64"))
    (memory,) = new_memories(needs)
    bound = bind(layout, needs, [data], [memory])
    executor = CpuExecutor(layout, needs, cells_of(needs))
    executor.move(bound)
    expected = digest_tensor(data)
    data[7] ^= 1
    assert executor.digest_cells(bound).tolist() == [expected]
    executor.move(bound)
    assert executor.digest_cells(bound).tolist() == [digest_tensor(data)]


def test_read_back_sees_it_when_a_bit_of_the_parameter_flips() -> None:
    layout, needs, data = one_copy("BF16", (30, 40), "BF16", (1, 30))
    (memory,) = new_memories(needs)
    bound = bind(layout, needs, [data], [memory])
    executor = CpuExecutor(layout, needs, cells_of(needs))
    executor.move(bound)
    before, unreadable = executor.read_back(bound)
    memory[999] ^= 16
    after, _ = executor.read_back(bound)
    assert unreadable == ()
    assert before.tolist() == [digest_tensor(data)]
    assert after.tolist() != before.tolist()


@pytest.mark.parametrize("dtype", ["BOOL", "U8", "F8_E4M3", "BF16", "F32", "I64", "C64"])
def test_fill_is_what_torch_fills_when_window_is_strided(dtype: str) -> None:
    parameter = ParameterSpec("p", dtype, (6, 5), (5, 1))
    needs = Needs((parameter,), (), (Fill(0, 7, (4, 2), (5, 2), 1.0), Fill(0, 0, (0,), (1,), 1.0)))
    layout = Layout((), (), ())
    (memory,) = new_memories(needs)
    expected = torch.from_numpy(memory.copy()).view(TORCH_DTYPES[dtype])
    expected.as_strided((4, 2), (5, 2), 7).fill_(1.0)
    CpuExecutor(layout, needs, []).move(bind(layout, needs, [], [memory]))
    assert np.array_equal(memory, expected.view(torch.uint8).numpy())


def test_move_is_refused_when_torch_has_no_such_operation() -> None:
    layout, needs, data = one_copy("F8_E4M3", (8,), "F8_E4M3", (1,), ("exp", ""))
    bound = bind(layout, needs, [data], new_memories(needs))
    with pytest.raises(PlanError, match=r"transform exp is of torch.float8_e4m3fn"):
        CpuExecutor(layout, needs, []).move(bound)


def test_source_may_begin_anywhere_when_it_is_not_aligned() -> None:
    layout, needs, data = one_copy("F32", (33, 9), "F64", (1, 33), ("cast", "F64"))
    memory = np.concatenate([np.zeros(3, dtype=np.uint8), data])[3:]
    assert address_of(memory) % 4 == 3
    (target,) = new_memories(needs)
    CpuExecutor(layout, needs, []).move(bind(layout, needs, [memory], [target]))
    with np.errstate(invalid="ignore"):
        expected = data.view("<f4").reshape(33, 9).T.astype("<f8")
    assert np.array_equal(target, expected.reshape(-1).view(np.uint8))
