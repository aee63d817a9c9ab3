"""Tasks that fail together tell the first cause; calls that are left are known until they end."""

from __future__ import annotations

import threading

import anyio
import pytest

from weightbus.consumers.errors import TornRead, WorkerLost
from weightbus.consumers.transfer.together import Calls, run_together

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
