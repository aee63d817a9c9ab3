"""Preparing, transferring and proving; above all what is known of the engine when that fails."""

from __future__ import annotations

import time
from typing import Any

import anyio
import pytest
from msgspec import structs

from tests.unit.consumers.fakes import (
    CONFIG,
    DATA,
    DIGEST,
    LAYOUT,
    FakeBus,
    FakeEngine,
    FakeRoute,
    layout_of,
    plan_of,
    ready_of,
    sums,
)
from weightbus.bus.clock import BusClock
from weightbus.consumers.config import ConsumerConfig
from weightbus.consumers.errors import (
    ConsumerError,
    DeadlineExceeded,
    DigestMismatch,
    EngineUnavailable,
    PeerLost,
    RouteUnavailable,
    SegmentUnavailable,
    TornRead,
    TransferError,
    VersionRetired,
    WorkerLost,
)
from weightbus.consumers.round.config import Origin
from weightbus.consumers.update import LAYOUTS_KEPT, Outcome, Updater
from weightbus.schemas.checkpoint import CheckpointRetired
from weightbus.schemas.layout_codec import layout_digest
from weightbus.schemas.placement import SharedMemorySegment
from weightbus.schemas.rounds import RoundPlan

pytestmark = pytest.mark.anyio

LONG_S = 60.0
SHORT_S = 0.05
TORN = TornRead("s", 2, 3)


class World:
    """One updater with all that it works with."""

    def __init__(
        self,
        engine: FakeEngine | None = None,
        *routes: FakeRoute,
        config: ConsumerConfig = CONFIG,
    ) -> None:
        self.bus = FakeBus()
        self.engine = engine or FakeEngine(version=1)
        self.routes = routes or (FakeRoute(),)
        self.updater = Updater(config, "c", self.bus.as_bus(), self.engine, self.routes)
        self.moving = anyio.CancelScope()

    @property
    def route(self) -> FakeRoute:
        return self.routes[0]

    async def transfer(
        self, version: int = 2, plan: RoundPlan | None = None, deadline_s: float = LONG_S
    ) -> Outcome:
        """Prepare and transfer; `engine.calls` are those of the transfer alone."""
        ready = ready_of(version)
        prepared = await self.updater.prepare(ready, LONG_S)
        self.engine.calls.clear()
        return await self.updater.transfer(
            prepared, ready, plan or plan_of(version), deadline_s, self.moving
        )

    async def transfer_fails(self, **arguments: float) -> TransferError:
        with pytest.raises(TransferError) as raised:
            await self.transfer(**arguments)  # type: ignore[arg-type]
        return raised.value


# ---------------------------------------------------------------- prepare


async def test_prepare_takes_the_lease_before_it_looks_for_the_retirement() -> None:
    world = World()
    await world.updater.prepare(ready_of(2), LONG_S)
    assert world.bus.calls == ["take 2", "last CheckpointRetired"]


async def test_prepare_tells_every_route_of_the_ranks_devices_before_it_asks_for_a_way() -> None:
    routes = FakeRoute("local"), FakeRoute("broadcast")
    world = World(None, *routes)
    for version in (2, 3):
        await world.updater.prepare(ready_of(version), LONG_S)
    described = tuple("cpu" for _ in range(world.engine.ranks))
    assert [route.devices for route in routes] == [[described, described]] * 2


@pytest.mark.parametrize(
    ("version", "producer", "refused"),
    [(2, "t", True), (3, "t", True), (1, "t", False), (2, "u", False)],
)
async def test_prepare_is_refused_when_its_producer_has_retired_it(
    version: int, producer: str, refused: bool
) -> None:
    world = World()
    world.bus.kept[CheckpointRetired] = CheckpointRetired(
        model="m", version=version, producer=producer, reason="gone"
    )
    if refused:
        with pytest.raises(VersionRetired, match="gone"):
            await world.updater.prepare(ready_of(2), LONG_S)
        assert world.bus.reader_leases.held == {2}, "the lease is kept until it is let go"
        assert world.engine.calls == []
    else:
        await world.updater.prepare(ready_of(2), LONG_S)


async def test_prepare_is_refused_when_the_placement_is_past_its_time() -> None:
    with pytest.raises(VersionRetired, match="is past"):
        await World().updater.prepare(ready_of(2, valid_until_ns=1), LONG_S)
    still = time.time_ns() + 10**12
    await World().updater.prepare(ready_of(2, valid_until_ns=still), LONG_S)


async def test_end_of_a_placement_is_taken_at_its_word_when_both_clocks_are_the_bus_s() -> None:
    ahead_ns = 3600 * 10**9

    async def probe() -> int:
        return time.time_ns() + ahead_ns

    world = World()
    world.bus.clock = BusClock(probe)
    await world.bus.clock.measure()
    now_ns = world.bus.clock.now_ns()
    past = ready_of(2, valid_until_ns=now_ns - 10**9, clock_residual_ns=10**6)
    with pytest.raises(VersionRetired, match="is past"):
        await world.updater.prepare(past, LONG_S)
    await world.updater.prepare(structs.replace(past, clock_residual_ns=None), LONG_S)
    later = ready_of(2, valid_until_ns=now_ns + 600 * 10**9, clock_residual_ns=10**6)
    await world.updater.prepare(later, LONG_S)


async def test_prepare_asks_the_engine_once_per_layout_and_worker() -> None:
    world = World()
    for version in (2, 3):
        await world.updater.prepare(ready_of(version), LONG_S)
    assert world.engine.calls == ["inspect", "describe", "attach", "inspect"]
    world.engine.start_anew("j")
    prepared = await world.updater.prepare(ready_of(4), LONG_S)
    assert world.engine.calls[4:] == ["inspect", "describe", "attach"]
    assert prepared.binding.instances == ("j",)


async def test_prepare_forgets_the_layout_that_was_longest_unused() -> None:
    world = World()
    layouts = [layout_of(f"w{number}") for number in range(LAYOUTS_KEPT + 1)]
    world.bus.known = {layout_digest(layout): layout for layout in layouts}
    for version, layout in enumerate([*layouts[:-1], layouts[0], layouts[-1]]):
        await world.updater.prepare(ready_of(version, layout), LONG_S)
    world.engine.calls.clear()
    await world.updater.prepare(ready_of(10, layouts[0]), LONG_S)
    assert world.engine.calls == ["inspect"]
    await world.updater.prepare(ready_of(11, layouts[1]), LONG_S)
    assert world.engine.calls[1:] == ["inspect", "describe", "attach"]


async def test_broadcast_is_offered_once_every_rank_is_proven() -> None:
    far, group = FakeRoute("p2p"), FakeRoute("broadcast")
    group.rendezvous = "tcp://h:1"
    world = World(FakeEngine(2, 1), group, far)
    prepared = await world.updater.prepare(ready_of(2), LONG_S)
    assert [offer.routes for offer in prepared.offers] == [("p2p",), ("p2p",)]
    assert not prepared.proven
    world.engine.prove(layout_digest(LAYOUT))
    prepared = await world.updater.prepare(ready_of(3), LONG_S)
    assert [offer.routes for offer in prepared.offers] == [("broadcast", "p2p")] * 2
    assert (prepared.proven, prepared.rendezvous) == (True, "tcp://h:1")


async def test_prepare_is_refused_when_only_a_group_would_do_and_nothing_is_proven() -> None:
    world = World(FakeEngine(2, 1), FakeRoute("broadcast"))
    with pytest.raises(RouteUnavailable, match="to prove"):
        await world.updater.prepare(ready_of(2), LONG_S)


@pytest.mark.parametrize(
    ("free_bytes", "room_bytes", "offered"),
    [(100, None, 100), (0, None, 0), (100, 30, 30), (20, 30, 20), (0, 30, 30), (100, 0, 1)],
)
async def test_offer_of_memory_keeps_to_what_staging_has_room_for(
    free_bytes: int, room_bytes: int | None, offered: int
) -> None:
    engine, route = FakeEngine(2, 1), FakeRoute("p2p")
    engine.free_bytes, route.room = free_bytes, room_bytes
    prepared = await World(engine, FakeRoute(), route).updater.prepare(ready_of(2), LONG_S)
    assert [offer.free_bytes for offer in prepared.offers] == [offered] * 2


async def test_offers_tell_what_is_free_on_gpus_apart_from_room_for_staging() -> None:
    engine, route = FakeEngine(2, 1), FakeRoute("p2p")
    engine.device, engine.free_bytes, route.room = "cuda:0", 7, 5
    prepared = await World(engine, route).updater.prepare(ready_of(2), LONG_S)
    assert [(one.free_bytes, one.device_bytes) for one in prepared.offers] == [(5, 7)] * 2


async def test_route_out_of_favour_is_offered_only_when_no_other_reaches() -> None:
    group, far = FakeRoute("broadcast"), FakeRoute("p2p")
    group.favoured = False
    world = World(FakeEngine(2, 1), group, far)
    world.engine.prove(layout_digest(LAYOUT))
    prepared = await world.updater.prepare(ready_of(2), LONG_S)
    assert [offer.routes for offer in prepared.offers] == [("p2p",)] * 2
    far.unreachable = "there is no transfer engine"
    prepared = await world.updater.prepare(ready_of(2), LONG_S)
    assert [offer.routes for offer in prepared.offers] == [("broadcast",)] * 2


async def test_origin_is_told_with_what_was_prepared() -> None:
    prepared = await World(FakeEngine(2, 1)).updater.prepare(ready_of(2), LONG_S)
    assert prepared.origin == Origin(layout_bytes=len(DATA), hosts=1, files=True)
    near = SharedMemorySegment(name="weightbus-a", host_id="h", generation=2)
    ready = ready_of(2, placement=((near,),))
    prepared = await World(FakeEngine(2, 1)).updater.prepare(ready, LONG_S)
    assert prepared.origin == Origin(layout_bytes=len(DATA), hosts=1, memory="host")


async def test_prepare_offers_the_routes_that_reach_every_segment() -> None:
    near, far, forbidden = FakeRoute("local"), FakeRoute("p2p"), FakeRoute("broadcast")
    config = structs.replace(CONFIG, routes=("local", "p2p"))
    world = World(FakeEngine(2, 1), near, far, forbidden, config=config)
    prepared = await world.updater.prepare(ready_of(2), LONG_S)
    assert [(offer.rank, offer.routes) for offer in prepared.offers] == [
        (0, ("local", "p2p")),
        (1, ("local", "p2p")),
    ]
    assert [offer.need_bytes for offer in prepared.offers] == [16, 16]
    near.unreachable = "too far"
    prepared = await world.updater.prepare(ready_of(3), LONG_S)
    assert prepared.offers[0].routes == ("p2p",)
    far.unreachable = "no cable"
    with pytest.raises(RouteUnavailable, match=r"local: .*too far; p2p: .*no cable"):
        await world.updater.prepare(ready_of(4), LONG_S)


@pytest.mark.parametrize("call", ["inspect", "describe", "attach"])
async def test_prepare_ends_at_its_deadline_when_the_engine_hangs(call: str) -> None:
    world = World()
    world.engine.hang(call)
    with pytest.raises(DeadlineExceeded, match="prepare"):
        await world.updater.prepare(ready_of(2), SHORT_S)


async def test_prepare_begins_anew_when_it_failed_half_way() -> None:
    world = World()
    world.engine.errors["attach"] = WorkerLost(0, "gone")
    with pytest.raises(WorkerLost):
        await world.updater.prepare(ready_of(2), LONG_S)
    world.engine.errors.clear()
    world.engine.calls.clear()
    await world.updater.prepare(ready_of(2), LONG_S)
    assert world.engine.calls == ["inspect", "describe", "attach"]


# ---------------------------------------------------------------- leases


async def test_lease_is_renewed_until_it_is_let_go() -> None:
    world = World()
    await world.updater.prepare(ready_of(2), LONG_S)
    world.bus.calls.clear()
    await world.updater.renew_leases()
    world.updater.let_go_nowait(2)
    await world.updater.renew_leases()
    await world.updater.release(2)
    assert world.bus.calls == ["renew 2", "release 2"]


async def test_lease_that_is_lost_is_taken_again_and_others_are_renewed_when_renewing() -> None:
    world = World()
    for version in (2, 3):
        await world.updater.prepare(ready_of(version), LONG_S)
    world.bus.reader_leases.held.discard(2)
    world.bus.calls.clear()
    await world.updater.renew_leases()
    assert world.bus.calls == ["renew 2", "take 2", "renew 3"]


async def test_lease_is_kept_when_it_was_taken_again_before_its_release() -> None:
    world = World()
    await world.updater.prepare(ready_of(2), LONG_S)
    world.updater.let_go_nowait(2)
    await world.updater.prepare(ready_of(2), LONG_S)
    await world.updater.release(2)
    assert world.bus.reader_leases.held == {2}


async def test_lease_is_held_when_it_is_taken_again_while_it_is_released() -> None:
    world = World()
    await world.updater.prepare(ready_of(2), LONG_S)
    world.updater.let_go_nowait(2)
    world.bus.reader_leases.gate = anyio.Event()
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(world.updater.release, 2)
        await anyio.wait_all_tasks_blocked()
        tasks.start_soon(world.updater.prepare, ready_of(2), LONG_S)
        await anyio.wait_all_tasks_blocked()
        world.bus.reader_leases.gate.set()
    assert world.bus.reader_leases.held == {2}


# ---------------------------------------------------------------- transfer


async def test_transfer_ends_paused_and_proven() -> None:
    world = World()
    outcome = await world.transfer()
    assert world.engine.calls == ["inspect", "pause", "apply"]
    assert (outcome.verified, outcome.weights_digest) == ("verified", DIGEST)
    assert (outcome.route, outcome.bytes) == ("local", 16)
    assert outcome.pause_start_ns > 0


async def test_pause_is_measured_from_when_requests_wait() -> None:
    class Sleeping(FakeEngine):
        woken_ns = 0

        async def before_pause(self, deadline_s: float) -> None:
            await self._call("before_pause")
            self.woken_ns = time.monotonic_ns()

    engine = Sleeping(1, 1)
    outcome = await World(engine).transfer()
    assert sorted(engine.calls[:2]) == ["before_pause", "inspect"], "beside each other"
    assert engine.calls[2:] == ["pause", "apply"]
    assert outcome.pause_start_ns >= engine.woken_ns > 0


async def test_transfer_takes_the_route_of_the_plan_and_tells_it_what_is_proven() -> None:
    near, far = FakeRoute("local"), FakeRoute("p2p")
    world = World(FakeEngine(2, 1), near, far)
    outcome = await world.transfer(plan=plan_of(2, "p2p", "p2p"))
    assert outcome.route == "p2p"
    assert [(asked.ranks, asked.proven) for asked in far.asked] == [((0, 1), False)]
    world.engine.prove(layout_digest(LAYOUT))
    await world.transfer(3, plan=plan_of(3, "p2p", "p2p"))
    assert [asked.proven for asked in far.asked] == [False, True]
    assert near.asked == []


@pytest.mark.parametrize(
    ("error", "stage"),
    [
        (PeerLost("g", ["b/0"], "gone"), "broadcast"),
        (SegmentUnavailable("s", "absent", "must be there"), "fetch"),
        (DeadlineExceeded("broadcast", 1.0), "broadcast"),
        (DeadlineExceeded("Apply of rank 0", 1.0), "reload"),
    ],
)
async def test_failure_names_its_stage(error: ConsumerError, stage: str) -> None:
    world = World()
    world.route.fails_before = error
    assert (await world.transfer_fails()).stage == stage


async def test_engine_is_left_alone_when_a_transfer_fails_before_its_pause() -> None:
    world = World()
    world.route.fails_before = SegmentUnavailable("s", "absent", "must be there")
    error = await world.transfer_fails()
    assert (error.cause, error.touched) == ("SegmentUnavailable", False)
    assert world.engine.calls == []


async def test_engine_serves_what_it_served_when_a_transfer_fails_before_its_first_write() -> None:
    world = World()
    world.route.fails_after = TORN
    error = await world.transfer_fails()
    assert (error.cause, error.touched) == ("TornRead", False)
    assert world.engine.calls == ["inspect", "pause", "inspect", "resume 1"]


async def test_engine_that_served_nothing_stays_paused_when_its_first_transfer_fails() -> None:
    world = World(FakeEngine(version=-1))
    world.route.fails_after = TORN
    error = await world.transfer_fails()
    assert not error.touched
    assert world.engine.calls == ["inspect", "pause", "inspect"]


@pytest.mark.parametrize("found", [{"touched": True}, {"version": 2}, {"instance": "other"}])
async def test_engine_stays_paused_when_a_rank_may_have_been_written_to(
    found: dict[str, Any],
) -> None:
    world = World(FakeEngine(2, 1))

    def write() -> None:
        world.engine.held[1] = structs.replace(world.engine.held[1], **found)

    world.route.meanwhile, world.route.fails_after = write, TORN
    error = await world.transfer_fails()
    assert (error.cause, error.touched) == ("TornRead", True)
    assert world.engine.calls == ["inspect", "pause", "inspect"]


async def test_engine_stays_paused_when_it_was_written_to_before() -> None:
    world = World()
    world.engine.report = structs.replace(world.engine.report, paused=True, touched=True)
    world.route.fails_after = TORN
    assert (await world.transfer_fails()).touched
    assert not any(call.startswith("resume") for call in world.engine.calls)


@pytest.mark.parametrize("call", ["inspect", "resume 1"])
async def test_engine_counts_as_written_to_when_it_does_not_answer_after_a_failure(
    call: str,
) -> None:
    world = World()

    def lose() -> None:
        world.engine.errors[call] = EngineUnavailable("a", "gone")

    world.route.meanwhile, world.route.fails_after = lose, TORN
    error = await world.transfer_fails()
    assert (error.cause, error.touched) == ("TornRead", True)


async def test_engine_serves_on_when_its_pause_did_not_end_in_time() -> None:
    world = World()
    world.engine.errors["pause"] = DeadlineExceeded("Pause of the engine", 5.0)
    error = await world.transfer_fails()
    assert (error.cause, error.touched) == ("DeadlineExceeded", False)
    assert world.engine.calls == ["inspect", "pause", "resume 1"]


async def test_transfer_does_not_begin_when_a_worker_was_replaced_since_prepare() -> None:
    world = World()
    ready = ready_of(2)
    prepared = await world.updater.prepare(ready, LONG_S)
    world.engine.start_anew("j")
    with pytest.raises(TransferError) as raised:
        await world.updater.transfer(prepared, ready, plan_of(2), LONG_S, world.moving)
    assert (raised.value.cause, raised.value.touched) == ("WorkerLost", False)
    assert "apply" not in world.engine.calls
    assert "pause" not in world.engine.calls


async def test_transfer_fails_when_its_route_is_none_of_ours() -> None:
    world = World()
    with pytest.raises(TransferError) as raised:
        await world.transfer(plan=plan_of(2, "p2p"))
    assert (raised.value.cause, raised.value.touched) == ("RouteUnavailable", False)


async def test_transfer_ends_at_its_deadline_and_is_undone_when_the_engine_hangs() -> None:
    world = World()
    world.engine.hang("apply")
    error = await world.transfer_fails(deadline_s=SHORT_S)
    assert (error.cause, error.touched) == ("DeadlineExceeded", False)
    assert world.engine.calls == ["inspect", "pause", "apply", "inspect", "resume 1"]


async def test_transfer_ends_and_is_undone_when_it_is_cancelled_by_the_machine() -> None:
    world = World()
    applying = world.engine.hang("apply")
    failures: list[TransferError] = []

    async def transfer() -> None:
        failures.append(await world.transfer_fails())

    async with anyio.create_task_group() as tasks:
        tasks.start_soon(transfer)
        await applying.wait()
        world.moving.cancel()
    assert [(error.cause, error.touched) for error in failures] == [("TransferCancelled", False)]
    assert world.engine.calls[-1] == "resume 1"


async def test_transfer_touches_nothing_when_it_is_cancelled_before_it_begins() -> None:
    world = World()
    world.moving.cancel()
    error = await world.transfer_fails()
    assert (error.cause, error.touched) == ("TransferCancelled", False)
    assert "apply" not in world.engine.calls


async def test_transfer_is_undone_when_the_service_is_cancelled() -> None:
    world = World()
    applying = world.engine.hang("apply")
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(world.transfer)
        await applying.wait()
        tasks.cancel_scope.cancel()
    assert world.engine.calls == ["inspect", "pause", "apply", "inspect", "resume 1"]


# ---------------------------------------------------------------- proof


async def test_engine_stays_paused_when_the_version_that_it_serves_comes_again_and_is_wrong() -> (
    None
):
    """Its ranks say what they said before: whole, and of that version."""
    world = World()
    await world.transfer(2)
    await world.engine.resume(2, LONG_S)
    world.engine.data = [bytes(16)]
    error = await world.transfer_fails()
    assert (error.cause, error.touched) == ("DigestMismatch", True)
    assert world.engine.report.paused


async def test_mismatch_names_the_tensors_when_their_digests_can_be_had() -> None:
    world = World()
    world.engine.data = [bytes(16)]
    world.bus.blobs["d" * 64] = sums(DATA)
    error = await world.transfer_fails()
    assert (error.cause, error.touched) == ("DigestMismatch", True)
    assert "tensors at fault: w" in error.reason
    assert world.engine.calls == ["inspect", "pause", "apply", "inspect"], "it is not resumed"


@pytest.mark.parametrize("blob", [None, b"", b"short", bytes(16)])
async def test_mismatch_is_the_cause_when_the_digests_of_tensors_are_no_good(
    blob: bytes | None,
) -> None:
    world = World()
    world.engine.data = [bytes(16)]
    if blob is not None:
        world.bus.blobs["d" * 64] = blob
    error = await world.transfer_fails()
    assert isinstance(error.__cause__, DigestMismatch)
    assert error.__cause__.tensors == ()


async def test_replicas_are_compared_when_no_digest_is_offered() -> None:
    world = World(FakeEngine(2, 1))
    ready = ready_of(2, weights_digest=None, tensor_digests=None)
    prepared = await world.updater.prepare(ready, LONG_S)
    plan = plan_of(2, "local", "local")
    outcome = await world.updater.transfer(prepared, ready, plan, LONG_S, anyio.CancelScope())
    assert (outcome.verified, outcome.weights_digest) == ("not_offered", None)
    world.engine.data = [DATA, bytes(16)]
    with pytest.raises(TransferError, match="replicas of tensor w disagree") as raised:
        await world.updater.transfer(prepared, ready, plan, LONG_S, anyio.CancelScope())
    assert (raised.value.cause, raised.value.touched) == ("DigestMismatch", True)
