"""What overlaps in a pipeline and what does not, and who is named when it stands still."""

from __future__ import annotations

import uuid
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import asynccontextmanager

import anyio
import pytest

from tests.unit.transfer.steps import (
    BUCKET_BYTES,
    DEADLINE_S,
    StepExchange,
    StepFetcher,
    Steps,
    plan_of,
)
from tests.unit.transfer.words import Words, open_words
from weightbus.consumers.errors import (
    ConsumerError,
    DeadlineExceeded,
    PeerLost,
    TornRead,
    WorkerLost,
)
from weightbus.consumers.transfer.exchange import LEAVING, READY, WAITING
from weightbus.consumers.transfer.pipeline import Lane, Pipeline, Reader
from weightbus.consumers.transfer.staging import BlockPool, BlockSpec
from weightbus.schemas.shared_memory import SHM_GIVEN_UP_OFFSET

pytestmark = pytest.mark.anyio

SHORT_S = 0.1
TURN = 3
OWN = Reader("e/0", 0, own=True)
FOREIGN = Reader("f/0", 0, own=False)


@pytest.fixture
def pool() -> Iterator[BlockPool]:
    pool = BlockPool(f"test-{uuid.uuid4().hex[:8]}.e", 2**20)
    yield pool
    pool.close()


class World:
    """One lane of a pipeline, and its readers' words."""

    def __init__(self, pool: BlockPool, slots: int, lanes: int = 1) -> None:
        specs = [BlockSpec(pool.name_of(str(n)), slots, BUCKET_BYTES) for n in range(lanes)]
        self.blocks = pool.take(specs)
        self.words: list[Words] = []
        self.steps = Steps()

    def done(self, reader: int, buckets: int) -> None:
        for words in self.words:
            words.say_done(reader, TURN, buckets)


@asynccontextmanager
async def running(pipeline: Pipeline) -> AsyncIterator[None]:
    """The pipeline beside the body; cancelled after it."""
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(pipeline.run, DEADLINE_S)
        yield
        tasks.cancel_scope.cancel()


async def test_fetch_broadcast_and_reload_overlap_when_there_are_three_slots(
    pool: BlockPool,
) -> None:
    world = World(pool, slots=3)
    steps, lane = world.steps, Lane(number=0, block=world.blocks[0], rank=0)
    lane.exchange = StepExchange(steps)
    fetcher = StepFetcher(steps, range(0, 6, 2))
    held = steps.hold("broadcast 1"), steps.hold("fetch 2")
    pipeline = Pipeline([lane], plan_of(6), fetcher, [OWN], turn=TURN, stall_s=DEADLINE_S)
    with open_words(world.blocks[0].name) as words:
        async with running(pipeline):
            await steps.until("broadcast 1", "fetch 2")
            assert words.filled(TURN) == 1, "bucket 0 is being read, while 1 and 2 are on the way"
            for step in held:
                step.set()
            await steps.until("broadcast 2")
            for bucket in range(6):
                words.say_done(0, TURN, bucket + 1)
            await steps.until("broadcast 5")
        assert [step for step in steps.begun if step[0] == "b"] == [
            f"broadcast {bucket}" for bucket in range(6)
        ]


async def test_everything_takes_turns_when_there_is_one_slot(pool: BlockPool) -> None:
    world = World(pool, slots=1)
    block = world.blocks[0]
    fetcher = StepFetcher(world.steps, range(5))
    begun: list[tuple[int, int]] = []
    fetcher.checks.append(lambda bucket: begun.append((bucket, block.done(0))))
    lane = Lane(number=0, block=block, rank=0)
    pipeline = Pipeline([lane], plan_of(5), fetcher, [OWN], turn=TURN, stall_s=DEADLINE_S)
    with open_words(block.name) as words:
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(pipeline.run, DEADLINE_S)
            with anyio.fail_after(DEADLINE_S):
                for bucket in range(5):
                    while words.filled(TURN) <= bucket:
                        await anyio.lowlevel.checkpoint()
                    assert bytes(block.slot(0)[300:302]) == bytes([bucket + 1]) * 2
                    words.say_done(0, TURN, bucket + 1)
    assert begun == [(0, -1), (1, 1), (2, 2), (3, 3), (4, 4)]
    assert pipeline.timings(1) == ()
    (timing,) = pipeline.timings(0)
    assert (timing.stage, timing.bytes) == ("fetch", 3500 * 5)
    assert 0 < timing.start_ns < timing.end_ns


async def test_slots_are_filled_and_no_more_when_no_reader_has_begun(pool: BlockPool) -> None:
    world = World(pool, slots=2, lanes=2)
    lanes = [Lane(number=n, block=block, rank=n) for n, block in enumerate(world.blocks)]
    fetcher = StepFetcher(world.steps, range(100))
    pipeline = Pipeline(lanes, plan_of(4, 2), fetcher, [OWN], turn=TURN, stall_s=SHORT_S)
    with open_words(world.blocks[0].name) as words:
        async with running(pipeline):
            with anyio.fail_after(DEADLINE_S):
                await pipeline.primed.wait()
            with anyio.move_on_after(3 * SHORT_S):
                await anyio.sleep_forever()  # longer than a reader that had begun would have
            assert words.filled(TURN) == 2
        assert len(world.steps.begun) == 4
        assert words.given_up == TURN, "it was cancelled"


async def test_broadcast_waits_for_the_other_member_without_losing_it(pool: BlockPool) -> None:
    world = World(pool, slots=2)
    exchange = StepExchange(world.steps)
    exchange.other_is_ready = False
    lane = Lane(number=0, block=world.blocks[0], rank=0, exchange=exchange)
    fetcher = StepFetcher(world.steps, [0])
    pipeline = Pipeline([lane], plan_of(2), fetcher, [OWN], turn=TURN, stall_s=SHORT_S)
    async with running(pipeline):
        with anyio.fail_after(DEADLINE_S):
            while exchange.said.count(READY) < 3:
                await anyio.lowlevel.checkpoint()
        assert world.steps.begun == ["fetch 0"]
        exchange.other_is_ready = True
        await world.steps.until("broadcast 0", "broadcast 1")


async def test_member_says_that_it_is_not_ready_while_its_reader_has_not_begun(
    pool: BlockPool,
) -> None:
    world = World(pool, slots=1)
    exchange = StepExchange(world.steps)
    lane = Lane(number=0, block=world.blocks[0], rank=0, exchange=exchange)
    fetcher = StepFetcher(world.steps, [0])
    pipeline = Pipeline([lane], plan_of(2), fetcher, [OWN], turn=TURN, stall_s=SHORT_S)
    with open_words(world.blocks[0].name) as words:
        async with running(pipeline):
            await world.steps.until("broadcast 0")
            with anyio.fail_after(DEADLINE_S):
                while exchange.said.count(WAITING) < 3:
                    await anyio.lowlevel.checkpoint()
            assert "broadcast 1" not in world.steps.begun
            words.say_done(0, TURN, 1)
            await world.steps.until("broadcast 1")


@pytest.mark.parametrize(
    ("reader", "error", "named"), [(OWN, WorkerLost, "rank 0"), (FOREIGN, PeerLost, "f/0")]
)
async def test_reader_is_named_when_it_began_and_stands_still(
    pool: BlockPool, reader: Reader, error: type[ConsumerError], named: str
) -> None:
    world = World(pool, slots=1)
    lane = Lane(number=0, block=world.blocks[0], rank=0)
    fetcher = StepFetcher(world.steps, range(9))
    pipeline = Pipeline([lane], plan_of(3), fetcher, [reader], turn=TURN, stall_s=SHORT_S)
    with open_words(world.blocks[0].name) as words:
        words.say_done(0, TURN, 1)
        with pytest.raises(error, match=f"{named}.*stands still at bucket 1"):
            await pipeline.run(DEADLINE_S)
        assert words.given_up == TURN


async def test_lane_ends_well_when_only_another_consumers_reader_is_left(pool: BlockPool) -> None:
    world = World(pool, slots=2)
    lane = Lane(number=0, block=world.blocks[0], rank=0)
    fetcher = StepFetcher(world.steps, range(9))
    pipeline = Pipeline([lane], plan_of(2), fetcher, [OWN, FOREIGN], turn=TURN, stall_s=SHORT_S)
    with open_words(world.blocks[0].name) as words:
        words.say_done(0, TURN, 2)
        words.say_done(1, TURN, 1)
        await pipeline.run(DEADLINE_S)
        assert words.given_up == TURN


async def test_reader_that_left_is_not_waited_for(pool: BlockPool) -> None:
    world = World(pool, slots=1)
    lane = Lane(number=0, block=world.blocks[0], rank=0)
    fetcher = StepFetcher(world.steps, range(9))
    pipeline = Pipeline([lane], plan_of(4), fetcher, [OWN], turn=TURN, stall_s=SHORT_S)
    with open_words(world.blocks[0].name) as words:
        words.say_done(0, TURN, 0xFFFFFFFF)
        await pipeline.run(DEADLINE_S)
        assert words.filled(TURN) == 4


async def test_slot_is_not_filled_again_before_it_is_broadcast_when_its_reader_left(
    pool: BlockPool,
) -> None:
    world = World(pool, slots=2)
    exchange = StepExchange(world.steps)
    lane = Lane(number=0, block=world.blocks[0], rank=0, exchange=exchange)
    fetcher = StepFetcher(world.steps, range(0, 6, 2))
    held = world.steps.hold("broadcast 0")
    pipeline = Pipeline([lane], plan_of(6), fetcher, [OWN], turn=TURN, stall_s=DEADLINE_S)
    with open_words(world.blocks[0].name) as words:
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(pipeline.run, DEADLINE_S)
            await world.steps.until("broadcast 0")
            words.say_done(0, TURN, 0xFFFFFFFF)
            with anyio.move_on_after(SHORT_S):
                await anyio.sleep_forever()  # longer than a fetch that could begin would wait
            assert world.steps.begun == ["fetch 0", "broadcast 0"]
            held.set()
        assert words.filled(TURN) == 6


async def test_all_lanes_are_given_up_when_one_fails(pool: BlockPool) -> None:
    world = World(pool, slots=2, lanes=2)
    lanes = [Lane(number=n, block=block, rank=n) for n, block in enumerate(world.blocks)]
    fetcher = StepFetcher(world.steps, range(9))
    fetcher.error = TornRead("s", 2, 4)
    pipeline = Pipeline(lanes, plan_of(4, 2), fetcher, [OWN], turn=TURN, stall_s=DEADLINE_S)
    with pytest.raises(TornRead):
        await pipeline.run(DEADLINE_S)
    assert pipeline.primed.is_set(), "nobody waits for it"
    for block in world.blocks:
        with open_words(block.name) as words:
            assert words.word(SHM_GIVEN_UP_OFFSET) == TURN


async def test_peer_is_named_when_a_broadcast_fails(pool: BlockPool) -> None:
    world = World(pool, slots=2)
    exchange = StepExchange(world.steps)
    exchange.error = PeerLost("g", exchange.others, "connection closed")
    lane = Lane(number=0, block=world.blocks[0], rank=0, exchange=exchange)
    fetcher = StepFetcher(world.steps, range(9))
    pipeline = Pipeline([lane], plan_of(2), fetcher, [OWN], turn=TURN, stall_s=DEADLINE_S)
    with pytest.raises(PeerLost, match="other/0"):
        await pipeline.run(DEADLINE_S)


async def test_run_ends_at_its_deadline_when_the_engine_never_reads(pool: BlockPool) -> None:
    world = World(pool, slots=1)
    lane = Lane(number=0, block=world.blocks[0], rank=0)
    fetcher = StepFetcher(world.steps, range(9))
    pipeline = Pipeline([lane], plan_of(2), fetcher, [OWN], turn=TURN, stall_s=DEADLINE_S)
    with pytest.raises(DeadlineExceeded, match="stream"):
        await pipeline.run(SHORT_S)


class Told:
    """A pipeline of one lane in a group, whose workers are told to read as soon as it is primed."""

    def __init__(
        self,
        pool: BlockPool,
        readers: Sequence[Reader] = (OWN,),
        *,
        buckets: int = 3,
        lanes: int = 1,
    ) -> None:
        self.world = World(pool, slots=1)
        self.exchange = StepExchange(self.world.steps)
        self.lane = Lane(number=0, block=self.world.blocks[0], rank=0, exchange=self.exchange)
        self.left = 0
        self.pipeline = Pipeline(
            [self.lane],
            plan_of(buckets, lanes),
            StepFetcher(self.world.steps, range(0, buckets, 2)),
            readers,
            turn=TURN,
            stall_s=SHORT_S,
            leave=self.leave,
        )

    def leave(self) -> None:
        self.left += 1


async def failure_of(told: Told, *, tell: bool = True, deadline_s: float = DEADLINE_S) -> Exception:
    """What the pipeline raises; the group's members have been left by then."""
    errors: list[Exception] = []

    async def tell_it() -> None:
        await told.pipeline.primed.wait()
        if tell:
            told.pipeline.tell()

    async with anyio.create_task_group() as tasks:
        tasks.start_soon(tell_it)
        try:
            await told.pipeline.run(deadline_s)
        except ConsumerError as error:
            errors.append(error)
    assert told.left == 1
    return errors[0]


async def test_own_worker_is_named_when_it_was_told_to_read_and_does_not_begin(
    pool: BlockPool,
) -> None:
    told = Told(pool)
    with anyio.fail_after(20 * SHORT_S):
        error = await failure_of(told)
    assert isinstance(error, WorkerLost)
    assert "rank 0 is lost: it has not begun to read" in str(error)
    assert told.exchange.said[-1] == LEAVING, "the other members hear who it is"


async def test_member_leaves_when_its_engine_takes_too_long_to_pause(pool: BlockPool) -> None:
    told = Told(pool)
    with anyio.fail_after(20 * SHORT_S):
        error = await failure_of(told, tell=False)
    assert isinstance(error, DeadlineExceeded)
    assert error.stage == "pause"
    assert told.exchange.said.count(WAITING) >= 4
    assert told.exchange.said[-1] == LEAVING


async def test_member_leaves_in_time_for_the_others_when_the_deadline_is_near(
    pool: BlockPool,
) -> None:
    told = Told(pool)
    error = await failure_of(told, tell=False, deadline_s=2.5 * SHORT_S)
    assert isinstance(error, DeadlineExceeded)
    assert error.stage == "pause"


async def test_other_consumers_reader_is_named_when_it_does_not_begin(pool: BlockPool) -> None:
    told = Told(pool, [OWN, FOREIGN], lanes=2)
    with open_words(told.world.blocks[0].name) as words:
        words.say_done(0, TURN, 1)
        with anyio.fail_after(30 * SHORT_S):
            error = await failure_of(told)
    assert isinstance(error, PeerLost)
    assert error.members == ("f/0",)


async def test_member_is_named_when_it_says_that_it_leaves(pool: BlockPool) -> None:
    told = Told(pool)
    told.exchange.other_says[1] = LEAVING
    error = await failure_of(told)
    assert isinstance(error, PeerLost)
    assert error.members == ("other/0",)
    assert "cannot go on" in error.reason


async def test_member_is_named_when_it_is_never_ready(pool: BlockPool) -> None:
    told = Told(pool)
    told.exchange.other_is_ready = False
    with anyio.fail_after(30 * SHORT_S):
        error = await failure_of(told)
    assert isinstance(error, PeerLost)
    assert error.members == ("other/0",)
    assert "not ready for bucket 0" in error.reason


async def test_member_is_named_when_it_is_waited_for_at_the_deadline(pool: BlockPool) -> None:
    """Who waits for others has not failed himself: the next plan is for him."""
    told = Told(pool)
    told.exchange.other_is_ready = False
    error = await failure_of(told, deadline_s=2 * SHORT_S)
    assert isinstance(error, PeerLost)
    assert error.members == ("other/0",)


async def test_nothing_is_broadcast_when_a_member_cuts_the_version_in_another_way(
    pool: BlockPool,
) -> None:
    told = Told(pool)
    told.exchange.other_says[8] = b"12345678"
    error = await failure_of(told)
    assert isinstance(error, PeerLost)
    assert error.members == ("other/0",)
    assert "cuts the version in another way" in error.reason
    assert told.exchange.said == [bytes(8)]
    assert not [step for step in told.world.steps.begun if step.startswith("broadcast")]


async def test_members_hear_it_when_a_fetch_fails(pool: BlockPool) -> None:
    told = Told(pool)
    fetcher = StepFetcher(told.world.steps, range(9))
    fetcher.error = TornRead("s", 2, 4)
    told.pipeline = Pipeline(
        [told.lane],
        plan_of(3),
        fetcher,
        [OWN],
        turn=TURN,
        stall_s=SHORT_S,
        leave=told.leave,
    )
    assert isinstance(await failure_of(told), TornRead)
    assert told.exchange.said[-1] == LEAVING


async def test_member_says_why_it_left_when_others_leave_another_lane_meanwhile(
    pool: BlockPool,
) -> None:
    """Members that fail at once hear of each other: or nobody would say what is the matter."""
    world = World(pool, slots=1, lanes=2)
    ours, theirs = StepExchange(world.steps), StepExchange(world.steps)
    theirs.other_is_ready = False
    world.steps.hold("leave")
    lanes = [
        Lane(number=n, block=block, rank=n, exchange=exchange)
        for n, (block, exchange) in enumerate(zip(world.blocks, (ours, theirs), strict=True))
    ]
    fetcher = StepFetcher(world.steps, [0])
    fetcher.error = TornRead("s", 2, 4)
    pipeline = Pipeline(lanes, plan_of(3, 2), fetcher, [OWN], turn=TURN, stall_s=DEADLINE_S)
    errors: list[ConsumerError] = []

    async def run() -> None:
        try:
            await pipeline.run(DEADLINE_S)
        except ConsumerError as error:
            errors.append(error)

    async with anyio.create_task_group() as tasks:
        tasks.start_soon(run)
        await world.steps.until("leave")
        theirs.other_says[1] = LEAVING
    (error,) = errors
    assert isinstance(error, TornRead)
    assert isinstance(error.__cause__, PeerLost)


async def test_reader_is_named_when_its_words_differ_between_lanes(pool: BlockPool) -> None:
    """It was stopped between two words."""
    world = World(pool, slots=1, lanes=2)
    lanes = [Lane(number=n, block=block, rank=n) for n, block in enumerate(world.blocks)]
    pipeline = Pipeline(
        lanes, plan_of(4, 2), StepFetcher(world.steps, range(99)), [OWN], turn=TURN, stall_s=SHORT_S
    )
    with open_words(world.blocks[0].name) as first, open_words(world.blocks[1].name) as second:
        first.say_done(0, TURN, 2)
        second.say_done(0, TURN, 1)
        with pytest.raises(WorkerLost, match="stands still at bucket 1"), anyio.fail_after(5):
            await pipeline.run(DEADLINE_S)


async def test_own_worker_is_not_given_up_when_another_consumers_stands_still_at_the_end(
    pool: BlockPool,
) -> None:
    world = World(pool, slots=2)
    lane = Lane(number=0, block=world.blocks[0], rank=0)
    fetcher = StepFetcher(world.steps, range(9))
    pipeline = Pipeline([lane], plan_of(2), fetcher, [OWN, FOREIGN], turn=TURN, stall_s=SHORT_S)
    with open_words(world.blocks[0].name) as words:
        words.say_done(1, TURN, 1)
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(pipeline.run, DEADLINE_S)
            with anyio.fail_after(DEADLINE_S):
                await pipeline.primed.wait()
            with anyio.move_on_after(4 * SHORT_S):
                await anyio.sleep_forever()  # longer than the other reader is waited for
            assert words.given_up != TURN, "our own worker has yet to read"
            words.say_done(0, TURN, 2)
        assert words.given_up == TURN
