"""Device lanes: what is staged and admitted when, and who is named when a filler stands still."""

from __future__ import annotations

import uuid
from collections.abc import Iterator, Sequence
from contextlib import ExitStack

import anyio
import pytest

from tests.unit.transfer.fillers import WordFiller
from tests.unit.transfer.steps import (
    BUCKET_BYTES,
    DEADLINE_S,
    StepExchange,
    StepFetcher,
    Steps,
    plan_of,
)
from tests.unit.transfer.words import open_words
from weightbus.consumers.errors import (
    ConsumerError,
    DeadlineExceeded,
    PeerLost,
    TornRead,
    WorkerLost,
)
from weightbus.consumers.planning.buckets import BucketPlan, plan_buckets
from weightbus.consumers.transfer.device_pipeline import DevicePipeline
from weightbus.consumers.transfer.exchange import LEAVING, READY, WAITING
from weightbus.consumers.transfer.filling import Filling
from weightbus.consumers.transfer.pipeline import Lane, Reader
from weightbus.consumers.transfer.staging import BlockPool, BlockSpec
from weightbus.schemas.layout import Layout, SegmentSpec, ShardSpec, TensorSpec
from weightbus.schemas.placement import Segment, SharedMemorySegment
from weightbus.schemas.shared_memory import (
    SHM_ADMITTED_OFFSET,
    SHM_FETCHED_OFFSET,
    SHM_FILLED_OFFSET,
    SHM_HANDLE_OFFSET,
    SHM_HANDLE_SET_OFFSET,
    SHM_HEADER_BYTES,
    SHM_STAGED_OFFSET,
)

pytestmark = pytest.mark.anyio

SHORT_S = 0.1
TURN = 3
OWN = Reader("e/0", 0, own=True)
FOREIGN = Reader("f/0", 0, own=False)
READ_BY_WORKER = SharedMemorySegment(name="weightbus-test", host_id="h", generation=2)


def mixed_plan() -> BucketPlan:
    """Four buckets of one lane: two of segment 0, one of both segments, and one of segment 1."""
    first, second = 2 * 3500 + 1800, 3500 + 1700
    layout = Layout(
        (TensorSpec("a", "U8", (first,)), TensorSpec("b", "U8", (second,))),
        (ShardSpec(0, (0,), (first,), 0, 0), ShardSpec(1, (0,), (second,), 1, 0)),
        (SegmentSpec(first), SegmentSpec(second)),
    )
    plan = plan_buckets(layout, BUCKET_BYTES, 1)
    segments = [plan.runs_of(part)["segment"].tolist() for part in range(plan.buckets)]
    assert segments == [[0], [0], [0, 1], [1]]
    return plan


@pytest.fixture
def pool() -> Iterator[BlockPool]:
    pool = BlockPool(f"test-{uuid.uuid4().hex[:8]}.e", 2**20)
    yield pool
    pool.close()


class Site:
    """A consumer with one device lane, whose filler is told to begin as soon as all is primed.

    Args:
        place: of the consumer in a group of two; None: it is alone.
        sources: of the segments; None: the consumer fetches them.
    """

    def __init__(
        self,
        pool: BlockPool,
        stack: ExitStack,
        *,
        plan: BucketPlan | None = None,
        slots: int = 2,
        place: int | None = None,
        sources: Sequence[Segment | None] = (READ_BY_WORKER,),
        readers: Sequence[Reader] = (OWN,),
        stall_s: float = DEADLINE_S,
    ) -> None:
        self.plan = plan_of(5) if plan is None else plan
        device = Filling(slots=slots, sources=tuple(sources), fills={})
        spec = BlockSpec(pool.name_of("0"), slots if device.brought else 0, BUCKET_BYTES)
        (self.block,) = pool.take([spec])
        self.steps = Steps()
        self.exchange = StepExchange(self.steps, place or 0)
        self.fetcher = StepFetcher(self.steps, range(99))
        self.lane = Lane(number=0, block=self.block, rank=0)
        if place is not None:
            self.lane.exchange = self.exchange
        self.words = stack.enter_context(open_words(self.block.name))
        self.filler: WordFiller | None = WordFiller(
            self.words,
            self.steps,
            turn=TURN,
            buckets=self.plan.buckets,
            slots=slots,
            place=place or 0,
            size=1 if place is None else 2,
        )
        self.left = 0
        self.pipeline = DevicePipeline(
            [self.lane],
            self.plan,
            self.fetcher,
            readers,
            device,
            turn=TURN,
            stall_s=stall_s,
            leave=self.leave,
        )

    def leave(self) -> None:
        self.left += 1

    def count(self, offset_bytes: int) -> int:
        return self.words.count(offset_bytes, TURN)

    async def run(self, deadline_s: float = DEADLINE_S, *, tell: bool = True) -> None:
        """The pipeline, beside the filler; raises what it raises."""
        errors: list[ConsumerError] = []

        async def serve() -> None:
            try:
                await self.pipeline.run(deadline_s)
            except ConsumerError as error:
                errors.append(error)

        async with anyio.create_task_group() as tasks:
            tasks.start_soon(serve)
            await self.pipeline.primed.wait()
            if tell and not errors:
                self.pipeline.tell()
                if self.filler is not None:
                    tasks.start_soon(self.filler.run)
        if errors:
            assert self.words.given_up == TURN, "the filler and all readers stop"
            raise errors[0]

    async def until(self, offset_bytes: int, count: int) -> None:
        with anyio.fail_after(DEADLINE_S):
            while self.count(offset_bytes) < count:
                await anyio.lowlevel.checkpoint()


@pytest.fixture
def stack() -> Iterator[ExitStack]:
    with ExitStack() as stack:
        yield stack


@pytest.mark.parametrize("slots", [1, 2, 3])
async def test_consumer_moves_nothing_when_its_worker_reads_every_segment(
    pool: BlockPool, stack: ExitStack, slots: int
) -> None:
    site = Site(pool, stack, slots=slots)
    assert site.block.size_bytes == 0, "no host memory is taken"
    assert pool.total_bytes == SHM_HEADER_BYTES
    await site.run()
    assert site.words.filled(TURN) == 5
    assert not [step for step in site.steps.begun if step.startswith(("fetch", "broadcast"))]
    assert site.words.given_up == 0
    assert site.pipeline.timings(0) == ()


async def test_engine_may_pause_before_anything_is_filled(
    pool: BlockPool, stack: ExitStack
) -> None:
    site = Site(pool, stack)
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(site.pipeline.run, DEADLINE_S)
        with anyio.fail_after(DEADLINE_S):
            await site.pipeline.primed.wait()
        assert site.words.filled(TURN) == 0
        tasks.cancel_scope.cancel()


async def test_words_of_an_earlier_turn_count_for_nothing(
    pool: BlockPool, stack: ExitStack
) -> None:
    site = Site(pool, stack)
    site.block.begin(TURN - 1)
    site.block.staged(5)
    site.block.admitted(5)
    site.words.set_word(SHM_HANDLE_SET_OFFSET, 1)
    site.words.set_word(SHM_HANDLE_OFFSET, 77)
    site.block.begin(TURN)
    assert (site.count(SHM_STAGED_OFFSET), site.count(SHM_ADMITTED_OFFSET)) == (0, 0)
    assert (site.block.filler_fetched(), site.block.filler_filled()) == (-1, 0)
    assert site.words.word(SHM_HANDLE_SET_OFFSET) == 1, "the filler's memory is what it was"
    assert site.words.word(SHM_HANDLE_OFFSET) == 77


@pytest.mark.parametrize("slots", [1, 2])
async def test_consumer_fetches_only_what_its_worker_does_not_read(
    pool: BlockPool, stack: ExitStack, slots: int
) -> None:
    site = Site(pool, stack, plan=mixed_plan(), slots=slots, sources=[READ_BY_WORKER, None])
    assert site.block.size_bytes == slots * BUCKET_BYTES
    await site.run()
    for read, bucket in zip(site.fetcher.reads, (2, 3), strict=True):
        (run,) = (run for run in site.plan.runs_of(bucket) if run["segment"] == 1)
        assert (read.segment, read.source, read.size_bytes) == (1, run["source"], run["size_bytes"])
        place = read.address - site.block.slot_address(bucket % slots)
        assert place == run["staged"], "where the filler looks for it"
    assert site.words.filled(TURN) == 4
    (timing,) = site.pipeline.timings(0)
    assert timing.stage == "fetch"


async def test_slot_is_fetched_into_again_only_when_the_filler_has_copied_it(
    pool: BlockPool, stack: ExitStack
) -> None:
    site = Site(pool, stack, slots=2, sources=[None])
    held = site.steps.hold("copy 0")
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(site.run)
        await site.steps.until("fetch 0", "fetch 1", "copy 0")
        with anyio.move_on_after(SHORT_S):
            await anyio.sleep_forever()  # longer than a fetch that could begin would wait
        assert "fetch 2" not in site.steps.begun
        assert site.count(SHM_STAGED_OFFSET) == 2
        held.set()
    assert site.words.filled(TURN) == 5
    begun = site.steps.begun
    for bucket in range(3):
        assert begun.index(f"fetch {bucket + 2}") > begun.index(f"copy {bucket}")


async def test_engine_is_paused_when_the_slots_of_its_host_are_fetched(
    pool: BlockPool, stack: ExitStack
) -> None:
    site = Site(pool, stack, sources=[None])
    held = site.steps.hold("fetch 1")
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(site.run)
        await site.steps.until("fetch 1")
        assert not site.pipeline.primed.is_set()
        held.set()
    assert site.words.filled(TURN) == 5


@pytest.mark.parametrize("place", [0, 1])
async def test_groups_carry_roll_calls_only(pool: BlockPool, stack: ExitStack, place: int) -> None:
    site = Site(pool, stack, place=place)
    await site.run()
    assert site.exchange.said[0] == bytes(8), "the fingerprint"
    assert site.exchange.said.count(READY) == 5
    copies = [step for step in site.steps.begun if step.startswith("copy")]
    assert copies == [f"copy {bucket}" for bucket in range(place, 5, 2)]
    assert not [step for step in site.steps.begun if step.startswith("broadcast")]
    (timing,) = site.pipeline.timings(0)
    part_bytes = sum(map(site.plan.part_bytes, range(5)))
    assert (timing.stage, timing.bytes) == ("broadcast", part_bytes)
    assert 0 < timing.start_ns <= timing.end_ns
    assert [bucket.bytes for bucket in timing.buckets] == list(map(site.plan.part_bytes, range(5)))
    starts = [bucket.start_ns for bucket in timing.buckets]
    assert starts == [timing.start_ns, *(bucket.end_ns for bucket in timing.buckets[:-1])]


async def test_buckets_are_admitted_ahead_of_the_broadcast_as_far_as_there_is_room(
    pool: BlockPool, stack: ExitStack
) -> None:
    site = Site(pool, stack, place=0, slots=3)
    held = site.steps.hold("fill 0")
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(site.run)
        await site.until(SHM_ADMITTED_OFFSET, 3)
        with anyio.move_on_after(SHORT_S):
            await anyio.sleep_forever()
        assert site.count(SHM_ADMITTED_OFFSET) == 3, "bucket 3 needs the slot of bucket 0"
        held.set()
    assert site.words.filled(TURN) == 5


async def test_nothing_is_admitted_before_the_other_member_is_ready(
    pool: BlockPool, stack: ExitStack
) -> None:
    site = Site(pool, stack, place=0, stall_s=SHORT_S)
    site.exchange.other_is_ready = False
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(site.run)
        with anyio.fail_after(DEADLINE_S):
            while site.exchange.said.count(READY) < 3:
                await anyio.lowlevel.checkpoint()
        assert site.count(SHM_ADMITTED_OFFSET) == 0
        site.exchange.other_is_ready = True
    assert site.words.filled(TURN) == 5


async def test_member_is_not_ready_before_its_filler_has_begun(
    pool: BlockPool, stack: ExitStack
) -> None:
    """Nobody waits in a broadcast for an engine to pause, not even for who only receives."""
    site = Site(pool, stack, place=1, stall_s=2 * SHORT_S)
    filler, site.filler = site.filler, None
    assert filler is not None
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(lambda: site.run(tell=False))
        with anyio.fail_after(DEADLINE_S):
            while site.exchange.said.count(WAITING) < 3:
                await anyio.lowlevel.checkpoint()
        assert READY not in site.exchange.said
        tasks.start_soon(filler.run)
    assert site.words.filled(TURN) == 5


async def test_engine_is_not_paused_before_the_other_members_are_there(
    pool: BlockPool, stack: ExitStack
) -> None:
    site = Site(pool, stack, place=0)
    here = anyio.Event()
    inner = site.exchange.roll_call

    async def roll_call(answer: bytes, deadline_s: float) -> tuple[bytes, ...]:
        await here.wait()
        return await inner(answer, deadline_s)

    site.exchange.roll_call = roll_call  # type: ignore[method-assign]
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(site.run)
        with anyio.move_on_after(SHORT_S):
            await anyio.sleep_forever()
        assert not site.pipeline.primed.is_set()
        here.set()
    assert site.words.filled(TURN) == 5


@pytest.mark.parametrize("place", [None, 0])
async def test_own_worker_is_named_when_it_does_not_begin(
    pool: BlockPool, stack: ExitStack, place: int | None
) -> None:
    site = Site(pool, stack, place=place, stall_s=SHORT_S)
    site.filler = None
    with anyio.fail_after(20 * SHORT_S), pytest.raises(WorkerLost, match="has not begun to fill"):
        await site.run()
    assert site.left == 1
    if place is not None:
        assert site.exchange.said[-1] == LEAVING, "the other members hear it"


@pytest.mark.parametrize("step", ["copy 2", "fill 2"])
@pytest.mark.parametrize("place", [None, 0])
async def test_own_worker_is_named_when_it_stands_still(
    pool: BlockPool, stack: ExitStack, place: int | None, step: str
) -> None:
    """Of a broadcast that stands still the others are suspected first: ours may wait for them."""
    site = Site(pool, stack, place=place, stall_s=SHORT_S)
    held = site.steps.hold(step)
    in_broadcast = place is not None and step.startswith("fill")
    expected = PeerLost if in_broadcast else WorkerLost

    async def let_go() -> None:
        while site.words.given_up != TURN:
            await anyio.lowlevel.checkpoint()
        held.set()

    async with anyio.create_task_group() as tasks:
        tasks.start_soon(let_go)
        with anyio.fail_after(40 * SHORT_S), pytest.raises(expected, match="stands still"):
            await site.run()
    assert site.left == 1
    assert isinstance(site.pipeline.suspect, WorkerLost) == in_broadcast


async def test_filler_is_not_at_fault_while_it_waits_for_another_consumers_reader(
    pool: BlockPool, stack: ExitStack
) -> None:
    site = Site(pool, stack, slots=1, readers=[OWN, FOREIGN], stall_s=SHORT_S)
    site.words.say_done(1, TURN, 0)
    with pytest.raises(PeerLost) as lost, anyio.fail_after(40 * SHORT_S):
        await site.run()
    assert "f/0" in lost.value.members


async def test_member_leaves_when_its_engine_takes_too_long_to_pause(
    pool: BlockPool, stack: ExitStack
) -> None:
    site = Site(pool, stack, place=0, stall_s=SHORT_S)
    with anyio.fail_after(20 * SHORT_S), pytest.raises(DeadlineExceeded) as late:
        await site.run(tell=False)
    assert late.value.stage == "pause"
    assert site.exchange.said[-1] == LEAVING


async def test_member_is_named_when_it_leaves(pool: BlockPool, stack: ExitStack) -> None:
    site = Site(pool, stack, place=0)
    site.exchange.other_says[1] = LEAVING
    with pytest.raises(PeerLost, match="cannot go on") as lost:
        await site.run()
    assert lost.value.members == ("other/0",)
    assert site.left == 1


async def test_member_is_named_when_the_roll_call_never_agrees(
    pool: BlockPool, stack: ExitStack
) -> None:
    site = Site(pool, stack, place=0, stall_s=SHORT_S)
    site.exchange.other_is_ready = False
    with anyio.fail_after(40 * SHORT_S), pytest.raises(PeerLost, match="not ready") as lost:
        await site.run()
    assert lost.value.members == ("other/0",)


async def test_engine_is_not_paused_when_a_member_cuts_the_version_in_another_way(
    pool: BlockPool, stack: ExitStack
) -> None:
    site = Site(pool, stack, place=0)
    site.exchange.other_says[8] = b"12345678"
    with pytest.raises(PeerLost, match="in another way"):
        await site.run()
    assert not site.steps.begun


async def test_members_hear_it_when_a_fetch_fails(pool: BlockPool, stack: ExitStack) -> None:
    site = Site(pool, stack, place=0, sources=[None])
    site.fetcher.error = TornRead("s", 2, 4)
    with pytest.raises(TornRead):
        await site.run()
    assert site.exchange.said[-1] == LEAVING


async def test_filler_stops_when_the_run_is_cancelled(pool: BlockPool, stack: ExitStack) -> None:
    site = Site(pool, stack, place=0)
    site.steps.hold("fill 1")
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(site.run)
        await site.steps.until("fill 1")
        tasks.cancel_scope.cancel()
    assert site.words.given_up == TURN
    assert site.left == 1


async def test_filler_is_not_at_fault_in_one_lane_while_it_waits_for_another(
    pool: BlockPool, stack: ExitStack
) -> None:
    """Its broadcasts keep one order over all lanes: bucket 0 of lane 1 waits for that of lane 0."""
    plan, device = plan_of(2, lanes=2), Filling(slots=2, sources=(READ_BY_WORKER,), fills={})
    blocks = pool.take([BlockSpec(pool.name_of(str(n)), 0, BUCKET_BYTES) for n in range(2)])
    words = [stack.enter_context(open_words(block.name)) for block in blocks]
    exchanges = [StepExchange(Steps()) for _ in range(2)]
    exchanges[0].other_is_ready = False
    lanes = [
        Lane(number=n, block=block, rank=0, exchange=exchanges[n]) for n, block in enumerate(blocks)
    ]
    pipeline = DevicePipeline(
        lanes,
        plan,
        StepFetcher(Steps(), []),
        [OWN],
        device,
        turn=TURN,
        stall_s=2 * SHORT_S,
    )
    with anyio.fail_after(DEADLINE_S):
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(pipeline.run, DEADLINE_S)
            await pipeline.primed.wait()
            pipeline.tell()
            for one in words:
                one.set_word(SHM_FETCHED_OFFSET, TURN << 32 | 2)
            while words[1].count(SHM_ADMITTED_OFFSET, TURN) < 2:
                await anyio.lowlevel.checkpoint()
            with anyio.move_on_after(6 * SHORT_S):
                await anyio.sleep_forever()  # longer than a filler may stand still
            exchanges[0].other_is_ready = True
            while words[0].count(SHM_ADMITTED_OFFSET, TURN) < 2:
                await anyio.lowlevel.checkpoint()
            for one in words:
                one.set_word(SHM_FILLED_OFFSET, TURN << 32 | 2)
                one.say_done(0, TURN, 2)
