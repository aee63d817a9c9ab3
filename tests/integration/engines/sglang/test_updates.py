"""Updates of an SGLang engine through its stand-in: bytes move, and are proven."""

from __future__ import annotations

import threading
import time
from pathlib import Path

import anyio
import pytest

from tests.integration.engines.checkpoints import Checkpoints
from tests.integration.engines.harness import LONG_S, Updates, digests_of, until
from tests.integration.engines.sglang.setting import Consumers, LackingCheckpoints, Models
from tests.integration.engines.sglang.stand_in import Answer
from weightbus.consumers.engines.engine import TokenSeen
from weightbus.consumers.engines.sglang.engine import SglangSettings
from weightbus.consumers.errors import (
    ApplyFailed,
    DeadlineExceeded,
    EngineUnavailable,
    WorkerLost,
)
from weightbus.schemas.worker import InPlace

pytestmark = pytest.mark.anyio

UPDATE = "/update_weights_from_tensor"
SHORT_S = 0.4


BOTH = pytest.mark.parametrize("has_sessions", [True, False], ids=["sessions", "no-sessions"])


@BOTH
async def test_ranks_hold_each_version_bit_for_bit_when_it_is_resumed(
    consumers: Consumers, models: Models, checkpoints: Checkpoints
) -> None:
    stand_in = consumers.stand_in
    async with consumers.open() as engine:
        assert engine.ranks == 2
        assert (await engine.state(LONG_S)).version == -1
        updates = Updates(engine, checkpoints)
        await updates.prepare()
        for version in (1, 2, 3):
            applied = await updates.update(version)
            assert models.fingerprints() == checkpoints.fingerprints(version)
            assert stand_in.label == str(version)
            report = await engine.state(LONG_S)
            assert (report.version, report.paused, report.touched) == (version, False, False)
        assert all(rank.processed_parameters == 0 < rank.direct_parameters for rank in applied)
        held = await engine.inspect(checkpoints.layout_digest, LONG_S)
        for now, then in zip(held, applied, strict=True):
            sums, expected = digests_of(now), digests_of(then)
            expected[list(now.unreadable)] = 0
            assert sums.tolist() == expected.tolist()
    assert [rank.errors for rank in models.ranks] == [[], []]


async def test_update_asks_in_order_when_requests_are_kept(consumers: Consumers) -> None:
    stand_in = consumers.stand_in
    stand_in.running = ["a", "b"]
    async with consumers.prepared() as (_, updates):
        before = len(stand_in.asked)
        await updates.update(1)
        asked = stand_in.asked[before:]
    assert [(path, body.get("mode")) for path, body in asked] == [
        ("/pause_generation", "retract"),
        ("/flush_cache", None),
        ("/pause_generation", "in_place"),
        (UPDATE, None),
        ("/update_weight_version", None),
        ("/continue_generation", None),
    ]
    assert (stand_in.running, stand_in.aborted) == (["a", "b"], [])


async def test_first_token_is_seen_when_one_comes_out_of_a_request_that_runs_on(
    consumers: Consumers,
) -> None:
    """The counter of tokens rises when a request ends; that of the times between two, before."""
    stand_in = consumers.stand_in
    stand_in.counted = {}
    seen: list[TokenSeen | None] = []

    def looks() -> int:
        return [path for path, _ in stand_in.asked].count("/metrics")

    async def has_looked() -> bool:
        return looks() > 1

    async with consumers.prepared() as (engine, updates):
        await updates.update(1)
        assert await engine.first_token(2, LONG_S) is None, "it serves another version"
        assert looks() == 0

        async def watch() -> None:
            seen.append(await engine.first_token(1, LONG_S))

        async with anyio.create_task_group() as tasks:
            tasks.start_soon(watch)
            await until(has_looked)
            made_ns = time.time_ns()
            stand_in.counted = {"sglang:inter_token_latency_seconds_count": 1}
    (token,) = seen
    assert token is not None
    assert token.at_ns - token.resolution_ns < made_ns <= token.at_ns


async def test_first_token_is_not_told_when_the_server_was_started_without_metrics(
    consumers: Consumers,
) -> None:
    async with consumers.prepared() as (engine, updates):
        await updates.update(1)
        with anyio.fail_after(LONG_S / 2):
            assert await engine.first_token(1, LONG_S) is None


async def test_session_is_begun_once_and_ended_when_the_consumer_leaves(
    consumers: Consumers,
) -> None:
    stand_in = consumers.stand_in
    async with consumers.prepared() as (_, updates):
        await updates.update(1)
        assert stand_in.session == "draft"
    assert stand_in.session is None
    assert stand_in.paths.count("/begin_weight_update") == 1


async def test_session_of_a_consumer_that_died_is_used_on(
    consumers: Consumers, models: Models, checkpoints: Checkpoints
) -> None:
    stand_in = consumers.stand_in
    stand_in.session = "draft"
    async with consumers.prepared() as (_, updates):
        await updates.update(1)
    assert models.fingerprints() == checkpoints.fingerprints(1)
    assert "/begin_weight_update" not in stand_in.paths
    assert stand_in.session == "draft"


@pytest.mark.parametrize(
    ("settings", "mode", "flushes", "running", "aborted"),
    [
        (SglangSettings(), "retract", 1, ["a"], []),
        (SglangSettings(caches="keep"), "in_place", 0, ["a"], []),
        (SglangSettings(pause="abort"), "abort", 1, [], ["a"]),
        (SglangSettings(pause="abort", caches="keep"), "abort", 0, [], ["a"]),
    ],
    ids=["keep-reset", "keep-keep", "abort-reset", "abort-keep"],
)
async def test_requests_and_caches_are_treated_as_set(
    consumers: Consumers,
    settings: SglangSettings,
    mode: str,
    flushes: int,
    running: list[str],
    aborted: list[str],
) -> None:
    stand_in = consumers.stand_in
    stand_in.running = ["a"]
    async with consumers.prepared(settings) as (_, updates):
        assert stand_in.running == ["a"]  # turns outside of updates leave it alone
        before = len(stand_in.asked)
        await updates.update(1)
        asked = stand_in.asked[before:]
    assert asked[0] == ("/pause_generation", {"mode": mode})
    assert [path for path, _ in asked].count("/flush_cache") == flushes
    assert (stand_in.running, stand_in.aborted) == (running, aborted)


async def test_update_is_refused_before_a_write_when_the_server_does_not_flush(
    consumers: Consumers, models: Models
) -> None:
    stand_in = consumers.stand_in
    stand_in.running, stand_in.flushes_beside_waiting = ["a"], False
    held = models.fingerprints()
    async with consumers.prepared() as (engine, _):
        with pytest.raises(EngineUnavailable, match="caches cannot be reset"):
            await engine.pause(LONG_S)
        assert (stand_in.paused, stand_in.running) == ("", ["a"])
        report = await engine.state(LONG_S)
        assert not report.paused
        assert not report.touched
    assert models.fingerprints() == held


async def test_apply_is_refused_when_the_engine_is_not_paused(
    consumers: Consumers, models: Models
) -> None:
    held = models.fingerprints()
    async with consumers.prepared() as (_, updates):
        with pytest.raises(EngineUnavailable, match="not paused"):
            await updates.apply(1)
    assert models.fingerprints() == held


async def test_resume_is_refused_when_a_rank_holds_another_version(consumers: Consumers) -> None:
    async with consumers.prepared() as (engine, updates):
        await engine.pause(LONG_S)
        await updates.apply(1, ranks=[1])
        with pytest.raises(EngineUnavailable, match="rank 0 holds version -1"):
            await engine.resume(1, LONG_S)
        assert consumers.stand_in.paused
        await updates.apply(1)
        await engine.resume(1, LONG_S)
    assert not consumers.stand_in.paused


async def test_engine_stays_paused_for_the_next_consumer_when_one_leaves_in_an_update(
    consumers: Consumers, models: Models, checkpoints: Checkpoints
) -> None:
    async with consumers.prepared() as (engine, updates):
        await updates.update(1)
        await engine.pause(LONG_S)
        await updates.apply(2)
    async with consumers.open() as engine:
        report = await engine.state(LONG_S)
        assert (report.version, report.paused, report.touched) == (1, True, True)
        assert consumers.stand_in.paused
        updates = Updates(engine, checkpoints)
        await updates.prepare()
        assert consumers.stand_in.paused
        await updates.update(3)
        assert not consumers.stand_in.paused
    assert models.fingerprints() == checkpoints.fingerprints(3)


async def test_engine_goes_on_with_the_next_consumer_when_nothing_was_written(
    consumers: Consumers,
) -> None:
    async with consumers.prepared() as (engine, updates):
        await updates.update(1)
        await engine.pause(LONG_S)
    assert consumers.stand_in.paused
    async with consumers.open() as engine:
        report = await engine.state(LONG_S)
        assert (report.version, report.paused, report.touched) == (1, False, False)
    assert not consumers.stand_in.paused


@BOTH
async def test_turn_fails_at_once_and_the_engine_goes_on_when_the_server_says_no_success(
    consumers: Consumers, checkpoints: Checkpoints
) -> None:
    stand_in = consumers.stand_in
    async with consumers.open() as engine:
        updates = Updates(engine, checkpoints)
        stand_in.refusals[UPDATE] = Answer(400, {"success": False, "message": "a cached split"})
        with anyio.fail_after(LONG_S / 2), pytest.raises(EngineUnavailable, match="cached split"):
            await updates.prepare()
        assert not stand_in.paused
        stand_in.refusals.clear()
        await updates.prepare()
        await updates.update(1)


async def test_failed_apply_leaves_the_engine_paused_until_a_version_is_whole(
    consumers: Consumers, models: Models, checkpoints: Checkpoints
) -> None:
    """What is written when a server fails in an update is not known."""
    stand_in = consumers.stand_in
    async with consumers.prepared() as (engine, updates):
        await updates.update(1)
        await engine.pause(LONG_S)
        stand_in.refusals[UPDATE] = Answer(500, "Internal Server Error")
        with pytest.raises(EngineUnavailable) as raised:
            await updates.apply(2)
        assert raised.value.touched
        report = await engine.state(LONG_S)
        assert (report.paused, report.touched) == (True, True)
        with pytest.raises(EngineUnavailable, match="a part of an update"):
            await engine.resume(1, LONG_S)
        stand_in.refusals.clear()
        await updates.update(2)
    assert models.fingerprints() == checkpoints.fingerprints(2)


async def test_requests_time_out_and_come_to_nothing_when_the_server_is_slow(
    consumers: Consumers, checkpoints: Checkpoints
) -> None:
    stand_in = consumers.stand_in
    async with consumers.open() as engine:
        stand_in.holding[UPDATE] = threading.Event()
        with pytest.raises(DeadlineExceeded):
            await engine.inspect(None, SHORT_S)
        assert not stand_in.paused
        stand_in.paused = "in_place"  # or what was held would wait for requests
        turns = stand_in.turns
        stand_in.holding.pop(UPDATE).set()
        await until(lambda: anyio.to_thread.run_sync(lambda: stand_in.turns > turns))
        updates = Updates(engine, checkpoints)
        await updates.prepare()
        await updates.update(1)


async def test_engine_is_unavailable_when_its_server_is_dead(consumers: Consumers) -> None:
    async with consumers.prepared() as (engine, updates):
        await engine.pause(LONG_S)
        consumers.stand_in.stopped = True
        with pytest.raises(EngineUnavailable):
            await engine.state(LONG_S)
        with pytest.raises(EngineUnavailable):
            await updates.apply(1)
        with pytest.raises(EngineUnavailable):
            await engine.resume(-1, LONG_S)


@BOTH
async def test_engine_serves_nothing_of_the_bus_when_its_server_is_started_anew(
    consumers: Consumers, checkpoints: Checkpoints
) -> None:
    stand_in = consumers.stand_in
    async with consumers.prepared() as (engine, updates):
        await updates.update(1)
        fresh = Models()
        stand_in.restart(fresh.ranks)
        report = await engine.state(LONG_S)
        assert (report.version, report.touched) == (-1, False)
        assert "anew" in report.error
        await engine.pause(LONG_S)
        with pytest.raises((WorkerLost, ApplyFailed)):
            await updates.apply(2)
        await updates.prepare()
        await updates.update(2)
        assert (await engine.state(LONG_S)).version == 2
    assert fresh.fingerprints() == checkpoints.fingerprints(2)


async def test_turn_is_given_by_a_new_server_when_the_old_one_was_paused(
    consumers: Consumers,
) -> None:
    stand_in = consumers.stand_in
    async with consumers.prepared() as (engine, updates):
        await updates.update(1)
        await engine.pause(LONG_S)
        stand_in.restart(Models().ranks)
        await engine.state(LONG_S)
        await engine.state(LONG_S)
        assert not stand_in.paused


async def test_checkpoint_is_refused_before_a_write_when_it_lacks_a_tensor(
    consumers: Consumers, models: Models, short_path: Path
) -> None:
    held = models.fingerprints()
    (short_path / "lacking").mkdir()
    lacking = LackingCheckpoints(short_path / "lacking")
    async with consumers.open() as engine:
        with pytest.raises(ApplyFailed, match=r"CheckpointRefused.*qkv_proj") as raised:
            await engine.describe(lacking.layout_digest, lacking.layout_blob, LONG_S)
        assert not raised.value.touched
    assert models.fingerprints() == held


async def test_version_is_not_read_when_it_lies_outside_of_the_roots(
    consumers: Consumers, models: Models, checkpoints: Checkpoints, tmp_path: Path
) -> None:
    held = models.fingerprints()
    async with consumers.prepared() as (engine, updates):
        await engine.pause(LONG_S)
        elsewhere = Checkpoints(tmp_path, "decoder", checkpoints.config, 2)
        feed = InPlace(sources=elsewhere.sources(1))
        with pytest.raises(ApplyFailed) as raised:
            await updates.feed(1, {0: feed, 1: feed})
        assert not raised.value.touched
    assert models.fingerprints() == held
