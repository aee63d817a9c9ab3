"""Turns as the consumer gives them, to workers that are only pretended."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import cast

import anyio
import msgspec
import pytest

from weightbus.consumers.engines.channel import WorkerChannel
from weightbus.consumers.engines.engine import EngineReport
from weightbus.consumers.engines.turns import END_S, NO_REQUEST, WAIT_S, Turn, TurnEngine
from weightbus.consumers.errors import (
    ConsumerError,
    DeadlineExceeded,
    EngineUnavailable,
    WorkerLost,
)
from weightbus.schemas.errors import WeightBusError
from weightbus.schemas.worker import Applied, InPlace, Inspected, Prepared, WorkerMessage

pytestmark = pytest.mark.anyio

LONG_S = 60.0
FEED = InPlace(sources=())
Answer = WorkerMessage | WeightBusError


class Channel:
    """Every request waits until it is answered, or given up."""

    ranks = 3

    def __init__(self) -> None:
        self.number = 100
        self.asked: list[tuple[dict[int, WorkerMessage], dict[int, int], bool]] = []
        self.answers: dict[int, Answer] = {}
        self.changed = anyio.Event()

    def next_number(self) -> int:
        self.number += 1
        return self.number

    async def request_each(
        self,
        requests: Mapping[int, WorkerMessage],
        deadline_s: float,
        *,
        adopt: bool,
        numbers: Mapping[int, int],
    ) -> dict[int, Answer]:
        self.asked.append((dict(requests), dict(numbers), adopt))
        with anyio.move_on_after(deadline_s):
            while not all(number in self.answers for number in numbers.values()):
                await self.changed.wait()
        late = DeadlineExceeded("reply", deadline_s)
        return {rank: self.answers.get(number, late) for rank, number in numbers.items()}

    def answer(self, number: int, answer: Answer) -> None:
        self.answers.setdefault(number, answer)
        self.changed.set()
        self.changed = anyio.Event()

    def give_up_nowait(self, numbers: Iterable[int], error: WeightBusError) -> None:
        for number in numbers:
            self.answer(number, error)


class Subject(TurnEngine):
    kind = "subject"

    def __init__(self, channel: Channel) -> None:
        super().__init__(cast(WorkerChannel, channel), "subject", (), "host")
        self.turns: list[Turn] = []
        self.opened = 0
        self.on_open: ConsumerError | None = None
        self.on_turn: Callable[[Turn], ConsumerError | None] = lambda turn: None
        self.hold: anyio.Event | None = None

    async def _open_ranks(self, deadline_s: float) -> None:
        self.opened += 1
        if self.on_open is not None:
            raise self.on_open

    async def _give_turn(self, turn: Turn, deadline_s: float) -> None:
        await anyio.lowlevel.checkpoint()
        self.turns.append(turn)
        if self.hold is not None:
            await self.hold.wait()
        error = self.on_turn(turn)
        if error is not None:
            raise error

    async def pause(self, deadline_s: float) -> None: ...

    async def resume(self, version: int, deadline_s: float) -> None: ...

    async def state(self, deadline_s: float) -> EngineReport:
        return EngineReport(version=-1, paused=False, touched=False, ranks=self.ranks)


def inspected(rank: int) -> Inspected:
    return Inspected(request=0, rank=rank, instance="a", version=1, touched=False)


def answering(channel: Channel, *but: int) -> Callable[[Turn], None]:
    """Every rank replies in its turn."""

    def on_turn(turn: Turn) -> None:
        for rank, number in enumerate(turn.numbers):
            if number != NO_REQUEST and rank not in but:
                channel.answer(number, inspected(rank))

    return on_turn


@pytest.fixture
def channel() -> Channel:
    return Channel()


@pytest.fixture
def subject(channel: Channel) -> Subject:
    return Subject(channel)


async def test_turn_names_every_rank_its_request_when_all_are_asked(
    channel: Channel, subject: Subject
) -> None:
    subject.on_turn = answering(channel)
    replies = await subject.inspect(None, LONG_S)
    assert [reply.rank for reply in replies] == [0, 1, 2]
    ((_, numbers, adopt),) = channel.asked
    assert (adopt, subject.opened) == (True, 1)
    assert subject.turns == [Turn(numbers=tuple(numbers.values()), wait_s=WAIT_S)]


async def test_turn_names_no_request_of_ranks_that_are_not_asked(
    channel: Channel, subject: Subject
) -> None:
    def on_turn(turn: Turn) -> None:
        channel.answer(turn.numbers[1], Prepared(request=0, rank=1, ready=True))

    subject.on_turn = on_turn
    (prepared,) = await subject.prepare("0" * 64, {1: FEED}, LONG_S)
    assert prepared.rank == 1
    (turn,) = subject.turns
    assert (turn.numbers[0], turn.numbers[2]) == (NO_REQUEST, NO_REQUEST)
    assert subject.opened == 0, "only who adopts workers opens them"


async def test_turns_follow_one_another_when_two_are_asked_for(
    channel: Channel, subject: Subject
) -> None:
    subject.on_turn = answering(channel)
    subject.hold = anyio.Event()
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(subject.inspect, None, LONG_S)
        tasks.start_soon(subject.inspect, None, LONG_S)
        await anyio.wait_all_tasks_blocked()
        assert len(subject.turns) == 1
        with pytest.raises(DeadlineExceeded, match="the turn before"):
            await subject.inspect(None, 0.01)
        subject.hold.set()
    assert len(subject.turns) == 2


async def test_requests_fail_with_their_turn_but_for_those_that_were_replied_to(
    channel: Channel, subject: Subject
) -> None:
    def on_turn(turn: Turn) -> ConsumerError:
        channel.answer(
            turn.numbers[0], Applied(request=0, rank=0, version=1, bytes=0, cell_digests=b"")
        )
        channel.answer(turn.numbers[2], WorkerLost(2, "it died"))
        return EngineUnavailable("subject", "500")

    subject.on_turn = on_turn
    with anyio.fail_after(LONG_S / 2):
        outcomes = await subject._ask(dict.fromkeys(range(3), inspected(0)), LONG_S)
    kinds = [type(outcome) for outcome in outcomes.values()]
    assert kinds == [Applied, EngineUnavailable, WorkerLost]


async def test_requests_fail_when_their_workers_cannot_be_opened(
    channel: Channel, subject: Subject
) -> None:
    subject.on_open = EngineUnavailable("subject", "it is gone")
    with pytest.raises(EngineUnavailable, match="it is gone"):
        await subject.inspect(None, LONG_S)
    assert not channel.asked
    subject.on_open, subject.on_turn = None, answering(channel)
    await subject.inspect(None, LONG_S)


async def test_replies_are_returned_when_the_turn_does_not_end_after_them(
    channel: Channel, subject: Subject, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert END_S <= 10
    monkeypatch.setattr("weightbus.consumers.engines.turns.END_S", 0.01)
    hold = anyio.Event()

    async def give(turn: Turn, deadline_s: float) -> None:
        answering(channel)(turn)
        await hold.wait()

    subject._give_turn = give  # type: ignore[method-assign]
    assert len(await subject.inspect(None, LONG_S)) == 3


async def test_ranks_are_asked_something_else_when_an_apply_is_given_up(
    channel: Channel, subject: Subject
) -> None:
    """Its answer says that they have ended; it counts as touched all the same."""

    def on_turn(turn: Turn) -> ConsumerError | None:
        if len(subject.turns) == 1:
            return EngineUnavailable("subject", "500")
        return answering(channel)(turn)

    subject.on_turn = on_turn
    with pytest.raises(EngineUnavailable) as caught:
        await subject.apply(1, "0" * 64, {0: FEED, 2: FEED}, LONG_S)
    assert caught.value.touched
    assert [number == NO_REQUEST for number in subject.turns[1].numbers] == [False, True, False]


async def test_ranks_are_waited_for_when_an_apply_is_cancelled(
    channel: Channel, subject: Subject
) -> None:
    subject.hold, scope, ended = anyio.Event(), anyio.CancelScope(), anyio.Event()
    subject.on_turn = answering(channel)

    async def apply() -> None:
        with scope:
            await subject.apply(1, "0" * 64, {0: FEED}, LONG_S)
        ended.set()

    async with anyio.create_task_group() as tasks:
        tasks.start_soon(apply)
        await anyio.wait_all_tasks_blocked()
        scope.cancel()
        with anyio.fail_after(LONG_S):
            while len(subject.turns) < 2:
                await anyio.lowlevel.checkpoint()
        assert not ended.is_set()
        subject.hold.set()
    assert scope.cancelled_caught


@pytest.mark.parametrize(
    "document",
    [
        b'{"numbers": [], "wait_s": 1}',
        b'{"numbers": [-2], "wait_s": 1}',
        b'{"numbers": [1.5], "wait_s": 1}',
        b'{"numbers": [1], "wait_s": 61}',
        b'{"numbers": [1]}',
        b'{"numbers": [1], "wait_s": 1, "more": 1}',
        b"[1]",
    ],
)
def test_turn_is_refused_when_it_breaks_its_contract(document: bytes) -> None:
    with pytest.raises(msgspec.ValidationError):
        msgspec.json.decode(document, type=Turn)


def test_turn_is_the_same_when_it_was_json() -> None:
    turn = Turn(numbers=(-1, 2**48), wait_s=0.5)
    assert msgspec.json.decode(msgspec.json.encode(turn), type=Turn) == turn
    assert msgspec.convert({"numbers": [-1, 2**48], "wait_s": 0.5}, Turn) == turn
