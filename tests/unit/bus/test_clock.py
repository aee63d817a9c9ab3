"""The bus's clock, measured by hosts whose own is hours off, over links that are slow one way."""

from __future__ import annotations

import random
from dataclasses import dataclass, field

import anyio
import pytest

from weightbus.bus.clock import DRIFT_PPM, EVERY_S, BusClock, ClockReading, HostClock
from weightbus.bus.errors import BusTimeout
from weightbus.bus.link import Interrupted, NoResponders

pytestmark = pytest.mark.anyio

EPOCH_NS = 1_700_000_000_000_000_000
MS = 10**6
HOUR_NS = 3600 * 10**9


@dataclass
class World:
    """A server and one host, whose clocks go as they are told; a request takes its two ways."""

    skew_ns: int = 0
    """The host's wall clock minus the server's."""
    ways: list[tuple[int, int]] = field(default_factory=list)
    """Of the next requests, how long they and their answers take; then 1 ms both."""
    failures: list[Exception] = field(default_factory=list)
    """What the next requests raise."""
    asked: int = 0
    passed_ns: int = 0
    """Since the beginning, by a perfect clock."""
    drift_ppm: int = 0
    """Of the host's clocks."""
    set_ns: int = 0
    """By how much the host's wall clock was set since."""
    server_set_ns: int = 0

    def host(self) -> HostClock:
        return HostClock(wall_ns=self.wall_ns, steady_ns=self.steady_ns)

    def server_ns(self) -> int:
        return EPOCH_NS + self.passed_ns + self.server_set_ns

    def steady_ns(self) -> int:
        return 5 * HOUR_NS + self.passed_ns + self.passed_ns * self.drift_ppm // 10**6

    def wall_ns(self) -> int:
        return EPOCH_NS - 5 * HOUR_NS + self.steady_ns() + self.skew_ns + self.set_ns

    async def probe(self) -> int:
        self.asked += 1
        there_ns, back_ns = self.ways.pop(0) if self.ways else (MS, MS)
        self.passed_ns += there_ns
        stamp_ns = self.server_ns()
        self.passed_ns += back_ns
        if self.failures:
            raise self.failures.pop(0)
        await anyio.lowlevel.checkpoint()
        return stamp_ns


def off_ns(world: World, clock: BusClock | ClockReading) -> int:
    return abs(clock.now_ns() - world.server_ns())


def residual_of(reading: ClockReading) -> int:
    assert reading.residual_ns is not None
    return reading.residual_ns


@pytest.mark.parametrize("skew_ns", [0, 7 * HOUR_NS, -7 * HOUR_NS, 90 * MS])
async def test_time_is_that_of_the_server_when_the_host_has_another(skew_ns: int) -> None:
    world = World(skew_ns=skew_ns)
    clock = BusClock(world.probe, world.host())
    assert await clock.measure()
    reading = clock.reading()
    assert off_ns(world, reading) <= residual_of(reading) <= 2 * MS
    assert abs(reading.offset_ns + skew_ns) <= residual_of(reading)
    worked_ns = world.wall_ns()
    assert abs(reading.bus_ns(worked_ns) - world.server_ns()) <= residual_of(reading)


async def test_residual_holds_what_is_off_when_ways_are_unlike() -> None:
    random.seed(7)
    for _ in range(200):
        ways = [(random.randrange(90 * MS), random.randrange(90 * MS)) for _ in range(3)]
        world = World(skew_ns=random.randrange(-HOUR_NS, HOUR_NS), ways=list(ways))
        clock = BusClock(world.probe, world.host())
        assert await clock.measure()
        reading = clock.reading()
        assert off_ns(world, reading) <= residual_of(reading), ways
        shortest_ns = min(there + back for there, back in ways)
        assert residual_of(reading) <= shortest_ns // 2 + 1 + 600 * MS * DRIFT_PPM // 10**6, ways


async def test_quickest_answer_counts_when_others_are_slow() -> None:
    world = World(ways=[(80 * MS, 1 * MS), (1 * MS, 1 * MS), (1 * MS, 80 * MS)])
    clock = BusClock(world.probe, world.host())
    assert await clock.measure(probes=3)
    assert off_ns(world, clock) <= residual_of(clock.reading()) < 2 * MS


@pytest.mark.parametrize(
    "error", [BusTimeout("request", 5.0), Interrupted("request"), NoResponders("request")]
)
async def test_times_are_the_hosts_when_nobody_answers(error: Exception) -> None:
    world = World(skew_ns=HOUR_NS, failures=[error])
    clock = BusClock(world.probe, world.host())
    assert not await clock.measure()
    reading = clock.reading()
    assert reading.residual_ns is None
    assert (reading.offset_ns, reading.bus_ns(17)) == (0, 17)
    assert reading.now_ns() == world.wall_ns()
    assert await clock.measure()
    assert residual_of(clock.reading()) <= 2 * MS
    assert off_ns(world, clock) <= 2 * MS


async def test_answers_before_a_lost_one_count_when_it_is_lost() -> None:
    world = World(skew_ns=HOUR_NS)
    clock = BusClock(world.probe, world.host())

    async def probe_twice() -> int:
        if world.asked == 1:
            raise Interrupted("request")
        return await world.probe()

    clock = BusClock(probe_twice, world.host())
    assert await clock.measure()
    assert off_ns(world, clock) <= 2 * MS


async def test_opening_goes_on_when_the_answer_does_not_come_in_time() -> None:
    async def never() -> int:
        await anyio.sleep_forever()
        raise AssertionError

    clock = BusClock(never)
    with anyio.fail_after(30):
        assert not await clock.measure(within_s=0.01)
    assert clock.reading().residual_ns is None


async def test_residual_grows_by_the_drift_until_it_is_measured_again() -> None:
    world = World(drift_ppm=-DRIFT_PPM)
    clock = BusClock(world.probe, world.host())
    await clock.measure()
    before = residual_of(clock.reading())
    world.passed_ns += HOUR_NS
    grown = residual_of(clock.reading())
    assert grown - before == pytest.approx(HOUR_NS * DRIFT_PPM / 10**6, rel=1e-3)
    assert off_ns(world, clock) <= grown
    await clock.measure()
    assert off_ns(world, clock) <= residual_of(clock.reading()) <= 2 * MS


async def test_clock_that_is_slewed_is_off_by_what_is_stated_until_it_is_measured_again() -> None:
    world = World(drift_ppm=500)
    clock = BusClock(world.probe, world.host())
    await clock.measure()
    world.passed_ns += int(EVERY_S * 1e9)
    passed_by_ns = off_ns(world, clock) - residual_of(clock.reading())
    assert 0 < passed_by_ns <= 5 * MS
    await clock.measure()
    assert off_ns(world, clock) <= residual_of(clock.reading()) <= 2 * MS


async def test_reading_keeps_its_time_when_clocks_are_set_and_measured_anew() -> None:
    world = World()
    clock = BusClock(world.probe, world.host())
    await clock.measure()
    kept = clock.reading()
    now_ns = kept.now_ns()
    world.set_ns, world.server_set_ns = 3 * HOUR_NS, 20 * HOUR_NS
    assert kept.now_ns() == now_ns, "neither clock was ours to follow within an update"
    assert kept.bus_ns(world.wall_ns()) == now_ns, "workers time by the wall clock that was set"
    await clock.measure()
    assert off_ns(world, clock) <= 2 * MS, "a server whose clock was set is followed"
    assert kept.now_ns() < clock.now_ns()


async def test_worse_answer_does_not_count_when_a_better_one_is_known() -> None:
    world = World()
    clock = BusClock(world.probe, world.host())
    await clock.measure()
    known = clock.reading()
    world.ways = [(40 * MS, 2 * MS)] * 3
    assert await clock.measure(probes=3)
    assert clock.reading() is known


async def test_clock_is_measured_at_once_and_anew_when_the_connection_is_back() -> None:
    world = World()
    clock = BusClock(world.probe, world.host())
    await clock.measure()
    known = clock.reading()
    world.ways = [(40 * MS, 2 * MS)] * 3
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(clock.run, 3600.0)
        await anyio.wait_all_tasks_blocked()
        assert clock.reading() is known
        clock.reconnected_nowait()
        with anyio.fail_after(30):
            while clock.reading() is known:
                await anyio.lowlevel.checkpoint()
        tasks.cancel_scope.cancel()
    assert off_ns(world, clock) <= residual_of(clock.reading()) <= 22 * MS
