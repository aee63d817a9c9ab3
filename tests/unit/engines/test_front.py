"""The front's rules, with ranks that are only pretended."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import NoReturn

import anyio
import anyio.lowlevel
import msgspec
import pytest

from weightbus.bus.background import open_background
from weightbus.consumers.engines.errors import RequestFailed
from weightbus.consumers.engines.torch.front import Front
from weightbus.consumers.engines.torch.messages import (
    AskFingerprints,
    AskFirstAnswer,
    AskState,
    ClientReply,
    Done,
    Fingerprints,
    FirstAnswered,
    Infer,
    Inferred,
    Inputs,
    Outputs,
    Pause,
    Refused,
    Restart,
    Resume,
    StateReport,
)
from weightbus.consumers.engines.torch.spec import TorchEngineSpec
from weightbus.consumers.engines.torch.words import NOTHING_HELD, Held
from weightbus.consumers.errors import DeadlineExceeded, EngineUnavailable, WorkerLost

pytestmark = pytest.mark.anyio

LONG_S = 30.0
SHORT_S = 0.05
SPEC = TorchEngineSpec(architecture="decoder", tp=2)
INFER = Infer(request=5, inputs=Inputs(prompts=((1,),)), deadline_s=LONG_S)


class FakeRanks:
    """One generation: computes when it is told to, and is lost when it is told to."""

    def __init__(self) -> None:
        self.holds = [NOTHING_HELD] * 2
        self.holding = True
        self.may_compute = anyio.Event()
        self.may_compute.set()
        self.computing = 0
        self.lost = anyio.Event()
        self.reason = ""
        self.failure: Exception | None = None

    @property
    def pids(self) -> tuple[int, ...]:
        return (101, 102)

    def held(self) -> list[Held]:
        return list(self.holds)

    def hold(self) -> None:
        self.holding = True

    def let_go(self) -> None:
        self.holding = False

    def condemn(self, reason: str) -> None:
        self.reason = reason
        self.lost.set()

    def update(self, version: int) -> None:
        """As a consumer would: only while held."""
        assert self.holding
        assert not self.computing
        self.holds = [Held(version, False, held.updates + 1) for held in self.holds]

    async def wait_until_ready(self, deadline_s: float) -> None:
        if self.failure is not None:
            raise self.failure

    async def wait_until_lost(self) -> NoReturn:
        await self.lost.wait()
        raise WorkerLost(1, self.reason)

    async def compute(
        self, request: Infer | AskFingerprints, deadline_s: float
    ) -> Inferred | Fingerprints:
        self.computing += 1
        version = self.holds[0].version
        try:
            await self.may_compute.wait()
            if self.failure is not None:
                raise self.failure
        finally:
            self.computing -= 1
        if isinstance(request, AskFingerprints):
            return Fingerprints(request=request.request, version=version, fingerprints=("a", "b"))
        return Inferred(request=request.request, version=version, outputs=Outputs())


class Engine:
    """A front and the generations of ranks that it has opened."""

    def __init__(self, spec: TorchEngineSpec, *generations: FakeRanks) -> None:
        self.front = Front(spec, self._open)
        self.coming = list(generations)
        self.closed = 0

    @asynccontextmanager
    async def _open(self) -> AsyncIterator[FakeRanks]:
        try:
            yield self.coming.pop(0) if self.coming else FakeRanks()
        finally:
            self.closed += 1

    async def state(self) -> StateReport:
        report = await self.front.answer(AskState(request=1, deadline_s=LONG_S))
        assert isinstance(report, StateReport)
        return report

    async def ready_again(self) -> StateReport:
        """The state once a second generation of ranks is ready."""
        with anyio.fail_after(LONG_S):
            while (state := await self.state()).generation < 2 or not state.ready:
                await anyio.lowlevel.checkpoint()
        return state

    async def pause(self, deadline_s: float = LONG_S) -> ClientReply:
        return await self.front.answer(Pause(request=2, deadline_s=deadline_s))

    async def first_answer(self, version: int, deadline_s: float = LONG_S) -> int:
        asked = AskFirstAnswer(request=4, version=version, deadline_s=deadline_s)
        reply = await self.front.answer(asked)
        assert isinstance(reply, FirstAnswered)
        return reply.at_ns

    async def resume(self, version: int) -> ClientReply:
        return await self.front.answer(Resume(request=3, version=version, deadline_s=LONG_S))


@asynccontextmanager
async def running(*generations: FakeRanks, spec: TorchEngineSpec = SPEC) -> AsyncIterator[Engine]:
    engine = Engine(spec, *generations)
    async with open_background() as tasks:
        tasks.start_soon(engine.front.run_ranks)
        await engine.front.ready.wait()
        yield engine


async def ask(engine: Engine, answers: list[ClientReply], request: Infer = INFER) -> None:
    answers.append(await engine.front.answer(request))


def refused(reply: ClientReply) -> str:
    assert isinstance(reply, Refused), reply
    return f"{reply.error}: {reply.reason}"


async def test_engine_serves_nothing_when_it_is_fresh() -> None:
    async with running(FakeRanks()) as engine:
        state = await engine.state()
        assert (state.version, state.paused, state.touched, state.ready) == (-1, True, False, True)
        impatient = msgspec.structs.replace(INFER, deadline_s=SHORT_S)
        reply = await engine.front.answer(impatient)
        assert "DeadlineExceeded" in refused(reply)
        assert "the engine is paused" in refused(reply)


async def test_requests_wait_and_get_the_new_version_when_paused_for_an_update() -> None:
    ranks = FakeRanks()
    answers: list[ClientReply] = []
    async with running(ranks) as engine:
        ranks.update(1)
        assert isinstance(await engine.resume(1), Done)
        assert await engine.front.answer(INFER) == Inferred(request=5, version=1, outputs=Outputs())
        assert isinstance(await engine.pause(), Done)
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(ask, engine, answers)
            await anyio.wait_all_tasks_blocked()
            assert (await engine.state()).waiting == 1
            ranks.update(2)
            assert not answers
            assert isinstance(await engine.resume(2), Done)
        assert answers == [Inferred(request=5, version=2, outputs=Outputs())]


async def test_first_answer_is_told_when_it_was_made_and_no_later_one() -> None:
    ranks = FakeRanks()
    seen: list[int] = []

    async def wait(engine: Engine) -> None:
        seen.append(await engine.first_answer(1))

    async with running(ranks) as engine:
        ranks.update(1)
        await engine.resume(1)
        before_ns = time.time_ns()
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(wait, engine)
            await anyio.wait_all_tasks_blocked()
            fingerprints = AskFingerprints(request=6, deadline_s=LONG_S)
            assert isinstance(await engine.front.answer(fingerprints), Fingerprints)
            await anyio.wait_all_tasks_blocked()
            assert not seen, "no token was asked for"
            await engine.front.answer(INFER)
        after_ns = time.time_ns()
        assert before_ns <= seen[0] <= after_ns
        await engine.front.answer(INFER)
        assert await engine.first_answer(1) == seen[0], "also when it is asked for late"


async def test_first_answer_is_of_the_version_that_is_served() -> None:
    ranks = FakeRanks()
    async with running(ranks) as engine:
        assert await engine.first_answer(-1) == 0, "nothing is served"
        ranks.update(1)
        await engine.resume(1)
        await engine.front.answer(INFER)
        assert await engine.first_answer(2) == 0
        await engine.pause()
        assert await engine.first_answer(1) == 0
        ranks.update(2)
        await engine.resume(2)
        resumed_ns = time.time_ns()
        assert await engine.first_answer(2, SHORT_S) == 0, "the answer before was of version 1"
        await engine.front.answer(INFER)
        assert await engine.first_answer(2) >= resumed_ns


@pytest.mark.parametrize("ended_by", ["pause", "loss"])
async def test_first_answer_is_not_waited_for_when_the_engine_serves_no_more(
    ended_by: str,
) -> None:
    ranks = FakeRanks()
    seen: list[int] = []

    async def wait(engine: Engine) -> None:
        seen.append(await engine.first_answer(1))

    async with running(ranks) as engine:
        ranks.update(1)
        await engine.resume(1)
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(wait, engine)
            await anyio.wait_all_tasks_blocked()
            if ended_by == "pause":
                await engine.pause()
            else:
                ranks.condemn("it was killed")
    assert seen == [0]


async def test_pause_waits_for_the_request_that_runs() -> None:
    ranks = FakeRanks()
    answers: list[ClientReply] = []
    paused = anyio.Event()
    async with running(ranks) as engine, anyio.create_task_group() as tasks:
        ranks.update(1)
        await engine.resume(1)
        ranks.may_compute = anyio.Event()
        tasks.start_soon(ask, engine, answers)
        await anyio.wait_all_tasks_blocked()

        async def pause() -> None:
            await engine.pause()
            paused.set()

        tasks.start_soon(pause)
        await anyio.wait_all_tasks_blocked()
        assert not paused.is_set()
        assert not ranks.holding
        ranks.may_compute.set()
        await paused.wait()
        assert ranks.holding
        assert len(answers) == 1


async def test_engine_serves_on_when_it_could_not_be_paused_in_time() -> None:
    ranks = FakeRanks()
    answers: list[ClientReply] = []
    async with running(ranks) as engine, anyio.create_task_group() as tasks:
        ranks.update(1)
        await engine.resume(1)
        ranks.may_compute = anyio.Event()
        tasks.start_soon(ask, engine, answers)
        await anyio.wait_all_tasks_blocked()
        assert "DeadlineExceeded" in refused(await engine.pause(SHORT_S))
        ranks.may_compute.set()
        assert isinstance(await engine.front.answer(INFER), Inferred)
        assert not (await engine.state()).paused


async def test_pause_waits_for_the_request_that_runs_when_its_client_is_gone() -> None:
    ranks = FakeRanks()
    client = anyio.CancelScope()

    async def ask_and_leave() -> None:
        with client:
            await engine.front.answer(INFER)

    async with running(ranks) as engine, anyio.create_task_group() as tasks:
        ranks.update(1)
        await engine.resume(1)
        ranks.may_compute = anyio.Event()
        tasks.start_soon(ask_and_leave)
        await anyio.wait_all_tasks_blocked()
        client.cancel()
        tasks.start_soon(engine.pause)
        await anyio.wait_all_tasks_blocked()
        assert ranks.computing
        assert not ranks.holding
        ranks.may_compute.set()
    assert ranks.holding


@pytest.mark.parametrize(
    ("held", "reason"),
    [
        ([(4, False), (3, False)], "rank 1 holds version 3, not version 4"),
        ([(4, False), (4, True)], "rank 1 holds a part of an update after 4"),
        ([(-1, False), (-1, False)], "rank 0 holds version -1"),
    ],
)
async def test_resume_is_refused_when_ranks_do_not_all_hold_the_version(
    held: list[tuple[int, bool]], reason: str
) -> None:
    ranks = FakeRanks()
    async with running(ranks) as engine:
        ranks.holds = [Held(version, touched, 1) for version, touched in held]
        assert reason in refused(await engine.resume(4))
        assert ranks.holding
        assert (await engine.state()).paused


async def test_resume_is_refused_when_another_version_is_being_served() -> None:
    ranks = FakeRanks()
    async with running(ranks) as engine:
        ranks.update(1)
        await engine.resume(1)
        assert isinstance(await engine.resume(1), Done)
        assert "serves 1 and is not paused" in refused(await engine.resume(2))


async def test_engine_is_touched_when_ranks_hold_other_than_what_it_serves() -> None:
    ranks = FakeRanks()
    async with running(ranks) as engine:
        for held, touched in [
            ([NOTHING_HELD, NOTHING_HELD], False),
            ([Held(-1, True, 1), NOTHING_HELD], True),
            ([Held(1, False, 1), NOTHING_HELD], True),
            ([Held(1, False, 1), Held(1, False, 1)], True),
        ]:
            ranks.holds = held
            assert (await engine.state()).touched is touched, held
        await engine.resume(1)
        assert not (await engine.state()).touched


async def test_engine_is_touched_when_the_version_it_serves_was_written_again() -> None:
    """Its consumer may have died before it proved what was written."""
    ranks = FakeRanks()
    async with running(ranks) as engine:
        ranks.update(1)
        await engine.resume(1)
        await engine.pause()
        assert not (await engine.state()).touched
        ranks.update(1)
        state = await engine.state()
        assert (state.version, state.paused, state.touched) == (1, True, True)
        await engine.resume(1)
        assert not (await engine.state()).touched


async def test_engine_is_paused_without_version_when_a_rank_was_lost() -> None:
    first, second = FakeRanks(), FakeRanks()
    answers: list[ClientReply] = []
    async with running(first, second) as engine, anyio.create_task_group() as tasks:
        first.update(1)
        await engine.resume(1)
        first.condemn("it was killed")
        state = await engine.ready_again()
        assert (state.version, state.paused, state.generation, state.ready) == (-1, True, 2, True)
        assert state.error == "worker of rank 1 is lost: it was killed"
        tasks.start_soon(ask, engine, answers)
        await anyio.wait_all_tasks_blocked()
        assert not answers
        second.update(2)
        await engine.resume(2)
    assert answers == [Inferred(request=5, version=2, outputs=Outputs())]


@pytest.mark.parametrize("failure", [WorkerLost(0, "gone"), DeadlineExceeded("step", 1.0)])
async def test_ranks_are_started_anew_when_a_request_does_not_end(failure: Exception) -> None:
    first = FakeRanks()
    async with running(first) as engine:
        first.update(1)
        await engine.resume(1)
        first.failure = failure
        assert type(failure).__name__ in refused(await engine.front.answer(INFER))
        state = await engine.ready_again()
        assert (state.generation, state.paused) == (2, True)
        assert str(failure) in state.error


async def test_ranks_go_on_when_a_request_is_refused_by_the_model() -> None:
    ranks = FakeRanks()
    async with running(ranks) as engine:
        ranks.update(1)
        await engine.resume(1)
        ranks.failure = RequestFailed("RequestRefused", "no")
        assert "no" in refused(await engine.front.answer(INFER))
        ranks.failure = None
        assert isinstance(await engine.front.answer(INFER), Inferred)


async def test_ranks_are_started_anew_when_they_computed_with_another_version() -> None:
    ranks = FakeRanks()
    async with running(ranks) as engine:
        ranks.update(1)
        await engine.resume(1)
        ranks.holds = [Held(2, False, 2)] * 2
        assert "WorkerLost" in refused(await engine.front.answer(INFER))
        assert (await engine.ready_again()).paused


async def test_restart_is_answered_when_the_old_ranks_are_gone() -> None:
    ranks = FakeRanks()
    async with running(ranks) as engine:
        restart = Restart(request=4, reason="stuck", deadline_s=LONG_S)
        assert isinstance(await engine.front.answer(restart), Done)
        assert engine.closed == 1
        assert "stuck" in (await engine.ready_again()).error


async def test_engine_ends_when_its_ranks_never_started() -> None:
    ranks = FakeRanks()
    ranks.failure = WorkerLost(0, "no such model")
    engine = Engine(SPEC, ranks)
    with pytest.raises(EngineUnavailable, match="no such model"):
        await engine.front.run_ranks()
    assert engine.closed == 1


async def test_engine_serves_its_file_until_ranks_are_lost_when_started_with_weights() -> None:
    first, second = FakeRanks(), FakeRanks()
    spec = msgspec.structs.replace(SPEC, weights="/a/file")
    async with running(first, second, spec=spec) as engine:
        assert await engine.front.answer(INFER) == Inferred(
            request=5, version=-1, outputs=Outputs()
        )
        await engine.pause()
        assert isinstance(await engine.resume(-1), Done)
        first.condemn("killed")
        assert (await engine.ready_again()).paused
        assert second.holding


async def test_nothing_is_served_at_no_version_when_started_without_weights() -> None:
    async with running(FakeRanks()) as engine:
        assert "without weights" in refused(await engine.resume(-1))


async def test_fingerprints_take_their_turn_when_paused() -> None:
    ranks = FakeRanks()
    async with running(ranks) as engine:
        ask_for = AskFingerprints(request=9, deadline_s=SHORT_S)
        assert "paused" in refused(await engine.front.answer(ask_for))
        ranks.update(1)
        await engine.resume(1)
        assert await engine.front.answer(ask_for) == Fingerprints(
            request=9, version=1, fingerprints=("a", "b")
        )
