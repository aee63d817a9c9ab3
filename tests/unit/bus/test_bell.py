"""A bell's rings, and the waits that they end."""

from __future__ import annotations

import math

import anyio
import pytest

from weightbus.bus.bell import Bell

pytestmark = pytest.mark.anyio


async def test_wait_ends_at_a_ring() -> None:
    bell = Bell()
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(bell.wait, math.inf)
        await anyio.wait_all_tasks_blocked()
        bell.ring()


async def test_rings_from_before_end_one_wait_at_once() -> None:
    bell = Bell()
    bell.ring()
    bell.ring()
    await bell.wait(math.inf)
    with anyio.move_on_after(0) as second:
        await bell.wait(math.inf)
    assert second.cancelled_caught


async def test_wait_ends_by_itself_when_its_time_is_over() -> None:
    await Bell().wait(0)


async def test_ring_is_kept_when_the_wait_was_cancelled() -> None:
    bell = Bell()
    with anyio.CancelScope() as scope:
        scope.cancel()
        await bell.wait(math.inf)
    bell.ring()
    await bell.wait(math.inf)
