"""A vLLM within the consumer's process: an `AsyncLLM` and an `LLM`, stood in for."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractAsyncContextManager
from pathlib import Path
from types import SimpleNamespace
from typing import Any, TypeVar

import anyio
import anyio.lowlevel
import anyio.to_thread
import prometheus_client
import pytest

from tests.integration.engines.checkpoints import Checkpoints
from tests.integration.engines.harness import LONG_S, Updates, updating
from tests.integration.engines.vllm.workers import Executor
from weightbus.consumers.engines.engine import TokenSeen
from weightbus.consumers.engines.vllm.engine import (
    VllmEngine,
    VllmSettings,
    open_vllm_engine,
)
from weightbus.consumers.engines.vllm.handle import (
    Turnstile,
    VllmHandle,
    open_handle_control,
)
from weightbus.consumers.errors import DeadlineExceeded, EngineUnavailable

pytestmark = pytest.mark.anyio

R = TypeVar("R")


@pytest.fixture
def anyio_backend() -> str:
    """An `AsyncLLM` runs on asyncio's event loop."""
    return "asyncio"


class AsyncEngine:
    """What there is of an `AsyncLLM` (0.32)."""

    def __init__(self, executor: Executor) -> None:
        self.executor = executor
        self.vllm_config = executor.workers[0].vllm_config
        self.paused = False
        self.said: list[object] = []

    async def collective_rpc(
        self,
        method: str,
        timeout: float | None = None,
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> list[Any]:
        return await asyncio.to_thread(self.executor.collective_rpc, method, timeout, args, kwargs)

    async def pause_generation(self, *, mode: str = "abort", clear_cache: bool = True) -> None:
        self.said.append(("pause", mode, clear_cache))
        self.paused = True

    async def resume_generation(self) -> None:
        self.paused = False

    async def is_paused(self) -> bool:
        return self.paused

    async def is_sleeping(self) -> bool:
        return self.paused

    async def reset_prefix_cache(
        self, reset_running_requests: bool = False, reset_connector: bool = False
    ) -> bool:
        self.said.append(("reset", reset_running_requests, reset_connector))
        return True

    async def update_weight_version(self, new_version: str) -> None:
        self.said.append(("version", new_version))

    async def init_weight_transfer_engine(self, request: object) -> None: ...

    async def start_weight_update(self) -> None: ...

    async def start_draft_weight_update(self) -> None: ...

    async def update_weights(self, request: object) -> None: ...


class OfflineEngine:
    """What there is of an `LLM` (0.32): one thread may use it at a time."""

    def __init__(self, executor: Executor) -> None:
        self.executor = executor
        self.llm_engine = SimpleNamespace(
            vllm_config=executor.workers[0].vllm_config,
            is_sleeping=lambda: False,
            reset_encoder_cache=lambda: None,
        )
        self.said: list[object] = []
        self._in_use = threading.Lock()

    def collective_rpc(
        self,
        method: str,
        timeout: float | None = None,
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> list[Any]:
        return self._alone(lambda: self.executor.collective_rpc(method, timeout, args, kwargs))

    def generate(self) -> tuple[str, ...]:
        return self._alone(self.executor.fingerprints)

    def reset_prefix_cache(
        self, reset_running_requests: bool = False, reset_connector: bool = False
    ) -> bool:
        return self._alone(lambda: reset_connector)

    def update_weight_version(self, new_version: str) -> None:
        self.said.append(new_version)

    def wake_up(self, tags: list[str] | None = None) -> None:
        self.said.append(tags)

    def _alone(self, call: Callable[[], R]) -> R:
        assert self._in_use.acquire(blocking=False), "two threads use it at once"
        try:
            return call()
        finally:
            self._in_use.release()


@pytest.fixture
def executor(checkpoints: Checkpoints) -> Iterator[Executor]:
    executor = Executor(checkpoints)
    yield executor
    executor.end()


def opened(
    handle: VllmHandle, directory: Path, checkpoints: Checkpoints
) -> AbstractAsyncContextManager[tuple[VllmEngine, Updates]]:
    opening = open_vllm_engine(
        directory,
        handle=handle,
        settings=VllmSettings(),
        roots=[str(checkpoints.directory)],
        start_timeout_s=LONG_S,
    )
    return updating(opening, checkpoints)


async def test_async_engine_holds_each_version_when_updated(
    executor: Executor, directory: Path, checkpoints: Checkpoints
) -> None:
    llm = AsyncEngine(executor)
    async with opened(VllmHandle(llm), directory, checkpoints) as (engine, updates):
        await updates.prepare()
        for version in (1, 2):
            await updates.update(version)
            assert executor.fingerprints() == checkpoints.fingerprints(version)
            assert not llm.paused
            assert (await engine.state(LONG_S)).version == version
    assert llm.said == [
        item
        for version in (1, 2)
        for item in (("pause", "keep", False), ("reset", True, True), ("version", str(version)))
    ]


@pytest.fixture
def counter() -> Iterator[prometheus_client.Counter]:
    """As vLLM registers it in its process."""
    counter = prometheus_client.Counter("vllm:generation_tokens", "of a test", ["engine"])
    yield counter
    prometheus_client.REGISTRY.unregister(counter)


async def test_first_token_is_seen_when_the_counter_of_this_process_rises(
    executor: Executor,
    directory: Path,
    checkpoints: Checkpoints,
    counter: prometheus_client.Counter,
) -> None:
    seen: list[TokenSeen | None] = []
    counter.labels("0").inc(7)
    handle = VllmHandle(AsyncEngine(executor))
    async with opened(handle, directory, checkpoints) as (engine, updates):
        await updates.prepare()
        await updates.update(1)

        async def watch() -> None:
            seen.append(await engine.first_token(1, LONG_S))

        async with anyio.create_task_group() as tasks:
            tasks.start_soon(watch)
            await anyio.wait_all_tasks_blocked()  # it is looked at, and nothing has come
            made_ns = time.time_ns()
            counter.labels("1").inc()
    (token,) = seen
    assert token is not None
    assert token.at_ns >= made_ns


async def test_first_token_is_not_told_when_the_engine_counts_none(
    executor: Executor, directory: Path, checkpoints: Checkpoints
) -> None:
    handle = VllmHandle(AsyncEngine(executor))
    async with opened(handle, directory, checkpoints) as (engine, updates):
        await updates.prepare()
        await updates.update(1)
        with anyio.fail_after(LONG_S / 2):
            assert await engine.first_token(1, LONG_S) is None


async def test_offline_engine_generates_with_whole_versions_while_it_is_updated(
    executor: Executor, directory: Path, checkpoints: Checkpoints
) -> None:
    llm = OfflineEngine(executor)
    handle = VllmHandle(llm)
    generated: list[tuple[str, ...]] = []
    done, began = threading.Event(), threading.Event()

    def generate_on() -> None:
        while not done.is_set():
            with handle.serving(LONG_S):
                generated.append(llm.generate())
            began.set()

    expected = [executor.fingerprints(), *map(checkpoints.fingerprints, (1, 2))]
    async with (
        anyio.create_task_group() as tasks,
        opened(handle, directory, checkpoints) as (engine, updates),
    ):
        tasks.start_soon(anyio.to_thread.run_sync, generate_on)
        assert await anyio.to_thread.run_sync(began.wait, LONG_S)
        await updates.prepare()
        for version in (1, 2):
            await updates.update(version)
            assert (await engine.state(LONG_S)).version == version
        done.set()
    assert set(generated) <= set(expected)
    assert generated[0] == expected[0]
    assert llm.said == ["1", "2"]


async def test_nobody_generates_when_the_engine_is_paused(
    executor: Executor, directory: Path, checkpoints: Checkpoints
) -> None:
    handle = VllmHandle(OfflineEngine(executor))
    async with opened(handle, directory, checkpoints) as (engine, _):
        await engine.pause(LONG_S)
        await engine.pause(LONG_S)
        assert (await engine.state(LONG_S)).paused
        with pytest.raises(DeadlineExceeded), handle.serving(0.01):
            pass
        await engine.resume(-1, LONG_S)
        with handle.serving(LONG_S):
            assert not (await engine.state(LONG_S)).paused
            with pytest.raises(DeadlineExceeded):
                await engine.pause(0.05)
        await engine.pause(LONG_S)
        await engine.resume(-1, LONG_S)


async def test_nobody_is_kept_out_when_a_pause_was_cancelled_while_it_waited(
    executor: Executor,
) -> None:
    handle = VllmHandle(OfflineEngine(executor))
    async with open_handle_control(handle) as control:
        with handle.serving(LONG_S):
            async with anyio.create_task_group() as tasks:
                tasks.start_soon(control.pause, "keep", False, LONG_S)
                while not handle.turnstile._wanted:
                    await anyio.lowlevel.checkpoint()
                tasks.cancel_scope.cancel()
        with handle.serving(LONG_S):
            assert not handle.turnstile.is_held


async def test_engine_is_refused_when_it_is_none(directory: Path) -> None:
    for llm in (SimpleNamespace(collective_rpc=None), AsyncNothing()):
        with pytest.raises(EngineUnavailable, match=r"neither an AsyncLLM nor|no pause_generation"):
            async with open_vllm_engine(directory, handle=VllmHandle(llm)):
                pass


class AsyncNothing:
    async def collective_rpc(self) -> None: ...


async def test_engine_is_refused_when_it_is_data_parallel(
    executor: Executor, directory: Path
) -> None:
    executor.workers[0].vllm_config.parallel_config.data_parallel_size = 2
    with pytest.raises(EngineUnavailable, match="data parallel: 2 copies"):
        async with open_vllm_engine(directory, handle=VllmHandle(AsyncEngine(executor))):
            pass


def test_whoever_updates_goes_first_when_others_wait() -> None:
    turnstile, order = Turnstile(), list[str]()
    assert turnstile.enter(LONG_S)

    def enter(name: str, enter: Callable[[float], bool]) -> None:
        assert enter(LONG_S)
        order.append(name)
        turnstile.leave()

    first = threading.Thread(target=enter, args=("update", turnstile.enter_first))
    first.start()
    while not turnstile._wanted:
        pass
    second = threading.Thread(target=enter, args=("generate", turnstile.enter))
    second.start()
    turnstile.leave()
    first.join(LONG_S)
    second.join(LONG_S)
    assert order == ["update", "generate"]
    assert turnstile.enter(0)
    assert not turnstile.enter(0)
    assert not turnstile.enter_first(0)
