"""Reading a version from many processes, of which some are killed, stopped, or write anew."""

from __future__ import annotations

import logging
import threading
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import ExitStack, asynccontextmanager

import anyio
import pytest

from tests.integration.p2p import source as processes
from tests.integration.p2p.source import running_source
from tests.integration.p2p.target import Target
from weightbus.bus.endpoint import PROGRESS_S, SETTLE_S, Endpoint, RemoteRead, open_endpoint
from weightbus.consumers.errors import DeadlineExceeded, SegmentUnavailable, TornRead
from weightbus.consumers.transfer.fetch import Fetcher, LocalSegments
from weightbus.consumers.transfer.remote import (
    RELEASE_S,
    RemoteFetcher,
    Source,
    open_remote_fetcher,
)
from weightbus.consumers.transfer.sources import Sources
from weightbus.schemas.layout import Layout, SegmentSpec

pytestmark = pytest.mark.anyio

MIB = 2**20
SIZES = (45 * MIB + 3, 0, 19 * MIB)
"""Two sources read two batches each."""
DEADLINE_S = 60.0
SLACK_S = 20.0
"""A loaded machine may be so late; whoever waited for a deadline would be later."""


@pytest.fixture(scope="module")
def endpoint() -> Iterator[Endpoint]:
    with open_endpoint("127.0.0.1") as endpoint:
        yield endpoint


@pytest.fixture
def stack() -> Iterator[ExitStack]:
    with ExitStack() as stack:
        yield stack


@asynccontextmanager
async def opened(
    endpoint: Endpoint, publisher: processes.Source, copies: Sequence[Source] = ()
) -> AsyncIterator[tuple[Fetcher, Target]]:
    target = Target(SIZES)
    layout = Layout((), (), tuple(SegmentSpec(size) for size in SIZES))
    ways = dict(enumerate(publisher.ways))
    async with open_remote_fetcher(endpoint, copies, 0, ways, layout, DEADLINE_S) as fetcher:
        await fetcher.adopt(target.address, target.size_bytes)
        yield fetcher, target
        await fetcher.release(target.address)
        assert not fetcher.writing()


def as_copy(source: processes.Source, name: str = "the copy of engine b") -> Source:
    return Source(name, dict(enumerate(source.ways)), own=False)


async def until_idle(fetcher: Fetcher, deadline_s: float) -> None:
    """Nothing writes to the target any more."""
    await until(lambda: not fetcher.writing(), deadline_s)


async def until(condition: Callable[[], bool], deadline_s: float = DEADLINE_S) -> None:
    with anyio.fail_after(deadline_s):
        while True:
            if condition():
                return
            await anyio.sleep(0.005)


class Slow(Endpoint):
    """An endpoint whose batches of bytes end one by one, long after each other."""

    def __init__(self, endpoint: Endpoint, batch_s: float) -> None:
        self.__dict__.update(endpoint.__dict__)
        self.batch_s = batch_s

    def read(self, session: str, reads: Sequence[RemoteRead]) -> None:
        super().read(session, reads)
        if any(read.size_bytes > 8 for read in reads):
            time.sleep(self.batch_s)  # what a slow link does


class Counting(Endpoint):
    """An endpoint that counts reads of words."""

    def __init__(self, endpoint: Endpoint) -> None:
        self.__dict__.update(endpoint.__dict__)
        self.calls = 0

    def read(self, session: str, reads: Sequence[RemoteRead]) -> None:
        self.calls += all(read.size_bytes == 8 for read in reads)
        super().read(session, reads)


class Meddling(Endpoint):
    """An endpoint with which something happens before the n-th batch from one session."""

    def __init__(self, endpoint: Endpoint) -> None:
        self.__dict__.update(endpoint.__dict__)
        self.batches: dict[str, int] = {}
        self.asked = Counter[str]()
        """Session -> how often it was read from, be it a word."""
        self.session_of_interest, self.at = "", -1
        self.happen: Callable[[], object] = bool

    def read(self, session: str, reads: Sequence[RemoteRead]) -> None:
        self.asked[session] += 1
        if any(read.size_bytes > 8 for read in reads):
            self.batches[session] = self.batches.get(session, 0) + 1
            if (session, self.batches[session]) == (self.session_of_interest, self.at):
                self.happen()
        super().read(session, reads)


@pytest.mark.parametrize("cut_bytes", [2**62, 100_001], ids=["whole", "small"])
async def test_fetch_brings_every_byte_from_one_source(
    endpoint: Endpoint, stack: ExitStack, cut_bytes: int
) -> None:
    publisher = stack.enter_context(running_source(SIZES))
    async with opened(endpoint, publisher) as (fetcher, target):
        await fetcher.fetch(target.reads(cut_bytes), DEADLINE_S)
        await fetcher.check(DEADLINE_S)
    target.check()


async def test_fetch_asks_every_source_when_there_are_many(
    endpoint: Endpoint, stack: ExitStack
) -> None:
    publisher, *others = (stack.enter_context(running_source(SIZES)) for _ in range(3))
    meddling = Meddling(endpoint)
    async with opened(meddling, publisher, [as_copy(one) for one in others]) as (fetcher, target):
        assert isinstance(fetcher, RemoteFetcher)
        sources = fetcher._sources
        await until(lambda: all(one.has_answered for one in sources))  # else the first is enough
        await fetcher.fetch(target.reads(), DEADLINE_S)
    target.check()
    assert set(meddling.batches) == {one.ways[0].session for one in (publisher, *others)}


@pytest.mark.faults
@pytest.mark.parametrize("what", ["kill", "stop"])
@pytest.mark.parametrize("whose", ["publisher", "copy"])
async def test_fetch_goes_on_elsewhere_when_a_source_dies_in_the_middle(
    endpoint: Endpoint, stack: ExitStack, what: str, whose: str
) -> None:
    publisher, copy = (stack.enter_context(running_source(SIZES)) for _ in range(2))
    victim = publisher if whose == "publisher" else copy
    meddling = Meddling(endpoint)
    meddling.session_of_interest, meddling.at = victim.ways[0].session, 2
    meddling.happen = victim.kill if what == "kill" else victim.stop
    since = time.monotonic()
    async with opened(meddling, publisher, [as_copy(copy)]) as (fetcher, target):
        await fetcher.fetch(target.reads(4 * MIB), DEADLINE_S)
        assert time.monotonic() - since < PROGRESS_S + SETTLE_S + SLACK_S
        target.check()
        asked = meddling.asked[meddling.session_of_interest]
        await fetcher.fetch(target.reads(), DEADLINE_S)
        assert meddling.asked[meddling.session_of_interest] == asked, "it is lost"
    target.check()


@pytest.mark.faults
async def test_reading_begins_at_once_when_sources_are_stopped_that_nobody_needs(
    endpoint: Endpoint, stack: ExitStack
) -> None:
    publisher, *others = (stack.enter_context(running_source(SIZES)) for _ in range(4))
    for one in others:
        one.stop()
    took_s = []
    for copies in ([], [as_copy(one) for one in others]):
        since = time.monotonic()
        async with opened(endpoint, publisher, copies) as (fetcher, target):
            await fetcher.fetch(target.reads(), DEADLINE_S)
            took_s.append(time.monotonic() - since)
        target.check()
    assert took_s[1] < took_s[0] + PROGRESS_S, f"{took_s}: it waits for who does not answer"


@pytest.mark.faults
async def test_fetch_fails_and_names_every_source_when_none_is_left(
    endpoint: Endpoint, stack: ExitStack
) -> None:
    publisher, copy = (stack.enter_context(running_source(SIZES)) for _ in range(2))
    async with opened(endpoint, publisher, [as_copy(copy)]) as (fetcher, target):
        publisher.kill()
        copy.kill()
        with pytest.raises(SegmentUnavailable, match=r"the publisher: .*the copy of engine b: "):
            await fetcher.fetch(target.reads(), DEADLINE_S)


@pytest.mark.parametrize("when", [1, 2], ids=["before", "middle"])
async def test_fetch_reads_again_elsewhere_when_a_copy_is_overwritten(
    endpoint: Endpoint, stack: ExitStack, when: int
) -> None:
    publisher, copy = (stack.enter_context(running_source(SIZES)) for _ in range(2))
    meddling = Meddling(endpoint)
    meddling.session_of_interest, meddling.at = copy.ways[0].session, when
    meddling.happen = lambda: copy.tell("write 2")
    async with opened(meddling, publisher, [as_copy(copy)]) as (fetcher, target):
        await fetcher.fetch(target.reads(MIB), DEADLINE_S)
    target.check()


async def test_fetch_leaves_a_copy_alone_when_it_is_retired(
    endpoint: Endpoint, stack: ExitStack
) -> None:
    publisher, process = (stack.enter_context(running_source(SIZES)) for _ in range(2))
    offered = [True]
    ways = dict(enumerate(process.ways))
    copy = Source("the copy", ways, own=False, is_offered=lambda: offered[0])
    meddling = Meddling(endpoint)
    meddling.session_of_interest, meddling.at = process.ways[0].session, 1
    meddling.happen = lambda: offered.__setitem__(0, False)
    async with opened(meddling, publisher, [copy]) as (fetcher, target):
        await fetcher.fetch(target.reads(MIB), DEADLINE_S)
        await fetcher.fetch(target.reads(MIB), DEADLINE_S)
    target.check()
    assert meddling.batches[process.ways[0].session] == 1
    assert "about to be overwritten" in copy.failure


@pytest.mark.parametrize("command", ["write 2", "begin"])
async def test_fetch_says_torn_when_the_publisher_writes(
    endpoint: Endpoint, stack: ExitStack, command: str
) -> None:
    publisher, copy = (stack.enter_context(running_source(SIZES)) for _ in range(2))
    async with opened(endpoint, publisher, [as_copy(copy)]) as (fetcher, target):
        assert isinstance(fetcher, RemoteFetcher)
        sources = fetcher._sources
        await until(lambda: all(one.has_answered for one in sources))  # else the copy is enough
        publisher.tell(command)
        with pytest.raises(TornRead, match=r"of the publisher has generation [34]"):
            await fetcher.fetch(target.reads(), DEADLINE_S)


async def test_opening_says_torn_when_the_publisher_has_written(
    endpoint: Endpoint, stack: ExitStack
) -> None:
    publisher = stack.enter_context(running_source(SIZES))
    publisher.tell("write 2")
    with pytest.raises(TornRead):
        async with opened(endpoint, publisher):
            pass


class Pausing(logging.Handler):
    """Holds up whoever logs."""

    def __init__(self) -> None:
        super().__init__()
        self.go_on = threading.Event()

    def emit(self, record: logging.LogRecord) -> None:
        self.go_on.wait(DEADLINE_S)


async def test_opening_says_torn_when_the_thread_that_found_it_is_slow_to_go_on(
    endpoint: Endpoint, stack: ExitStack
) -> None:
    publisher = stack.enter_context(running_source(SIZES))
    publisher.tell("write 2")
    pausing, logger = Pausing(), logging.getLogger(Source.__module__)
    logger.addHandler(pausing)
    stack.callback(logger.removeHandler, pausing)
    stack.callback(pausing.go_on.set)
    with pytest.raises(TornRead):
        async with opened(endpoint, publisher):
            pass


@pytest.mark.faults
async def test_fetch_ends_at_its_deadline_and_knows_who_still_writes(
    endpoint: Endpoint, stack: ExitStack
) -> None:
    publisher = stack.enter_context(running_source(SIZES))
    async with opened(endpoint, publisher) as (fetcher, target):
        publisher.stop()
        with pytest.raises(DeadlineExceeded, match="fetch from the publisher"):
            await fetcher.fetch(target.reads(), 0.5)
        assert fetcher.writing()
        await until_idle(fetcher, PROGRESS_S + SETTLE_S + SLACK_S)


async def test_fetch_can_be_used_again_when_it_was_cancelled(
    endpoint: Endpoint, stack: ExitStack
) -> None:
    publisher = stack.enter_context(running_source(SIZES))
    meddling = Meddling(endpoint)
    begun = anyio.Event()
    meddling.session_of_interest, meddling.at = publisher.ways[0].session, 1
    meddling.happen = lambda: anyio.from_thread.run_sync(begun.set)
    async with opened(meddling, publisher) as (fetcher, target):
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(fetcher.fetch, target.reads(), DEADLINE_S)
            await begun.wait()
            tasks.cancel_scope.cancel()
        await until_idle(fetcher, DEADLINE_S)
        await fetcher.fetch(target.reads(), DEADLINE_S)
    target.check()


async def test_fetch_refuses_what_lies_outside_a_segment(
    endpoint: Endpoint, stack: ExitStack
) -> None:
    publisher = stack.enter_context(running_source(SIZES))
    async with opened(endpoint, publisher) as (fetcher, target):
        (read, *_) = target.reads()
        with pytest.raises(SegmentUnavailable, match="must hold at least"):
            await fetcher.fetch([read._replace(source=1)], DEADLINE_S)


async def test_fetch_lasts_longer_than_a_stall_when_it_gets_on(
    endpoint: Endpoint, stack: ExitStack
) -> None:
    publisher = stack.enter_context(running_source(SIZES))
    async with opened(Slow(endpoint, 1.0), publisher) as (fetcher, target):
        since = time.monotonic()
        await fetcher.fetch(target.reads(), 3.0)
        assert time.monotonic() - since > 3.0, "five batches take longer"
    target.check()


async def test_generations_of_one_process_are_read_together(
    endpoint: Endpoint, stack: ExitStack
) -> None:
    sizes = (4096,) * 40
    publisher = stack.enter_context(running_source(sizes))
    counting = Counting(endpoint)
    layout = Layout((), (), tuple(SegmentSpec(size) for size in sizes))
    ways = dict(enumerate(publisher.ways))
    target = Target(sizes)
    opening = open_remote_fetcher(counting, [], 0, ways, layout, DEADLINE_S)
    async with opening as fetcher:
        await fetcher.adopt(target.address, target.size_bytes)
        await fetcher.fetch(target.reads(), DEADLINE_S)
        await fetcher.release(target.address)
    target.check()
    assert counting.calls == 2, "once before, and once after"
    sources = Sources(LocalSegments("elsewhere"), "elsewhere", endpoint=counting)
    assert sources.reach("p2p", layout, tuple((way,) for way in publisher.ways)) == publisher.ways
    assert counting.calls == 3


async def test_memory_stays_registered_while_a_read_that_was_left_may_write_to_it(
    endpoint: Endpoint, stack: ExitStack
) -> None:
    publisher = stack.enter_context(running_source(SIZES))
    go_on, begun = threading.Event(), anyio.Event()
    meddling = Meddling(endpoint)
    meddling.session_of_interest, meddling.at = publisher.ways[0].session, 1

    def hang() -> None:
        anyio.from_thread.run_sync(begun.set)
        go_on.wait(DEADLINE_S)

    meddling.happen = hang
    target = Target(SIZES)
    layout = Layout((), (), tuple(SegmentSpec(size) for size in SIZES))
    ways = dict(enumerate(publisher.ways))
    async with open_remote_fetcher(meddling, [], 0, ways, layout, DEADLINE_S) as fetcher:
        await fetcher.adopt(target.address, target.size_bytes)
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(fetcher.fetch, target.reads(), DEADLINE_S)
            await begun.wait()
            tasks.cancel_scope.cancel()
        await fetcher.release(target.address)
        assert target.address in endpoint._registered
        go_on.set()
        await until_idle(fetcher, DEADLINE_S)
        await until(lambda: target.address not in endpoint._registered)


@pytest.mark.parametrize("operation", ["adopt", "release"])
async def test_memory_is_left_to_the_transfer_engine_when_it_hangs(
    endpoint: Endpoint, operation: str
) -> None:
    hung = Hung(endpoint)
    fetcher = RemoteFetcher(hung, [], {})
    target = Target([4096])
    if operation == "release":
        hung.go_on.set()
        await fetcher.adopt(target.address, target.size_bytes)
        hung.go_on.clear()
    with anyio.move_on_after(RELEASE_S + SLACK_S) as scope:
        with anyio.move_on_after(0.1):
            await getattr(fetcher, operation)(
                *([target.address] if operation == "release" else [target.address, 4096])
            )
        scope.shield = True
    assert not scope.cancelled_caught
    hung.go_on.set()
    await until(lambda: not hung.changing and target.address not in endpoint._registered)


class Hung(Endpoint):
    """An endpoint that changes what is registered when it may."""

    def __init__(self, endpoint: Endpoint) -> None:
        self.__dict__.update(endpoint.__dict__)
        self.go_on, self.changing = threading.Event(), 0

    def register(self, address: int, size_bytes: int) -> None:
        self.changing += 1
        assert self.go_on.wait(DEADLINE_S)
        super().register(address, size_bytes)
        self.changing -= 1

    def unregister(self, address: int) -> None:
        self.changing += 1
        assert self.go_on.wait(DEADLINE_S)
        super().unregister(address)
        self.changing -= 1
