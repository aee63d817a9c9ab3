"""What every engine must do, whatever it is: run for each kind with real processes."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import AsyncIterator
from functools import partial
from pathlib import Path

import anyio
import pytest

from tests.integration.engines.harness import (
    KINDS,
    LONG_S,
    Answer,
    EngineUnderTest,
    Subject,
    Updates,
    digests_of,
    until,
)
from weightbus.consumers.engines.engine import Engine, TokenSeen
from weightbus.consumers.errors import (
    ApplyFailed,
    DeadlineExceeded,
    EngineUnavailable,
    WorkerLost,
)
from weightbus.schemas.worker import Feed, InPlace

pytestmark = [pytest.mark.anyio, pytest.mark.parametrize("kind", list(KINDS))]

SMALL_MINILM = {
    "vocab_size": 100,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
}
SUBJECTS = {
    "decoder": Subject("decoder", {"vocab_size": 100, "tie_word_embeddings": True}, 1),
    "experts-tp2": Subject("decoder", {"vocab_size": 100, "num_experts": 4}, 2),
    "bf16-tp2": Subject("decoder", {"attention_bias": True, "dtype": "BF16"}, 2),
    "replicated-kv-tp4": Subject("decoder", {"num_key_value_heads": 2}, 4),
    "repacked-tp2": Subject("decoder", {"repacked_down_proj": True}, 2),
    "minilm-tp2": Subject("minilm", SMALL_MINILM, 2),
}
SHARDED = SUBJECTS["experts-tp2"]


@pytest.fixture
def subject() -> Subject:
    """Two ranks, unless a test says otherwise."""
    return SHARDED


@pytest.fixture
async def running(kind: str, subject: Subject, short_path: Path) -> AsyncIterator[EngineUnderTest]:
    async with KINDS[kind](subject, short_path) as running:
        yield running


async def is_touched(engine: Engine) -> bool:
    return (await engine.state(LONG_S)).touched


@pytest.mark.parametrize("subject", SUBJECTS.values(), ids=SUBJECTS)
async def test_engine_holds_each_version_bit_for_bit_when_its_bytes_are_staged(
    running: EngineUnderTest,
) -> None:
    """Relayed first, and then streamed by every rank whose plan is proven to write all."""
    checkpoints = running.checkpoints
    repacked = bool(checkpoints.config.get("repacked_down_proj"))
    async with running.open_consumer() as engine:
        updates = Updates(engine, checkpoints)
        await updates.prepare()
        for version in (1, 2, 3):
            inspected = await engine.inspect(None, LONG_S)
            proven = all(checkpoints.layout_digest in rank.proven for rank in inspected)
            assert proven == (version > 1 and not repacked)
            await engine.pause(LONG_S)
            if proven:
                applied = await updates.stream(version, 2**16, lanes=version - 1)
                assert not any(rank.processed_parameters for rank in applied)
            else:
                applied = await updates.relay(version, 10_007)
            verdict = updates.verify(version, applied)
            assert verdict.ok, verdict.reason
            await engine.resume(version, LONG_S)
            assert await running.fingerprints() == checkpoints.fingerprints(version)
            assert (await running.ask()).version == version


@pytest.mark.parametrize("subject", SUBJECTS.values(), ids=SUBJECTS)
async def test_engine_holds_each_version_bit_for_bit_when_updated(running: EngineUnderTest) -> None:
    checkpoints = running.checkpoints
    repacked = bool(checkpoints.config.get("repacked_down_proj"))
    answers: list[Answer] = []
    async with running.open_consumer() as engine:
        updates = Updates(engine, checkpoints)
        described = await updates.prepare()
        assert [rank.rank for rank in described] == list(range(checkpoints.ranks))
        assert not any(rank.untraced_reason for rank in described)
        for version in (1, 2, 3):
            applied = await updates.update(version)
            assert await running.fingerprints() == checkpoints.fingerprints(version)
            answers.append(await running.ask())
            report = await engine.state(LONG_S)
            assert (report.version, report.paused, report.touched) == (version, False, False)
            held = await engine.inspect(checkpoints.layout_digest, LONG_S)
            assert [(rank.version, rank.touched) for rank in held] == [(version, False)] * len(held)
            for now, then in zip(held, applied, strict=True):
                sums, expected = digests_of(now), digests_of(then)
                expected[list(now.unreadable)] = 0
                assert sums.tolist() == expected.tolist()
        assert all((rank.processed_parameters > 0) is repacked for rank in applied)
        assert all(rank.direct_parameters > 0 for rank in applied)
    assert [answer.version for answer in answers] == [1, 2, 3]
    assert len({str(answer.content) for answer in answers}) == 3


async def test_engine_serves_while_it_prepares_and_holds_the_version_then(
    running: EngineUnderTest,
) -> None:
    checkpoints = running.checkpoints
    digest = checkpoints.layout_digest
    async with running.open_consumer() as engine:
        updates = Updates(engine, checkpoints)
        await updates.prepare()
        await updates.update(1)
        feeds: dict[int, Feed] = {
            rank: InPlace(sources=checkpoints.sources(2)) for rank in reversed(range(engine.ranks))
        }
        waiting = dict(feeds)
        with anyio.fail_after(LONG_S):
            while waiting:
                replies = await engine.prepare(digest, waiting, LONG_S)
                assert [reply.rank for reply in replies] == list(waiting)
                assert [reply.reason for reply in replies] == [""] * len(replies)
                for reply in replies:
                    if reply.ready:
                        del waiting[reply.rank]
                assert (await running.ask()).version == 1
        assert not await is_touched(engine)
        with pytest.raises(ApplyFailed):
            await engine.prepare("0" * 64, feeds, LONG_S)
        await updates.update(2)
        assert await running.fingerprints() == checkpoints.fingerprints(2)


async def test_first_token_of_a_version_is_seen_when_a_request_has_come(
    running: EngineUnderTest,
) -> None:
    seen: list[TokenSeen | None] = []
    async with running.open_consumer() as engine:
        updates = Updates(engine, running.checkpoints)
        await updates.prepare()
        await updates.update(1)
        asked_ns = time.time_ns()

        async def watch() -> None:
            seen.append(await engine.first_token(1, LONG_S))

        async with anyio.create_task_group() as tasks:
            tasks.start_soon(watch)
            assert (await running.ask()).version == 1
        (token,) = seen
        assert token is not None
        assert asked_ns <= token.at_ns <= time.time_ns()
        await running.ask()
        await watch()
        assert seen[1] is not None
        assert seen[1].at_ns <= token.at_ns, "the first, whatever came since"


async def test_engine_serves_nothing_when_it_was_never_updated(running: EngineUnderTest) -> None:
    with pytest.raises(DeadlineExceeded):
        await running.ask(deadline_s=0.2)
    async with running.open_consumer() as engine:
        report = await engine.state(LONG_S)
        assert (report.version, report.paused, report.touched) == (-1, True, False)
        with pytest.raises(EngineUnavailable):
            await engine.resume(0, LONG_S)
        with pytest.raises(EngineUnavailable):
            await engine.resume(-1, LONG_S)


async def test_request_gets_the_new_version_when_it_came_during_an_update(
    running: EngineUnderTest,
) -> None:
    answers: list[Answer] = []

    async def ask() -> None:
        answers.append(await running.ask())

    async def request_waits() -> bool:
        return await running.waiting() > 0

    async with running.open_consumer() as engine:
        updates = Updates(engine, running.checkpoints)
        await updates.prepare()
        await updates.update(1)
        await engine.pause(LONG_S)
        await engine.pause(LONG_S)
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(ask)
            await until(request_waits)
            await updates.apply(2)
            assert (await engine.state(LONG_S)).paused
            assert not answers
            await engine.resume(2, LONG_S)
    assert [answer.version for answer in answers] == [2]


async def test_no_request_sees_a_mix_when_ten_versions_go_through(running: EngineUnderTest) -> None:
    answers: list[Answer] = []
    alone: dict[int, object] = {}

    async def ask_on() -> None:
        while True:
            answers.append(await running.ask())

    async with running.open_consumer() as engine, anyio.create_task_group() as tasks:
        updates = Updates(engine, running.checkpoints)
        await updates.prepare()
        await updates.update(1)
        for _ in range(4):
            tasks.start_soon(ask_on)
        for version in range(1, 11):
            if version > 1:
                await updates.update(version)
            alone[version] = (await running.ask()).content
        tasks.cancel_scope.cancel()
    assert len({str(content) for content in alone.values()}) == 10
    assert {answer.version for answer in answers} == set(alone)
    for answer in answers:
        assert answer.content == alone[answer.version], f"version {answer.version}"
    versions = [answer.version for answer in answers]
    assert versions == sorted(versions)


async def test_update_is_refused_when_engine_is_not_paused(running: EngineUnderTest) -> None:
    async with running.open_consumer() as engine:
        updates = Updates(engine, running.checkpoints)
        await updates.prepare()
        await updates.update(1)
        with pytest.raises(ApplyFailed, match="not paused") as caught:
            await updates.apply(2)
        assert not caught.value.touched
        assert await running.fingerprints() == running.checkpoints.fingerprints(1)
        report = await engine.state(LONG_S)
        assert (report.version, report.paused, report.touched) == (1, False, False)


async def test_engine_serves_as_before_when_update_failed_before_it_wrote(
    running: EngineUnderTest,
) -> None:
    async with running.open_consumer() as engine:
        updates = Updates(engine, running.checkpoints)
        await updates.prepare()
        await updates.update(1)
        await engine.pause(LONG_S)
        os.truncate(running.checkpoints.path(2), 1000)
        with pytest.raises(ApplyFailed) as caught:
            await updates.apply(2)
        assert caught.value.cause == "SegmentUnavailable"
        assert not caught.value.touched
        assert not (await engine.state(LONG_S)).touched
        await engine.resume(1, LONG_S)
        assert (await running.ask()).version == 1
        await updates.update(3)
        assert (await running.ask()).version == 3


async def test_engine_stays_paused_when_only_some_ranks_were_updated(
    running: EngineUnderTest,
) -> None:
    async with running.open_consumer() as engine:
        updates = Updates(engine, running.checkpoints)
        await updates.prepare()
        await updates.update(1)
        await engine.pause(LONG_S)
        await updates.apply(2, ranks=[0])
        report = await engine.state(LONG_S)
        assert (report.version, report.paused, report.touched) == (1, True, True)
        for version in (1, 2):
            with pytest.raises(EngineUnavailable, match="rank"):
                await engine.resume(version, LONG_S)
        with pytest.raises(DeadlineExceeded):
            await running.ask(deadline_s=0.2)
        await updates.apply(2, ranks=[1])
        await engine.resume(2, LONG_S)
        assert await running.fingerprints() == running.checkpoints.fingerprints(2)


async def test_layout_is_refused_and_serving_goes_on_when_it_does_not_fit(
    running: EngineUnderTest,
) -> None:
    async with running.open_consumer() as engine:
        updates = Updates(engine, running.checkpoints)
        await updates.prepare()
        await updates.update(1)
        with pytest.raises(ApplyFailed) as caught:
            await engine.describe("0" * 64, running.checkpoints.layout_blob, LONG_S)
        assert not caught.value.touched
        with pytest.raises(ApplyFailed):
            await engine.attach("0" * 64, ["0" * 64] * 2, [[], []], LONG_S)
        assert (await running.ask()).version == 1
        await updates.update(2)


async def test_update_that_was_cut_short_is_seen_when_a_new_consumer_comes(
    running: EngineUnderTest,
) -> None:
    checkpoints = running.checkpoints
    async with running.open_consumer() as engine:
        updates = Updates(engine, checkpoints)
        await updates.prepare()
        await updates.update(1)
        await engine.pause(LONG_S)
    async with running.open_consumer() as engine:
        report = await engine.state(LONG_S)
        assert (report.version, report.paused, report.touched) == (1, True, False)
        await engine.resume(1, LONG_S)
        assert (await running.ask()).version == 1
        await engine.pause(LONG_S)
        updates = Updates(engine, checkpoints)
        await updates.prepare()
        await updates.apply(2, ranks=[1])
    async with running.open_consumer() as engine:
        report = await engine.state(LONG_S)
        assert (report.version, report.paused, report.touched) == (1, True, True)
        held = await engine.inspect(None, LONG_S)
        assert [rank.version for rank in held] == [1, 2]
        updates = Updates(engine, checkpoints)
        await updates.prepare()
        await updates.update(3)
        assert await running.fingerprints() == checkpoints.fingerprints(3)


async def test_unproven_update_is_seen_when_it_was_of_the_version_that_is_served(
    running: EngineUnderTest,
) -> None:
    """A consumer that goes back to the version before may die before it has proven it."""
    async with running.open_consumer() as engine:
        updates = Updates(engine, running.checkpoints)
        await updates.prepare()
        await updates.update(1)
        await engine.pause(LONG_S)
        assert not await is_touched(engine)
        await updates.apply(1)
    async with running.open_consumer() as engine:
        report = await engine.state(LONG_S)
        assert (report.version, report.paused, report.touched) == (1, True, True)


async def test_second_consumer_is_refused_when_engine_has_one(running: EngineUnderTest) -> None:
    async with running.open_consumer():
        with pytest.raises(EngineUnavailable, match="another process"):
            async with running.open_consumer():
                pass


async def test_engine_is_brought_back_when_a_worker_was_killed(running: EngineUnderTest) -> None:
    checkpoints = running.checkpoints
    async with running.open_consumer() as engine:
        updates = Updates(engine, checkpoints)
        await updates.prepare()
        await updates.update(1)
        before = await running.worker_pids()
        instances = {rank.instance for rank in await engine.inspect(None, LONG_S)}
        os.kill(before[1], signal.SIGKILL)

        async def replaced() -> bool:
            return await running.worker_pids() not in ((), before)

        await until(replaced)
        report = await engine.state(LONG_S)
        assert (report.version, report.paused, report.touched) == (-1, True, False)
        assert "SIGKILL" in report.error
        with pytest.raises(WorkerLost):
            await updates.attach()
        assert not instances & {rank.instance for rank in await engine.inspect(None, LONG_S)}
        with pytest.raises(EngineUnavailable):
            await engine.resume(1, LONG_S)
        await updates.prepare()
        await updates.update(1)
        assert await running.fingerprints() == checkpoints.fingerprints(1)
        assert (await running.ask()).version == 1


async def test_update_fails_as_touched_when_a_worker_dies_in_it(running: EngineUnderTest) -> None:
    async with running.open_consumer() as engine:
        updates = Updates(engine, running.checkpoints)
        await updates.prepare()
        await updates.update(1)
        await engine.pause(LONG_S)
        pids = await running.worker_pids()
        os.kill(pids[0], signal.SIGSTOP)

        async def kill_when_half_done() -> None:
            await until(partial(is_touched, engine))
            os.kill(pids[0], signal.SIGKILL)

        async with anyio.create_task_group() as tasks:
            tasks.start_soon(kill_when_half_done)
            with pytest.raises(WorkerLost) as caught:
                await updates.apply(2)
        assert caught.value.touched
        assert (await engine.state(LONG_S)).paused
        await updates.prepare()
        await updates.update(3)
        assert await running.fingerprints() == running.checkpoints.fingerprints(3)


async def test_stuck_worker_is_ended_when_update_runs_out_of_time(running: EngineUnderTest) -> None:
    async with running.open_consumer() as engine:
        updates = Updates(engine, running.checkpoints)
        await updates.prepare()
        await updates.update(1)
        await engine.pause(LONG_S)
        pids = await running.worker_pids()
        os.kill(pids[1], signal.SIGSTOP)
        with pytest.raises(DeadlineExceeded) as caught:
            await updates.apply(2, deadline_s=3.0)
        assert caught.value.touched
        assert set(pids).isdisjoint(await running.worker_pids())
        await updates.prepare()
        await updates.update(2)
        assert await running.fingerprints() == running.checkpoints.fingerprints(2)


async def test_cancelled_update_has_ended_when_the_cancellation_comes_through(
    running: EngineUnderTest,
) -> None:
    async with running.open_consumer() as engine:
        updates = Updates(engine, running.checkpoints)
        await updates.prepare()
        await updates.update(1)
        await engine.pause(LONG_S)
        pids = await running.worker_pids()
        os.kill(pids[1], signal.SIGSTOP)
        with anyio.CancelScope() as scope:
            async with anyio.create_task_group() as tasks:
                tasks.start_soon(updates.apply, 2)
                await until(partial(is_touched, engine))
                os.kill(pids[1], signal.SIGCONT)
                scope.cancel()
        held = await engine.inspect(None, LONG_S)
        assert not any(rank.touched for rank in held)
        assert await running.worker_pids() == pids
        await updates.update(3)
