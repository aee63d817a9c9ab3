"""Servers that a consumer cannot stand beside, and what it says of them; engines that sleep."""

from __future__ import annotations

import sys
from collections.abc import Awaitable, Callable, Mapping
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import anyio
import anyio.lowlevel
import anyio.to_thread
import pytest

from tests.integration.engines.checkpoints import Checkpoints
from tests.integration.engines.harness import LONG_S, until
from tests.integration.engines.vllm.conftest import CONFIG, Start
from tests.integration.engines.vllm.server import StandIn, serving
from tests.integration.engines.vllm.test_updates import (
    Gate,
    has_been_asked,
    opened,
    report,
)
from tests.integration.engines.vllm.workers import Executor, RenamedExtension, Worker
from weightbus.consumers.engines.http import JsonServer, open_json_server
from weightbus.consumers.engines.turns import Turn
from weightbus.consumers.engines.vllm.engine import VllmSettings, open_vllm_engine
from weightbus.consumers.engines.vllm.http import HttpControl
from weightbus.consumers.engines.vllm.plugin import BACKEND
from weightbus.consumers.engines.vllm.status import WorkerStatus, write_status
from weightbus.consumers.errors import ApplyFailed, EngineUnavailable

pytestmark = pytest.mark.anyio

ELSEWHERE = "theirs.extension.WeightBusExtension"
"""Of a module that the consumer cannot import."""

REFUSED: Mapping[str, tuple[Mapping[str, Any], str]] = {
    "no dev mode": ({"style": "no dev mode"}, r"no /pause, .*VLLM_SERVER_DEV_MODE=1"),
    "no documents": ({"style": "no documents"}, r"404.*without|404.*--disable-fastapi-docs"),
    "no way in": (
        {"backend": None},
        r"--weight-transfer-config '\{\"backend\": \"weightbus\"\}', .*"
        r"--worker-extension-cls weightbus\.\S+\.WeightBusExtension .*backend None and",
    ),
    "another backend": ({"backend": "nccl"}, r"it has backend nccl and extension None"),
    "data parallel": ({"copies": 3}, r"data parallel: 6 workers in copies of 2"),
}


@pytest.mark.parametrize(("given", "reason"), REFUSED.values(), ids=REFUSED)
async def test_engine_is_refused_when_it_lacks_what_is_needed(
    given: Mapping[str, Any], reason: str, start: Start, directory: Path, checkpoints: Checkpoints
) -> None:
    server = start(**given)
    with pytest.raises(EngineUnavailable, match=reason):
        async with opened(server, directory, checkpoints):
            pass


def extended_by(server: StandIn, extension: str) -> StandIn:
    for worker in server.executor.workers:
        worker.vllm_config.parallel_config.worker_extension_cls = extension
    return server


@pytest.mark.parametrize("name", [f"{RenamedExtension.__module__}.RenamedExtension", ELSEWHERE])
async def test_extension_is_taken_by_what_it_can_do_whatever_its_name(
    name: str, start: Start, directory: Path, checkpoints: Checkpoints
) -> None:
    server = extended_by(start("extension", backend=None, extended=True), name)
    async with opened(server, directory, checkpoints) as (_, updates):
        await updates.prepare()
        await updates.update(1)


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        (f"{Worker.__module__}.Worker", "has no weightbus_open, weightbus_turn"),
        (f"{Worker.__module__}.Absent", "cannot be looked at from here: AttributeError"),
        ("theirs.extension.Own", "cannot be looked at from here: ModuleNotFoundError"),
    ],
)
async def test_extension_is_refused_unasked_when_it_cannot_do_what_is_needed(
    name: str, reason: str, start: Start, directory: Path, checkpoints: Checkpoints
) -> None:
    """vLLM takes harm from calls of methods that its workers do not have."""
    server = extended_by(start("extension", backend=None), name)
    with pytest.raises(EngineUnavailable, match=rf"extension {name}, which {reason}"):
        async with opened(server, directory, checkpoints):
            pass
    assert not any("collective_rpc" in detail for detail in server.details())


@pytest.mark.parametrize("url", ["127.0.0.1:8000", "ftp://127.0.0.1", "http://", "http://[::1"])
async def test_engine_is_refused_when_its_url_is_none(url: str, directory: Path) -> None:
    with pytest.raises(EngineUnavailable, match="URL"):
        async with open_vllm_engine(directory, url=url, start_timeout_s=LONG_S):
            pass


async def test_engine_is_refused_when_nothing_answers_in_time(
    directory: Path, checkpoints: Checkpoints
) -> None:
    executor = Executor(checkpoints)
    with serving(StandIn(executor)) as server:
        url = server.url
    executor.end()
    with pytest.raises(EngineUnavailable, match=r"not there within 0\.3 s: /health"):
        async with open_vllm_engine(directory, url=url, start_timeout_s=0.3):
            pass


class Budgets(HttpControl):
    """Answers by itself, and notes what each request had left."""

    def __init__(self, server: JsonServer) -> None:
        super().__init__(server, "")
        self.left_s: list[float] = []

    def has(self, operation: str) -> bool:
        del operation
        return True

    async def _ask(self, method: str, path: str, deadline_s: float, *_: Any, **__: Any) -> Any:
        self.left_s.append(deadline_s)
        begun = anyio.current_time()
        while anyio.current_time() == begun:
            await anyio.lowlevel.checkpoint()
        return {"world_size": 1, "vllm_config": {"weight_transfer_config": {"backend": BACKEND}}}


async def test_requests_of_one_call_share_its_budget(short_path: Path) -> None:
    async with open_json_server("http://127.0.0.1:1") as server:
        calls: list[Callable[[HttpControl], Awaitable[None]]] = [
            lambda control: control.reset_caches(LONG_S),
            lambda control: control.show_draft(LONG_S),
            lambda control: control.turn(Turn(numbers=(1,), wait_s=0), LONG_S),
        ]
        for call in calls:
            control = Budgets(server)
            with pytest.raises(EngineUnavailable, match="rank 0 cannot write"):
                await control.open(short_path, LONG_S)
            assert len(control.left_s) == 4
            write_status(short_path, WorkerStatus(rank=0))
            await call(control)
            for spent in (control.left_s[:4], control.left_s[4:]):
                assert spent == sorted(set(spent), reverse=True)
                assert spent[0] <= LONG_S
            assert len(control.left_s) == 6


async def test_engine_is_gone_when_its_server_is(directory: Path, checkpoints: Checkpoints) -> None:
    executor = Executor(checkpoints)
    with serving(StandIn(executor)) as server:
        opening = opened(server, directory, checkpoints)
        engine, updates = await opening.__aenter__()
        await updates.prepare()
        await updates.update(1)
    try:
        with anyio.fail_after(LONG_S / 2):
            with pytest.raises(EngineUnavailable):
                await engine.state(LONG_S)
            with pytest.raises(EngineUnavailable):
                await engine.pause(LONG_S)
            with pytest.raises(EngineUnavailable):
                await engine.inspect(None, LONG_S)
    finally:
        await opening.__aexit__(None, None, None)
        executor.end()


async def test_engine_is_refused_when_it_came_back_with_other_workers(
    start: Start, directory: Path, checkpoints: Checkpoints, short_path: Path
) -> None:
    server = start()
    async with opened(server, directory, checkpoints) as (engine, _):
        files = short_path / "other"
        files.mkdir()
        alone = Executor(Checkpoints(files, "decoder", CONFIG, 1))
        await anyio.to_thread.run_sync(server.restart, alone)
        with pytest.raises(EngineUnavailable, match="it has 1 workers now, and had 2"):
            await engine.inspect(None, LONG_S)


async def test_second_consumer_is_refused_when_the_first_is_there(
    start: Start, directory: Path, checkpoints: Checkpoints
) -> None:
    server = start()
    async with opened(server, directory, checkpoints) as (engine, _):
        with pytest.raises(EngineUnavailable, match="another process is bound"):
            async with opened(server, directory, checkpoints):
                pass
        await engine.inspect(None, LONG_S)


async def test_second_consumer_is_refused_when_it_has_another_directory(
    start: Start, directory: Path, checkpoints: Checkpoints
) -> None:
    """The first goes on, and ends its session where it began it."""
    server = start()
    async with opened(server, directory, checkpoints) as (_, updates):
        await updates.prepare()
        with pytest.raises(EngineUnavailable, match=f"rank 0: .*another consumer, in {directory}"):
            async with opened(server, directory.with_name("other"), checkpoints):
                pass
        await updates.update(1)
    assert not any(worker.has_session for worker in server.executor.workers)
    async with opened(server, directory.with_name("other"), checkpoints) as (engine, _):
        assert await report(engine) == (-1, False, True)


async def test_caller_is_wrong_when_it_gives_no_engine(directory: Path) -> None:
    with pytest.raises(ValueError, match="exactly one"):
        async with open_vllm_engine(directory, settings=VllmSettings()):
            pass


@pytest.fixture
def asleep(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """What vLLM's allocator knows of the memory of parameters, on GPUs."""
    allocation = SimpleNamespace(tag="weights", is_asleep=False)
    module = ModuleType("vllm.device_allocator.cumem")
    instance = SimpleNamespace(pointer_to_data={1: allocation})
    module.__dict__["CuMemAllocator"] = SimpleNamespace(instance=instance)
    monkeypatch.setitem(sys.modules, module.__name__, module)
    return allocation


def fall_asleep(server: StandIn, asleep: SimpleNamespace) -> None:
    server.paused, asleep.is_asleep = True, True
    server.asleep |= {"weights", "kv_cache"}


async def test_engine_is_left_alone_when_it_sleeps(
    asleep: SimpleNamespace, start: Start, directory: Path, checkpoints: Checkpoints
) -> None:
    server = start()
    async with opened(server, directory, checkpoints) as (engine, updates):
        fall_asleep(server, asleep)
        await updates.prepare()
        assert (await engine.state(LONG_S)).paused  # as vLLM says of one that sleeps
        with pytest.raises(EngineUnavailable, match="it sleeps: wake it first"):
            await engine.pause(LONG_S)
        assert server.asleep == {"weights", "kv_cache"}
        assert "POST /wake_up" not in " ".join(server.details())


async def test_engine_is_woken_for_an_update_when_it_may_be(
    asleep: SimpleNamespace, start: Start, directory: Path, checkpoints: Checkpoints
) -> None:
    """Its parameters first; the rest only once they are right."""
    server = start()

    def wake() -> None:
        asleep.is_asleep = False

    server.before["POST /wake_up"] = wake
    async with opened(server, directory, checkpoints, sleeping="wake") as (engine, updates):
        fall_asleep(server, asleep)
        await updates.prepare()
        assert (await engine.state(LONG_S)).paused
        await engine.pause(LONG_S)
        assert (server.asleep, server.paused) == ({"kv_cache"}, True)
        await updates.apply(1)
        await engine.resume(1, LONG_S)
        assert (server.asleep, server.paused) == (set(), False)
        assert server.executor.fingerprints() == checkpoints.fingerprints(1)


@pytest.mark.parametrize("way", ["backend", "extension"])
async def test_sleeping_engine_is_not_resumed_when_a_consumer_takes_it_over(
    way: str, asleep: SimpleNamespace, start: Start, directory: Path, checkpoints: Checkpoints
) -> None:
    """It says that it is paused, and holds what was served last: its next step would fault."""
    extended: dict[str, Any] = {"style": "extension", "backend": None, "extended": True}
    server = start(**({} if way == "backend" else extended))
    async with opened(server, directory, checkpoints) as (_, updates):
        await updates.prepare()
        await updates.update(1)
    fall_asleep(server, asleep)
    since = len(server.calls)
    async with opened(server, directory, checkpoints) as (engine, _):
        assert await report(engine) == (1, True, False)
        await engine.resume(1, LONG_S)
        assert server.paused
        assert "POST /resume" not in server.details(since)
        asleep.is_asleep = False
        await engine.inspect(None, LONG_S)
        await engine.resume(1, LONG_S)
        assert await report(engine) == (1, False, False)


@pytest.mark.parametrize("sleeping", ["refuse", "wake"])
async def test_updated_engine_sleeps_on_when_its_user_has_woken_its_parameters_only(
    sleeping: str,
    asleep: SimpleNamespace,
    start: Start,
    directory: Path,
    checkpoints: Checkpoints,
) -> None:
    """Its user wakes the rest; or we do, if we may."""
    server = start()
    async with opened(server, directory, checkpoints, sleeping=sleeping) as (engine, updates):
        asleep.tag = "kv_cache"
        fall_asleep(server, asleep)
        server.asleep = {"kv_cache"}
        await updates.prepare()
        await engine.pause(LONG_S)
        await updates.apply(1)
        await engine.resume(1, LONG_S)
        assert server.executor.fingerprints() == checkpoints.fingerprints(1)
        woken = sleeping == "wake"
        assert (not server.asleep, server.paused) == (woken, not woken)


class Allocator:
    """vLLM's (`device_allocator/cumem.py`), in which the weights are one allocation."""

    def __init__(self) -> None:
        self.weights = SimpleNamespace(tag="weights", is_asleep=False, cpu_backup_tensor=None)
        self.pointer_to_data = {1: self.weights}

    def sleep(self, offload_tags: tuple[str, ...] = ()) -> None:
        self.weights.cpu_backup_tensor = object() if "weights" in offload_tags else None
        self.weights.is_asleep = True

    def wake_up(self, tags: list[str] | None = None) -> None:
        del tags
        self.weights.is_asleep, self.weights.cpu_backup_tensor = False, None


@pytest.fixture
def allocator(monkeypatch: pytest.MonkeyPatch) -> Allocator:
    module, allocator = ModuleType("vllm.device_allocator.cumem"), Allocator()
    module.__dict__["CuMemAllocator"] = SimpleNamespace(instance=allocator)
    monkeypatch.setitem(sys.modules, module.__name__, module)
    return allocator


@pytest.mark.parametrize("way", ["backend", "extension"])
async def test_ranks_hold_nothing_when_their_weights_were_discarded_in_a_sleep(
    way: str, allocator: Allocator, start: Start, directory: Path, checkpoints: Checkpoints
) -> None:
    """It has slept and was woken before anybody looked."""
    extended: dict[str, Any] = {"style": "extension", "backend": None, "extended": True}
    server = start(**({} if way == "backend" else extended))
    async with opened(server, directory, checkpoints) as (engine, updates):
        await updates.prepare()
        await updates.update(1)
        allocator.sleep(("weights",))
        allocator.wake_up()
        assert await report(engine) == (1, False, False)
        allocator.sleep()
        allocator.wake_up()
        assert await report(engine) == (-1, False, True)
        said = (await engine.state(LONG_S)).error
        assert said == "its weights were discarded while it slept (level 2)"
        with pytest.raises(EngineUnavailable, match="rank 0 holds a part of an update"):
            await engine.resume(1, LONG_S)
    async with opened(server, directory, checkpoints) as (engine, updates):
        assert await report(engine) == (-1, False, True)
        await updates.prepare()
        (first, *_) = await updates.update(2)
        assert first.processed_parameters > 0, "all of it is loaded by the engine itself"
        assert await report(engine) == (2, False, False)
        assert server.executor.fingerprints() == checkpoints.fingerprints(2)


async def test_update_fails_touched_when_weights_are_discarded_in_its_pause(
    allocator: Allocator, start: Start, directory: Path, checkpoints: Checkpoints
) -> None:
    server = start()
    async with opened(server, directory, checkpoints) as (engine, updates):
        await updates.prepare()
        await updates.update(1)
        await engine.pause(LONG_S)
        allocator.sleep()
        allocator.wake_up()
        with pytest.raises(ApplyFailed, match="NotAttached") as caught:
            await updates.apply(2)
        assert caught.value.touched
        assert await report(engine) == (-1, True, True)
        await updates.prepare()
        await updates.update(2)
        assert await report(engine) == (2, False, False)


async def test_update_is_refused_untouched_when_the_engine_fell_asleep_in_its_pause(
    asleep: SimpleNamespace, start: Start, directory: Path, checkpoints: Checkpoints
) -> None:
    server = start()
    async with opened(server, directory, checkpoints) as (engine, updates):
        await updates.prepare()
        await engine.pause(LONG_S)
        asleep.is_asleep = True
        with pytest.raises(ApplyFailed, match="EngineAsleep: Apply is refused") as caught:
            await updates.apply(1)
        assert not caught.value.touched


async def test_paused_engine_of_a_dead_consumer_is_not_taken_for_one_that_sleeps(
    start: Start, directory: Path, checkpoints: Checkpoints
) -> None:
    server = start()
    async with opened(server, directory, checkpoints) as (engine, _):
        await engine.pause(LONG_S)
    async with opened(server, directory, checkpoints) as (engine, updates):
        await updates.prepare()
        await updates.update(1)
        assert await report(engine) == (1, False, False)


async def test_resumption_is_refused_when_old_blocks_cannot_be_dropped(
    start: Start, directory: Path, checkpoints: Checkpoints
) -> None:
    server = start()
    async with opened(server, directory, checkpoints) as (engine, updates):
        await updates.prepare()
        server.failing["POST /reset_prefix_cache"] = "remote KV transfer"
        with pytest.raises(EngineUnavailable, match="remote KV transfer"):
            await updates.update(1)
        assert await report(engine) == (-1, True, True)
        server.failing.clear()
        await engine.resume(1, LONG_S)
        assert await report(engine) == (1, False, False)


async def test_next_consumer_takes_the_engine_for_touched_when_old_blocks_were_not_dropped(
    start: Start, directory: Path, checkpoints: Checkpoints
) -> None:
    server = start()
    async with opened(server, directory, checkpoints) as (_, updates):
        await updates.prepare()
        await updates.update(1)
        server.failing["POST /reset_prefix_cache"] = "remote KV transfer"
        with pytest.raises(EngineUnavailable, match="remote KV transfer"):
            await updates.update(2)
    server.failing.clear()
    async with opened(server, directory, checkpoints) as (engine, updates):
        assert await report(engine) == (1, True, True)
        await updates.prepare()
        await updates.update(2)
        assert await report(engine) == (2, False, False)


async def test_engine_serves_on_when_a_refused_update_could_not_drop_its_blocks(
    asleep: SimpleNamespace, start: Start, directory: Path, checkpoints: Checkpoints
) -> None:
    """Nothing was written, so nothing is stale."""
    server, gate = start(), Gate()
    async with opened(server, directory, checkpoints) as (engine, updates):
        await updates.prepare()
        await updates.update(1)
        await engine.pause(LONG_S)
        server.failing["POST /reset_prefix_cache"] = "remote KV transfer"
        server.before["POST /update_weights"] = gate
        asleep.is_asleep, since = True, len(server.calls)

        async def apply() -> None:
            with pytest.raises(ApplyFailed, match="EngineAsleep") as caught:
                await updates.apply(2)
            assert not caught.value.touched

        async with anyio.create_task_group() as tasks:
            tasks.start_soon(apply)
            await gate.wait()
            await until(lambda: has_been_asked(server, "POST /reset_prefix_cache", since))
            await engine._control.world_size(LONG_S)  # its answer comes after that
            gate.open()
        asleep.is_asleep = False
        await engine.inspect(None, LONG_S)
        await engine.resume(1, LONG_S)
        assert await report(engine) == (1, False, False)


async def test_resumption_is_refused_when_the_connector_keeps_old_blocks(
    start: Start, directory: Path, checkpoints: Checkpoints
) -> None:
    server = start()
    async with opened(server, directory, checkpoints) as (_, updates):
        await updates.prepare()
        server.connector_resets = False
        with pytest.raises(EngineUnavailable, match=r"prefix cache, .* could not be reset"):
            await updates.update(1)
