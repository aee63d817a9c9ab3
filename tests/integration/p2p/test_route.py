"""The route p2p from a real publisher to an engine of another host, and on through its copy."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn, cast

import anyio
import pytest
import torch

from tests.integration.routes.engine import DEADLINE_S, InProcessEngine
from tests.integration.routes.model import make_tensors
from tests.unit.transfer.publishing import HOST, Trainer
from weightbus.bus.connection import Bus
from weightbus.bus.endpoint import Endpoint, P2pOptions, open_endpoint
from weightbus.bus.errors import RemoteReadFailed, SharedMemoryFull
from weightbus.consumers.errors import RouteUnavailable, TornRead
from weightbus.consumers.transfer.copies import Copies, open_copies, with_copies
from weightbus.consumers.transfer.fetch import LocalSegments
from weightbus.consumers.transfer.kept import KeptCopy, open_kept_copy
from weightbus.consumers.transfer.p2p import P2pRoute
from weightbus.consumers.transfer.remote import read_generations
from weightbus.consumers.transfer.route import Transfer
from weightbus.consumers.transfer.staged import Staging
from weightbus.consumers.transfer.staging import BlockPool
from weightbus.producers.publisher import Publisher, PublisherOptions, open_publisher
from weightbus.schemas.checkpoint import CheckpointReady, CopyReady, CopyRetired
from weightbus.schemas.layout import Layout
from weightbus.schemas.layout_codec import encode_layout
from weightbus.schemas.placement import Placement, RemoteSegment, SharedMemorySegment
from weightbus.schemas.progress import EngineState
from weightbus.schemas.rounds import EngineRoute, RankRoute, RoundPlan
from weightbus.schemas.worker import Applied

pytestmark = pytest.mark.anyio

MODEL = "m"
OPTIONS = PublisherOptions(p2p=P2pOptions(), close_wait_s=0.1, linger_s=0.0)


@dataclass(frozen=True)
class Published:
    """One version, as a consumer that has prepared it knows it."""

    ready: CheckpointReady
    layout: Layout
    tensors: dict[str, torch.Tensor]

    @property
    def layout_digest(self) -> str:
        return str(self.ready.layout_digest)

    @property
    def layout_blob(self) -> bytes:
        return encode_layout(self.layout)


@dataclass
class World:
    """A publisher, and engines of a host that does not share its memory."""

    bus: Bus
    publisher: Publisher
    endpoint: Endpoint
    stack: AsyncExitStack

    async def publish(self, version: int) -> Published:
        tensors = dict(make_tensors(version))
        ready = await self.publisher.publish(tensors, version)
        layout, _ = await self.bus.layouts.get(str(ready.layout_digest))
        return Published(ready, layout, tensors)

    def route(self, copies: Copies | None = None, kept: KeptCopy | None = None) -> P2pRoute:
        pool = BlockPool(MODEL)
        self.stack.callback(pool.close)
        local = LocalSegments(HOST)
        self.stack.callback(local.close)
        staging = Staging(pool, 10.0)
        return P2pRoute(self.endpoint, staging, local, HOST, copies=copies, kept=kept)

    async def bring(
        self,
        route: P2pRoute,
        engine: InProcessEngine,
        published: Published,
        *,
        placement: Placement | None = None,
        proven: bool = False,
    ) -> tuple[Applied, ...]:
        """The version must arrive bit by bit, and be proven."""
        await engine.attach_to(cast(Trainer, published))
        ready = published.ready
        ranks = tuple(range(engine.ranks))

        async def pause() -> None:
            await engine.pause(DEADLINE_S)

        routes = tuple(RankRoute(rank=rank, route="p2p") for rank in ranks)
        applied = await route.transfer(
            Transfer(
                engine=engine,
                ranks=ranks,
                version=ready.version,
                layout=published.layout,
                layout_digest=published.layout_digest,
                placement=placement or ready.placement,
                plan=RoundPlan(
                    model=MODEL,
                    version=ready.version,
                    round=f"v{ready.version}",
                    epoch=1,
                    leader=engine.name,
                    engines=(EngineRoute(engine=engine.name, ranks=routes),),
                    bucket_bytes=16 * 1024,
                    checkpoint_ns=ready.created_ns,
                ),
                begin_write=pause,
                deadline_s=DEADLINE_S,
                proven=proven,
            )
        )
        verdict = engine.verdict(cast(Trainer, published), applied, str(ready.weights_digest))
        assert verdict.ok, verdict.reason
        engine.check(published.tensors)
        return applied


@pytest.fixture(scope="module")
def endpoint() -> Iterator[Endpoint]:
    with open_endpoint("127.0.0.1") as endpoint:
        yield endpoint


@pytest.fixture
async def world(bus: Bus, endpoint: Endpoint) -> AsyncIterator[World]:
    async with (
        open_publisher(bus, MODEL, options=OPTIONS) as publisher,
        AsyncExitStack() as stack,
    ):
        yield World(bus, publisher, endpoint, stack)


@asynccontextmanager
async def holder(world: World, name: str, published: Published) -> AsyncIterator[KeptCopy]:
    """An engine that has taken a version into a copy of its own, and offers it."""
    await world.bus.presence.put(state_of(name))
    async with open_kept_copy(world.bus, MODEL, name, HOST, world.endpoint) as kept:
        engine = InProcessEngine(name, 2, ())
        applied = await world.bring(world.route(kept=kept), engine, published)
        assert applied[0].stages[0].stage == "fetch"
        await kept.offer(
            published.ready.version, published.layout_digest, published.ready.created_ns
        )
        yield kept


def state_of(engine: str, consumer: str = "one") -> EngineState:
    return EngineState(
        model=MODEL, engine=engine, consumer=consumer, host_id=HOST, status="serving"
    )


def copy_blocks() -> list[str]:
    return [path.name for path in Path("/dev/shm").glob(f"weightbus-copy.{MODEL}.*")]


async def heard(copies: Copies, published: Published, count: int) -> Sequence[CopyReady]:
    with anyio.fail_after(DEADLINE_S):
        while True:
            found = copies.of(published.ready, published.layout_digest, published.layout)
            if len(found) == count:
                return found
            await anyio.sleep(0.005)


@pytest.mark.parametrize("ranks", [1, 3])
async def test_versions_arrive_by_relay_and_then_by_stream(world: World, ranks: int) -> None:
    engine, route = InProcessEngine("b", ranks, ()), world.route()
    for version, proven in ((1, False), (2, True), (5, True)):
        published = await world.publish(version)
        applied = await world.bring(route, engine, published, proven=proven)
        fetched = sum(
            stage.bytes for reply in applied for stage in reply.stages if stage.stage == "fetch"
        )
        assert fetched > 0
    assert engine.log == ["pause", "apply"] * 3


async def test_placement_offers_each_slot_to_both_hosts(world: World) -> None:
    first, second = [(await world.publish(version)).ready for version in (1, 2)]
    for ready in (first, second):
        ((near, far),) = ready.placement
        assert isinstance(near, SharedMemorySegment)
        assert isinstance(far, RemoteSegment)
        assert far.session == world.endpoint.session
        assert far.generation == near.generation
    assert first.placement != second.placement


async def test_slots_are_registered_anew_when_the_tensors_grow(world: World) -> None:
    ways = []
    for version in range(4):
        tensors = {"weight": torch.zeros(10_000 * (version + 1))}
        ready = await world.publisher.publish(tensors, version)
        ways.append(ready.placement[0][1])
    gone, kept = ways[:2], ways[2:]
    for way in kept:
        assert isinstance(way, RemoteSegment)
        assert read_generations(world.endpoint, [way]) == [way.generation]
    for way in gone:
        assert isinstance(way, RemoteSegment)
        with contextlib.suppress(RemoteReadFailed):  # a new slot may lie where it lay
            assert read_generations(world.endpoint, [way]) != [way.generation]


async def test_reach_fails_with_the_reason_when_there_is_no_endpoint(world: World) -> None:
    published = await world.publish(1)
    pool = BlockPool(MODEL)
    staging = Staging(pool, 10.0)
    route = P2pRoute(None, staging, LocalSegments(HOST), HOST, missing="libnuma1 is missing")
    with pytest.raises(RouteUnavailable, match="libnuma1 is missing"):
        route.reach(published.layout, published.ready.placement)


async def test_reach_fails_when_the_slot_holds_another_version_by_now(world: World) -> None:
    first = await world.publish(1)
    await world.publish(2)
    await world.publish(3)
    with pytest.raises(RouteUnavailable, match="has generation 4"):
        world.route().reach(first.layout, first.ready.placement)


async def test_transfer_says_torn_when_the_publisher_goes_on(world: World) -> None:
    first = await world.publish(1)
    engine, route = InProcessEngine("b", 1, ()), world.route()
    await world.bring(route, engine, first)
    await world.publish(2)
    await world.publish(3)
    with pytest.raises((TornRead, RouteUnavailable), match="has generation 4"):
        await world.bring(route, engine, first)


async def test_newcomer_reads_from_the_copies_when_the_publisher_is_gone(
    bus: Bus, endpoint: Endpoint
) -> None:
    async with AsyncExitStack() as stack:
        copies = await stack.enter_async_context(open_copies(bus, MODEL, "late"))
        async with open_publisher(bus, MODEL, options=OPTIONS) as publisher:
            world = World(bus, publisher, endpoint, stack)
            published = await world.publish(1)
            for name in ("b", "c"):
                await stack.enter_async_context(holder(world, name, published))
        offers = await heard(copies, published, 2)
        engine, route = InProcessEngine("late", 2, ()), world.route(copies)
        with pytest.raises(RouteUnavailable):
            route.reach(published.layout, published.ready.placement)

        placement = with_copies(published.ready.placement, offers)
        await world.bring(route, engine, published, placement=placement)


async def test_copy_is_retired_before_it_is_overwritten_and_at_the_end(world: World) -> None:
    first = await world.publish(1)
    async with open_copies(world.bus, MODEL, "late") as copies:
        async with holder(world, "b", first) as kept:
            (offer,) = await heard(copies, first, 1)
            second = await world.publish(2)
            engine = InProcessEngine("b", 1, ())
            await world.bring(world.route(kept=kept), engine, second)
            assert copies.of(first.ready, first.layout_digest, first.layout) == ()
            await kept.offer(2, second.layout_digest, second.ready.created_ns)
            (again,) = await heard(copies, second, 1)
            assert again.placement != offer.placement
        await heard(copies, second, 0)
    said = [received.message async for received in world.bus.replay(CopyRetired, model=MODEL)]
    assert [gone.version for gone in said] == [1, 2]
    assert copy_blocks() == []


async def test_who_comes_later_knows_what_is_offered(world: World) -> None:
    published = await world.publish(1)
    async with (
        holder(world, "b", published),
        open_copies(world.bus, MODEL, "b") as own,
        open_copies(world.bus, MODEL, "late") as copies,
    ):
        assert own.of(published.ready, published.layout_digest, published.layout) == ()
        (offer,) = copies.of(published.ready, published.layout_digest, published.layout)
        assert offer.engine == "b"
        other: Any = published.ready.__class__(
            model=MODEL, version=1, producer="x", created_ns=published.ready.created_ns + 1
        )
        assert copies.of(other, published.layout_digest, published.layout) == ()


async def test_placement_is_widened_by_what_can_be_read_from_other_hosts(world: World) -> None:
    published = await world.publish(1)
    async with (
        open_copies(world.bus, MODEL, "late") as copies,
        holder(world, "b", published),
        holder(world, "c", published),
    ):
        await heard(copies, published, 2)
        route = world.route(copies)
        (ways,) = route.widen(
            published.ready, published.layout_digest, published.layout, published.ready.placement
        )
    assert [type(way).__name__ for way in ways] == [
        "SharedMemorySegment",
        "RemoteSegment",
        "RemoteSegment",
        "RemoteSegment",
    ], "a neighbour's block would be read in place"


async def test_copy_is_forgotten_when_its_engine_is_gone(world: World) -> None:
    published = await world.publish(1)
    async with holder(world, "b", published), open_copies(world.bus, MODEL, "late") as copies:
        await heard(copies, published, 1)
        await world.bus.presence.drop(MODEL, "b")
        await heard(copies, published, 0)
        async with open_copies(world.bus, MODEL, "later") as later:
            assert later.of(published.ready, published.layout_digest, published.layout) == ()


async def test_copy_is_forgotten_when_another_consumer_serves_its_engine(world: World) -> None:
    published = await world.publish(1)
    async with holder(world, "b", published), open_copies(world.bus, MODEL, "late") as copies:
        await heard(copies, published, 1)
        await world.bus.presence.put(state_of("b", "two"))
        await heard(copies, published, 0)


async def test_version_is_read_from_a_copy_of_this_host_and_then_elsewhere_when_it_tears(
    world: World, caplog: pytest.LogCaptureFixture
) -> None:
    published = await world.publish(1)
    async with (
        open_copies(world.bus, MODEL, "late") as copies,
        holder(world, "b", published) as kept,
    ):
        await heard(copies, published, 1)
        (far,) = (way for way in published.ready.placement[0] if isinstance(way, RemoteSegment))
        placement: Placement = ((far,),)
        route, engine = world.route(copies), InProcessEngine("late", 2, ())
        await world.bring(route, engine, published, placement=placement)
        assert "not read" not in caplog.text

        (block,) = kept._blocks
        block.begin_write()[:] = bytes(block.size_bytes)
        await world.bring(route, engine, published, placement=placement, proven=True)
        assert "the copy of engine b is not read" in caplog.text


class NoRoom(KeptCopy):
    """Where no copy fits."""

    async def begin(self, layout: Layout) -> NoReturn:
        raise SharedMemoryFull("/dev/shm", 2, 1)


async def test_version_is_brought_without_a_copy_when_there_is_no_room_for_one(
    world: World, caplog: pytest.LogCaptureFixture
) -> None:
    kept = NoRoom(world.bus, MODEL, "b", HOST, world.endpoint)
    route, engine = world.route(kept=kept), InProcessEngine("b", 1, ())
    for version in (1, 2):
        published = await world.publish(version)
        await world.bring(route, engine, published, proven=version > 1)
        await route.share(version, published.layout_digest, published.ready.created_ns)
    assert caplog.text.count("no copy is kept for others") == 1
    said = [received.message async for received in world.bus.replay(CopyReady, model=MODEL)]
    assert said == []
