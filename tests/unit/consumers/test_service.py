"""The service around its round machine: how it starts, what it keeps alive, how it ends."""

from __future__ import annotations

import itertools
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

import anyio
import anyio.lowlevel
import pytest
from msgspec import structs
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from tests.unit.consumers.fakes import CONFIG, FakeBus, FakeEngine, FakeRoute, ready_of
from weightbus.bus.clock import BusClock, HostClock
from weightbus.bus.errors import BusUnavailable
from weightbus.bus.link import NoResponders
from weightbus.bus.received import Reconnected
from weightbus.consumers.engines.engine import TokenSeen
from weightbus.consumers.errors import (
    DeadlineExceeded,
    EngineTaken,
    EngineUnavailable,
    TornRead,
)
from weightbus.consumers.service import Consumer, open_consumer
from weightbus.schemas.base import Message
from weightbus.schemas.checkpoint import CheckpointReady
from weightbus.schemas.progress import (
    EngineState,
    EngineStatus,
    FirstToken,
    StageComplete,
    UpdateComplete,
    UpdateFailed,
)
from weightbus.schemas.rounds import Join
from weightbus.tracing.context import SpanRef
from weightbus.tracing.sdk import make_tracer
from weightbus.tracing.telemetry import Telemetry

pytestmark = pytest.mark.anyio

DEADLINE_S = 30.0
NEVER_S = 3600.0


class World:
    """One consumer's surroundings."""

    def __init__(self, engine: FakeEngine | None = None) -> None:
        self.bus = FakeBus()
        self.engine = engine or FakeEngine(version=1)
        self.route = FakeRoute()

    @asynccontextmanager
    async def following(
        self, *, telemetry: Telemetry | None = None, **changes: Any
    ) -> AsyncIterator[Consumer]:
        async with open_consumer(
            structs.replace(CONFIG, **changes),
            bus=self.bus.as_bus(),
            engine=self.engine,
            routes=[self.route],
            telemetry=telemetry or Telemetry(),
        ) as consumer:
            yield consumer

    async def until(self, what: str, is_so: Callable[[], bool]) -> None:
        with anyio.move_on_after(DEADLINE_S):
            while not is_so():
                await anyio.lowlevel.checkpoint()
            return
        raise AssertionError(f"{what}: {self.bus.calls} {self.bus.published} {self.engine.calls}")

    async def until_complete(self, version: int, times: int = 1) -> None:
        def is_complete() -> bool:
            done = self.bus.said(UpdateComplete)
            return [one.version for one in done].count(version) == times

        await self.until(f"version {version} is complete", is_complete)


# ---------------------------------------------------------------- start


def rival(beats: int, status: EngineStatus = "serving") -> EngineState:
    return EngineState(
        model=CONFIG.model,
        engine=CONFIG.engine,
        consumer="other",
        host_id="h",
        status=status,
        updated_ns=beats,
    )


@pytest.mark.parametrize("left_s", [DEADLINE_S, 0.0])
async def test_consumer_gives_way_when_another_one_beats(left_s: float) -> None:
    world = World()
    world.bus.presence.rival = [rival(1), rival(1), rival(2, "serving" if left_s else "stopping")]
    with pytest.raises(BaseExceptionGroup) as raised:
        async with world.following(stop_s=left_s):
            raise AssertionError("it has started")
    assert raised.group_contains(EngineTaken, match=f"{CONFIG.engine} .* instance other on host h")
    assert world.bus.calls == []
    assert world.engine.calls == []


@pytest.mark.parametrize(
    "seen",
    [
        [rival(1), rival(1), None],
        [rival(1), rival(2, "stopping"), rival(3, "stopping"), None],
        [rival(1)],
    ],
)
async def test_consumer_starts_when_another_one_is_dead_or_leaves(
    seen: list[EngineState | None],
) -> None:
    world = World()
    world.bus.presence.rival = seen
    async with world.following():
        assert world.bus.presence.states


async def test_engine_is_present_before_its_consumer_hears_of_versions() -> None:
    world = World()
    async with world.following():
        first = next(n for n, call in enumerate(world.bus.calls) if call.startswith("put"))
        assert first < world.bus.calls.index("subscribe")
        assert world.bus.calls.index("subscribe") < world.bus.calls.index("last CheckpointReady")


@pytest.mark.parametrize(
    ("report", "rank", "resumed", "status", "version"),
    [
        ({}, {}, False, "serving", 1),
        ({"version": -1, "paused": True}, {"version": -1}, False, "starting", -1),
        # A consumer died between its pause and its first write.
        ({"paused": True}, {}, True, "serving", 1),
        # It died after its last write, and nobody has seen a proof.
        ({"paused": True}, {"version": 2}, False, "quarantined", -1),
        ({"paused": True}, {"touched": True}, False, "quarantined", -1),
        ({"paused": True, "touched": True}, {"version": 2}, False, "quarantined", -1),
        ({"version": -1, "paused": True, "touched": True}, {}, False, "quarantined", -1),
    ],
)
async def test_engine_is_taken_over_as_it_is(
    report: dict[str, Any], rank: dict[str, Any], resumed: bool, status: str, version: int
) -> None:
    world = World()
    world.engine.report = structs.replace(world.engine.report, **report)
    world.engine.held = [structs.replace(world.engine.held[0], **rank)]
    async with world.following() as consumer:
        state = consumer.state
        assert state is not None
        assert (state.status, state.version) == (status, version)
        assert ("resume 1" in world.engine.calls) == resumed


async def test_engine_that_was_written_to_is_taken_over_though_its_workers_do_not_answer() -> None:
    world = World()
    world.engine.report = structs.replace(world.engine.report, paused=True, touched=True)
    world.engine.hang("inspect")
    async with world.following() as consumer:
        assert consumer.state is not None
        assert consumer.state.status == "quarantined"


async def test_consumer_catches_up_with_the_last_version_when_it_starts() -> None:
    world = World()
    world.bus.kept[CheckpointReady] = ready_of(2)
    async with world.following():
        await world.until_complete(2)
    assert world.engine.calls[-3:] == ["pause", "apply", "resume 2"]


async def test_spans_end_and_letters_count_when_the_bus_is_lost_while_the_consumer_starts() -> None:
    world, exporter = World(), InMemorySpanExporter()

    async def lose(kind: type[Message], *, model: str, **tokens: str) -> None:
        assert world.bus.dead_letter is not None
        if kind is not CheckpointReady:
            await anyio.sleep_forever()
        await world.until("the version is in hand", lambda: "take 2" in world.bus.calls)
        raise BusUnavailable("nats://host:4222", "it is gone")

    world.bus.last = lose  # type: ignore[method-assign]
    world.bus.hear(ready_of(2))
    telemetry = Telemetry(make_tracer("consumer", SimpleSpanProcessor(exporter), {}))
    with pytest.raises(BaseExceptionGroup) as raised:
        async with world.following(telemetry=telemetry):
            raise AssertionError("it has started")
    assert raised.group_contains(BusUnavailable)
    (update,) = [span for span in exporter.get_finished_spans() if "checkpoint" in span.name]
    assert not update.status.is_ok


# ---------------------------------------------------------------- first token


@pytest.mark.parametrize("before_s", [0.0, 60.0], ids=["after the resumption", "before its end"])
async def test_first_token_is_said_within_its_update_when_the_engine_has_seen_it(
    before_s: float,
) -> None:
    """The engine may have made it before it has answered that it goes on."""
    world = World()
    at_ns = time.time_ns() + int((30.0 - before_s) * 1e9)
    world.engine.tokens[2] = TokenSeen(at_ns=at_ns, resolution_ns=10**15)
    async with world.following():
        world.bus.hear(ready_of(2))
        await world.until("it is said", lambda: bool(world.bus.said(FirstToken)))
    (said,) = world.bus.said(FirstToken)
    (complete,) = world.bus.said(UpdateComplete)
    assert (said.model, said.version, said.engine) == ("m", 2, CONFIG.engine)
    assert said.round == complete.round
    assert complete.start_ns <= said.start_ns <= said.end_ns
    assert said.end_ns - said.start_ns < 30 * 10**9
    assert said.resolution_ns <= 30 * 10**9, "it was not there before the engine served"
    assert (said.resolution_ns > 0) == (before_s == 0.0)
    headers = world.bus.headers[world.bus.published.index(said)]
    assert SpanRef.from_headers(headers) == SpanRef(said.trace_id, said.span_id)
    assert said.parent_span_id not in ("", said.span_id)


@pytest.mark.parametrize(
    "failure", [None, EngineUnavailable("a", "it has no metrics"), RuntimeError("of its own code")]
)
async def test_nothing_is_said_and_nothing_fails_when_the_engine_does_not_see_its_first_token(
    failure: Exception | None,
) -> None:
    world = World()
    if failure is not None:
        world.engine.errors["first_token"] = failure
    async with world.following():
        for version in (2, 3):
            world.bus.hear(ready_of(version))
            await world.until_complete(version)
    assert world.bus.said(FirstToken) == []
    assert world.bus.said(UpdateFailed) == []


async def test_next_version_and_the_end_do_not_wait_when_a_first_token_is_looked_out_for() -> None:
    world = World()
    looking = world.engine.hang("first_token")
    with anyio.fail_after(DEADLINE_S):
        async with world.following(stop_s=NEVER_S):
            world.bus.hear(ready_of(2))
            await world.until_complete(2)
            await looking.wait()
            world.bus.hear(ready_of(3))
            await world.until_complete(3)
    assert world.bus.said(FirstToken) == []


async def test_first_token_is_said_when_an_earlier_watch_of_the_version_ends_without_one() -> None:
    world = World()
    watches: list[anyio.Event] = []

    async def first_token(version: int, deadline_s: float) -> TokenSeen | None:
        watches.append(own := anyio.Event())
        await own.wait()
        return TokenSeen(at_ns=time.time_ns()) if own is watches[1] else None

    world.engine.first_token = first_token  # type: ignore[method-assign]
    async with world.following():
        world.bus.hear(ready_of(2))
        await world.until("it is looked out for", lambda: len(watches) == 1)
        world.engine.start_anew("j")
        await world.until("it is again", lambda: len(watches) == 2)
        await world.until_complete(2, times=2)
        watches[0].set()
        await anyio.wait_all_tasks_blocked()
        watches[1].set()
        await world.until("it is said", lambda: len(world.bus.said(FirstToken)) == 1)


# ---------------------------------------------------------------- what is kept alive


async def test_state_is_put_with_every_beat_and_when_the_bus_is_back() -> None:
    world = World()
    async with world.following(heartbeat_s=NEVER_S):
        assert world.bus.calls.count("put serving") == 1
        world.bus.kept[CheckpointReady] = ready_of(1)
        world.bus.hear_again(Reconnected())
        await world.until("it is put again", lambda: world.bus.calls.count("put serving") == 2)
    world = World()
    async with world.following():
        await world.until("it beats", lambda: world.bus.calls.count("put serving") > 3)


async def test_every_beat_is_later_than_the_one_before_when_the_clock_is_set_back() -> None:
    world, set_ns = World(), [0]

    async def probe() -> int:
        return time.time_ns() + set_ns[0]

    clock = world.bus.clock = BusClock(probe)
    await clock.measure()
    states = world.bus.presence.states
    async with world.following(heartbeat_s=0.01) as consumer:
        before_ns = consumer.now_ns()
        set_ns[0] = -3600 * 10**9
        assert await clock.measure()
        await world.until("it goes by the new time", lambda: consumer.now_ns() < before_ns)
        beats = len(states)
        await world.until("it goes on beating", lambda: len(states) > beats + 2)
    times = [state.updated_ns for state in states]
    assert all(earlier < later for earlier, later in itertools.pairwise(times))


async def test_version_that_was_missed_is_taken_when_the_bus_is_back() -> None:
    world = World()
    async with world.following():
        world.bus.kept[CheckpointReady] = ready_of(2)
        world.bus.hear_again(Reconnected())
        await world.until_complete(2)


async def test_engine_is_brought_back_when_it_has_lost_what_it_served() -> None:
    world = World()
    async with world.following():
        world.bus.hear(ready_of(2))
        await world.until_complete(2)
        world.engine.start_anew("j")
        await world.until_complete(2, times=2)
    assert world.engine.report.version == 2
    assert world.bus.said(UpdateFailed) == []


async def test_engine_is_not_taken_for_lost_when_it_is_asked_while_it_resumes() -> None:
    """What it says is older than what it is compared with."""
    world = World()
    async with world.following():
        stale = world.engine.answer_state_late()
        await stale.asked.wait()
        world.bus.hear(ready_of(2))
        await world.until_complete(2)
        stale.go_on.set()
        beats = world.bus.calls.count("put serving")
        await world.until("it goes on", lambda: world.bus.calls.count("put serving") > beats + 3)
    assert world.engine.calls.count("apply") == 1


async def test_engine_counts_as_serving_again_when_it_was_only_out_of_reach() -> None:
    world = World()
    async with world.following() as consumer:

        def status() -> str:
            return consumer.state.status if consumer.state is not None else ""

        world.engine.errors["state"] = EngineUnavailable("a", "nothing runs there")
        await world.until("it is given up", lambda: status() == "quarantined")
        del world.engine.errors["state"]
        await world.until("it is found again", lambda: status() == "serving")
    assert world.engine.calls == []


async def test_engine_counts_as_serving_when_it_is_only_slow() -> None:
    world = World()
    async with world.following() as consumer:
        world.engine.errors["state"] = DeadlineExceeded("state", 1.0)
        beats = world.bus.calls.count("put serving")
        await world.until("it goes on", lambda: world.bus.calls.count("put serving") > beats + 3)
        assert consumer.state is not None
        assert consumer.state.status == "serving"


async def test_consumer_ends_when_its_engine_does_not_answer_any_more() -> None:
    world = World()
    with pytest.RaisesGroup(EngineUnavailable):
        async with world.following(engine_lost_s=0.05, stop_s=NEVER_S):
            world.engine.errors["state"] = EngineUnavailable("a", "nothing runs there")
            with anyio.fail_after(DEADLINE_S):
                await anyio.sleep_forever()
    assert world.bus.calls[-1] == "drop"


# ---------------------------------------------------------------- versions that overtake


async def test_older_version_is_put_down_when_a_newer_one_comes_while_it_is_prepared() -> None:
    world = World()
    async with world.following():
        describing = world.engine.hang("describe")
        world.bus.hear(ready_of(2))
        await describing.wait()
        world.engine.hangs.clear()
        world.bus.hear(ready_of(3))
        await world.until_complete(3)
    assert world.bus.said(UpdateFailed) == []
    assert {join.version for join in world.bus.said(Join)} == {3}
    assert world.bus.reader_leases.held == set()


async def test_lease_is_held_while_a_version_that_was_published_again_is_prepared() -> None:
    world = World()
    async with world.following():
        describing = world.engine.hang("describe")
        world.bus.hear(ready_of(2))
        await describing.wait()
        again = world.engine.hang("describe")
        world.bus.hear(ready_of(2, created_ns=100))
        await again.wait()
        await anyio.wait_all_tasks_blocked()
        assert world.bus.reader_leases.held == {2}


# ---------------------------------------------------------------- a resume that seemed to fail


async def test_update_is_complete_when_the_engine_serves_it_after_its_resume_ran_out_of_time() -> (
    None
):
    world = World()
    world.engine.errors["resume 2"] = DeadlineExceeded("resume", 10.0)
    async with world.following(heartbeat_s=0.01):
        world.bus.hear(ready_of(2))
        await world.until("it failed", lambda: bool(world.bus.said(UpdateFailed)))
        world.engine.report = structs.replace(world.engine.report, version=2, paused=False)
        await world.until_complete(2)
    (failed,) = world.bus.said(UpdateFailed)
    (complete,) = world.bus.said(UpdateComplete)
    assert (failed.stage, failed.cause) == ("commit", "DeadlineExceeded")
    assert complete.end_ns > failed.end_ns
    assert complete.paused_s > 0


async def test_engine_s_answer_is_not_believed_when_it_was_asked_before_it_was_written_to() -> None:
    world = World()
    world.engine.errors["resume 2"] = DeadlineExceeded("resume", 10.0)
    async with world.following(heartbeat_s=0.01) as consumer:
        world.bus.hear(ready_of(2))
        await world.until("it failed", lambda: bool(world.bus.said(UpdateFailed)))
        late = world.engine.answer_state_late()
        world.engine.report = structs.replace(world.engine.report, version=2, paused=False)
        late.report = world.engine.report
        await late.asked.wait()
        world.route.meanwhile = world.engine.spoil
        world.route.fails_after = TornRead("s", 2, 3)
        world.bus.hear(ready_of(3))
        await world.until("it failed, too", lambda: len(world.bus.said(UpdateFailed)) == 2)
        assert world.bus.said(UpdateFailed)[-1].quarantined
        late.go_on.set()
        await anyio.wait_all_tasks_blocked()
        assert consumer.state is not None
        assert consumer.state.version == -1
        assert world.bus.said(UpdateComplete) == []


# ---------------------------------------------------------------- stop


async def test_consumer_releases_its_lease_before_it_leaves_and_is_silent_afterwards() -> None:
    world = World()
    async with world.following():
        describing = world.engine.hang("describe")
        world.bus.hear(ready_of(2))
        await describing.wait()
    calls = world.bus.calls
    assert calls.index("release 2") < calls.index("drop") == len(calls) - 1
    assert calls[calls.index("release 2") :].count("put stopping") <= 1
    assert world.bus.reader_leases.held == set()


async def test_consumer_says_that_an_update_failed_before_it_leaves() -> None:
    world = World()
    async with world.following():
        applying = world.engine.hang("apply")
        world.bus.hear(ready_of(2))
        await applying.wait()
    (failed,) = world.bus.said(UpdateFailed)
    assert (failed.cause, failed.served_version) == ("TransferCancelled", 1)
    assert world.engine.calls[-2:] == ["inspect", "resume 1"]
    assert world.bus.calls[-1] == "drop"


async def test_consumer_leaves_at_once_when_it_is_cancelled() -> None:
    world = World()
    with anyio.move_on_after(DEADLINE_S) as scope:
        async with world.following(stop_s=NEVER_S):
            applying = world.engine.hang("apply")
            world.bus.hear(ready_of(2))
            await applying.wait()
            scope.cancel()
            await anyio.sleep_forever()
    assert world.bus.calls[-1] == "drop"
    assert world.engine.calls[-2:] == ["inspect", "resume 1"]


async def test_consumer_gives_up_after_its_time_when_its_engine_hangs_while_it_stops() -> None:
    world = World()
    async with world.following(stop_s=0.05):
        resuming = world.engine.hang("resume 2")
        world.bus.hear(ready_of(2))
        await resuming.wait()
    assert world.bus.said(UpdateComplete) == []


# ---------------------------------------------------------------- what time it is


@pytest.mark.parametrize("step_s", [-0.5, 100_000.0])
async def test_pause_is_as_long_as_it_was_when_the_wall_clock_is_set_meanwhile(
    step_s: float,
) -> None:
    world, set_ns = World(), [0]
    world.bus.clock = BusClock(nobody, HostClock(wall_ns=lambda: time.time_ns() + set_ns[0]))

    async def set_clock() -> None:
        set_ns[0] = int(step_s * 1e9)

    world.route.before_end = set_clock
    began_s = time.monotonic()
    async with world.following():
        world.bus.hear(ready_of(2))
        await world.until_complete(2)
    (done,) = world.bus.said(UpdateComplete)
    assert 0 < done.paused_s < time.monotonic() - began_s


async def nobody() -> int:
    raise NoResponders("request")


async def test_clock_is_renewed_when_the_next_version_is_there_before_the_end_of_the_last() -> None:
    world = World()
    gates: list[anyio.Event] = []

    async def wait() -> None:
        gates.append(own := anyio.Event())
        await own.wait()

    async def probe() -> int:
        return time.time_ns()

    world.route.before_end = wait
    async with world.following():
        world.bus.hear(ready_of(2))
        await world.until("it is transferred", lambda: len(gates) == 1)
        measured = BusClock(probe)
        assert await measured.measure()
        world.bus.clock.reading = measured.reading  # type: ignore[method-assign]
        world.bus.hear(ready_of(3))
        await anyio.wait_all_tasks_blocked()
        gates[0].set()
        await world.until("the next one is", lambda: len(gates) == 2)
        gates[1].set()
        await world.until_complete(3)
    first, second = world.bus.said(UpdateComplete)
    assert first.clock_residual_ns is None, "it kept the clock that it began with"
    assert second.clock_residual_ns is not None


async def test_times_do_not_step_within_an_update_when_the_clock_is_measured_anew() -> None:
    world, ahead_ns = World(), 3600 * 10**9
    served = [ahead_ns]

    async def probe() -> int:
        return time.time_ns() + served[0]

    clock = world.bus.clock = BusClock(probe)
    await clock.measure()

    async def measure_anew() -> None:
        served[0] = 2 * ahead_ns
        assert await clock.measure()

    world.route.before_end = measure_anew
    async with world.following() as consumer:
        assert abs(consumer.now_ns() - time.time_ns() - ahead_ns) < ahead_ns / 10
        world.bus.hear(ready_of(2))
        await world.until_complete(2)
        (done,) = world.bus.said(UpdateComplete)
        await world.until("it has been told", lambda: len(world.bus.said(StageComplete)) == 2)
        told = [done, *world.bus.said(StageComplete)]
        for each in told:
            assert each.start_ns <= each.end_ns
            assert abs(each.start_ns - time.time_ns() - ahead_ns) < ahead_ns / 10
            assert abs(each.end_ns - time.time_ns() - ahead_ns) < ahead_ns / 10
        assert done.clock_residual_ns is not None

        def has_the_new_time() -> bool:
            return abs(consumer.now_ns() - time.time_ns() - 2 * ahead_ns) < ahead_ns / 10

        await world.until("it goes by the new time", has_the_new_time)
