"""What every route must do. A new route is added to `ROUTES` of `worlds`, and to nothing else here.

What only one route has to do is below, under its name. The loss of a peer concerns those that have
one: `local` reads memory that outlives its publisher, and files.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from functools import partial
from pathlib import Path

import anyio
import pytest
import torch
from torch import nn

from tests.integration.routes.engine import DEADLINE_S
from tests.integration.routes.fleet import Fleet, causes, until
from tests.integration.routes.model import make_tensors
from tests.integration.routes.worlds import (
    ROUTES,
    BroadcastWorld,
    LocalWorld,
    OpenWorld,
    Publishers,
    RemoteWorld,
    Shape,
    World,
)
from tests.unit.transfer.publishing import cut_layout, open_trainer, weights_digest
from weightbus.consumers.errors import (
    ApplyFailed,
    ConsumerError,
    PeerLost,
    RouteUnavailable,
)
from weightbus.consumers.planning.buckets import plan_buckets
from weightbus.schemas.layout import Layout, SegmentSpec

pytestmark = pytest.mark.anyio

SHORT_S = 0.5
"""A deadline that is let pass."""

ONE_SLOT = Shape(bucket_bytes=1024, slots=1)
"""Fetch, broadcast and reload take turns; the largest tensor takes several buckets."""

Open = Callable[[Layout, Shape], AbstractContextManager[World]]

LOCAL = ("local-memory", "local-files", "local-staged")
REMOTE = ("p2p", "broadcast")


def only(*routes: str) -> pytest.MarkDecorator:
    """What the other routes have no part in."""
    return pytest.mark.parametrize("make_world", routes, indirect=True)


def first_and_later(*routes: str) -> pytest.MarkDecorator:
    """The first version goes through the engine's own loader, later ones are streamed; no first one
    is broadcast: it takes p2p."""
    return pytest.mark.parametrize(
        ("make_world", "streamed"),
        [
            (route, later)
            for route in routes
            for later in (False, True)
            if later or route != "broadcast"
        ],
        indirect=["make_world"],
    )


def layout_of_ranks(ranks: int) -> Layout:
    """A trainer of some ranks: each has a segment, and shards are cut across them."""
    return cut_layout(make_tensors(0), segments=ranks, seed=ranks)


@pytest.fixture(scope="module")
def publishers() -> Iterator[Publishers]:
    publishers = Publishers()
    yield publishers
    publishers.close()


@pytest.fixture(params=ROUTES)
def make_world(request: pytest.FixtureRequest) -> OpenWorld:
    name: str = request.param
    return ROUTES[name]


@pytest.fixture
def open_world(make_world: OpenWorld, publishers: Publishers, tmp_path: Path) -> Open:
    return lambda layout, shape: make_world(layout, tmp_path, publishers, shape)


@pytest.fixture
def world(open_world: Open) -> Iterator[World]:
    with open_world(layout_of_ranks(3), Shape()) as world:
        yield world


@pytest.fixture
def narrow(open_world: Open) -> Iterator[World]:
    """A world in which nothing runs ahead of its readers by more than one small bucket."""
    with open_world(layout_of_ranks(3), ONE_SLOT) as world:
        yield world


@pytest.mark.parametrize("trainer_ranks", [1, 4])
@pytest.mark.parametrize("engine_ranks", [1, 2, 3])
async def test_every_dtype_and_shape_arrives_whatever_the_ranks(
    open_world: Open, trainer_ranks: int, engine_ranks: int
) -> None:
    """Several versions: through the engine's own loader, then directly, in either slot."""
    with open_world(layout_of_ranks(trainer_ranks), Shape()) as world:
        fleet = Fleet.of(world, engine_ranks)
        for version in (1, 2, 5):
            replies = await fleet.update(version)
        for applied in replies:
            assert all(reply.processed_parameters == 0 for reply in applied)


async def test_later_versions_take_the_stages_of_their_route(world: World) -> None:
    fleet = Fleet.of(world, 2)
    await fleet.update(1)
    for version in (2, 3):
        applied, *_ = await fleet.update(version)
        stages = {timing.stage for reply in applied for timing in reply.stages}
        fetch = {"fetch"} if world.staged else set()
        broadcast = {"broadcast"} if isinstance(world, BroadcastWorld) else set()
        assert stages == {"reload"} | fetch | broadcast


async def test_buckets_of_every_stage_lie_within_it_and_add_up(narrow: World) -> None:
    """What is streamed is told bucket by bucket; what is read in place has none."""
    fleet = Fleet.of(narrow, 2)
    await fleet.update(1)
    applied, *_ = await fleet.update(2)
    for timing in (timing for reply in applied for timing in reply.stages):
        assert (len(timing.buckets) > 1) == narrow.staged, timing
        if narrow.staged:
            assert sum(bucket.bytes for bucket in timing.buckets) == timing.bytes
            assert all(bucket.start_ns <= bucket.end_ns for bucket in timing.buckets)
            starts = [bucket.start_ns for bucket in timing.buckets]
            assert starts == sorted(starts)
            assert timing.start_ns <= starts[0]
            assert (timing.start_ns == starts[0]) or timing.stage == "reload"
            assert max(bucket.end_ns for bucket in timing.buckets) <= timing.end_ns


async def test_replicas_and_engines_of_other_sizes_agree(world: World) -> None:
    fleet = Fleet.of(world, 1, 3, 3)
    for version in (1, 2):
        await fleet.update(version)


async def test_version_arrives_when_it_is_cut_for_other_ranks_than_before(open_world: Open) -> None:
    """From four ranks to two, and then to three that come later."""
    with open_world(layout_of_ranks(4), Shape()) as world:
        two = Fleet.of(world, 2)
        for version in (1, 2):
            await two.update(version)
        both = Fleet(world, [*two.sites, world.add_site("d", 3, 0)])
        for version in (3, 4, 5):
            await both.update(version)


async def test_tensors_larger_than_a_bucket_arrive_through_one_slot(narrow: World) -> None:
    layout = narrow.trainer.layout
    largest = max(tensor.nbytes for tensor in make_tensors(0).values())
    assert largest > 3 * ONE_SLOT.bucket_bytes
    assert plan_buckets(layout, ONE_SLOT.bucket_bytes, 3).buckets > 4
    fleet = Fleet.of(narrow, 3)
    for version in (1, 2, 3):
        await fleet.update(version)


async def test_version_arrives_when_a_segment_is_empty(open_world: Open) -> None:
    layout = layout_of_ranks(2)
    layout = Layout(layout.tensors, layout.shards, (*layout.segments, SegmentSpec(0)))
    with open_world(layout, Shape()) as world:
        fleet = Fleet.of(world, 2)
        for version in (1, 2):
            await fleet.update(version)


async def test_engine_is_paused_once_and_before_it_is_written(world: World) -> None:
    fleet = Fleet.of(world, 2)
    for version in (1, 2):
        await fleet.update(version)
    for engine in fleet.engines:
        assert engine.log == ["pause", "apply"] * 2


async def test_version_arrives_when_parameters_have_moved_meanwhile(world: World) -> None:
    """Nobody knew when the transfer began: a stream is broken off, and others do not suffer."""
    fleet = Fleet.of(world, 2)
    await fleet.update(1)
    moves = [True]

    async def pause() -> None:
        for host in fleet.engine.hosts if moves else ():
            old = host.live.get_parameter("F32_wide")
            host.live.F32_wide = nn.Parameter(old.detach().clone(), requires_grad=False)
        moves.clear()

    placement = fleet.publish(2)
    fleet.check(2, await fleet.bring(2, placement, pauses={"a": pause}))
    for version in (3, 4):
        await fleet.update(version)


async def test_nothing_is_written_when_the_pause_fails(world: World) -> None:
    fleet = Fleet.of(world, 2)
    await fleet.update(1)

    async def refuse() -> None:
        raise ConsumerError("the engine does not pause")

    error, *others = await fleet.bring(2, fleet.publish(2), pauses={"a": refuse})
    assert isinstance(error, ConsumerError)
    assert "does not pause" in str(error)
    assert set(causes(others)) <= {"PeerLost"}
    fleet.engine.check(make_tensors(1))
    await fleet.check_no_mix(1, 2)
    await fleet.update(3)


@only("local-memory", *REMOTE)  # a file that is written again is a file
async def test_version_is_refused_when_it_was_overwritten_before_the_pause(world: World) -> None:
    fleet = Fleet.of(world, 2)
    await fleet.update(1)
    placement = fleet.publish(2)
    world.overwrite(2)
    for error in await fleet.bring(2, placement):
        assert isinstance(error, RouteUnavailable)
        assert "has generation" in str(error)
    await fleet.check_untouched(1)
    await fleet.update(3)


@first_and_later(*ROUTES)
async def test_torn_read_is_noticed_and_the_next_version_is_whole(
    narrow: World, streamed: bool
) -> None:
    """The source retires the version, and writes it again, while it is read."""
    fleet = Fleet.of(narrow, 2)
    if streamed:
        await fleet.update(1)
    placement = fleet.publish(2)

    async def pause() -> None:
        narrow.overwrite(2)

    if isinstance(narrow, RemoteWorld):
        outcomes = await fleet.bring(2, placement, pauses={"a": pause})
    else:  # what lies on this host is looked at last by the workers
        fleet.engine.hosts[1].on_synchronize = partial(narrow.overwrite, 2)
        outcomes = await fleet.bring(2, placement)
        fleet.engine.hosts[1].on_synchronize = _nothing
    found = causes(outcomes)
    assert "TornRead" in found
    assert set(found) <= {"TornRead", "PeerLost"}, "nobody takes it for whole"
    await fleet.check_no_mix(1, 2)
    await fleet.update(3)
    assert not (await fleet.engine.state(DEADLINE_S)).touched


async def test_nothing_is_touched_when_a_segment_cannot_be_reached(world: World) -> None:
    fleet = Fleet.of(world, 2)
    await fleet.update(1)
    logs = [list(engine.log) for engine in fleet.engines]
    first, _, last = fleet.publish(2)
    layout = world.trainer.layout
    for segment, reason in world.strange():
        placement = (first, (segment,), last)
        with pytest.raises(RouteUnavailable, match=reason):
            fleet.route.reach(layout, placement)
        for error in await fleet.bring(2, placement):
            assert isinstance(error, RouteUnavailable)
            assert reason in str(error)
    assert [engine.log for engine in fleet.engines] == logs
    await fleet.check_untouched(1)
    await fleet.update(3)


async def test_nothing_is_touched_when_the_source_is_gone(world: World) -> None:
    fleet = Fleet.of(world, 2)
    await fleet.update(1)
    placement = fleet.publish(2)
    world.lose_source(2)
    outcomes = await fleet.bring(2, placement)
    assert set(causes(outcomes)) == {"RouteUnavailable"}
    await fleet.check_untouched(1)


@first_and_later(*REMOTE)
async def test_transfer_fails_soon_when_the_source_dies_in_the_middle(
    narrow: World, streamed: bool
) -> None:
    fleet = Fleet.of(narrow, 2)
    if streamed:
        await fleet.update(1)
    placement = fleet.publish(2)

    async def pause() -> None:
        narrow.lose_source(2)

    begin = anyio.current_time()
    outcomes = await fleet.bring(2, placement, pauses={"a": pause})
    assert anyio.current_time() - begin < DEADLINE_S / 2
    found = causes(outcomes)
    assert "SegmentUnavailable" in found, outcomes
    assert set(found) <= {"SegmentUnavailable", "PeerLost"}, outcomes
    await fleet.check_no_mix(1, 2)
    await fleet.update(3)


@only("broadcast")
async def test_others_know_who_is_lost_when_a_member_leaves_in_the_middle(narrow: World) -> None:
    fleet = Fleet.of(narrow, 2)
    await fleet.update(1)

    async def leave() -> None:
        fleet.leave("z")
        await anyio.sleep_forever()

    begin = anyio.current_time()
    *others, lost = await fleet.bring(2, fleet.publish(2), pauses={"z": leave})
    assert anyio.current_time() - begin < DEADLINE_S / 2
    assert lost is None
    assert [site.engine.name for site in fleet.sites][-1] == "z"
    for error in others:
        assert isinstance(error, PeerLost)
    assert any("z/" in str(error) for error in others)
    await fleet.check_no_mix(1, 2)

    rest = Fleet(narrow, fleet.sites[:-1])
    await rest.update(3)
    await fleet.update(4)


@first_and_later(*ROUTES)
async def test_engine_is_used_again_when_a_transfer_was_cancelled_in_the_middle(
    narrow: World, streamed: bool
) -> None:
    """One rank has been written to, or is being; another was not asked yet."""
    fleet = Fleet.of(narrow, 2)
    if streamed:
        await fleet.update(1)
    engine, placement = fleet.engine, fleet.publish(2)
    before = engine.workers[0].updates

    async def hold(rank: int) -> None:
        if rank == 1:
            await anyio.sleep_forever()

    engine.before_apply = hold
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(fleet.bring, 2, placement)
        await until(lambda: engine.workers[0].updates > before)
        tasks.cancel_scope.cancel()
    engine.before_apply = _at_once
    assert engine.workers[1].updates == before
    await fleet.check_no_mix(1, 2)
    for version in (3, 4):
        await fleet.update(version)


async def test_deadline_is_kept_and_the_next_version_goes_through(world: World) -> None:
    fleet = Fleet.of(world, 2)
    await fleet.update(1)
    placement = fleet.publish(2)
    outcomes = await fleet.bring(2, placement, deadline_s=0.0)
    assert set(causes(outcomes)) == {"DeadlineExceeded"}
    await fleet.check_untouched(1)
    await fleet.update(3)


@first_and_later(*ROUTES)
async def test_deadline_is_kept_when_the_pause_takes_too_long(
    narrow: World, streamed: bool
) -> None:
    fleet = Fleet.of(narrow, 2)
    if streamed:
        await fleet.update(1)

    async def pause() -> None:
        await anyio.sleep(2 * SHORT_S)

    placement = fleet.publish(2)
    outcomes = await fleet.bring(2, placement, deadline_s=SHORT_S, pauses={"a": pause})
    found = causes(outcomes)
    assert "DeadlineExceeded" in found, outcomes
    assert set(found) <= {"DeadlineExceeded", "PeerLost"}, outcomes
    assert fleet.engine.workers[0].version == (1 if streamed else -1)
    await fleet.check_no_mix(1, 2)
    await fleet.update(3)


async def test_engine_is_used_again_when_its_own_loader_failed(world: World) -> None:
    fleet = Fleet.of(world, 2)
    fail = [True, False]

    def raise_once() -> None:
        if fail.pop(0):
            raise RuntimeError("the device is lost")

    fleet.engine.hosts[0].on_synchronize = raise_once
    error, *_ = await fleet.bring(1, fleet.publish(1))
    assert isinstance(error, ApplyFailed)
    assert "the device is lost" in str(error)
    assert error.touched
    fleet.engine.hosts[0].on_synchronize = _nothing
    for version in (2, 3):
        await fleet.update(version)


@pytest.mark.parametrize("version", [1, 2])
async def test_flipped_bit_is_proven_when_the_bytes_differ_from_those_published(
    world: World, version: int
) -> None:
    """By relay, or by stream."""
    fleet = Fleet.of(world, 3)
    if version > 1:
        await fleet.update(1)
    sent, said = make_tensors(version), make_tensors(version)
    said["BF16.rows"].view(torch.uint8)[3, 5] ^= 16
    outcomes = await fleet.bring(version, world.publish(sent, version))
    for engine, applied in zip(fleet.engines, outcomes, strict=True):
        assert isinstance(applied, tuple), applied
        assert engine.verdict(world.trainer, applied, weights_digest(sent)).ok
        verdict = engine.verdict(world.trainer, applied, weights_digest(said))
        assert not verdict.ok
        assert "the publisher's is" in verdict.reason


@only(*LOCAL, "p2p")  # a plan sends all ranks of an engine to a broadcast, or none
async def test_some_ranks_alone_are_written_when_the_plan_says_so(world: World) -> None:
    fleet = Fleet.of(world, 2)
    await fleet.update(1)
    (applied,) = await fleet.bring(2, fleet.publish(2), ranks=(1,))
    assert isinstance(applied, tuple), applied
    assert [reply.rank for reply in applied] == [1]
    assert [worker.version for worker in fleet.engine.workers] == [1, 2]


@only(*LOCAL)  # others know no size of what they read
async def test_nothing_is_touched_when_a_segment_is_too_short(world: World) -> None:
    assert isinstance(world, LocalWorld)
    fleet = Fleet.of(world, 2)
    await fleet.update(1)
    placement = fleet.publish(2)
    path = world.path(1, 2)
    size = path.stat().st_size
    os.truncate(path, size - 1)
    (error,) = await fleet.bring(2, placement)
    assert isinstance(error, RouteUnavailable)
    assert "bytes long: must hold at least" in str(error)
    await fleet.check_untouched(1)
    os.truncate(path, size)
    await fleet.update(3)


@only("local-memory")
async def test_nearest_way_is_taken_when_several_are_offered(
    open_world: Open, tmp_path: Path
) -> None:
    layout = layout_of_ranks(1)
    with (
        open_world(layout, Shape()) as world,
        open_trainer(layout, "files", tmp_path) as far,
    ):
        fleet = Fleet.of(world, 2)
        ((memory,),) = fleet.publish(1)
        (file,) = far.publish(make_tensors(1), 1)
        assert tuple(fleet.route.reach(layout, ((file, memory),))) == (memory,)
        world.lose_source(1)
        assert tuple(fleet.route.reach(layout, ((file, memory),))) == (file,)
        fleet.check(1, await fleet.bring(1, ((memory, file),)))


def _nothing() -> None:
    pass


async def _at_once(rank: int) -> None:
    pass
