"""Updates of a vLLM engine by both ways into its workers, as its consumer makes them."""

from __future__ import annotations

import threading
import time
from collections.abc import Mapping
from contextlib import AbstractAsyncContextManager
from pathlib import Path
from typing import Any

import anyio
import anyio.to_thread
import pytest

from tests.integration.engines.checkpoints import Checkpoints
from tests.integration.engines.harness import LONG_S, Updates, until, updating
from tests.integration.engines.vllm.conftest import Start
from tests.integration.engines.vllm.server import StandIn
from tests.integration.engines.vllm.workers import Executor
from weightbus.consumers.engines.engine import TokenSeen
from weightbus.consumers.engines.vllm.engine import (
    VllmEngine,
    VllmSettings,
    open_vllm_engine,
)
from weightbus.consumers.engines.vllm.http import open_http_control
from weightbus.consumers.errors import (
    ApplyFailed,
    DeadlineExceeded,
    EngineUnavailable,
    WorkerLost,
)
from weightbus.schemas.worker import Feed, InPlace

pytestmark = pytest.mark.anyio

SHORT_S = 0.3

WAYS: Mapping[str, Mapping[str, Any]] = {
    "0.32": {"style": "0.32"},
    "0.26": {"style": "0.26"},
    "extension": {"style": "extension", "backend": None, "extended": True},
    "extension of 0.32": {"style": "0.32", "backend": "nccl", "extended": True},
}


def opened(
    server: StandIn, directory: Path, checkpoints: Checkpoints, **settings: Any
) -> AbstractAsyncContextManager[tuple[VllmEngine, Updates]]:
    opening = open_vllm_engine(
        directory,
        url=server.url,
        settings=VllmSettings(**settings),
        roots=[str(checkpoints.directory)],
        start_timeout_s=LONG_S,
    )
    return updating(opening, checkpoints)


class Gate:
    """Holds whoever comes in a thread."""

    def __init__(self) -> None:
        self._came, self._open = threading.Event(), threading.Event()

    def __call__(self) -> None:
        self._came.set()
        assert self._open.wait(LONG_S)

    async def wait(self) -> None:
        """Until somebody has come."""
        assert await anyio.to_thread.run_sync(self._came.wait, LONG_S)

    def open(self) -> None:
        self._open.set()


async def report(engine: VllmEngine) -> tuple[int, bool, bool]:
    """Version, paused, touched."""
    state = await engine.state(LONG_S)
    return state.version, state.paused, state.touched


@pytest.mark.parametrize("way", WAYS.values(), ids=WAYS)
async def test_engine_holds_each_version_bit_for_bit_when_updated(
    way: Mapping[str, Any], start: Start, directory: Path, checkpoints: Checkpoints
) -> None:
    server = start(**way)
    async with opened(server, directory, checkpoints) as (engine, updates):
        assert engine.ranks == 2
        assert await report(engine) == (-1, False, False)
        described = await updates.prepare()
        assert [rank.rank for rank in described] == [0, 1]
        for version in (1, 2, 3):
            applied = await updates.update(version)
            assert [rank.rank for rank in applied] == [0, 1]
            assert server.executor.fingerprints() == checkpoints.fingerprints(version)
            assert await report(engine) == (version, False, False)
        if way["style"] == "0.32":
            assert server.version == "3"
    for worker in server.executor.workers:
        assert not worker.has_session


async def test_first_token_is_seen_when_the_counter_of_the_server_rises(
    start: Start, directory: Path, checkpoints: Checkpoints
) -> None:
    server = start("0.32", api_key="secret")
    server.tokens = 12
    seen: list[TokenSeen | None] = []

    async def watch(engine: VllmEngine) -> None:
        seen.append(await engine.first_token(1, LONG_S))

    def looks() -> int:
        return server.details().count("GET /metrics/?name[]=vllm:generation_tokens_total")

    async def has_looked() -> bool:
        return looks() > 1

    async with opened(server, directory, checkpoints, api_key="secret") as (engine, updates):
        await updates.prepare()
        assert await engine.first_token(-1, LONG_S) is None, "nothing is served"
        await updates.update(1)
        assert await engine.first_token(2, LONG_S) is None, "it serves another version"
        assert looks() == 0, "the server is not asked for nothing"
        begun_ns = time.time_ns()
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(watch, engine)
            await until(has_looked)
            made_ns = time.time_ns()
            server.tokens += 1
    (token,) = seen
    assert token is not None
    assert begun_ns <= token.at_ns - token.resolution_ns < made_ns <= token.at_ns


async def test_first_token_is_not_looked_for_any_more_when_the_next_pause_begins(
    start: Start, directory: Path, checkpoints: Checkpoints
) -> None:
    server = start("0.32")
    seen: list[TokenSeen | None] = []

    async def watch(engine: VllmEngine) -> None:
        seen.append(await engine.first_token(1, LONG_S))

    async def has_looked() -> bool:
        return "GET /metrics/?name[]=vllm:generation_tokens_total" in server.details()

    async with opened(server, directory, checkpoints) as (engine, updates):
        await updates.prepare()
        await updates.update(1)
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(watch, engine)
            await until(has_looked)
            await engine.pause(LONG_S)
            server.tokens += 1
            paused = len(server.calls)
        looks = server.details(paused).count("GET /metrics/?name[]=vllm:generation_tokens_total")
    assert seen == [None]
    assert looks <= 1, "that was on its way"


async def test_pause_is_over_when_the_engine_has_paused_though_its_answer_is_late(
    start: Start, directory: Path, checkpoints: Checkpoints
) -> None:
    server = start("0.32")
    async with opened(server, directory, checkpoints, pause="keep") as (engine, _):
        answer = Gate()
        server.after["POST /pause"] = answer
        await engine.pause(LONG_S)
        answer.open()
        assert server.paused


async def test_pause_waits_for_its_answer_when_the_engine_was_paused_before(
    start: Start, directory: Path, checkpoints: Checkpoints
) -> None:
    """By a pause that lets running requests end, it may say so while they still run."""
    server, answer, over = start(), Gate(), anyio.Event()
    server.paused = True
    async with opened(server, directory, checkpoints, pause="keep") as (engine, _):
        server.after["POST /pause"] = answer

        async def pause() -> None:
            await engine.pause(LONG_S)
            over.set()

        async with anyio.create_task_group() as tasks:
            tasks.start_soon(pause)
            with anyio.fail_after(LONG_S / 8):
                await answer.wait()
            assert await engine._control.world_size(LONG_S) == 2  # it answers one by one
            assert not over.is_set()
            answer.open()


@pytest.mark.parametrize("mode", ["keep", "wait", "abort"])
@pytest.mark.parametrize("caches", ["reset", "keep"])
async def test_calls_between_pause_and_resumption_are_few_when_the_pause_is_as_configured(
    mode: str, caches: str, start: Start, directory: Path, checkpoints: Checkpoints
) -> None:
    server = start("0.32")
    async with opened(server, directory, checkpoints, pause=mode, caches=caches) as (_, updates):
        await updates.prepare()
        server.running, since = 3, len(server.calls)
        await updates.update(1)
        during = [d for d in server.details(since) if d != "GET /is_paused"]
        clear = "true" if mode != "keep" and caches == "reset" else "false"
        resets = [
            "POST /reset_encoder_cache",
            "POST /reset_prefix_cache?reset_running_requests=true&reset_external=true",
        ]
        assert during[:2] == ["GET /is_sleeping", f"POST /pause?mode={mode}&clear_cache={clear}"]
        beside = resets if (mode, caches) == ("keep", "reset") else []
        assert sorted(during[2:-2]) == [*beside, "POST /update_weights"]
        assert during[-2:] == ["POST /update_weight_version", "POST /resume"]
        assert server.caches == (set() if caches == "reset" else {"prefix", "encoder", "connector"})
        assert server.aborted == (3 if mode == "abort" else 0)
        assert server.preempted == (3 if (mode, caches) == ("keep", "reset") else 0)


@pytest.mark.parametrize("style", ["0.32", "0.26", "extension"])
async def test_connector_is_reset_beside_the_turn_when_the_server_takes_the_word_for_it(
    style: str, start: Start, directory: Path, checkpoints: Checkpoints
) -> None:
    server = start(**WAYS[style])
    async with opened(server, directory, checkpoints) as (engine, updates):
        await updates.prepare()
        await engine.pause(LONG_S)
        server.caches.add("connector")
        await updates.apply(1)
        assert server.caches == ({"connector"} if style == "extension" else set())
        await engine.resume(1, LONG_S)


@pytest.mark.parametrize("encodes", [True, False])
async def test_encoder_cache_is_reset_only_when_there_is_one(
    encodes: bool, start: Start, directory: Path, checkpoints: Checkpoints
) -> None:
    """Each request more makes the pause longer. It follows the blocks, which running requests hold
    until then."""
    server = start()
    server.encodes = encodes
    async with opened(server, directory, checkpoints) as (_, updates):
        await updates.prepare()
        server.running, since = 3, len(server.calls)
        await updates.update(1)
        resets = [detail for detail in server.details(since) if "/reset_" in detail]
    assert [detail.partition("?")[0] for detail in resets] == [
        "POST /reset_prefix_cache",
        *(["POST /reset_encoder_cache"] if encodes else []),
    ]


async def has_been_asked(server: StandIn, route: str, since: int) -> bool:
    return any(call.route == route for call in server.calls[since:])


async def test_session_is_taken_over_when_a_dead_consumer_left_it_open(
    start: Start, directory: Path, checkpoints: Checkpoints
) -> None:
    server = start()
    async with opened(server, directory, checkpoints):
        pass
    await anyio.to_thread.run_sync(server.executor.collective_rpc, "start_weight_update")
    since = len(server.calls)
    async with opened(server, directory, checkpoints) as (_, updates):
        await updates.prepare()
        await updates.update(1)
    details = server.details(since)
    assert "POST /start_weight_update" not in details
    assert details[-1] == "POST /finish_weight_update"


async def test_request_fails_at_once_and_the_next_succeeds_when_a_turn_fails(
    start: Start, directory: Path, checkpoints: Checkpoints
) -> None:
    server = start()
    async with opened(server, directory, checkpoints) as (engine, updates):
        server.failing["POST /update_weights"] = "EngineCore is out of sorts"
        with anyio.fail_after(LONG_S / 2):
            with pytest.raises(EngineUnavailable, match="answered 500: EngineCore is out of sorts"):
                await engine.inspect(None, LONG_S)
            await engine.pause(LONG_S)
            server.failing.clear()
            await updates.prepare()
            server.failing["POST /update_weights"] = "EngineCore is out of sorts"
            with pytest.raises(EngineUnavailable) as caught:
                await updates.apply(1)
        assert caught.value.touched
        server.failing.clear()
        assert [(r.version, r.touched) for r in await engine.inspect(None, LONG_S)] == [
            (-1, False)
        ] * 2
        await updates.update(2)
        assert server.executor.fingerprints() == checkpoints.fingerprints(2)


async def test_session_is_started_again_when_somebody_finished_it(
    start: Start, directory: Path, checkpoints: Checkpoints
) -> None:
    server = start()
    async with opened(server, directory, checkpoints) as (engine, _):
        await anyio.to_thread.run_sync(server.executor.collective_rpc, "finish_weight_update")
        since = len(server.calls)
        await engine.inspect(None, LONG_S)
        assert server.details(since) == ["POST /start_weight_update", "POST /update_weights"]


@pytest.mark.parametrize("rank", [0, 1])
async def test_turn_is_refused_until_its_workers_can_say_how_they_are(
    rank: int, start: Start, directory: Path, checkpoints: Checkpoints
) -> None:
    """As on a disk that is full: vLLM's session may be open in some of them, in all, or in none."""
    server = start()
    async with opened(server, directory, checkpoints) as (engine, updates):
        await updates.prepare()
        await updates.update(1)
        finish, begin = "finish_weight_update", "start_weight_update"
        for operations in ([finish], [finish, begin]):
            in_the_way = directory / f"worker-{rank}.new"
            in_the_way.mkdir()
            for operation in operations:
                await anyio.to_thread.run_sync(server.executor.collective_rpc, operation)
            for _ in range(2):
                with pytest.raises(EngineUnavailable, match=f"rank {rank} cannot write to"):
                    await engine.inspect(None, LONG_S)
            in_the_way.rmdir()
            assert [rank.version for rank in await engine.inspect(None, LONG_S)] == [1, 1]
        await updates.update(2)
        assert await report(engine) == (2, False, False)


async def test_session_that_its_workers_cannot_tell_of_is_used_once_they_can(
    start: Start, directory: Path, checkpoints: Checkpoints
) -> None:
    """The disk is full just when the consumer begins a session."""
    server = start()
    async with opened(server, directory, checkpoints) as (engine, updates):
        await updates.prepare()
        await updates.update(1)
        await anyio.to_thread.run_sync(server.executor.collective_rpc, "finish_weight_update")
        in_the_way = directory / "worker-1.new"
        server.before["POST /start_weight_update"] = in_the_way.mkdir
        with pytest.raises(EngineUnavailable, match="rank 1 cannot write to"):
            await engine.inspect(None, LONG_S)
        server.before.clear()
        in_the_way.rmdir()
        await updates.update(2)
        assert await report(engine) == (2, False, False)


async def test_apply_that_was_given_up_is_over_when_its_turn_comes_late(
    start: Start, directory: Path, checkpoints: Checkpoints
) -> None:
    """A worker that has been asked something else meanwhile does not write any more; one that has
    not is waited for."""
    server, gate, scope = start(), Gate(), anyio.CancelScope()
    async with opened(server, directory, checkpoints) as (engine, updates):
        await updates.prepare()
        await engine.pause(LONG_S)
        server.before["POST /update_weights"] = gate

        async def apply() -> None:
            with scope:
                await updates.apply(1)

        async with anyio.create_task_group() as tasks:
            tasks.start_soon(apply)
            await gate.wait()
            scope.cancel()
            assert await report(engine) == (-1, True, True)
            gate.open()
        found = server.executor.fingerprints()
        held = await engine.inspect(None, LONG_S)
        assert not any(rank.touched for rank in held)
        assert await report(engine) == (-1, True, any(rank.updates for rank in held))
        assert server.executor.fingerprints() == found


async def test_apply_ends_after_the_last_write_when_it_is_cancelled(
    start: Start, directory: Path, checkpoints: Checkpoints
) -> None:
    server = start()
    host = server.executor.hosts[1]
    ended = anyio.Event()
    async with opened(server, directory, checkpoints) as (engine, updates):
        await updates.prepare()
        await engine.pause(LONG_S)
        host.may_load.clear()
        scope = anyio.CancelScope()

        async def apply() -> None:
            with scope:
                await updates.apply(1)
            ended.set()

        async with anyio.create_task_group() as tasks:
            tasks.start_soon(apply)
            await anyio.to_thread.run_sync(host.loading.wait, LONG_S)
            scope.cancel()
            assert not ended.is_set()
            assert await report(engine) == (-1, True, True)
            host.may_load.set()
        held = await engine.inspect(None, LONG_S)
        assert [(rank.version, rank.touched) for rank in held] == [(1, False)] * 2
        assert await report(engine) == (-1, True, True), "nobody has proven it"
        await engine.resume(1, LONG_S)
        assert await report(engine) == (1, False, False)


@pytest.mark.parametrize("mode", ["keep", "wait", "abort"])
async def test_engine_serves_when_its_pause_was_cancelled(
    mode: str, start: Start, directory: Path, checkpoints: Checkpoints
) -> None:
    """vLLM carries out what its client has given up, perhaps after what came later."""
    server, gate = start(), Gate()
    async with opened(server, directory, checkpoints, pause=mode) as (engine, _):
        server.late["POST /pause"] = gate
        since = len(server.calls)
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(engine.pause, LONG_S)
            await gate.wait()
            tasks.cancel_scope.cancel()
            with anyio.CancelScope(shield=True):
                await until(lambda: has_been_asked(server, "GET /is_paused", since))
            gate.open()
        assert not server.paused
        await engine.resume(-1, LONG_S)
        assert await report(engine) == (-1, False, False)


async def test_engine_serves_when_its_requests_did_not_end_within_the_budget_of_a_pause(
    start: Start, directory: Path, checkpoints: Checkpoints
) -> None:
    server = start()
    async with opened(server, directory, checkpoints, pause="wait") as (engine, _):
        server.drained.clear()
        with pytest.raises(DeadlineExceeded):
            await engine.pause(SHORT_S)
        assert not server.paused
        server.drained.set()
        assert await report(engine) == (-1, False, False)


async def test_engine_stays_paused_when_a_pause_of_one_that_was_paused_is_given_up(
    start: Start, directory: Path, checkpoints: Checkpoints
) -> None:
    """It may hold a part of an update, of this consumer or of one that died."""
    server = start()
    server.paused = True
    async with opened(server, directory, checkpoints, pause="wait") as (engine, _):
        server.drained.clear()
        with pytest.raises(DeadlineExceeded):
            await engine.pause(SHORT_S)
        server.drained.set()
        assert server.paused
        assert "POST /resume" not in server.details()


async def test_pause_that_never_comes_is_waited_for_within_a_budget(
    start: Start, directory: Path, checkpoints: Checkpoints
) -> None:
    server = start()
    async with open_http_control(server.url) as control:
        await control.probe(LONG_S)
        await control.take_back_pause(SHORT_S, may_come=True)
        await control.take_back_pause(LONG_S, may_come=False)
    assert "POST /resume" not in server.details()


async def test_pause_waits_for_its_answer_when_steps_may_be_overtaken(
    start: Start, directory: Path, checkpoints: Checkpoints
) -> None:
    server, answer, ended = start(), Gate(), anyio.Event()
    server.stages = 2
    async with opened(server, directory, checkpoints, pause="keep") as (engine, _):
        server.after["POST /pause"] = answer
        since = len(server.calls)

        async def pause() -> None:
            await engine.pause(LONG_S)
            ended.set()

        async with anyio.create_task_group() as tasks:
            tasks.start_soon(pause)
            await answer.wait()
            with anyio.move_on_after(SHORT_S):
                await ended.wait()
            assert server.paused
            assert not ended.is_set()
            assert "GET /is_paused" not in server.details(since)
            answer.open()


async def test_engine_serves_when_asking_for_its_pause_fails_and_the_pause_comes_late(
    start: Start, directory: Path, checkpoints: Checkpoints
) -> None:
    server, gate = start(), Gate()
    async with opened(server, directory, checkpoints, pause="keep") as (engine, updates):
        await updates.prepare()
        server.late["POST /pause"] = gate
        server.failing["GET /is_paused"], since = "for now", len(server.calls)
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(engine.pause, LONG_S)
            await gate.wait()
            await until(lambda: has_been_asked(server, "GET /is_paused", since))
            del server.failing["GET /is_paused"]
            gate.open()
        assert server.paused
        await engine.resume(-1, LONG_S)
        assert await report(engine) == (-1, False, False)


async def test_state_is_told_from_memory_when_a_turn_is_under_way(
    start: Start, directory: Path, checkpoints: Checkpoints
) -> None:
    server, gate = start(), Gate()
    async with opened(server, directory, checkpoints) as (engine, updates):
        await updates.prepare()
        await updates.update(1)
        server.before["POST /update_weights"] = gate
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(engine.inspect, None, LONG_S)
            await gate.wait()
            since = len(server.calls)
            assert await report(engine) == (1, False, False)
            assert server.details(since) == []
            gate.open()


async def test_new_workers_are_adopted_when_the_server_was_started_anew(
    start: Start, directory: Path, checkpoints: Checkpoints
) -> None:
    server = start()
    async with opened(server, directory, checkpoints) as (engine, updates):
        await updates.prepare()
        await updates.update(4)
        assert await report(engine) == (4, False, False)
        await anyio.to_thread.run_sync(server.restart, Executor(checkpoints))
        state = await engine.state(LONG_S)
        assert (state.version, state.paused, state.touched) == (-1, False, False)
        assert state.error == "its workers were started anew"
        await engine.pause(LONG_S)
        with pytest.raises((WorkerLost, ApplyFailed)):
            await updates.apply(5)
        await updates.prepare()
        await updates.update(5)
        assert server.executor.fingerprints() == checkpoints.fingerprints(5)
        assert await report(engine) == (5, False, False)


async def test_engine_counts_as_touched_when_its_consumer_died_before_the_proof(
    start: Start, directory: Path, checkpoints: Checkpoints
) -> None:
    server = start()
    async with opened(server, directory, checkpoints) as (engine, updates):
        await updates.prepare()
        await updates.update(1)
        await engine.pause(LONG_S)
        await updates.apply(2)
    async with opened(server, directory, checkpoints) as (engine, updates):
        assert await report(engine) == (1, True, True)
        with pytest.raises(EngineUnavailable, match="rank 0 holds version 2, not version 1"):
            await engine.resume(1, LONG_S)
        await updates.prepare()
        await updates.update(3)
    async with opened(server, directory, checkpoints) as (engine, _):
        assert await report(engine) == (3, False, False)


async def test_apply_is_refused_when_the_engine_is_not_paused(
    start: Start, directory: Path, checkpoints: Checkpoints
) -> None:
    server = start()
    async with opened(server, directory, checkpoints) as (engine, updates):
        await updates.prepare()
        with pytest.raises(EngineUnavailable, match="not paused"):
            await updates.apply(1)
        with pytest.raises(EngineUnavailable, match="rank 0 holds version -1, not version 1"):
            await engine.resume(1, LONG_S)


@pytest.mark.parametrize("way", ["0.32", "extension"])
async def test_drafter_is_shown_to_the_host_when_it_is_made_of_the_same_checkpoint(
    way: str, start: Start, directory: Path, checkpoints: Checkpoints
) -> None:
    server = start(**WAYS[way], drafts=True)
    async with opened(server, directory, checkpoints, api_key="") as (_, updates):
        await updates.prepare()
        await updates.update(1)
        for worker in server.executor.workers:
            assert worker.host.draft is not None
            assert worker.host.draft[0] is worker.draft
    drafts = [call for call in server.details() if "start_draft" in call]
    assert len(drafts) == (1 if way == "0.32" else 0)


async def test_every_request_has_the_key_when_there_is_one(
    start: Start, directory: Path, checkpoints: Checkpoints
) -> None:
    server = start(api_key="secret")
    async with opened(server, directory, checkpoints, api_key="secret") as (_, updates):
        await updates.prepare()
        await updates.update(1)


async def test_engine_serves_while_it_prepares_and_holds_the_version_then(
    start: Start, directory: Path, checkpoints: Checkpoints
) -> None:
    server = start()
    async with opened(server, directory, checkpoints) as (engine, updates):
        await updates.prepare()
        await updates.update(1)
        feeds: dict[int, Feed] = {
            rank: InPlace(sources=checkpoints.sources(2)) for rank in reversed(range(2))
        }
        waiting = dict(feeds)
        with anyio.fail_after(LONG_S):
            while waiting:
                replies = await engine.prepare(checkpoints.layout_digest, waiting, LONG_S)
                assert [reply.rank for reply in replies] == list(waiting)
                for reply in replies:
                    if reply.ready:
                        del waiting[reply.rank]
        assert await report(engine) == (1, False, False)
        await updates.update(2)
        assert server.executor.fingerprints() == checkpoints.fingerprints(2)
