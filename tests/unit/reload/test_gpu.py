"""The executor for GPUs leaves what the one for main memory leaves, and digests to the same.

Its kernel is interpreted here; `tests/gpu` has it compiled.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from msgspec import structs

from tests.unit.planning.worlds import UNWRITTEN, Bytes, World, make_world, memory_bytes
from tests.unit.reload.interpreted import interpreted_executor, interpreting
from tests.unit.reload.test_cpu import (
    address_of,
    bind,
    cells_of,
    digest_of_cell,
    new_memories,
    one_copy,
)
from weightbus.bus.digest import digest_tensor
from weightbus.consumers.errors import PlanError
from weightbus.consumers.planning.cells import plan_cells
from weightbus.consumers.planning.tiles import BoundTiles, TilePlan, bind_tiles, plan_tiles
from weightbus.consumers.reload.cpu import CpuExecutor
from weightbus.consumers.reload.dtypes import TORCH_DTYPES
from weightbus.consumers.reload.executor import Executor
from weightbus.consumers.reload.portions import cut_portions
from weightbus.consumers.reload.programs import BLOCK_BYTES
from weightbus.schemas.dtypes import DTYPE_BYTES
from weightbus.schemas.layout import Layout, SegmentSpec, ShardSpec, TensorSpec
from weightbus.schemas.needs import Copy, Fill, Needs, ParameterSpec, Transform, UnaryOp
from weightbus.schemas.worker import Cell


@pytest.fixture(scope="module", autouse=True)
def _interpreter() -> Iterator[None]:
    with interpreting():
        yield


Make = Callable[[Layout, Needs, Sequence[Cell]], Executor]


@pytest.fixture(params=[CpuExecutor, interpreted_executor], ids=["cpu", "gpu"])
def make(request: pytest.FixtureRequest) -> Make:
    """Both executors."""
    found: Make = request.param
    return found


def odd_memory(size_bytes: int, residue: int, value: int | None = None) -> Bytes:
    """Memory that begins `residue` bytes after a multiple of 8."""
    raw = np.zeros(size_bytes + 16, dtype=np.uint8)
    begin = (residue - address_of(raw)) % 8
    memory = raw[begin : begin + size_bytes]
    if value is not None:
        memory[:] = value
    return memory


def cut_cells(needs: Needs, layout: Layout, rng: random.Random) -> list[Cell]:
    """Every copy's box as one cell, as several, or (unless it transforms) only in part; and a
    tensor that no copy holds."""
    cells = []
    for number, copy in enumerate(needs.copies):
        if not all(copy.sizes):
            continue
        wide = [dim for dim, size in enumerate(copy.sizes) if size > 1]
        if not wide or rng.random() < 0.3:
            cells.append(Cell(copy.tensor, copy.starts, copy.sizes, number))
            continue
        dim = rng.choice(wide)
        middle = rng.randrange(1, copy.sizes[dim])
        parts = [(0, middle), (middle, copy.sizes[dim])]
        if copy.transform < 0 and rng.random() < 0.3:
            parts.pop(rng.randrange(2))
        for begin, end in parts:
            starts, sizes = list(copy.starts), list(copy.sizes)
            starts[dim], sizes[dim] = starts[dim] + begin, end - begin
            cells.append(Cell(copy.tensor, tuple(starts), tuple(sizes), number))
    unheld = rng.randrange(len(layout.tensors))
    shape = layout.tensors[unheld].shape
    if all(shape):
        cells.append(Cell(unheld, (0,) * len(shape), shape, -1))
    rng.shuffle(cells)
    return cells


def check_both(world: World, needs: Needs, rng: random.Random) -> None:
    cells = cut_cells(needs, world.layout, rng)
    segments = [odd_memory(one.size, rng.choice([0, 0, 1, 2, 4, 6])) for one in world.segments]
    for memory, one in zip(segments, world.segments, strict=True):
        memory[:] = one
    residues = [rng.choice([0, 0, 1, 2, 4]) for _ in needs.parameters]
    found = []
    for make in (CpuExecutor, interpreted_executor):
        memories = [
            odd_memory(memory_bytes(one), residue, UNWRITTEN)
            for one, residue in zip(needs.parameters, residues, strict=True)
        ]
        bound = bind(world.layout, needs, segments, memories)
        executor: Executor = make(world.layout, needs, cells)
        executor.prepare(bound.plan)
        changed_before = executor.changed_parameter(bound)
        assert all((memory == UNWRITTEN).all() for memory in memories), "comparing writes nothing"
        digests = executor.update(bound, range(len(cells))).tolist()
        assert digests == executor.digest_cells(bound).tolist()
        assert executor.changed_parameter(bound) is None
        found.append((digests, executor.read_back(bound), changed_before is None, memories))
    (digests, back, is_same, memories), (on_gpu, back_on_gpu, is_same_on_gpu, of_gpu) = found
    assert on_gpu == digests == [digest_of_cell(world, cell) for cell in cells]
    assert back_on_gpu[0].tolist() == back[0].tolist()
    assert (back_on_gpu[1], is_same_on_gpu) == (back[1], is_same)
    assert all(map(np.array_equal, of_gpu, memories))


@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 2**32))
def test_bytes_and_digests_are_the_cpus_when_world_is_random(seed: int) -> None:
    world, rng = make_world(seed, ranks=2), random.Random(seed)
    for needs in world.needs:
        check_both(world, needs, rng)


@pytest.mark.parametrize("dtype", sorted(DTYPE_BYTES))
@pytest.mark.parametrize("residue", [0, 3])
def test_every_dtype_is_moved_and_digested_when_it_is_turned_reversed_or_a_column(
    dtype: str, residue: int
) -> None:
    item, shape = DTYPE_BYTES[dtype], (11, 7)
    layout = Layout(
        (TensorSpec("t", dtype, shape), TensorSpec("s", dtype, ()), TensorSpec("e", dtype, (0, 3))),
        (ShardSpec(0, (0, 0), shape, 0, item), ShardSpec(1, (), (), 0, 0)),
        (SegmentSpec(item * 78),),
    )
    whole = ParameterSpec("", dtype, (77,), (1,))
    needs = Needs(
        (whole, whole, whole, whole, ParameterSpec("", dtype, (), ()), whole),
        (
            Copy(0, (0, 0), shape, 0, 0, (7, 1)),
            Copy(0, (0, 0), shape, 1, 0, (1, 11)),
            Copy(0, (0, 0), shape, 2, 76, (-7, -1)),
            Copy(0, (0, 3), (11, 1), 3, 5, (1, 1)),
            Copy(1, (), (), 4, 0, ()),
            Copy(2, (0, 0), (0, 3), 5, 0, (3, 1)),
        ),
    )
    data = np.random.default_rng(5).integers(0, 256, item * 78, dtype=np.uint8)
    source = odd_memory(data.size, residue * item)
    source[:] = data
    cells = [Cell(copy.tensor, copy.starts, copy.sizes, n) for n, copy in enumerate(needs.copies)]
    found = []
    for make in (CpuExecutor, interpreted_executor):
        memories = [odd_memory(memory_bytes(p), item, UNWRITTEN) for p in needs.parameters]
        bound = bind(layout, needs, [source], memories)
        digests = make(layout, needs, cells).update(bound, range(len(cells))).tolist()
        found.append((digests, [memory.tobytes() for memory in memories]))
    assert found[0] == found[1]
    tensor = data[item:]
    assert found[1][0][:3] == [digest_tensor(tensor)] * 3
    assert found[1][1][1] == tensor.view(f"V{item}").reshape(shape).T.tobytes()


@pytest.mark.parametrize(
    ("dtype", "ops"),
    [
        ("F32", (("cast", "BF16"),)),
        ("F64", (("cast", "F32"),)),
        ("BF16", (("cast", "F8_E4M3"),)),
        ("I64", (("cast", "I32"),)),
        ("BF16", (("cast", "F32"), ("exp", ""), ("neg", ""))),
        ("F32", (("neg", ""),)),
    ],
)
@pytest.mark.parametrize("strides", [(53, 1), (1, 37), (-53, 1), (-1, -37)])
def test_transform_is_the_cpus_when_window_runs_any_way(
    dtype: str, ops: tuple[tuple[UnaryOp, str], ...], strides: tuple[int, int]
) -> None:
    targets = [name for op, name in ops if op == "cast"]
    layout, needs, data = one_copy(dtype, (37, 53), targets[-1] if targets else dtype, (1, 1), *ops)
    offset = sum((n - 1) * -step for n, step in zip((37, 53), strides, strict=True) if step < 0)
    copy = structs.replace(needs.copies[0], offset=offset, strides=strides)
    needs = structs.replace(needs, copies=(copy,))
    found = []
    for make in (CpuExecutor, interpreted_executor):
        (memory,) = new_memories(needs)
        bound = bind(layout, needs, [data], [memory])
        executor: Executor = make(layout, needs, cells_of(needs))
        assert executor.changed_parameter(bound) == 0
        assert executor.move(bound) == data.size
        assert executor.digest_cells(bound).tolist() == [digest_tensor(data)]
        assert executor.changed_parameter(bound) is None
        memory[-1] ^= 1
        assert executor.changed_parameter(bound) == 0
        assert executor.read_back(bound)[1] == (0,)
        found.append(memory.tobytes())
    assert found[0] == found[1]


def test_copy_that_transforms_is_whole_when_it_takes_many_blocks() -> None:
    shape = (3, BLOCK_BYTES // 16, 3)
    assert 4 * math.prod(shape) > 2 * BLOCK_BYTES
    data = np.random.default_rng(1).standard_normal(math.prod(shape), dtype=np.float32)
    strides = (3 * shape[1], 3, 1)
    layout, needs, source = one_copy(
        "F32", shape, "BF16", strides, ("cast", "BF16"), data=data.view(np.uint8)
    )
    (memory,) = new_memories(needs)
    bound = bind(layout, needs, [source], [memory])
    executor = interpreted_executor(layout, needs, cells_of(needs))
    assert executor.update(bound, [0]).tolist() == [digest_tensor(source)]
    expected = torch.from_numpy(data).to(torch.bfloat16).view(torch.uint8).numpy()
    assert np.array_equal(memory, expected)


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("item", [1, 2, 8])
def test_copy_of_many_tiles_is_moved_and_digested(item: int, transposed: bool) -> None:
    dtype, shape = {1: "U8", 2: "BF16", 8: "F64"}[item], (513, 1026 // item)
    strides = (1, shape[0]) if transposed else (shape[1], 1)
    layout, needs, data = one_copy(dtype, shape, dtype, strides)
    (memory,) = new_memories(needs)
    bound = bind(layout, needs, [data], [memory])
    executor = interpreted_executor(layout, needs, cells_of(needs))
    assert executor.update(bound, [0]).tolist() == [digest_tensor(data)]
    assert executor.read_back(bound)[0].tolist() == [digest_tensor(data)]
    matrix = data.view(f"V{item}").reshape(shape)
    assert memory.tobytes() == (matrix.T if transposed else matrix).tobytes()


@pytest.mark.parametrize("dtype", ["BOOL", "U8", "F8_E4M3", "BF16", "F32", "I64", "C64"])
def test_fill_is_what_torch_fills_when_window_is_strided(dtype: str, make: Make) -> None:
    parameter = ParameterSpec("p", dtype, (6, 5), (5, 1))
    fills = (
        Fill(0, 7, (2, 2), (5, 2), 1.0),
        Fill(0, 0, (0,), (1,), 1.0),
        Fill(0, 29, (3, 2), (-1, -5), 1.0),
    )
    needs, layout = Needs((parameter,), (), fills), Layout((), (), ())
    (memory,) = new_memories(needs)
    expected = torch.from_numpy(memory.copy()).view(TORCH_DTYPES[dtype])
    expected.as_strided((2, 2), (5, 2), 7).fill_(1.0)
    expected.as_strided((2, 3), (5, 1), 22).fill_(1.0)
    make(layout, needs, []).move(bind(layout, needs, [], [memory]))
    assert np.array_equal(memory, expected.view(torch.uint8).numpy())


def test_move_is_refused_when_torch_has_no_such_operation() -> None:
    layout, needs, data = one_copy("F8_E4M3", (8,), "F8_E4M3", (1,), ("exp", ""))
    bound = bind(layout, needs, [data], new_memories(needs))
    with pytest.raises(PlanError, match=r"transform exp is of torch.float8_e4m3fn"):
        interpreted_executor(layout, needs, []).move(bound)


def test_cells_of_a_portion_are_digested_with_it(make: Make) -> None:
    world = make_world(25, ranks=1)
    (needs,) = world.needs
    (cells,) = plan_cells(world.layout, [needs]).cells
    memories = new_memories(needs)
    executor = make(world.layout, needs, cells)
    plan = plan_tiles(world.layout, needs)
    found: dict[int, int] = {}
    portions = cut_portions(plan, 1)
    assert len(portions) > 1
    for portion in portions:
        bound = at(portion.plan, world, memories)
        copies = set(portion.plan.pieces.copy.tolist())
        numbers = [n for n, cell in enumerate(cells) if cell.copy in copies]
        found.update(zip(numbers, executor.update(bound, numbers).tolist(), strict=True))
    assert found == {n: digest_of_cell(world, cells[n]) for n in found}
    assert found.keys() == {n for n, cell in enumerate(cells) if cell.copy >= 0}
    last = [n for n in found if needs.copies[cells[n].copy].transform < 0]
    assert executor.digest_cells(bound, last).tolist() == [found[n] for n in last]


def at(plan: TilePlan, world: World, memories: list[Bytes]) -> BoundTiles:
    return bind_tiles(
        plan,
        [address_of(segment) for segment in world.segments],
        [segment.size for segment in world.segments],
        [address_of(memory) for memory in memories],
        [memory.size for memory in memories],
    )


def test_nothing_is_launched_when_a_tile_would_leave_its_parameter() -> None:
    layout, needs, data = one_copy("F32", (100,), "F32", (1,))
    (memory,) = new_memories(needs)
    bound = bind(layout, needs, [data], [memory])
    executor = interpreted_executor(layout, needs, [])
    for short, thing in (
        (replace(bound, parameter_sizes=(399,)), "parameter 0"),
        (replace(bound, segment_sizes=(399,)), "segment 0"),
    ):
        with pytest.raises(PlanError, match=f"{thing} is 399 bytes long"):
            executor.move(short)
    assert (memory == UNWRITTEN).all()


def test_transformed_cell_keeps_its_digest_when_its_source_changes_later(make: Make) -> None:
    layout, needs, data = one_copy("F32", (100,), "F64", (1,), ("cast", "F64"))
    (memory,) = new_memories(needs)
    bound = bind(layout, needs, [data], [memory])
    executor = make(layout, needs, cells_of(needs))
    executor.move(bound)
    expected = digest_tensor(data)
    data[7] ^= 1
    assert executor.digest_cells(bound).tolist() == [expected]
    executor.move(bound)
    assert executor.digest_cells(bound).tolist() == [digest_tensor(data)]


def test_read_back_sees_it_when_a_bit_of_the_parameter_flips(make: Make) -> None:
    layout, needs, data = one_copy("BF16", (30, 40), "BF16", (1, 30))
    (memory,) = new_memories(needs)
    bound = bind(layout, needs, [data], [memory])
    executor = make(layout, needs, cells_of(needs))
    executor.move(bound)
    memory[999] ^= 16
    digests, unreadable = executor.read_back(bound)
    assert unreadable == ()
    assert digests.tolist() != [digest_tensor(data)]


def test_table_is_made_anew_when_addresses_are_less_aligned() -> None:
    layout, needs, data = one_copy("F32", (10, 12), "F32", (1, 10))
    executor = interpreted_executor(layout, needs, cells_of(needs))
    plan = plan_tiles(layout, needs)
    for residue in (0, 4, 2, 1, 0):
        source, memory = odd_memory(480, residue), odd_memory(480, (3 * residue) % 8, UNWRITTEN)
        source[:] = data
        bound = bind_tiles(plan, [address_of(source)], [480], [address_of(memory)], [480])
        assert executor.update(bound, [0]).tolist() == [digest_tensor(data)]
        assert memory.tobytes() == data.view("<f4").reshape(10, 12).T.tobytes()


def test_copies_of_several_transforms_share_a_gathering() -> None:
    tensors = tuple(TensorSpec(f"t{n}", "F32", (n, 3)) for n in range(1, 6))
    sizes = [12 * n for n in range(1, 6)]
    begins = np.cumsum([0, *sizes]).tolist()
    layout = Layout(
        tensors,
        tuple(ShardSpec(n, (0, 0), t.shape, 0, begins[n]) for n, t in enumerate(tensors)),
        (SegmentSpec(begins[-1]),),
    )
    needs = Needs(
        tuple(ParameterSpec(f"p{n}", "BF16", t.shape, (3, 1)) for n, t in enumerate(tensors)),
        tuple(Copy(n, (0, 0), t.shape, n, 0, (3, 1), 0) for n, t in enumerate(tensors)),
        (),
        (Transform((("cast", "BF16"),)),),
    )
    data = np.random.default_rng(2).standard_normal(begins[-1] // 4, dtype=np.float32)
    memories = new_memories(needs)
    bound = bind(layout, needs, [data.view(np.uint8)], memories)
    executor = interpreted_executor(layout, needs, cells_of(needs))
    digests = executor.update(bound, range(5)).tolist()
    for number, memory in enumerate(memories):
        part = data[begins[number] // 4 : begins[number + 1] // 4]
        assert digests[number] == digest_tensor(part.view(np.uint8))
        expected = torch.from_numpy(part).to(torch.bfloat16).view(torch.uint8).numpy()
        assert np.array_equal(memory, expected)
