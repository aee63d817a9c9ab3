"""Threads do every call once, and none is left behind; what they do is what one thread does."""

from __future__ import annotations

import threading
from functools import partial
from itertools import pairwise

import numpy as np
import pytest

from tests.unit.planning.worlds import make_world
from tests.unit.reload.test_cpu import address_of, bind, cells_of, new_memories, one_copy
from weightbus.bus.digest import digest_tensor
from weightbus.consumers.planning.cells import plan_cells
from weightbus.consumers.reload.cpu import CpuExecutor
from weightbus.consumers.reload.jobs import JOB_BYTES, WINDOW_BYTES, cut_run
from weightbus.consumers.reload.threads import MOST_THREADS, Threads, threads_per_worker
from weightbus.schemas.dtypes import DTYPE_BYTES
from weightbus.schemas.layout import Layout, SegmentSpec, ShardSpec, TensorSpec
from weightbus.schemas.needs import Copy, Needs, ParameterSpec

WAIT_S = 30.0


def own_threads() -> list[threading.Thread]:
    return [one for one in threading.enumerate() if one.name.startswith("weightbus-move")]


@pytest.mark.parametrize("count", [1, 2, 5])
@pytest.mark.parametrize("calls", [0, 1, 3, 200])
def test_every_call_is_made_once_and_results_are_in_order(count: int, calls: int) -> None:
    made: list[int] = []

    def call(number: int) -> int:
        made.append(number)
        return number * number

    threads = Threads(count)
    try:
        found = threads.run([partial(call, number) for number in range(calls)])
    finally:
        threads.close()
    assert found == [number * number for number in range(calls)]
    assert sorted(made) == list(range(calls))


def test_calls_run_side_by_side_when_there_are_several_threads() -> None:
    barrier = threading.Barrier(3)
    threads = Threads(3)
    try:
        threads.run([lambda: barrier.wait(WAIT_S)] * 3)
    finally:
        threads.close()
    assert not barrier.broken


@pytest.mark.parametrize("is_caller", [True, False])
def test_error_is_raised_once_all_begun_calls_have_ended(is_caller: bool) -> None:
    both, failed = threading.Barrier(2), threading.Event()
    ended: list[str] = []

    def call() -> None:
        both.wait(WAIT_S)
        if (threading.current_thread() is threading.main_thread()) == is_caller:
            failed.set()
            raise ValueError("this one")
        assert failed.wait(WAIT_S)
        ended.append("other")

    threads = Threads(2)
    later: list[int] = []
    try:
        with pytest.raises(ValueError, match="this one"):
            threads.run([call, call])
        assert ended == ["other"]
        assert threads.run([lambda: later.append(1)] * 4) == [None] * 4
    finally:
        threads.close()
    assert later == [1] * 4


def test_no_further_call_is_begun_when_one_has_failed() -> None:
    begun: list[int] = []

    def call(number: int) -> None:
        begun.append(number)
        raise ValueError(str(number))

    threads = Threads(3)
    try:
        with pytest.raises(ValueError, match=r"\d"):
            threads.run([partial(call, number) for number in range(500)])
    finally:
        threads.close()
    assert len(begun) <= 3


def test_no_thread_is_left_when_closed() -> None:
    before = set(own_threads())
    threads = Threads(4)
    for _ in range(2):  # closed threads start again when they are needed
        barrier = threading.Barrier(4)
        threads.run([partial(barrier.wait, WAIT_S)] * 4)
        assert len(set(own_threads()) - before) == 3
        threads.close()
        assert set(own_threads()) == before
    threads.close()


def test_no_thread_is_started_when_count_is_one() -> None:
    before = set(own_threads())
    names = Threads(1).run([lambda: threading.current_thread().name] * 5)
    assert names == [threading.current_thread().name] * 5
    assert set(own_threads()) == before


@pytest.mark.parametrize(
    ("cores", "workers", "expected"), [(1, 1, 1), (2, 1, 2), (2, 4, 1), (96, 8, 8), (40, 8, 5)]
)
def test_worker_takes_its_share_of_the_cores(cores: int, workers: int, expected: int) -> None:
    assert threads_per_worker(cores, workers) == expected <= MOST_THREADS


@pytest.mark.parametrize("threads", [1, 3, 8])
@pytest.mark.parametrize("size_bytes", [0, 1, JOB_BYTES, JOB_BYTES + 1, 10 * JOB_BYTES + 3])
def test_parts_of_a_run_hold_every_byte_once(size_bytes: int, threads: int) -> None:
    parts = list(cut_run(size_bytes, threads))
    assert len(parts) <= threads
    assert [n for part in parts for n in part[:1]] == [0, *(end for _, end in parts[:-1])][
        : len(parts)
    ]
    assert (parts[-1][1] if parts else 0) == size_bytes


@pytest.mark.parametrize("seed", range(40))
def test_threads_leave_what_one_thread_leaves_when_world_is_random(seed: int) -> None:
    world = make_world(seed)
    threads = Threads(3)
    try:
        for rank, needs in enumerate(world.needs):
            (cells,) = plan_cells(world.layout, [needs]).cells
            found = []
            for one in (Threads(), threads):
                memories = new_memories(needs)
                bound = bind(world.layout, needs, world.segments, memories)
                executor = CpuExecutor(world.layout, needs, cells, one)
                digests = executor.update(bound, range(len(cells)))
                assert digests.tolist() == executor.digest_cells(bound).tolist()
                found.append((memories, digests.tolist()))
            (alone, digests_alone), (shared, digests_shared) = found
            assert digests_alone == digests_shared, f"rank {rank}"
            assert all(map(np.array_equal, alone, shared)), f"rank {rank}"
    finally:
        threads.close()


@pytest.mark.parametrize("dtype", sorted(DTYPE_BYTES))
@pytest.mark.parametrize("is_turned", [False, True])
@pytest.mark.parametrize("is_digested", [False, True])
def test_large_and_small_copies_are_whole_when_threads_share_them(
    dtype: str, is_turned: bool, is_digested: bool
) -> None:
    item_bytes = DTYPE_BYTES[dtype]
    rows = 129
    shapes = [(rows, columns // item_bytes) for columns in (40_000, 24, 8, 24_000, 800, 808)]
    sizes = [item_bytes * rows * columns for rows, columns in shapes]
    assert max(sizes) > 4 * JOB_BYTES
    starts = np.cumsum([0, *sizes]).tolist()
    layout = Layout(
        tuple(TensorSpec(f"t{n}", dtype, shape) for n, shape in enumerate(shapes)),
        tuple(ShardSpec(n, (0, 0), shape, 0, starts[n]) for n, shape in enumerate(shapes)),
        (SegmentSpec(starts[-1]),),
    )
    needs = Needs(
        tuple(ParameterSpec(f"p{n}", dtype, (a * b,), (1,)) for n, (a, b) in enumerate(shapes)),
        tuple(
            Copy(n, (0, 0), shape, n, 0, (1, rows) if is_turned else (shape[1], 1), -1)
            for n, shape in enumerate(shapes)
        ),
        (),
        (),
    )
    data = np.random.default_rng(3).integers(0, 256, starts[-1], dtype=np.uint8)
    memories = new_memories(needs)
    threads = Threads(3)
    try:
        executor = CpuExecutor(layout, needs, cells_of(needs), threads)
        bound = bind(layout, needs, [data], memories)
        chosen = range(len(shapes)) if is_digested else ()
        digests = executor.update(bound, chosen).tolist()
    finally:
        threads.close()
    tensors = [data[begin:end] for begin, end in pairwise(starts)]
    assert digests == [digest_tensor(tensors[number]) for number in chosen]
    for shape, tensor, memory in zip(shapes, tensors, memories, strict=True):
        whole = tensor.view(f"V{item_bytes}").reshape(shape)
        expected = np.ascontiguousarray(whole.T if is_turned else whole)
        assert memory.tobytes() == expected.tobytes()


def test_cell_is_whole_when_it_is_larger_than_a_window() -> None:
    shape = (WINDOW_BYTES // 4096 + 1, 1024)
    layout, needs, data = one_copy("F32", shape, "F32", (1024, 1))
    (memory,) = new_memories(needs)
    threads = Threads(2)
    try:
        executor = CpuExecutor(layout, needs, cells_of(needs), threads)
        bound = bind(layout, needs, [data], [memory])
        assert bound.parameter_addresses.tolist() == [address_of(memory)]
        digests = executor.update(bound, [0]).tolist()
        back, unreadable = executor.read_back(bound)
    finally:
        threads.close()
    assert digests == [digest_tensor(data)] == back.tolist()
    assert unreadable == ()
    assert np.array_equal(memory, data)
