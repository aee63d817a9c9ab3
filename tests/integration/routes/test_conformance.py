"""What every route must do. A new route is added to `ROUTES`, and to nothing else here."""

from __future__ import annotations

import os
import uuid
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from pathlib import Path

import pytest
import torch

from tests.integration.routes.engine import DEADLINE_S, InProcessEngine
from tests.integration.routes.model import make_tensors
from tests.unit.transfer.publishing import (
    HOST,
    Kind,
    Trainer,
    cut_layout,
    open_trainer,
    weights_digest,
)
from weightbus.consumers.errors import (
    ApplyFailed,
    ConsumerError,
    DeadlineExceeded,
    RouteUnavailable,
    TornRead,
    cause_of,
)
from weightbus.consumers.transfer.local import LocalRoute
from weightbus.consumers.transfer.route import Route, Transfer
from weightbus.consumers.transfer.staged import Staging
from weightbus.consumers.transfer.staging import BlockPool
from weightbus.schemas.layout import Layout
from weightbus.schemas.placement import FileSegment, Placement, Segment, SharedMemorySegment
from weightbus.schemas.rounds import EngineRoute, RankRoute, RoundPlan
from weightbus.schemas.worker import Applied

pytestmark = pytest.mark.anyio

MakeRoute = Callable[[Sequence[str]], Route]

POOL = BlockPool(f"test-{uuid.uuid4().hex[:8]}.e", 16 * 2**20)
"""Staging of all routes; closed after the last test."""

ROUTES: Mapping[str, MakeRoute] = {
    "local": lambda roots: LocalRoute(HOST, roots),
    "local, staged": lambda roots: LocalRoute(HOST, roots, Staging(POOL, DEADLINE_S)),
}
"""Every route, made for a host whose files lie below some roots."""

BUCKET_BYTES = 4096
"""So that a version takes several buckets."""


@pytest.fixture(scope="module", autouse=True)
def _close_pool() -> Iterator[None]:
    yield
    POOL.close()


class World:
    """One trainer, one route, and engines that follow."""

    def __init__(self, trainer: Trainer, make_route: MakeRoute) -> None:
        self.trainer = trainer
        self.route = make_route(trainer.roots)

    def engine(self, ranks: int, name: str = "a") -> InProcessEngine:
        return InProcessEngine(name, ranks, self.trainer.roots)

    async def bring(
        self,
        engine: InProcessEngine,
        version: int,
        placement: Placement,
        *,
        deadline_s: float = DEADLINE_S,
        begin_write: Callable[[], Awaitable[None]] | None = None,
    ) -> tuple[Applied, ...]:
        """Prepare and transfer, as the consumer service does."""
        await engine.prepare(self.trainer)

        async def pause() -> None:
            await engine.pause(DEADLINE_S)

        ranks = tuple(range(engine.ranks))
        inspected = await engine.inspect(None, DEADLINE_S)
        routes = tuple(RankRoute(rank=rank, route=self.route.name) for rank in ranks)
        return await self.route.transfer(
            Transfer(
                engine=engine,
                ranks=ranks,
                version=version,
                layout=self.trainer.layout,
                layout_digest=self.trainer.layout_digest,
                placement=placement,
                plan=RoundPlan(
                    model="m",
                    version=version,
                    round=f"v{version}",
                    epoch=0,
                    leader=engine.name,
                    engines=(EngineRoute(engine=engine.name, ranks=routes),),
                    bucket_bytes=BUCKET_BYTES,
                ),
                begin_write=begin_write or pause,
                deadline_s=deadline_s,
                proven=all(self.trainer.layout_digest in rank.proven for rank in inspected),
            )
        )

    async def update(self, engine: InProcessEngine, version: int) -> tuple[Applied, ...]:
        """Publish and bring a version; it must arrive, bit by bit, and be proven."""
        tensors = make_tensors(version)
        placement = ways(self.trainer.publish(tensors, version))
        applied = await self.bring(engine, version, placement)
        assert [(reply.rank, reply.version) for reply in applied] == [
            (rank, version) for rank in range(engine.ranks)
        ]
        verdict = engine.verdict(self.trainer, applied, weights_digest(tensors))
        assert verdict.ok, verdict.reason
        engine.check(tensors)
        return applied


def ways(segments: Sequence[Segment]) -> Placement:
    return tuple((segment,) for segment in segments)


def layout_of_ranks(ranks: int) -> Layout:
    """A trainer of some ranks: each has a segment, and shards are cut across them."""
    return cut_layout(make_tensors(0), segments=ranks, seed=ranks)


@pytest.fixture(params=ROUTES)
def make_route(request: pytest.FixtureRequest) -> MakeRoute:
    return ROUTES[request.param]


@pytest.fixture(params=["memory", "files"])
def kind(request: pytest.FixtureRequest) -> Kind:
    kind: Kind = request.param
    return kind


@pytest.fixture
def world(make_route: MakeRoute, kind: Kind, tmp_path: Path) -> Iterator[World]:
    with open_trainer(layout_of_ranks(3), kind, tmp_path) as trainer:
        yield World(trainer, make_route)


@pytest.mark.parametrize("trainer_ranks", [1, 4])
@pytest.mark.parametrize("engine_ranks", [1, 2, 3])
async def test_every_dtype_and_shape_arrives_whatever_the_ranks(
    make_route: MakeRoute, kind: Kind, trainer_ranks: int, engine_ranks: int, tmp_path: Path
) -> None:
    """Several versions: through the engine's own loader, then directly, in either slot."""
    with open_trainer(layout_of_ranks(trainer_ranks), kind, tmp_path) as trainer:
        world = World(trainer, make_route)
        engine = world.engine(engine_ranks)
        for version in (1, 2, 5):
            applied = await world.update(engine, version)
        assert all(reply.processed_parameters == 0 for reply in applied)


async def test_engines_of_other_sizes_and_replicas_agree(world: World) -> None:
    engines = [world.engine(ranks, name) for name, ranks in (("a", 1), ("b", 3), ("c", 3))]
    for version in (1, 2):
        for engine in engines:
            await world.update(engine, version)


async def test_engine_is_paused_once_and_before_it_is_written(world: World) -> None:
    engine = world.engine(2)
    await world.update(engine, 1)
    assert engine.log == ["pause", "apply"]


async def test_some_ranks_alone_are_written_when_the_plan_says_so(world: World) -> None:
    engine = world.engine(2)
    await world.update(engine, 1)
    placement = ways(world.trainer.publish(make_tensors(2), 2))
    await engine.prepare(world.trainer)
    transfer = Transfer(
        engine=engine,
        ranks=(1,),
        version=2,
        layout=world.trainer.layout,
        layout_digest=world.trainer.layout_digest,
        placement=placement,
        plan=RoundPlan(
            model="m",
            version=2,
            round="v2",
            epoch=0,
            leader="a",
            engines=(EngineRoute(engine="a", ranks=(RankRoute(rank=1, route=world.route.name),)),),
        ),
        begin_write=lambda: engine.pause(DEADLINE_S),
        deadline_s=DEADLINE_S,
    )
    (applied,) = await world.route.transfer(transfer)
    assert applied.rank == 1
    assert [worker.version for worker in engine.workers] == [1, 2]


async def test_nothing_is_written_when_the_pause_fails(world: World) -> None:
    engine = world.engine(2)
    await world.update(engine, 1)

    async def refuse() -> None:
        raise ConsumerError("the engine does not pause")

    placement = ways(world.trainer.publish(make_tensors(2), 2))
    with pytest.raises(ConsumerError, match="does not pause"):
        await world.bring(engine, 2, placement, begin_write=refuse)
    await check_untouched(engine, 1)


def overwrite(trainer: Trainer, version: int) -> None:
    """The trainer publishes on without waiting for readers."""
    if trainer.kind == "memory":
        for block in trainer.blocks:
            block.generation += 2
    else:
        for number in range(len(trainer.layout.segments)):
            os.utime(trainer.path(number, version), ns=(version, version))


async def test_torn_read_is_noticed_and_the_next_version_is_whole(world: World) -> None:
    """Written again after the pause, and while the engine's workers read."""
    engine = world.engine(2)
    await world.update(engine, 1)
    placement = ways(world.trainer.publish(make_tensors(2), 2))
    engine.hosts[1].on_synchronize = lambda: overwrite(world.trainer, 2)
    with pytest.raises((ApplyFailed, TornRead), match="has generation") as caught:
        await world.bring(engine, 2, placement)
    assert (cause_of(caught.value), caught.value.touched) == ("TornRead", True)
    state = await engine.state(DEADLINE_S)
    assert state.touched or state.version == 2, "what was staged was whole for the workers"
    engine.hosts[1].on_synchronize = lambda: None
    await world.update(engine, 3)
    assert not (await engine.state(DEADLINE_S)).touched


async def test_version_is_refused_when_it_was_overwritten_before_the_pause(
    make_route: MakeRoute, tmp_path: Path
) -> None:
    with open_trainer(layout_of_ranks(2), "memory", tmp_path) as trainer:
        world = World(trainer, make_route)
        engine = world.engine(2)
        await world.update(engine, 1)
        placement = ways(trainer.publish(make_tensors(2), 2))
        overwrite(trainer, 2)
        with pytest.raises(RouteUnavailable, match="has generation"):
            await world.bring(engine, 2, placement)
        await check_untouched(engine, 1)
        await world.update(engine, 3)


async def check_untouched(engine: InProcessEngine, version: int) -> None:
    """The engine still serves what it did."""
    engine.check(make_tensors(version))
    for reply in await engine.inspect(None, DEADLINE_S):
        assert (reply.version, reply.touched) == (version, False)


async def test_nothing_is_touched_when_a_segment_cannot_be_reached(world: World) -> None:
    engine = world.engine(2)
    await world.update(engine, 1)
    log = list(engine.log)
    whole = world.trainer.publish(make_tensors(2), 2)
    absent: Segment = FileSegment(path=world.trainer.roots[0] + "/absent")
    outside = FileSegment(path="/proc/self/status")
    elsewhere = SharedMemorySegment(name="weightbus-x", host_id="other", generation=2)
    for segment, reason in (
        (absent, "No such file"),
        (outside, "must lie below"),
        (elsewhere, "must be on this one"),
    ):
        with pytest.raises(RouteUnavailable, match=reason):
            world.route.reach(world.trainer.layout, ways((whole[0], segment, whole[2])))
        with pytest.raises(RouteUnavailable, match=reason):
            await world.bring(engine, 2, ways((whole[0], segment, whole[2])))
    assert engine.log == log
    await check_untouched(engine, 1)
    assert tuple(world.route.reach(world.trainer.layout, ways(whole))) == whole
    await world.update(engine, 3)


async def test_nothing_is_touched_when_a_segment_is_too_short(world: World) -> None:
    engine = world.engine(2)
    await world.update(engine, 1)
    segments = world.trainer.publish(make_tensors(2), 2)
    path = (
        world.trainer.blocks[1].path if world.trainer.kind == "memory" else world.trainer.path(1, 2)
    )
    size = path.stat().st_size
    os.truncate(path, size - 1)
    with pytest.raises(RouteUnavailable, match="bytes long: must hold at least"):
        await world.bring(engine, 2, ways(segments))
    await check_untouched(engine, 1)
    os.truncate(path, size)
    await world.update(engine, 3)


async def test_nothing_is_touched_when_the_source_is_gone(world: World) -> None:
    engine = world.engine(2)
    await world.update(engine, 1)
    segments = world.trainer.publish(make_tensors(2), 2)
    if world.trainer.kind == "memory":
        world.trainer.blocks[2].unlink()
    else:
        world.trainer.path(2, 2).unlink()
    with pytest.raises(RouteUnavailable, match="No such file"):
        await world.bring(engine, 2, ways(segments))
    await check_untouched(engine, 1)


async def test_deadline_is_kept_and_the_next_version_goes_through(world: World) -> None:
    engine = world.engine(2)
    await world.update(engine, 1)
    placement = ways(world.trainer.publish(make_tensors(2), 2))
    with pytest.raises(DeadlineExceeded):
        await world.bring(engine, 2, placement, deadline_s=0.0)
    await check_untouched(engine, 1)
    await world.update(engine, 3)


async def test_engine_is_used_again_when_its_own_loader_failed(world: World) -> None:
    engine = world.engine(2)
    fail = [True, False]

    def raise_once() -> None:
        if fail.pop(0):
            raise RuntimeError("the device is lost")

    engine.hosts[0].on_synchronize = raise_once
    placement = ways(world.trainer.publish(make_tensors(1), 1))
    with pytest.raises(ApplyFailed, match="the device is lost") as caught:
        await world.bring(engine, 1, placement)
    assert caught.value.touched
    engine.hosts[0].on_synchronize = lambda: None
    for version in (2, 3):
        await world.update(engine, version)


async def test_flipped_bit_is_proven_when_the_bytes_differ_from_those_published(
    world: World,
) -> None:
    engine = world.engine(3)
    await world.update(engine, 1)
    sent, said = make_tensors(2), make_tensors(2)
    said["BF16.rows"].view(torch.uint8)[3, 5] ^= 16
    applied = await world.bring(engine, 2, ways(world.trainer.publish(sent, 2)))
    assert engine.verdict(world.trainer, applied, weights_digest(sent)).ok
    verdict = engine.verdict(world.trainer, applied, weights_digest(said))
    assert not verdict.ok
    assert "the publisher's is" in verdict.reason


async def test_nearest_way_is_taken_when_several_are_offered(
    make_route: MakeRoute, tmp_path: Path
) -> None:
    layout = layout_of_ranks(1)
    with (
        open_trainer(layout, "memory", tmp_path) as near,
        open_trainer(layout, "files", tmp_path) as far,
    ):
        world = World(near, make_route)
        (memory,), (file,) = (t.publish(make_tensors(1), 1) for t in (near, far))
        assert tuple(world.route.reach(layout, ((file, memory),))) == (memory,)
        near.blocks[0].unlink()
        assert tuple(world.route.reach(layout, ((file, memory),))) == (file,)
        engine = world.engine(2)
        await world.bring(engine, 1, ((memory, file),))
        engine.check(make_tensors(1))
