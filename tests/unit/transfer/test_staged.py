"""Every byte reaches every worker through staging, and whatever fails, its first cause is told."""

from __future__ import annotations

import uuid
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from contextlib import ExitStack, asynccontextmanager
from pathlib import Path

import anyio
import pytest

from tests.unit.planning.worlds import World, box_of, make_world
from tests.unit.transfer.blocks import Block, open_block
from tests.unit.transfer.reading import Held, ThreadEngine
from tests.unit.transfer.words import open_words
from weightbus.consumers.errors import (
    ApplyFailed,
    PeerLost,
    ProofNeeded,
    SegmentUnavailable,
    TornRead,
    WorkerLost,
)
from weightbus.consumers.planning.buckets import plan_buckets
from weightbus.consumers.transfer.alone import bring_alone
from weightbus.consumers.transfer.fetch import Fetcher, LocalSegments, Read, open_fetcher
from weightbus.consumers.transfer.local import LocalRoute
from weightbus.consumers.transfer.pipeline import Lane, Reader
from weightbus.consumers.transfer.route import Transfer
from weightbus.consumers.transfer.staged import (
    Staging,
    bring_by_stream,
    open_blocks,
)
from weightbus.consumers.transfer.staging import BlockPool, BlockSpec
from weightbus.schemas.placement import FileSegment, Placement
from weightbus.schemas.rounds import EngineRoute, RankRoute, RoundPlan
from weightbus.schemas.worker import Applied, Feed, InPlace, Relay, Stream

pytestmark = pytest.mark.anyio

HOST = "host"
DEADLINE_S = 20.0
STALL_S = 10.0
BUCKET_BYTES = 4096
SEED = 317
"""Of a world of several segments, and of more buckets than slots."""


class Site:
    """A version in shared memory, an engine, and what a route needs to bring it."""

    def __init__(self, world: World, blocks: Sequence[Block], ranks: int = 2) -> None:
        self.world, self.blocks = world, blocks
        self.engine = ThreadEngine(world.layout, ranks)
        self.pool = BlockPool(f"test-{uuid.uuid4().hex[:8]}.e", 2**20)
        self.staging = Staging(self.pool, STALL_S)
        self.local = LocalSegments(HOST)
        self.at_pause: list[list[int]] = []
        """For every pause, how much was filled of every staging block."""

    def close(self) -> None:
        self.engine.close()
        self.pool.close()
        self.local.close()

    @property
    def placement(self) -> Placement:
        return tuple((block.segment(),) for block in self.blocks)

    def transfer(
        self, *, slots: int = 2, proven: bool = True, placement: Placement | None = None
    ) -> Transfer:
        ranks = tuple(range(self.engine.ranks))
        routes = tuple(RankRoute(rank=rank, route="p2p") for rank in ranks)
        return Transfer(
            engine=self.engine,
            ranks=ranks,
            version=5,
            layout=self.world.layout,
            layout_digest="d" * 64,
            placement=self.placement if placement is None else placement,
            plan=RoundPlan(
                model="m",
                version=5,
                round="v5",
                epoch=1,
                leader="e",
                engines=(EngineRoute(engine="e", ranks=routes),),
                bucket_bytes=BUCKET_BYTES,
                slots=slots,
            ),
            begin_write=self.begin_write,
            deadline_s=DEADLINE_S,
            proven=proven,
        )

    async def begin_write(self) -> None:
        filled = []
        for name in self.names():
            with open_words(name) as words:
                filled.append(words.word(64) & 0xFFFFFFFF)
        self.at_pause.append(filled)

    def names(self) -> list[str]:
        prefix = self.pool.name_of("")
        return sorted(path.name for path in Path("/dev/shm").glob(f"{prefix}*"))

    @asynccontextmanager
    async def fetcher(self) -> AsyncIterator[Fetcher]:
        ways = [block.segment() for block in self.blocks]
        async with open_fetcher(ways, self.world.layout, self.local, DEADLINE_S) as fetcher:
            yield fetcher

    def check(self, rank: int) -> None:
        """Every shard that a worker has read, and all of the checkpoint."""
        check_held(self.world, self.engine.held[rank])


def check_held(world: World, held: Held) -> None:
    total = 0
    for (tensor, starts, sizes), data in held.items():
        box = [(start, start + size) for start, size in zip(starts, sizes, strict=True)]
        expected = box_of(world.tensors[tensor], world.layout.tensors[tensor], box)
        assert data == expected.tobytes()
        total += len(data)
    assert total == sum(tensor.size for tensor in world.tensors)


@pytest.fixture
def site() -> Iterator[Site]:
    yield from _site(make_world(SEED))


def _site(world: World) -> Iterator[Site]:
    with ExitStack() as stack:
        blocks = [
            stack.enter_context(open_block(segment.tobytes(), HOST)) for segment in world.segments
        ]
        site = Site(world, blocks)
        stack.callback(site.close)
        yield site


@pytest.mark.parametrize("seed", [0, 1, 2, 105, 317, 650])
@pytest.mark.parametrize("slots", [1, 2, 3])
@pytest.mark.parametrize("proven", [True, False])
async def test_every_byte_reaches_every_worker(seed: int, slots: int, proven: bool) -> None:
    for site in _site(make_world(seed)):
        for _ in range(2):
            async with site.fetcher() as fetcher:
                transfer = site.transfer(slots=slots, proven=proven)
                applied = await bring_alone(transfer, fetcher, site.staging, DEADLINE_S)
            assert [reply.rank for reply in applied] == [0, 1]
            for rank in range(2):
                site.check(rank)
                assert isinstance(site.engine.feeds[-1][rank], Stream if proven else Relay)
            if site.world.layout.shards and proven:
                stages = [stage.stage for reply in applied for stage in reply.stages]
                assert set(stages) <= {"fetch", "reload"}
        assert len(site.at_pause) == 2


async def test_slots_are_full_when_the_engine_is_paused(site: Site) -> None:
    buckets = plan_buckets(site.world.layout, BUCKET_BYTES, 2).buckets
    assert buckets >= 2, "the world is too small to tell"
    async with site.fetcher() as fetcher:
        await bring_alone(site.transfer(), fetcher, site.staging, DEADLINE_S)
    assert site.at_pause == [[2, 2]]


async def test_relay_follows_when_a_worker_finds_that_it_cannot_stream(site: Site) -> None:
    def before(rank: int, bucket: int) -> None:
        streams = isinstance(site.engine.feeds[-1][rank], Stream)
        if rank == 1 and bucket == 1 and streams:
            raise ProofNeeded("parameter p", "it moved")

    site.engine.before = before
    async with site.fetcher() as fetcher:
        await bring_alone(site.transfer(), fetcher, site.staging, DEADLINE_S)
    assert [type(feeds[0]) for feeds in site.engine.feeds] == [Stream, Relay]
    site.check(0)
    site.check(1)


class Broken(Fetcher):
    """A fetcher that fails at some call."""

    def __init__(self, inner: Fetcher, fails_at: int) -> None:
        self._inner, self._left = inner, fails_at
        self.hangs: anyio.Event | None = None
        self.is_writing = False

    async def fetch(self, reads: Sequence[Read], deadline_s: float) -> None:
        self._left -= 1
        if self._left < 0:
            if self.hangs is not None:
                self.hangs.set()
                await anyio.sleep_forever()
            raise TornRead("s", 2, 4)
        await self._inner.fetch(reads, deadline_s)

    async def check(self, deadline_s: float) -> None:
        await self._inner.check(deadline_s)

    def writing(self) -> bool:
        return self.is_writing

    async def adopt(self, address: int, size_bytes: int) -> None:
        await self._inner.adopt(address, size_bytes)

    async def release(self, address: int) -> None:
        await self._inner.release(address)


@pytest.mark.parametrize("proven", [True, False])
@pytest.mark.parametrize("fails_at", [0, 2])
async def test_fetch_failure_is_raised_and_workers_stop(
    site: Site, proven: bool, fails_at: int
) -> None:
    async with site.fetcher() as inner:
        broken = Broken(inner, fails_at)
        transfer = site.transfer(proven=proven, slots=1)
        with pytest.raises(TornRead) as torn:
            await bring_alone(transfer, broken, site.staging, DEADLINE_S)
    assert torn.value.touched == bool(site.engine.feeds), "only once the workers were told"
    assert not site.names(), "condemned"
    async with site.fetcher() as fetcher:
        await bring_alone(site.transfer(), fetcher, site.staging, DEADLINE_S)
    site.check(0)


@pytest.mark.parametrize("proven", [True, False])
async def test_engine_failure_is_raised_while_a_fetch_hangs(site: Site, proven: bool) -> None:
    """The fetch would hold the transfer up until its deadline."""
    async with site.fetcher() as inner:
        broken = Broken(inner, 4 if proven else 2)
        broken.hangs = anyio.Event()

        def before(rank: int, bucket: int) -> None:
            raise SegmentUnavailable("x", "gone", "must be there")

        site.engine.before = before
        with pytest.raises(ApplyFailed, match="SegmentUnavailable"):
            await bring_alone(site.transfer(proven=proven), broken, site.staging, DEADLINE_S)
    assert not site.names()


class Stopped(ThreadEngine):
    """Its workers stand still: they do not answer, whatever becomes of their lanes."""

    async def apply(
        self, version: int, layout_digest: str, feeds: Mapping[int, Feed], deadline_s: float
    ) -> tuple[Applied, ...]:
        self.feeds.append(feeds)
        await anyio.sleep_forever()
        raise AssertionError("it was cancelled")


@pytest.mark.parametrize("proven", [True, False])
async def test_failure_is_raised_when_workers_stand_still(site: Site, proven: bool) -> None:
    site.engine = Stopped(site.world.layout, ranks=2)
    site.staging = Staging(site.pool, 0.2)
    async with site.fetcher() as inner:
        with anyio.fail_after(DEADLINE_S / 2):
            if proven:
                with pytest.raises(WorkerLost, match="has not begun to read") as lost:
                    await bring_alone(site.transfer(slots=1), inner, site.staging, DEADLINE_S)
                assert lost.value.touched
            else:
                async with anyio.create_task_group() as tasks:
                    tasks.start_soon(ask_when_told, site)
                    with pytest.raises(TornRead):
                        await bring_alone(
                            site.transfer(proven=False), Broken(inner, 0), site.staging, DEADLINE_S
                        )
    assert not site.names()


async def ask_when_told(site: Site) -> None:
    """Ask for the first window, as a worker does."""
    while not site.engine.feeds:
        await anyio.lowlevel.checkpoint()
    feed = site.engine.feeds[0][0]
    assert isinstance(feed, Relay)
    with open_words(feed.block) as words:
        words.set_word(80, feed.turn << 32 | 1)


async def test_blocks_stay_in_the_bound_while_a_left_call_writes_to_them(site: Site) -> None:
    async with site.fetcher() as inner:
        broken = Broken(inner, 2)
        broken.is_writing = True
        with pytest.raises(TornRead):
            await bring_alone(site.transfer(slots=1), broken, site.staging, DEADLINE_S)
        assert not site.names()
        assert site.pool.total_bytes == 2 * (4096 + BUCKET_BYTES)
        broken.is_writing = False
        site.pool.condemn([], lambda: False)
        assert site.pool.total_bytes == 0


async def test_blocks_are_given_up_and_condemned_when_the_transfer_is_cancelled(
    site: Site,
) -> None:
    async with site.fetcher() as inner:
        broken = Broken(inner, 3)
        broken.hangs = anyio.Event()
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(bring_alone, site.transfer(), broken, site.staging, DEADLINE_S)
            with anyio.fail_after(DEADLINE_S):
                await broken.hangs.wait()
            (name, _) = site.names()
            with open_words(name) as words:
                tasks.cancel_scope.cancel()
                with anyio.CancelScope(shield=True):
                    while not words.given_up:
                        await anyio.lowlevel.checkpoint()
    assert not site.names()


async def test_other_consumers_are_named_when_a_lane_of_theirs_is_given_up(site: Site) -> None:
    """Two lanes on this host; the other one's owner gives up in the middle."""
    plan = plan_buckets(site.world.layout, BUCKET_BYTES, 2)
    other_pool = BlockPool(f"test-{uuid.uuid4().hex[:8]}.f", 2**20)
    (other,) = other_pool.take([BlockSpec(other_pool.name_of("1"), 2, BUCKET_BYTES)])
    other.begin(9)
    site.engine = ThreadEngine(site.world.layout, ranks=1, before=lambda *_: other.give_up())
    other.filled(1)
    spec = BlockSpec(site.pool.name_of("0"), 2, BUCKET_BYTES)
    async with site.fetcher() as fetcher:
        with pytest.raises(PeerLost, match=r"f\..*given up") as lost:
            async with open_blocks(site.pool, [spec], fetcher) as (block,):
                await bring_by_stream(
                    site.transfer(),
                    fetcher,
                    plan,
                    [Lane(number=0, block=block, rank=0)],
                    [block.name, other.name],
                    [Reader("e/0", 0, own=True)],
                    turn=9,
                    stall_s=STALL_S,
                    deadline_s=DEADLINE_S,
                )
        assert lost.value.members == (other.name,)
        assert lost.value.touched
    other_pool.close()


async def test_less_is_staged_at_once_when_there_is_little_room(site: Site) -> None:
    site.pool = BlockPool(f"test-{uuid.uuid4().hex[:8]}.e", 2 * (4096 + 4096))
    site.staging = Staging(site.pool, STALL_S)
    async with site.fetcher() as fetcher:
        await bring_alone(site.transfer(slots=3), fetcher, site.staging, DEADLINE_S)
    feed = site.engine.feeds[0][0]
    assert isinstance(feed, Stream)
    assert (feed.slots, feed.bucket_bytes) == (1, 4096)
    site.check(1)


async def test_local_files_are_streamed_when_the_engine_is_proven(
    site: Site, tmp_path: Path
) -> None:
    placement = []
    for number, segment in enumerate(site.world.segments):
        path = tmp_path / f"{number}.bin"
        path.write_bytes(segment.tobytes())
        placement.append((FileSegment(path=str(path)),))
    route = LocalRoute(HOST, [str(tmp_path)], site.staging)
    await route.transfer(site.transfer(placement=tuple(placement)))
    assert isinstance(site.engine.feeds[-1][0], Stream)
    site.check(0)
    site.check(1)
    await route.transfer(site.transfer(placement=tuple(placement), proven=False))
    assert isinstance(site.engine.feeds[-1][0], InPlace)
    await route.transfer(site.transfer())
    assert isinstance(site.engine.feeds[-1][0], InPlace), "memory is read in place"


async def test_local_files_are_read_in_place_when_a_worker_cannot_stream(
    site: Site, tmp_path: Path
) -> None:
    placement = []
    for number, segment in enumerate(site.world.segments):
        path = tmp_path / f"{number}.bin"
        path.write_bytes(segment.tobytes())
        placement.append((FileSegment(path=str(path)),))

    def before(rank: int, bucket: int) -> None:
        raise ProofNeeded("parameter p", "it moved")

    site.engine.before = before
    route = LocalRoute(HOST, [str(tmp_path)], site.staging)
    await route.transfer(site.transfer(placement=tuple(placement)))
    assert [type(feeds[0]) for feeds in site.engine.feeds] == [Stream, InPlace]
