"""Requests that keep their order and outlive a slow bus."""

from __future__ import annotations

import anyio
import pytest

from weightbus.bus.errors import BusTimeout, BusUnavailable
from weightbus.consumers.errands import Errands, keep_on

pytestmark = pytest.mark.anyio


async def test_errands_run_one_after_the_other_and_a_refusal_is_outlived() -> None:
    errands, log = Errands(), []

    async def errand(number: int) -> None:
        log.append(f"begin {number}")
        await anyio.lowlevel.checkpoint()
        if number == 2:
            raise BusTimeout("errand", 5.0)
        log.append(f"end {number}")

    for number in (1, 2, 3):
        errands.take_nowait(errand, number)
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(errands.run)
        assert await errands.wait_done(60.0)
        tasks.cancel_scope.cancel()
    assert log == ["begin 1", "end 1", "begin 2", "begin 3", "end 3"]


async def test_errands_end_when_the_bus_is_gone() -> None:
    errands = Errands()

    async def errand() -> None:
        raise BusUnavailable("nats://h", "lost")

    errands.take_nowait(errand)
    with pytest.raises(BusUnavailable):
        await errands.run()


async def test_request_gives_what_it_got_or_nothing_when_it_was_refused() -> None:
    async def answered() -> int:
        return 7

    async def refused() -> int:
        raise BusTimeout("request", 5.0)

    assert await keep_on(answered()) == 7
    assert await keep_on(refused()) is None
