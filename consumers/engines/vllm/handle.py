"""`VllmControl` of a vLLM within this process: an `AsyncLLM`, or an offline `LLM`.

Owns nothing of vLLM's. An `AsyncLLM` pauses by itself, and its coroutines run on the caller's event
loop. An `LLM` does not: it serves while its caller is in `generate`, and only then. So its caller
takes `VllmHandle.serving()` around every such call, and whatever the consumer does to the engine
happens while nobody is within; from a pause to the resumption nobody gets in.
"""

from __future__ import annotations

import inspect
import math
import sys
import threading
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager, contextmanager
from typing import Any, Final

import anyio
import anyio.to_thread

from weightbus.consumers.engines.budget import left_s
from weightbus.consumers.engines.vllm.control import (
    NOT_RESET,
    TOKENS_COUNTER,
    PauseMode,
    StartedWith,
    VllmControl,
)
from weightbus.consumers.errors import ConsumerError, DeadlineExceeded, EngineUnavailable

__all__ = ("VllmHandle", "open_handle_control")

_NAME: Final = "within this process"

_OF_WORKERS: Final = frozenset(
    {
        "init_weight_transfer_engine",
        "start_weight_update",
        "start_draft_weight_update",
        "update_weights",
    }
)


class VllmHandle:
    """A vLLM engine of this process. Give the same handle to whoever generates and to the
    consumer."""

    def __init__(self, llm: Any) -> None:
        """`llm` is an `AsyncLLM` or an `LLM`."""
        self.llm = llm
        self.is_async = inspect.iscoroutinefunction(llm.collective_rpc)
        self.turnstile = Turnstile()

    @contextmanager
    def serving(self, deadline_s: float = math.inf) -> Iterator[None]:
        """To be held, by one thread at a time, around every call of an `LLM`. An `AsyncLLM` needs
        it not.

        Raises:
            DeadlineExceeded: an update, or another thread, has not let go within `deadline_s`.
        """
        if not self.turnstile.enter(deadline_s):
            raise DeadlineExceeded("an update of the engine", deadline_s)
        try:
            yield
        finally:
            self.turnstile.leave()


class Turnstile:
    """Lets one thread in at a time; whoever wants to update goes first, and may stay. For any
    thread."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._taken = False
        self._wanted = 0
        """How many wait in `enter_first`."""
        self.is_held = False
        """The consumer is within, from a pause to the resumption."""

    def enter(self, deadline_s: float) -> bool:
        """Whether the caller is within; it is not if it would have had to wait longer."""
        with self._changed:
            if not self._wait(lambda: not self._taken and not self._wanted, deadline_s):
                return False
            self._taken = True
            return True

    def enter_first(self, deadline_s: float) -> bool:
        """As `enter`, before all who wait there."""
        with self._changed:
            self._wanted += 1
            try:
                if not self._wait(lambda: not self._taken, deadline_s):
                    return False
                self._taken = True
                return True
            finally:
                self._wanted -= 1
                self._changed.notify_all()

    def leave(self) -> None:
        with self._changed:
            self._taken = False
            self._changed.notify_all()

    def hold(self) -> None:
        """Stay, for the consumer: whoever calls is within."""
        with self._changed:
            self.is_held = True

    def let_go(self) -> None:
        """The consumer leaves, if it is within."""
        with self._changed:
            if self.is_held:
                self.is_held = self._taken = False
                self._changed.notify_all()

    def _wait(self, condition: Callable[[], bool], deadline_s: float) -> bool:
        timeout = None if math.isinf(deadline_s) else deadline_s
        return self._changed.wait_for(condition, timeout)


class _HandleControl(VllmControl):
    """What both kinds of engine have in common."""

    def __init__(self, handle: VllmHandle) -> None:
        super().__init__(_NAME)
        self._handle = handle
        self._llm = handle.llm

    async def probe(self, deadline_s: float) -> None:
        del deadline_s
        if not self.has("collective_rpc"):
            kind = type(self._llm).__name__
            raise EngineUnavailable(self.name, f"a {kind} is neither an AsyncLLM nor an LLM")

    def has(self, operation: str) -> bool:
        return callable(getattr(self._llm, operation, None))

    async def world_size(self, deadline_s: float) -> int:
        del deadline_s
        parallel = self._config().parallel_config
        if parallel.data_parallel_size > 1:
            reason = f"it is data parallel: {parallel.data_parallel_size} copies"
            raise EngineUnavailable(self.name, reason)
        return int(parallel.world_size)

    async def started_with(self, deadline_s: float) -> StartedWith:
        del deadline_s
        return StartedWith.of(self._config())

    def _config(self) -> Any:
        return self._llm.vllm_config

    async def tokens_made(self, deadline_s: float) -> float | None:
        """Of all engines of this process. An `LLM` counts only if it was told to."""
        del deadline_s
        return _registered(TOKENS_COUNTER)

    def _external(self) -> dict[str, bool]:
        """What a reset is told so that it reaches connectors, where it takes that."""
        taken = inspect.signature(self._llm.reset_prefix_cache).parameters
        return {"reset_connector": True} if "reset_connector" in taken else {}

    async def _call_workers(
        self, operation: str, arguments: Mapping[str, Any], deadline_s: float
    ) -> None:
        await self._collective(operation, (), dict(arguments), deadline_s)

    async def _call_method(
        self, method: str, arguments: Sequence[str], deadline_s: float
    ) -> Sequence[Any]:
        results = await self._collective(method, tuple(arguments), {}, deadline_s)
        return results if isinstance(results, list) else []

    async def _collective(
        self, method: str, args: tuple[Any, ...], kwargs: dict[str, Any], deadline_s: float
    ) -> Any:
        return await self._call("collective_rpc", deadline_s, method, None, args, kwargs)

    async def _call(self, operation: str, deadline_s: float, *args: Any, **kwargs: Any) -> Any:
        raise NotImplementedError

    def _failed(self, operation: str, error: Exception) -> EngineUnavailable:
        said = " ".join(str(error).split())[:500] or type(error).__name__
        return EngineUnavailable(self.name, f"{operation}: {said}")


class _AsyncControl(_HandleControl):
    """Of an `AsyncLLM`."""

    async def probe(self, deadline_s: float) -> None:
        await super().probe(deadline_s)
        for operation in ("pause_generation", "resume_generation", "is_paused"):
            if not self.has(operation):
                raise EngineUnavailable(self.name, f"its AsyncLLM has no {operation}")

    async def pause(
        self, mode: PauseMode, clear_caches: bool, deadline_s: float, *, stands: bool = False
    ) -> None:
        del stands
        await self._call("pause_generation", deadline_s, mode=mode, clear_cache=clear_caches)

    async def resume(self, deadline_s: float) -> None:
        await self._call("resume_generation", deadline_s)

    async def is_paused(self, deadline_s: float) -> bool:
        return bool(await self._call("is_paused", deadline_s))

    async def is_sleeping(self, deadline_s: float) -> bool:
        return self.has("is_sleeping") and bool(await self._call("is_sleeping", deadline_s))

    async def wake_up(self, tags: Sequence[str], deadline_s: float) -> None:
        await self._call("wake_up", deadline_s, list(tags) or None)

    async def reset_caches(self, deadline_s: float) -> None:
        end = anyio.current_time() + deadline_s
        words = {"reset_running_requests": True, **self._external()}
        if await self._call("reset_prefix_cache", deadline_s, **words) is False:
            raise EngineUnavailable(self.name, NOT_RESET)
        if self._has_encoders():
            await self._call("reset_encoder_cache", left_s(end))

    async def set_version(self, version: str, deadline_s: float) -> None:
        if self.has("update_weight_version"):
            await self._call("update_weight_version", deadline_s, version)

    async def _call(self, operation: str, deadline_s: float, *args: Any, **kwargs: Any) -> Any:
        try:
            with anyio.fail_after(deadline_s):
                return await getattr(self._llm, operation)(*args, **kwargs)
        except TimeoutError:
            raise DeadlineExceeded(f"{operation} of vLLM", deadline_s) from None
        except Exception as error:
            raise self._failed(operation, error) from error


class _OfflineControl(_HandleControl):
    """Of an `LLM`: every call in a thread, while nobody generates."""

    def has(self, operation: str) -> bool:
        return operation in _OF_WORKERS or super().has(operation)

    def _config(self) -> Any:
        return self._llm.llm_engine.vllm_config

    async def pause(
        self, mode: PauseMode, clear_caches: bool, deadline_s: float, *, stands: bool = False
    ) -> None:
        """Who generates is waited for, whatever the mode."""
        del mode, stands
        end = anyio.current_time() + deadline_s
        turnstile = self._handle.turnstile
        if not turnstile.is_held:
            given_up = threading.Event()
            try:
                await self._in_thread("pause", deadline_s, self._hold, deadline_s, given_up)
            except BaseException:
                given_up.set()
                turnstile.let_go()
                raise
        if clear_caches:
            try:
                await self.reset_caches(left_s(end))
            except ConsumerError:
                turnstile.let_go()
                raise

    def _hold(self, deadline_s: float, given_up: threading.Event) -> None:
        """A pause that is given up may still wait here: it must not hold the engine then."""
        turnstile = self._handle.turnstile
        if not turnstile.enter_first(deadline_s):
            raise DeadlineExceeded("whoever generates", deadline_s)
        turnstile.hold()
        if given_up.is_set():
            turnstile.let_go()

    async def resume(self, deadline_s: float) -> None:
        del deadline_s
        self._handle.turnstile.let_go()

    async def take_back_pause(self, deadline_s: float, *, may_come: bool) -> None:
        """A pause that failed has let go by itself."""

    def is_partly_asleep(self) -> bool:
        """What matters here: nothing runs unless its caller, who let it sleep, generates."""
        return False

    async def is_paused(self, deadline_s: float) -> bool:
        del deadline_s
        return self._handle.turnstile.is_held

    async def is_sleeping(self, deadline_s: float) -> bool:
        engine = self._llm.llm_engine
        if not callable(getattr(engine, "is_sleeping", None)):
            return False
        return bool(await self._exclusively("is_sleeping", deadline_s, engine.is_sleeping))

    async def wake_up(self, tags: Sequence[str], deadline_s: float) -> None:
        await self._call("wake_up", deadline_s, list(tags) or None)

    async def reset_caches(self, deadline_s: float) -> None:
        end = anyio.current_time() + deadline_s
        if await self._call("reset_prefix_cache", deadline_s, **self._external()) is False:
            raise EngineUnavailable(self.name, NOT_RESET)
        reset = getattr(self._llm.llm_engine, "reset_encoder_cache", None)
        if self._encodes and callable(reset):
            await self._exclusively("reset_encoder_cache", left_s(end), reset)

    async def set_version(self, version: str, deadline_s: float) -> None:
        if self.has("update_weight_version"):
            await self._call("update_weight_version", deadline_s, version)

    async def _call(self, operation: str, deadline_s: float, *args: Any, **kwargs: Any) -> Any:
        call = getattr(self._llm, operation)
        return await self._exclusively(operation, deadline_s, lambda: call(*args, **kwargs))

    async def _exclusively(self, operation: str, deadline_s: float, call: Callable[[], Any]) -> Any:
        return await self._in_thread(operation, deadline_s, self._within, call, deadline_s)

    def _within(self, call: Callable[[], Any], deadline_s: float) -> Any:
        """A call that is given up goes on in its thread, and keeps the engine until it ends."""
        turnstile = self._handle.turnstile
        if turnstile.is_held:
            return call()
        if not turnstile.enter_first(deadline_s):
            raise DeadlineExceeded("whoever generates", deadline_s)
        try:
            return call()
        finally:
            turnstile.leave()

    async def _in_thread(
        self, operation: str, deadline_s: float, call: Callable[..., Any], *args: Any
    ) -> Any:
        try:
            with anyio.fail_after(deadline_s):
                return await anyio.to_thread.run_sync(call, *args, abandon_on_cancel=True)
        except TimeoutError:
            raise DeadlineExceeded(f"{operation} of vLLM", deadline_s) from None
        except ConsumerError:
            raise
        except Exception as error:
            raise self._failed(operation, error) from error


def _registered(counter: str) -> float | None:
    """A counter that vLLM has registered in this process, over all its labels; None: it has not."""
    prometheus = sys.modules.get("prometheus_client")
    if prometheus is None:
        return None
    metrics = prometheus.REGISTRY.restricted_registry([counter]).collect()
    values = [sample.value for metric in metrics for sample in metric.samples]
    return sum(values) if values else None


@asynccontextmanager
async def open_handle_control(handle: VllmHandle) -> AsyncIterator[VllmControl]:
    """The engine behind a handle; an `LLM` that is paused when this closes stays so."""
    yield _AsyncControl(handle) if handle.is_async else _OfflineControl(handle)
