"""A call that gets on may take its time; one that stands still is given up."""

from __future__ import annotations

import anyio
import pytest

from weightbus.consumers.errors import DeadlineExceeded, TornRead
from weightbus.consumers.transfer.progress import Progress, run_while_moving

pytestmark = pytest.mark.anyio

STALL_S = 0.2
DEADLINE_S = 20.0


async def test_call_lasts_while_it_gets_on() -> None:
    progress, since = Progress(), anyio.current_time()

    async def slow() -> None:
        with progress.working():
            while anyio.current_time() < since + 2 * STALL_S:
                await anyio.sleep(STALL_S / 20)
                progress.made()

    with anyio.fail_after(DEADLINE_S):
        await run_while_moving(slow, progress, STALL_S, lambda: "fetch")
    assert anyio.current_time() - since > STALL_S


async def test_call_is_given_up_when_it_stands_still() -> None:
    progress, ended = Progress(), anyio.Event()

    async def hang() -> None:
        try:
            with progress.working():
                await anyio.sleep_forever()
        finally:
            ended.set()

    with pytest.raises(DeadlineExceeded, match="fetch from a"), anyio.fail_after(DEADLINE_S):
        await run_while_moving(hang, progress, STALL_S, lambda: "fetch from a")
    assert ended.is_set()


async def test_call_does_not_stand_still_while_it_waits_for_its_turn() -> None:
    progress, turn = Progress(), anyio.Event()

    async def wait() -> None:
        await turn.wait()
        with progress.working():
            await anyio.lowlevel.checkpoint()

    async with anyio.create_task_group() as tasks:
        tasks.start_soon(run_while_moving, wait, progress, STALL_S, lambda: "fetch")
        with anyio.move_on_after(2 * STALL_S):
            await anyio.sleep_forever()
        turn.set()


async def test_error_of_the_call_comes_out_as_it_is() -> None:
    async def fail() -> None:
        raise TornRead("s", 2, 4)

    with pytest.raises(TornRead):
        await run_while_moving(fail, Progress(), STALL_S, lambda: "fetch")
