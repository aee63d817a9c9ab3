"""Process groups between members of one process, each with `Groups` of its own."""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from typing import Any, cast

import anyio
import anyio.to_thread
import numpy as np
import pytest

from weightbus.consumers.errors import PeerLost, RouteUnavailable
from weightbus.consumers.transfer.groups import (
    CHUNK_BYTES,
    GROUPS_KEPT,
    MARGIN_S,
    GlooExchange,
    Groups,
    _Forming,
    _serve_store,
    open_meeting,
)
from weightbus.schemas.rounds import Group, Member

pytestmark = pytest.mark.anyio

ADDRESS = "127.0.0.1"
DEADLINE_S = 20.0
STALL_S = 0.3
OPERATION_S = 2.0


class Hosts:
    """Hosts that meet at the first one."""

    def __init__(self, rendezvous: str, groups: Sequence[Groups]) -> None:
        self.rendezvous, self.groups = rendezvous, groups

    def lane(self, id: str, *, met: bool = False) -> Group:
        members = tuple(Member(f"e{host}", 0) for host in range(len(self.groups)))
        return Group(id=id, members=members, rendezvous="" if met else self.rendezvous)

    async def open_all(
        self, ids: Sequence[str], epoch: int, *, met: bool = False
    ) -> list[tuple[GlooExchange, ...]]:
        """Every host's groups."""
        opened: list[tuple[GlooExchange, ...]] = [()] * len(self.groups)

        async def open_on(host: int) -> None:
            lanes = [(self.lane(name, met=met), host) for name in ids]
            opened[host] = await self.groups[host].open_all(lanes, f"plan {epoch}", DEADLINE_S)

        async with anyio.create_task_group() as tasks:
            for host in range(len(self.groups)):
                tasks.start_soon(open_on, host)
        return opened


def make_hosts(count: int) -> Iterator[Hosts]:
    with ExitStack() as stack:
        meeting = stack.enter_context(open_meeting(ADDRESS))
        hosts = Hosts(
            meeting.rendezvous,
            [Groups(ADDRESS, form_s=1.0, operation_s=OPERATION_S) for _ in range(count)],
        )
        for groups in hosts.groups:
            stack.callback(groups.close, 2 * OPERATION_S)
        yield hosts


@pytest.fixture
def hosts() -> Iterator[Hosts]:
    yield from make_hosts(3)


async def exchange(members: Sequence[GlooExchange], root: int, size_bytes: int) -> None:
    """What every member holds afterwards is what the root held before."""
    memories = [np.full(size_bytes, member.place + 1, dtype=np.uint8) for member in members]
    async with anyio.create_task_group() as tasks:
        for member, memory in zip(members, memories, strict=True):
            tasks.start_soon(member.broadcast, memory.ctypes.data, memory.nbytes, root, DEADLINE_S)
    for memory in memories:
        assert (memory == root + 1).all(), (root, size_bytes, memory[:8])


async def test_bytes_of_every_root_reach_every_member_in_every_lane(hosts: Hosts) -> None:
    opened = await hosts.open_all(["x", "y"], 1)
    for lane in zip(*opened, strict=True):
        for root in range(3):
            for size_bytes in (0, 1, 4097, 3 * 2**20):
                await exchange(lane, root, size_bytes)


async def test_members_hear_what_every_other_says(hosts: Hosts) -> None:
    opened = await hosts.open_all(["x"], 1)
    said = [b"\1", b"\2", b"\3"]
    heard: list[tuple[bytes, ...]] = []

    async def say(member: GlooExchange, answer: bytes) -> None:
        heard.append(await member.roll_call(answer, DEADLINE_S))

    for length in (1, 8):
        async with anyio.create_task_group() as tasks:
            for (member,), word in zip(opened, said, strict=True):
                tasks.start_soon(say, member, word * length)
        assert heard == [tuple(word * length for word in said)] * 3
        heard.clear()


async def test_roll_call_is_over_as_soon_as_its_members_have_answered() -> None:
    """A millisecond is the event loop's shortest sleep; a bucket takes hardly more."""

    class Work:
        looks = 0

        def is_completed(self) -> bool:
            self.looks += 1
            return self.looks > 20

        def wait(self, timeout: object) -> None:
            pass

    class Members:
        def allreduce(self, tensors: object, options: object) -> Work:
            return Work()

    group = Group(id="g", members=(Member("a", 0), Member("b", 0)))
    exchange, took_s = GlooExchange(group, 0, Members()), []
    for _ in range(5):
        begin_s = time.perf_counter()
        await exchange.roll_call(b"\1", DEADLINE_S)
        took_s.append(time.perf_counter() - begin_s)
    assert min(took_s) < 10e-3, f"{took_s} s, for what is done when it was looked at 20 times"


@pytest.mark.parametrize("met", [False, True])
async def test_groups_that_met_before_are_used_again(hosts: Hosts, met: bool) -> None:
    first = await hosts.open_all(["x"], 1)
    again = await hosts.open_all(["x"], 2, met=met)
    assert [one[0] is other[0] for one, other in zip(first, again, strict=True)] == [True] * 3
    assert [groups.ids for groups in hosts.groups] == [("x",)] * 3
    await exchange([lane for (lane,) in again], 2, 1000)


async def test_group_of_one_needs_nobody() -> None:
    groups = Groups(ADDRESS)
    alone = Group(id="x", members=(Member("e0", 0),))
    (lane,) = await groups.open_all([(alone, 0)], "plan", DEADLINE_S)
    await lane.broadcast(0, 1000, 0, DEADLINE_S)


async def test_group_is_lost_when_a_member_does_not_come(hosts: Hosts) -> None:
    lanes = [(hosts.lane(name), 0) for name in ("x", "y")]
    with pytest.raises(PeerLost, match=r"group [xy], shared with e1/0, e2/0: .*did not meet"):
        await hosts.groups[0].open_all(lanes, "plan", DEADLINE_S)
    assert hosts.groups[0].ids == ()


async def test_group_is_lost_when_it_should_be_ready_and_is_not(hosts: Hosts) -> None:
    with pytest.raises(PeerLost, match="not ready here"):
        await hosts.groups[0].open_all([(hosts.lane("x", met=True), 0)], "plan", DEADLINE_S)


@pytest.mark.parametrize("rendezvous", ["nowhere", "tcp://127.0.0.1", "udp://127.0.0.1:1"])
async def test_group_is_lost_when_its_rendezvous_makes_no_sense(rendezvous: str) -> None:
    group = Group(id="x", members=(Member("a", 0), Member("b", 0)), rendezvous=rendezvous)
    with pytest.raises(PeerLost, match="tcp://host:port"):
        await Groups(ADDRESS).open_all([(group, 0)], "plan", DEADLINE_S)


async def test_group_is_lost_when_a_member_drops_it_and_another_can_be_formed(
    hosts: Hosts,
) -> None:
    opened = await hosts.open_all(["x"], 1)
    hosts.groups[1].drop_nowait(["x"])
    assert not opened[1][0].writing()
    memory = np.zeros(1000, dtype=np.uint8)
    with pytest.raises(PeerLost, match="shared with e1/0, e2/0"):
        await opened[0][0].broadcast(memory.ctypes.data, memory.nbytes, 1, DEADLINE_S)
    with pytest.raises(PeerLost, match="dropped"):
        await opened[1][0].broadcast(memory.ctypes.data, memory.nbytes, 1, DEADLINE_S)
    assert not opened[0][0].writing(), "what has failed has ended"
    hosts.groups[0].drop_nowait(["x"])
    hosts.groups[2].drop_nowait(["x"])
    again = await hosts.open_all(["x"], 2)
    await exchange([lane for (lane,) in again], 0, 1000)


async def test_memory_is_let_go_only_after_the_operation_that_stood_still(hosts: Hosts) -> None:
    opened = await hosts.open_all(["x"], 1)
    memory = np.zeros(1000, dtype=np.uint8)
    begin = anyio.current_time()
    with pytest.raises(PeerLost, match=r"1,000 bytes of member 1 stood still for 0\.3 s"):
        await opened[0][0].broadcast(memory.ctypes.data, memory.nbytes, 1, STALL_S)
    hosts.groups[0].drop_nowait(["x"])
    assert anyio.current_time() - begin < STALL_S + MARGIN_S, "nobody waits for a burial"
    assert hosts.groups[0].burials == 1
    assert opened[0][0].writing()
    assert await anyio.to_thread.run_sync(hosts.groups[0].close, 2 * OPERATION_S) == 0
    assert not opened[0][0].writing()
    took_s = anyio.current_time() - begin
    assert STALL_S + MARGIN_S / 2 < took_s < OPERATION_S, "a grave is soon closed"


@pytest.mark.parametrize("is_cancelled", [False, True])
async def test_group_ends_in_its_grave_when_somebody_keeps_the_error(
    hosts: Hosts, is_cancelled: bool
) -> None:
    """Else whoever lets go of the error destroys the group, and waits for its operation: the
    garbage collector does so in the event loop."""
    opened = await hosts.open_all(["x"], 1)
    kept: list[BaseException] = []
    begin = anyio.current_time()
    with anyio.move_on_after(STALL_S / 3 if is_cancelled else DEADLINE_S):
        try:
            await opened[0][0].roll_call(b"\1", STALL_S)
        except BaseException as error:
            kept.append(error)
            if not isinstance(error, PeerLost):
                raise
    assert [isinstance(error, PeerLost) for error in kept] == [not is_cancelled]
    hosts.groups[0].drop_nowait(["x"])
    assert await anyio.to_thread.run_sync(hosts.groups[0].close, 2 * OPERATION_S) == 0
    took_s = anyio.current_time() - begin
    assert took_s > STALL_S + MARGIN_S / 2, f"buried after {took_s} s, and its operation goes on"


async def test_closing_does_not_outlast_its_deadline(hosts: Hosts) -> None:
    opened = await hosts.open_all(["x", "y"], 1)
    memory = np.zeros(1000, dtype=np.uint8)
    with pytest.raises(PeerLost):
        await opened[0][0].broadcast(memory.ctypes.data, memory.nbytes, 1, 0.0)
    begin = anyio.current_time()
    assert hosts.groups[0].close(0.1) == 1
    assert anyio.current_time() - begin < OPERATION_S / 2


async def test_groups_that_no_plan_uses_are_dropped_beyond_the_limit() -> None:
    for hosts in make_hosts(1):
        for number in range(GROUPS_KEPT + 5):
            await hosts.open_all([f"g{number}"], number)
        assert hosts.groups[0].ids == tuple(f"g{number}" for number in range(4, GROUPS_KEPT + 5))


def test_meeting_is_on_its_address_only() -> None:
    with pytest.raises(RouteUnavailable, match=r"192\.0\.2\.1"), open_meeting("192.0.2.1"):
        pass


async def test_bytes_of_several_operations_reach_every_member(hosts: Hosts) -> None:
    opened = await hosts.open_all(["x"], 1)
    await exchange([lane for (lane,) in opened], 1, 2 * CHUNK_BYTES + 5)


class SlowGroup:
    """Operations that end one after the other."""

    def __init__(self, seconds: float) -> None:
        self._seconds, self._end = seconds, anyio.current_time()
        self.timeouts: list[float] = []

    def broadcast(self, tensors: Sequence[object], options: Any) -> SlowWork:
        self.timeouts.append(options.timeout.total_seconds())
        self._end += self._seconds
        return SlowWork(self._end)


class SlowWork:
    def __init__(self, end: float) -> None:
        self._end = end

    def is_completed(self) -> bool:
        return anyio.current_time() >= self._end

    def wait(self, timeout: object) -> None:
        assert self.is_completed()


@pytest.mark.parametrize("seconds", [0.6 * STALL_S, 1.5 * STALL_S])
async def test_broadcast_is_given_up_when_it_makes_no_progress_however_long_it_takes(
    seconds: float,
) -> None:
    group = Group(id="x", members=(Member("a", 0), Member("b", 0)))
    slow = SlowGroup(seconds)
    member = GlooExchange(group, 0, slow)
    memory = np.zeros(4 * CHUNK_BYTES, dtype=np.uint8)
    if seconds < STALL_S:
        await member.broadcast(memory.ctypes.data, memory.nbytes, 0, STALL_S)
        assert not member.writing()
    else:
        with pytest.raises(PeerLost, match="stood still"):
            await member.broadcast(memory.ctypes.data, memory.nbytes, 0, STALL_S)
        assert member.writing()
    assert slow.timeouts == [pytest.approx(STALL_S + MARGIN_S)] * 4


async def test_group_is_lost_when_forming_it_raises_anything(hosts: Hosts) -> None:
    groups = Groups(cast(str, 5), form_s=1.0, operation_s=OPERATION_S)
    with pytest.raises(PeerLost, match=r"did not form at tcp:.*: TypeError"):
        await groups.open_all([(hosts.lane("x"), 1)], "plan", DEADLINE_S)


async def test_whatever_a_call_raises_is_raised_to_who_waits_for_it() -> None:
    def fail() -> None:
        raise OSError("no")

    with pytest.raises(OSError, match="no"):
        await _Forming(fail).wait()


@pytest.mark.parametrize("closes", [False, True])
def test_socket_is_closed_when_the_store_fails(closes: bool) -> None:
    listener = socket.create_server((ADDRESS, 0))
    fds: list[int] = []

    def fail(*_: object, master_listen_fd: int, **__: object) -> None:
        fds.append(master_listen_fd)
        if closes:
            os.close(master_listen_fd)
        raise RuntimeError("no")

    with pytest.raises(RuntimeError):
        _serve_store(fail, ADDRESS, listener)
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(fds[0])
