"""Tasks that fail together tell the first cause; calls that are left are known until they end."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import AsyncExitStack, contextmanager

import anyio
import pytest

from weightbus.consumers.errors import DeadlineExceeded, TornRead, WorkerLost
from weightbus.consumers.transfer.together import Calls, enter_in_thread, run_together

pytestmark = pytest.mark.anyio

DEADLINE_S = 20.0


async def test_first_failure_is_raised_and_cancels_the_others() -> None:
    async def fail() -> None:
        raise TornRead("s", 2, 4)

    async def fail_late() -> None:
        try:
            await anyio.sleep_forever()
        finally:
            raise WorkerLost(0, "a consequence")

    with pytest.raises(TornRead), anyio.fail_after(DEADLINE_S):
        await run_together([fail_late, fail])


async def test_a_defect_is_not_taken_for_a_failure() -> None:
    async def fail() -> None:
        raise KeyError("defect")

    with pytest.raises(ExceptionGroup):
        await run_together([fail])


async def test_call_is_known_until_it_ends_when_it_was_left() -> None:
    calls, go_on, ended = Calls(), threading.Event(), threading.Event()
    with anyio.move_on_after(0.05):
        await calls.run(go_on.wait)
    assert calls.running == 1
    calls.when_ended(ended.set)
    assert not ended.is_set()
    go_on.set()
    assert await anyio.to_thread.run_sync(ended.wait, DEADLINE_S)
    assert calls.running == 0


async def test_what_follows_a_call_is_told_of_when_it_fails(
    caplog: pytest.LogCaptureFixture,
) -> None:
    calls, go_on, ended = Calls(), threading.Event(), threading.Event()

    def fail() -> None:
        raise OSError("defect")

    async with anyio.create_task_group() as tasks:
        tasks.start_soon(calls.run, go_on.wait)
        while not calls.running:
            await anyio.lowlevel.checkpoint()
        calls.when_ended(fail)
        calls.when_ended(ended.set)
        go_on.set()
    assert ended.is_set(), "the others are called nevertheless"
    assert "OSError: defect" in caplog.text


async def test_call_never_begins_when_it_is_left_before() -> None:
    calls, begun, ended = Calls(), threading.Event(), threading.Event()
    with anyio.CancelScope() as scope:
        scope.cancel()
        await calls.run(begun.set)
    assert calls.running == 0
    calls.when_ended(ended.set)
    assert ended.is_set()
    assert not begun.is_set()


async def test_call_returns_and_raises_what_it_does() -> None:
    calls = Calls()
    assert await calls.run(divmod, 7, 2) == (3, 1)
    with pytest.raises(ZeroDivisionError):
        await calls.run(divmod, 7, 0)
    assert calls.running == 0


async def test_context_that_is_entered_too_late_is_left_by_its_thread() -> None:
    go_on, left = threading.Event(), threading.Event()

    @contextmanager
    def slow() -> Iterator[int]:
        assert go_on.wait(DEADLINE_S)
        try:
            yield 7
        finally:
            left.set()

    async with AsyncExitStack() as stack:
        with pytest.raises(DeadlineExceeded):
            await enter_in_thread(stack, slow(), 0.05)
    go_on.set()
    assert await anyio.to_thread.run_sync(left.wait, DEADLINE_S)
    left.clear()
    async with AsyncExitStack() as stack:
        assert await enter_in_thread(stack, slow(), DEADLINE_S) == 7
        assert not left.is_set()
    assert left.is_set(), "by the stack"
