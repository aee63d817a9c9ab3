"""Device lanes: every byte comes to every worker, whoever fills, however slow, on one host or two;
and whatever fails, nobody keeps wrong bytes, nor anything on a device."""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import pytest

from tests.unit.planning.worlds import make_world
from tests.unit.transfer.blocks import Block
from tests.unit.transfer.device_fleet import Fleet, Member, Shape, open_fleet, wait_until
from tests.unit.transfer.staging import open_staging
from tests.unit.transfer.streaming_cuda import StreamingCuda
from weightbus.consumers.errors import PlanError, ProofNeeded, SegmentUnavailable
from weightbus.consumers.planning.buckets import plan_buckets
from weightbus.consumers.reload.deadline import Deadline
from weightbus.consumers.transfer import device_filler
from weightbus.consumers.transfer.device_filler import FilledLane, Filler
from weightbus.consumers.transfer.device_lanes import number_of
from weightbus.consumers.transfer.device_slots import KEPT_OPENINGS
from weightbus.consumers.transfer.lanes import StagingCache
from weightbus.schemas.layout import Layout, SegmentSpec, ShardSpec, TensorSpec
from weightbus.schemas.shared_memory import (
    SHM_FETCHED_OFFSET,
    SHM_FILLED_OFFSET,
    SHM_HANDLE_SET_OFFSET,
)
from weightbus.schemas.worker import LaneFill, Stream


def random_weights(layout: Layout, seed: int) -> list[bytes]:
    content = np.random.default_rng(seed)
    return [content.bytes(segment.size_bytes) for segment in layout.segments]


def flat_layout(*sizes_bytes: int) -> Layout:
    """A tensor for every segment."""
    return Layout(
        tensors=tuple(TensorSpec(f"t{n}", "U8", (size,)) for n, size in enumerate(sizes_bytes)),
        shards=tuple(ShardSpec(n, (0,), (size,), n, 0) for n, size in enumerate(sizes_bytes)),
        segments=tuple(map(SegmentSpec, sizes_bytes)),
    )


def run(fleet: Fleet, seed: int) -> None:
    fleet.write(random_weights(fleet.layout, seed))
    fleet.transfer()
    fleet.check()


@pytest.mark.parametrize("seed", range(24))
def test_every_worker_reads_every_byte_when_layouts_are_random(seed: int) -> None:
    source = random.Random(seed)
    layout = make_world(seed).layout
    if not sum(segment.size_bytes for segment in layout.segments):
        layout = flat_layout(1)
    workers = source.choice([1, 2, 3])
    shape = Shape(
        hosts=1 + seed % 2,
        workers=workers,
        lanes=source.randint(1, 4),
        slots=source.randint(1, 3),
        bucket_bytes=1024 + 8 * source.randrange(64),
        staged=frozenset(n for n in range(len(layout.segments)) if source.random() < 0.4),
        slowly_s=source.choice([0.0, 1e-3]),
    )
    with open_fleet(layout, shape) as fleet:
        for version in range(3):
            run(fleet, 100 * seed + version)


@pytest.mark.parametrize(
    "shape",
    [
        Shape(),
        Shape(workers=1, lanes=3, slots=1),
        Shape(hosts=2, workers=2, lanes=2, slots=3, slowly_s=1e-3),
        Shape(hosts=2, workers=1, lanes=3, slots=2, staged=frozenset({1})),
        Shape(hosts=3, workers=2, lanes=4, slots=2, slowly_s=1e-3),
        Shape(workers=4, lanes=4, slots=2, staged=frozenset({0, 1})),
    ],
    ids=repr,
)
def test_many_buckets_come_right_version_after_version(shape: Shape) -> None:
    with open_fleet(flat_layout(60_001, 20_003), shape) as fleet:
        assert fleet.plan.buckets > 3 * shape.slots
        for version in range(3):
            run(fleet, version)
        allocated = [worker.cuda.calls["allocate"] for worker in fleet.workers]
        opened = [worker.cuda.calls["open_handle"] for worker in fleet.workers]
        for _ in range(2):
            fleet.prepare(turn := fleet.begin())
            fleet.write(random_weights(fleet.layout, 77))
            fleet.transfer(turn)
            fleet.check()
        assert [worker.cuda.calls["allocate"] for worker in fleet.workers] == allocated
        assert [worker.cuda.calls["open_handle"] for worker in fleet.workers] == opened


BIG = flat_layout(60_001, 20_003)


def test_gpus_are_let_go_of_when_transfers_go_without_device_lanes() -> None:
    with open_fleet(BIG, Shape(hosts=2)) as fleet:
        run(fleet, 0)
        for number in range(KEPT_OPENINGS):
            assert all(worker.cuda.allocated for worker in fleet.workers), number
            assert all(worker.groups.members for worker in fleet.workers), number
            for worker in fleet.workers:
                worker.device.rest()
        assert not any(worker.cuda.allocated for worker in fleet.workers)
        assert not any(worker.groups.members for worker in fleet.workers)
        again(fleet)


class Stop(Exception):
    """Of a worker that fails by itself."""


def at(bucket: int, call: Callable[[], None]) -> Callable[[int], None]:
    """A hook that calls once, before one bucket is read."""

    def before(found: int) -> None:
        if found == bucket:
            call()

    return before


def failing(error: Exception) -> Callable[[], None]:
    def fail() -> None:
        raise error

    return fail


def errors(fleet: Fleet) -> list[str]:
    return [type(worker.failure).__name__ for worker in fleet.workers]


def assert_idle(fleet: Fleet) -> None:
    """Nothing runs any more on any device, and no event is left."""
    for worker in fleet.workers:
        assert not worker.cuda.events
        assert all(worker.cuda.is_done(0, stream) for stream in worker.cuda.streams)


def again(fleet: Fleet) -> None:
    """What failed does not hinder the next transfer."""
    assert_idle(fleet)
    for worker in fleet.workers:
        worker.before = lambda bucket: None
    run(fleet, 1234)


def test_slots_are_not_filled_again_while_one_reader_is_slow() -> None:
    shape = Shape(slots=2)
    with open_fleet(BIG, shape) as fleet:
        fleet.write(random_weights(BIG, 0))
        slow, gate = fleet.workers[1], threading.Event()
        seen: list[list[int]] = []

        def look() -> None:
            blocks = fleet.hosts[0].owner.blocks
            # worker 0 fills lane 0, and runs ahead as far as there is room
            wait_until(lambda: blocks[0].word(SHM_FETCHED_OFFSET) & 0xFFFFFFFF == 5)
            time.sleep(0.05)
            seen.append([block.word(SHM_FETCHED_OFFSET) & 0xFFFFFFFF for block in blocks])
            gate.set()

        slow.before = at(3, look)
        fleet.transfer()
        fleet.check()
        assert seen[0][0] == 3 + shape.slots
        assert seen[0][1] <= 3 + shape.slots


def test_lanes_are_filled_ahead_of_their_readers_when_there_are_slots() -> None:
    with open_fleet(BIG, Shape(workers=1, lanes=1, slots=3)) as fleet:
        fleet.write(random_weights(BIG, 0))
        ahead: list[int] = []
        (worker,) = fleet.workers
        worker.before = at(0, lambda: ahead.append(len(worker.cuda.copied)))
        fleet.transfer()
        fleet.check()
        assert ahead[0] == sum(len(fleet.plan.runs_of(bucket)) for bucket in range(3))
        (timing,) = worker.timings
        assert timing.stage == "fetch"
        assert timing.bytes == int(fleet.plan.runs["size_bytes"].sum())
        assert 0 < timing.start_ns < timing.end_ns
        assert len(timing.buckets) == fleet.plan.buckets
        assert sum(bucket.bytes for bucket in timing.buckets) == timing.bytes
        assert timing.buckets[0].start_ns == timing.start_ns
        assert timing.buckets[-1].end_ns == timing.end_ns


def test_slots_are_filled_while_a_peer_has_not_begun() -> None:
    """Its engine may be paused much later; who fills is not to be taken for lost."""
    shape = Shape(hosts=2, workers=2, lanes=2, slots=2)
    with open_fleet(BIG, shape) as fleet:
        fleet.write(random_weights(BIG, 0))
        late = [host.workers[1] for host in fleet.hosts]
        seen: list[int] = []

        def see(block: Block, feed: Stream) -> None:
            wait_until(lambda: block.word(SHM_FILLED_OFFSET) == feed.turn << 32 | shape.slots)
            seen.append(shape.slots)

        for host, worker in zip(fleet.hosts, late, strict=True):
            worker.before_run = partial(see, host.owner.blocks[0])
        fleet.transfer()
        fleet.check()
        assert seen == [shape.slots] * 2


def test_long_runs_are_copied_piece_by_piece(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(device_filler, "COPY_BYTES", 100)
    with open_fleet(BIG, Shape()) as fleet:
        run(fleet, 0)
        for worker in fleet.workers:
            assert max(size_bytes for _, _, size_bytes in worker.cuda.copied) == 100


def test_broadcasts_follow_one_order_whatever_groups_they_are_of() -> None:
    with open_fleet(BIG, Shape(hosts=2, workers=1, lanes=3, slots=2, slowly_s=1e-3)) as fleet:
        order: list[tuple[int, int]] = []
        members = fleet.workers[0].groups
        fleet.write(random_weights(BIG, 0))
        sent = Member.broadcast

        def broadcast(member: Member, *args: Any, **rest: Any) -> None:
            if member in members.members.values():
                lane = int(next(g for g, m in members.members.items() if m is member)[1:])
                order.append((len(member.sent), lane))
            sent(member, *args, **rest)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Member, "broadcast", broadcast)
            fleet.transfer()
        fleet.check()
        buckets = range(fleet.plan.buckets)
        assert order == [(bucket, lane) for bucket in buckets for lane in range(3)]


def test_readers_that_leave_do_not_make_room_for_what_other_hosts_have_not_got() -> None:
    with open_fleet(BIG, Shape(hosts=2, workers=1, lanes=2, slots=2, slowly_s=2e-3)) as fleet:
        fleet.write(random_weights(BIG, 0))
        fleet.workers[0].before = at(1, failing(ProofNeeded("version", "test")))
        fleet.transfer()
        assert errors(fleet) == ["ProofNeeded", "NoneType"]
        assert not fleet.workers[0].groups.dropped
        fleet.check([fleet.workers[1]])
        again(fleet)


def test_others_get_every_byte_when_a_worker_needs_a_proof() -> None:
    with open_fleet(BIG, Shape(workers=3, lanes=3)) as fleet:
        fleet.write(random_weights(BIG, 0))
        fleet.workers[1].before = at(2, failing(ProofNeeded("version", "test")))
        fleet.transfer()
        assert errors(fleet) == ["NoneType", "ProofNeeded", "NoneType"]
        fleet.check([fleet.workers[0], fleet.workers[2]])
        again(fleet)


@pytest.mark.parametrize("hosts", [1, 2])
def test_all_fail_soon_and_go_on_when_an_owner_gives_up(hosts: int) -> None:
    with open_fleet(BIG, Shape(hosts=hosts, slowly_s=1e-3)) as fleet:
        fleet.write(random_weights(BIG, 0))
        turn = fleet.begin()
        fleet.workers[0].before = at(2, lambda: fleet.give_up(turn))
        since = time.monotonic()
        fleet.transfer(turn)
        assert time.monotonic() - since < 5.0
        assert set(errors(fleet)) <= {"SegmentUnavailable", "PeerLost"}
        assert "SegmentUnavailable" in errors(fleet)
        again(fleet)


@pytest.mark.parametrize("hosts", [1, 2])
def test_all_fail_and_go_on_when_a_worker_fails(hosts: int) -> None:
    with open_fleet(BIG, Shape(hosts=hosts, workers=2, lanes=4, slowly_s=1e-3)) as fleet:
        fleet.write(random_weights(BIG, 0))
        fleet.workers[-1].before = at(2, failing(Stop()))
        fleet.transfer()
        *others, last = errors(fleet)
        assert last == "Stop"
        assert set(others) <= {"SegmentUnavailable", "PeerLost"}
        if hosts == 2:
            assert sorted(fleet.workers[-1].groups.dropped) == ["g1", "g3"]
        again(fleet)


def test_first_error_is_told_when_the_device_refuses_to_forget_an_event(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with open_fleet(BIG, Shape(slots=4)) as fleet:
        fleet.write(random_weights(BIG, 0))
        worker, idle = fleet.workers[0], threading.Event()
        is_done = worker.cuda.is_done

        def wait_idle(device: int, stream: int) -> bool:
            idle.set()
            return is_done(device, stream)

        def hold_later_buckets(number: int) -> None:
            assert number < 2 or idle.wait(30.0)

        monkeypatch.setattr(worker.cuda, "is_done", wait_idle)
        worker.cuda.before_copy = hold_later_buckets

        def stop(bucket: int) -> None:
            worker.cuda.fail("destroy_event")
            raise Stop

        worker.before = stop
        fleet.transfer()
        assert errors(fleet)[0] == "Stop"
        assert len(worker.cuda.events) == 1, "all others are forgotten"
        worker.cuda.events.clear()


def test_broadcasts_that_do_not_end_are_told(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    with open_fleet(BIG, Shape(hosts=2, slowly_s=1e-3)) as fleet:
        fleet.write(random_weights(BIG, 0))
        worker = fleet.workers[0]
        monkeypatch.setattr(worker.groups, "wait_burials", lambda deadline_s: 3)
        worker.before = at(1, failing(Stop()))
        fleet.transfer()
        assert "3 broadcasts go on after 2 s" in caplog.text
        again(fleet)


def test_wait_ends_when_an_owner_is_gone() -> None:
    with open_fleet(BIG, Shape(staged=frozenset({0, 1}))) as fleet:
        fleet.write(random_weights(BIG, 0))
        fleet.withheld = lambda bucket: bucket == 3
        fleet.workers[0].before = at(2, fleet.hosts[0].owner.vanish)
        fleet.transfer()
        assert errors(fleet) == ["SegmentUnavailable"] * 2
        assert_idle(fleet)


def test_deadline_is_told_when_a_group_is_not_admitted() -> None:
    with open_fleet(BIG, Shape(hosts=2, workers=1, lanes=1)) as fleet:
        fleet.write(random_weights(BIG, 0))
        fleet.withheld = lambda bucket: bucket == 3
        fleet.transfer(deadline_s=0.5)
        assert "DeadlineExceeded" in errors(fleet)
        assert "NoneType" not in errors(fleet)
        fleet.withheld = lambda bucket: False
        again(fleet)


@pytest.mark.parametrize("which", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("hosts", [1, 2])
def test_nobody_takes_bytes_of_a_segment_that_was_written_meanwhile(
    which: float, hosts: int
) -> None:
    """Be it the last bucket: that it is there is not told."""
    with open_fleet(BIG, Shape(hosts=hosts, slots=1)) as fleet:
        run(fleet, 0)
        filler = fleet.workers[0]
        last = len(filler.cuda.copied) - 1

        def overwrite() -> None:
            for block in fleet.hosts[0].segments:
                block.generation += 2

        filler.cuda.copied.clear()
        filler.cuda.before_copy = at(round(which * last), overwrite)
        fleet.write(random_weights(BIG, 1))
        fleet.transfer()
        assert "NoneType" not in errors(fleet)
        assert "TornRead" in errors(fleet)
        filler.cuda.before_copy = lambda number: None
        again(fleet)


def test_peer_whose_slots_change_under_a_reader_is_noticed() -> None:
    with open_fleet(BIG, Shape()) as fleet:
        fleet.write(random_weights(BIG, 0))
        block = fleet.hosts[0].owner.blocks[1]
        number = block.word(SHM_HANDLE_SET_OFFSET)
        fleet.workers[0].before = at(2, lambda: block.set_word(SHM_HANDLE_SET_OFFSET, number + 7))
        fleet.transfer()
        assert errors(fleet) == ["SegmentUnavailable"] * 2
        assert "must stay where they were opened" in str(fleet.workers[0].failure)


def test_slots_are_opened_anew_when_a_worker_is_replaced() -> None:
    with open_fleet(BIG, Shape(hosts=2, workers=2, lanes=2)) as fleet:
        run(fleet, 0)
        replaced = fleet.workers[1]
        replaced.close()
        replaced.open()
        opened = fleet.workers[0].cuda.calls["open_handle"]
        run(fleet, 1)
        assert fleet.workers[0].cuda.calls["open_handle"] == opened + 1
        assert fleet.workers[2].cuda.calls["open_handle"] == opened


def test_preparing_leaves_nothing_to_do_and_moves_nothing() -> None:
    shape = Shape(hosts=2, workers=2, lanes=3, staged=frozenset({1}))
    with open_fleet(BIG, shape) as fleet:
        fleet.write(random_weights(BIG, 0))
        fleet.prepare(turn := fleet.begin())
        assert not any(worker.cuda.copied for worker in fleet.workers)
        calls = ("allocate", "export", "open_handle", "register", "create_stream")
        before = [[worker.cuda.calls[name] for name in calls] for worker in fleet.workers]
        assert all(min(counts) > 0 for counts in before)
        fleet.transfer(turn)
        fleet.check()
        after = [[worker.cuda.calls[name] for name in calls] for worker in fleet.workers]
        assert after == before


def test_preparing_before_the_turn_has_begun_is_no_hindrance() -> None:
    with open_fleet(BIG, Shape(hosts=2, workers=1, lanes=1)) as fleet:
        fleet.write(random_weights(BIG, 0))
        fleet.prepare(turn := fleet.begin() + 1)
        assert fleet.begin() == turn
        fleet.transfer(turn)
        fleet.check()


@pytest.mark.parametrize("method", ["copy_async", "record_event", "allocate", "export"])
def test_device_that_refuses_is_told_and_leaves_nothing(method: str) -> None:
    with open_fleet(BIG, Shape(hosts=2, slowly_s=1e-3)) as fleet:
        fleet.write(random_weights(BIG, 0))
        fleet.workers[0].cuda.fail(method)
        fleet.transfer()
        assert errors(fleet)[0] == "CudaFailed"
        assert "NoneType" not in errors(fleet)
        again(fleet)


def test_peer_whose_slots_cannot_be_opened_is_named() -> None:
    with open_fleet(BIG, Shape()) as fleet:
        fleet.write(random_weights(BIG, 0))
        fleet.workers[0].cuda.fail("open_handle", "CUDA_ERROR_INVALID_VALUE")
        fleet.transfer()
        assert fleet.hosts[0].owner.names[1] in str(fleet.workers[0].failure)
        assert errors(fleet) == ["SegmentUnavailable"] * 2
        again(fleet)


def test_lanes_are_refused_by_a_worker_that_has_no_gpu() -> None:
    with pytest.raises(SegmentUnavailable, match="told to a worker on cpu"):
        number_of("cpu")
    assert number_of("cuda") == 0
    assert number_of("cuda:3") == 3


def test_feed_is_refused_when_it_names_other_segments_than_the_layout() -> None:
    with open_fleet(BIG, Shape()) as fleet:
        fleet.write(random_weights(BIG, 0))
        for host in fleet.hosts:
            host.sources.append(host.sources[0])
        fleet.transfer()
        assert errors(fleet) == ["PlanError"] * 2


class Short:
    """A segment that is shorter than its layout says."""

    name, size_bytes, address = "short", 60_000, 4096

    def check(self) -> None:
        pytest.fail("nothing is read")


def test_nothing_is_queued_when_a_run_would_leave_its_segment() -> None:
    plan = plan_buckets(BIG, 2048, 1)
    cuda = StreamingCuda()
    fill = LaneFill(0, 0)
    feed = Stream(
        lanes=("weightbus-x",), bucket_bytes=2048, slots=1, turn=1, reader=0, device=True, readers=1
    )
    budget = Deadline("test", 30.0)
    with (
        open_staging(1, 0) as owner,
        StagingCache().open_all(owner.names, 0, 1, budget) as blocks,
    ):
        lane = FilledLane(fill=fill, block=blocks[0], address=4096)
        sources = {0: Short(), 1: Short()}
        with pytest.raises(PlanError, match=r"segment 0 is 60000 bytes long: .* up to 60001"):
            Filler(plan, feed, [lane], sources, cuda, 0, (1, 2), budget)
    assert not cuda.calls


def test_block_without_slots_is_refused_when_something_has_to_be_staged_there() -> None:
    with open_fleet(BIG, Shape()) as fleet:
        fleet.write(random_weights(BIG, 0))
        for host in fleet.hosts:
            host.sources[1] = None
        fleet.transfer()
        assert set(errors(fleet)) == {"SegmentUnavailable"}
        assert any("must hold 4,096" in str(worker.failure) for worker in fleet.workers)
