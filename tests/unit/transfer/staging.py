"""Staging blocks as a consumer owns and fills them, for tests of the engine's side.

What fills them runs in a thread of its own, and does what is written in the contract and no more;
what a slot held before is spoiled before it is filled again.
"""

from __future__ import annotations

import fcntl
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager

from tests.unit.transfer.blocks import Block, open_block
from weightbus.consumers.planning.buckets import BucketPlan
from weightbus.schemas.shared_memory import (
    SHM_FILLED_OFFSET,
    SHM_GIVEN_UP_OFFSET,
    SHM_READERS_OFFSET,
    SHM_REQUEST_OFFSET,
    SHM_WANTED_OFFSET,
    TURN_BITS,
)
from weightbus.schemas.worker import Relay, Stream

__all__ = ("Owner", "open_staging", "relaying", "streaming")

PATIENCE_S = 30.0
SPOILED = b"\xa5"


class Owner:
    """Some staging blocks of one consumer."""

    def __init__(self, blocks: Sequence[Block]) -> None:
        self.blocks = blocks

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(block.name for block in self.blocks)

    def give_up(self, turn: int) -> None:
        for block in self.blocks:
            block.set_word(SHM_GIVEN_UP_OFFSET, turn)

    def vanish(self) -> None:
        """What the kernel does to a block whose owner is killed."""
        for block in self.blocks:
            fcntl.flock(block.fd, fcntl.LOCK_UN)


@contextmanager
def open_staging(count: int, size_bytes: int) -> Iterator[Owner]:
    """So many blocks of one size; removed at the end."""
    with ExitStack() as stack:
        names = [f"weightbus-stage.test.{uuid.uuid4().hex}" for _ in range(count)]
        yield Owner(
            [stack.enter_context(open_block(bytes(size_bytes), "", name)) for name in names]
        )


@contextmanager
def streaming(
    owner: Owner,
    plan: BucketPlan,
    segments: Sequence[bytes | bytearray],
    feed: Stream,
    *,
    readers: Sequence[int] = (0,),
    until: int | None = None,
    then: Callable[[], None] = lambda: None,
) -> Iterator[None]:
    """Fill lanes with a version while the body runs; `then` is called after bucket `until`."""

    def fill(gone: threading.Event) -> None:
        for bucket in range(plan.buckets if until is None else until):
            for lane, block in enumerate(owner.blocks):
                if not _wait(gone, lambda b=block, k=bucket: _may_fill(b, feed, readers, k)):  # type: ignore[misc]
                    return
                _fill(block, plan, bucket * plan.lanes + lane, segments, feed)
                block.set_word(SHM_FILLED_OFFSET, feed.turn << TURN_BITS | bucket + 1)
        then()

    with _thread(fill):
        yield


@contextmanager
def relaying(
    owner: Owner,
    segments: Sequence[bytes | bytearray],
    feed: Relay,
    *,
    until: int | None = None,
    then: Callable[[], None] = lambda: None,
) -> Iterator[list[tuple[int, int, int]]]:
    """Answer requests while the body runs: gives (segment, window, slot) of each, as they come."""
    asked: list[tuple[int, int, int]] = []
    (block,) = owner.blocks

    def answer(gone: threading.Event) -> None:
        while until is None or len(asked) < until:
            wanted = feed.turn << TURN_BITS | len(asked) + 1
            if not _wait(gone, lambda w=wanted: block.word(SHM_WANTED_OFFSET) == w):  # type: ignore[misc]
                return
            words = [block.word(SHM_REQUEST_OFFSET + 8 * place) for place in range(3)]
            segment, window, slot = words
            assert 0 <= slot < feed.slots
            data = segments[segment][window * feed.window_bytes :][: feed.window_bytes]
            block.put(slot * feed.window_bytes, SPOILED * feed.window_bytes)
            block.put(slot * feed.window_bytes, bytes(data))
            asked.append((segment, window, slot))
            block.set_word(SHM_FILLED_OFFSET, wanted)
        then()

    with _thread(answer):
        yield asked


def _may_fill(block: Block, feed: Stream, readers: Sequence[int], bucket: int) -> bool:
    words = [block.word(SHM_READERS_OFFSET + 8 * reader) for reader in readers]
    wanted = max(0, bucket - feed.slots + 1)
    return all(
        wanted == 0 or (word >> TURN_BITS == feed.turn and word & 0xFFFFFFFF >= wanted)
        for word in words
    )


def _fill(
    block: Block,
    plan: BucketPlan,
    part: int,
    segments: Sequence[bytes | bytearray],
    feed: Stream,
) -> None:
    slot = part // plan.lanes % feed.slots * feed.bucket_bytes
    block.put(slot, SPOILED * feed.bucket_bytes)
    for run in plan.runs_of(part):
        source, size_bytes = int(run["source"]), int(run["size_bytes"])
        data = segments[int(run["segment"])][source : source + size_bytes]
        block.put(slot + int(run["staged"]), bytes(data))


def _wait(gone: threading.Event, condition: Callable[[], bool]) -> bool:
    """Whether the condition holds before the body ends."""
    end = time.monotonic() + PATIENCE_S
    while not condition():
        if gone.wait(1e-4):
            return False
        assert time.monotonic() < end, "the reader makes no progress"
    return True


@contextmanager
def _thread(target: Callable[[threading.Event], None]) -> Iterator[None]:
    """Run it beside the body; what it raises, the body raises."""
    gone = threading.Event()
    failures: list[Exception] = []

    def run() -> None:
        try:
            target(gone)
        except Exception as error:  # noqa: BLE001
            failures.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    try:
        yield
    finally:
        gone.set()
        thread.join(PATIENCE_S)
    assert not failures, failures
