"""Communicators of workers that are threads of one process, over a stub of libnccl."""

from __future__ import annotations

import ctypes
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, cast
from urllib.parse import urlsplit

import msgspec
import pytest
import torch.distributed

from tests.nccl_stub import FOLDER, StubCuda, build_stub, load_stub, why_no_stub
from weightbus.bus.errors import NcclFailed, NcclUnavailable
from weightbus.bus.nccl import Nccl, load_nccl
from weightbus.consumers.errors import DeadlineExceeded, PeerLost, RouteUnavailable
from weightbus.consumers.transfer.communicators import (
    COMMUNICATORS_KEPT,
    Communicator,
    Communicators,
)
from weightbus.consumers.transfer.groups import open_meeting
from weightbus.schemas.worker import LaneFill

ADDRESS = "127.0.0.1"
DEADLINE_S = 30.0
SHORT_S = 0.3
REMOTE, CUDA = 6, 1


class GivenUp(Exception):
    pass


class Hosts:
    """Workers, one on each host, that meet at the first one's."""

    def __init__(self, rendezvous: str, stub: ctypes.CDLL, nccl: Nccl, count: int) -> None:
        self.rendezvous, self.stub = rendezvous, stub
        self.cudas = [StubCuda(stub) for _ in range(count)]
        self.nccls: list[Callable[[], Nccl]] = [lambda: nccl] * count
        self.workers = [self._worker(place) for place in range(count)]

    def _worker(self, place: int) -> Communicators:
        return Communicators(
            0,
            nccl=lambda: self.nccls[place](),
            cuda=lambda: self.cudas[place],
            form_s=5.0,
        )

    def fill(self, place: int, group: str, key: str, rendezvous: str | None = None) -> LaneFill:
        return LaneFill(
            lane=0,
            number=0,
            place=place,
            size=len(self.workers),
            group=group,
            rendezvous=self.rendezvous if rendezvous is None else rendezvous,
            key=key,
        )

    def open(
        self, group: str, key: str, deadline_s: float = DEADLINE_S
    ) -> list[Communicator | Exception]:
        """What every worker gets, or is told."""

        def open_on(place: int) -> Communicator | Exception:
            try:
                return self.workers[place].open(self.fill(place, group, key), deadline_s)
            except Exception as error:  # noqa: BLE001 - the test looks at it
                return error

        with ThreadPoolExecutor(len(self.workers)) as threads:
            return list(threads.map(open_on, range(len(self.workers))))

    def formed(self, group: str, key: str) -> list[Communicator]:
        return [whole(one) for one in self.open(group, key)]


def whole(one: Communicator | Exception) -> Communicator:
    assert isinstance(one, Communicator), one
    return one


def told(opened: Sequence[Communicator | Exception]) -> list[type]:
    return [type(one) for one in opened]


@contextmanager
def buffer(cuda: StubCuda, size_bytes: int) -> Iterator[tuple[int, int]]:
    """Device memory and a stream."""
    address, stream = cuda.allocate(0, size_bytes), cuda.create_stream(0)
    yield address, stream
    cuda.destroy_stream(0, stream)
    cuda.free(0, address)


def check_until(member: Communicator, limit_s: float) -> None:
    end = time.monotonic() + limit_s
    while time.monotonic() < end:
        member.check()
        time.sleep(1e-3)


def give_up() -> None:
    raise GivenUp


@pytest.fixture(scope="session")
def library(tmp_path_factory: pytest.TempPathFactory) -> str:
    if why_no_stub():
        pytest.skip(why_no_stub())
    return build_stub(tmp_path_factory.mktemp("nccl"))


@pytest.fixture
def hosts(library: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hosts]:
    """Of three workers."""
    monkeypatch.setenv(FOLDER, str(tmp_path))
    stub = load_stub(library)
    with open_meeting(ADDRESS) as meeting:
        hosts = Hosts(meeting.rendezvous, stub, load_nccl(library), 3)
        yield hosts
        stub.stub_refuse(b"nothing", 0, b"")
        assert [worker.close(DEADLINE_S) for worker in hosts.workers] == [0] * 3
    assert stub.stub_communicators() == 0, "all are aborted"
    for cuda in hosts.cudas:
        cuda.assert_clean()
        assert not cuda.streams


@pytest.fixture
def slow(hosts: Hosts) -> Iterator[Callable[[int], None]]:
    """So many milliseconds NCCL takes to queue something, and to abort."""
    yield hosts.stub.stub_slow
    hosts.stub.stub_slow(0)


def broadcast(hosts: Hosts, members: Sequence[Communicator], root: int, size_bytes: int) -> None:
    """What every member holds afterwards is what the root held before."""
    buffers = [(cuda.allocate(0, size_bytes), cuda.create_stream(0)) for cuda in hosts.cudas]
    for place, (cuda, (address, _)) in enumerate(zip(hosts.cudas, buffers, strict=True)):
        cuda.write(0, address, bytes([place + 1]) * size_bytes)

    def run(place: int) -> None:
        address, stream = buffers[place]
        members[place].broadcast(address, size_bytes, root, stream)
        end = time.monotonic() + DEADLINE_S
        while not hosts.cudas[place].is_done(0, stream):
            members[place].check()
            assert time.monotonic() < end
            time.sleep(1e-3)

    with ThreadPoolExecutor(len(members)) as threads:
        list(threads.map(run, range(len(members))))
    for cuda, (address, stream) in zip(hosts.cudas, buffers, strict=True):
        assert cuda.read(0, address, size_bytes) == bytes([root + 1]) * size_bytes
        cuda.destroy_stream(0, stream)
        cuda.free(0, address)


def test_bytes_of_every_root_reach_every_member(hosts: Hosts) -> None:
    members = hosts.formed("g", "plan 1")
    for root in range(3):
        for size_bytes in (1, 4097, 2**20):
            broadcast(hosts, members, root, size_bytes)
    members[0].broadcast(0, 0, 0, 0)


def test_group_of_one_needs_nobody() -> None:
    def fail() -> Nccl:
        raise NcclUnavailable("none", "nothing")

    alone = Communicators(0, nccl=fail)
    (opened,) = alone.open_all([LaneFill(lane=0, number=0)], DEADLINE_S)
    opened.broadcast(0, 1000, 0, 0)
    opened.check()
    assert alone.close(DEADLINE_S) == 0


def test_same_plan_finds_its_communicator_at_once(hosts: Hosts) -> None:
    members = hosts.formed("g", "plan 1")
    hosts.rendezvous = "tcp://127.0.0.1:1"
    assert hosts.formed("g", "plan 1") == members


def test_communicator_is_kept_for_the_next_plan_when_all_members_have_it(hosts: Hosts) -> None:
    members = hosts.formed("g", "plan 1")
    assert hosts.formed("g", "plan 2") == members
    broadcast(hosts, members, 1, 1000)
    assert hosts.stub.stub_communicators() == 3


def test_nothing_is_left_where_members_have_met_plan_after_plan(hosts: Hosts) -> None:
    where, dist = urlsplit(hosts.rendezvous), cast(Any, torch.distributed)
    store = dist.TCPStore(where.hostname, where.port)
    before = store.num_keys()
    for number in range(3):
        hosts.formed("g", f"plan {number}")
    assert store.num_keys() == before


def test_another_one_is_formed_when_one_member_has_lost_it(hosts: Hosts) -> None:
    before = hosts.formed("g", "plan 1")
    hosts.workers[2].drop("g")
    after = hosts.formed("g", "plan 2")
    assert {one.incarnation for one in before} & {one.incarnation for one in after} == set()
    assert len({one.incarnation for one in after}) == 1
    with pytest.raises(PeerLost, match="dropped"):
        before[0].check()
    broadcast(hosts, after, 2, 1000)


def test_another_one_is_formed_when_one_has_failed_meanwhile(hosts: Hosts) -> None:
    before = hosts.formed("g", "plan 1")
    hosts.stub.stub_refuse(b"ncclCommGetAsyncError", REMOTE, b"")
    after = hosts.formed("g", "plan 2")
    assert before[0].incarnation != after[0].incarnation
    broadcast(hosts, after, 0, 1000)


def test_several_groups_are_opened_in_their_order_and_used_side_by_side(hosts: Hosts) -> None:
    def open_on(place: int) -> tuple[Communicator, ...]:
        fills = [hosts.fill(place, name, "plan 1") for name in "xy"]
        return hosts.workers[place].open_all(fills, DEADLINE_S)

    with ThreadPoolExecutor(3) as threads:
        opened = list(threads.map(open_on, range(3)))
    for lane in zip(*opened, strict=True):
        broadcast(hosts, lane, 1, 1000)


def test_communicators_that_no_plan_uses_are_dropped_beyond_the_limit(hosts: Hosts) -> None:
    names = [f"g{number}" for number in range(COMMUNICATORS_KEPT + 3)]
    for number, name in enumerate(names):
        hosts.formed(name, f"plan {number}")
    assert [worker.ids for worker in hosts.workers] == [tuple(names[2:])] * 3
    assert [worker.wait_burials(DEADLINE_S) for worker in hosts.workers] == [0] * 3
    assert hosts.stub.stub_communicators() == 3 * (COMMUNICATORS_KEPT + 1)


def test_group_is_lost_when_a_member_does_not_come(hosts: Hosts) -> None:
    begin = time.monotonic()
    with pytest.raises(PeerLost, match=r"group g, shared with place 0, place 2: .*did not meet"):
        hosts.workers[1].open(hosts.fill(1, "g", "plan 1"), SHORT_S)
    assert time.monotonic() - begin < 2 * SHORT_S + 0.5
    assert hosts.workers[1].ids == ()
    with pytest.raises(PeerLost, match="did not meet"):
        hosts.workers[1].open(hosts.fill(1, "g", "plan 1"), DEADLINE_S)
    broadcast(hosts, hosts.formed("g", "plan 2"), 0, 1000)


def test_member_that_comes_late_is_waited_for_until_the_deadline(
    hosts: Hosts, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It may have hundreds of gigabytes to register before."""
    late, begin = threading.Event(), time.monotonic()
    for worker in hosts.workers[:2]:
        monkeypatch.setattr(worker, "_form_s", SHORT_S)

    def check() -> None:
        if time.monotonic() > begin + 2 * SHORT_S:
            late.set()

    def open_on(place: int) -> Communicator:
        assert place < 2 or late.wait(DEADLINE_S)
        return hosts.workers[place].open(hosts.fill(place, "g", "plan 1"), DEADLINE_S, check)

    with ThreadPoolExecutor(3) as threads:
        members = list(threads.map(open_on, range(3)))
    broadcast(hosts, members, 1, 1000)


@pytest.mark.parametrize("rendezvous", ["", "nowhere", "tcp://127.0.0.1", "udp://127.0.0.1:1"])
def test_group_is_lost_when_its_rendezvous_makes_no_sense(hosts: Hosts, rendezvous: str) -> None:
    with pytest.raises(PeerLost, match="tcp://host:port"):
        hosts.workers[0].open(hosts.fill(0, "g", "plan 1", rendezvous), DEADLINE_S)


def test_waiting_ends_when_the_transfer_is_given_up(hosts: Hosts) -> None:
    end = time.monotonic() + 0.1

    def check() -> None:
        if time.monotonic() >= end:
            raise GivenUp

    with pytest.raises(GivenUp):
        hosts.workers[0].open(hosts.fill(0, "g", "plan 1"), DEADLINE_S, check)
    with pytest.raises(PeerLost, match="this member has left it while it was formed: GivenUp"):
        hosts.workers[0].open(hosts.fill(0, "g", "plan 1"), DEADLINE_S)


def test_members_are_told_when_one_has_no_nccl(hosts: Hosts) -> None:
    def fail() -> Nccl:
        raise NcclUnavailable("it is not there", "install it")

    hosts.nccls[1] = fail
    opened = hosts.open("g", "plan 1")
    assert told(opened) == [PeerLost, RouteUnavailable, PeerLost]
    assert all("no NCCL: it is not there. To get it: install it" in str(one) for one in opened)
    assert "place 1: " in str(opened[2])


def test_members_are_told_when_their_versions_differ(hosts: Hosts) -> None:
    older = hosts.nccls[2]()
    older = Nccl(older._nccl, older.path, 21805)
    hosts.nccls[2] = lambda: older
    opened = hosts.open("g", "plan 1")
    assert told(opened) == [PeerLost] * 3
    assert all("different versions: 2.18.5, 2.28.9" in str(one) for one in opened)


def test_members_are_told_when_there_is_no_id(hosts: Hosts) -> None:
    hosts.stub.stub_refuse(b"ncclGetUniqueId", 2, b"no interface")
    opened = hosts.open("g", "plan 1")
    assert told(opened) == [PeerLost] * 3
    assert all("no interface" in str(one) for one in opened)


@pytest.mark.parametrize(
    ("code", "error"), [(CUDA, NcclFailed), (REMOTE, PeerLost)], ids=["own", "others"]
)
@pytest.mark.parametrize("call", ["what is begun", "ncclBroadcast"])
def test_forming_ends_for_all_when_it_fails_for_one(
    hosts: Hosts, call: str, code: int, error: type
) -> None:
    hosts.stub.stub_refuse(call.encode(), code, b"")
    opened = hosts.open("g", "plan 1", 1.0)
    at_fault = [one for one in opened if "stood still" not in str(one)]
    assert told(at_fault) == [error], opened
    assert told([one for one in opened if one not in at_fault]) == [PeerLost] * 2
    assert [worker.ids for worker in hosts.workers] == [()] * 3
    assert [worker.wait_burials(DEADLINE_S) for worker in hosts.workers] == [0] * 3
    broadcast(hosts, hosts.formed("g", "plan 2"), 0, 1000)


def test_broadcast_is_lost_when_it_is_dropped_meanwhile(hosts: Hosts) -> None:
    members = hosts.formed("g", "plan 1")
    cuda = hosts.cudas[0]
    with buffer(cuda, 1000) as (address, stream):
        members[0].broadcast(address, 1000, 0, stream)
        assert not cuda.is_done(0, stream), "nobody else takes part"
        timer = threading.Timer(0.1, hosts.workers[0].drop, ["g"])
        timer.start()
        with pytest.raises(PeerLost, match="dropped"):
            check_until(members[0], DEADLINE_S)
        timer.join()
        assert hosts.workers[0].wait_burials(DEADLINE_S) == 0
        assert cuda.is_done(0, stream), "its kernels have ended"


def test_queueing_ends_when_it_takes_too_long_or_is_given_up(
    hosts: Hosts, slow: Callable[[int], None]
) -> None:
    members = hosts.formed("g", "plan 1")
    slow(1000)
    with ExitStack() as stack:
        buffers = [stack.enter_context(buffer(cuda, 8)) for cuda in hosts.cudas[:2]]
        with pytest.raises(PeerLost, match=r"queueing 8 bytes of place 0 stood still for 0\.1 s"):
            members[0].broadcast(buffers[0][0], 8, 0, buffers[0][1], queue_s=0.1)
        with pytest.raises(GivenUp):
            members[1].broadcast(buffers[1][0], 8, 0, buffers[1][1], check=give_up)
        for worker in hosts.workers:
            worker.drop("g")
        assert [worker.wait_burials(DEADLINE_S) for worker in hosts.workers] == [0] * 3


def test_nobody_waits_for_a_burial_unless_asked_to(
    hosts: Hosts, slow: Callable[[int], None]
) -> None:
    hosts.formed("g", "plan 1")
    slow(1000)
    begin = time.monotonic()
    assert hosts.workers[0].close(0.01) == 1
    hosts.workers[1].drop("g")
    assert time.monotonic() - begin < 0.5
    assert hosts.workers[1].burials == 1
    assert hosts.workers[1].wait_burials(DEADLINE_S) == 0


def test_burial_ends_when_nccl_refuses_to_abort(hosts: Hosts) -> None:
    hosts.formed("g", "plan 1")
    hosts.stub.stub_refuse(b"ncclCommAbort", CUDA, b"the device is lost")
    assert [worker.close(DEADLINE_S) for worker in hosts.workers] == [0] * 3


@pytest.mark.parametrize(
    ("decision", "expected"),
    [
        (b"\xc1", "did not meet at .*: DecodeError"),
        (msgspec.msgpack.encode([False, b"short", ""]), "an id of 5 bytes"),
        (msgspec.msgpack.encode([False, bytes(129), ""]), "did not meet at .*: ValidationError"),
    ],
)
def test_group_is_lost_when_what_place_0_says_makes_no_sense(
    hosts: Hosts, decision: bytes, expected: str
) -> None:
    where, dist = urlsplit(hosts.rendezvous), cast(Any, torch.distributed)
    store = dist.TCPStore(where.hostname, where.port)
    store.set("nccl/g/plan 1/decision", decision)
    with pytest.raises(PeerLost, match=expected):
        hosts.workers[1].open(hosts.fill(1, "g", "plan 1"), DEADLINE_S)


def test_connection_is_closed_when_the_members_do_not_meet(hosts: Hosts) -> None:
    where, dist = urlsplit(hosts.rendezvous), cast(Any, torch.distributed)
    store = dist.TCPStore(where.hostname, where.port)
    before = len(list(Path("/proc/self/fd").iterdir()))
    for number in range(5):
        store.set(f"nccl/g/plan {number}/decision", b"\xc1")
        with pytest.raises(PeerLost):
            hosts.workers[1].open(hosts.fill(1, "g", f"plan {number}"), DEADLINE_S)
    end = time.monotonic() + DEADLINE_S
    while (after := len(list(Path("/proc/self/fd").iterdir()))) > before:
        assert time.monotonic() < end, f"{after} descriptors, before {before}"
        time.sleep(1e-2)


def test_nothing_is_opened_while_too_many_are_buried_or_another_thread_opens(
    hosts: Hosts, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("weightbus.consumers.transfer.communicators.GRAVES", 0)
    with pytest.raises(DeadlineExceeded, match="burial of dropped communicators"):
        hosts.workers[0].open(hosts.fill(0, "g", "plan 1"), 0.1)
    monkeypatch.undo()
    thread = threading.Thread(target=lambda: hosts.open("g", "plan 1", 1.0))
    with hosts.workers[0]._opening:
        thread.start()
        with pytest.raises(DeadlineExceeded, match="forming communicators"):
            hosts.workers[0].open(hosts.fill(0, "g", "plan 1"), 0.1)
    thread.join()
