"""What a link tells those who wait for its connection, without a server."""

from __future__ import annotations

from collections.abc import AsyncIterator

import anyio
import pytest

from weightbus.bus.background import open_background
from weightbus.bus.errors import BusUnavailable
from weightbus.bus.link import Link
from weightbus.bus.settings import BusSettings

pytestmark = pytest.mark.anyio


@pytest.fixture
async def link() -> AsyncIterator[Link]:
    """Not connected yet; a test says itself what nats-py would report."""
    async with open_background() as tasks:
        yield Link(BusSettings(), "nats://127.0.0.1:1", tasks)


async def test_waiter_goes_on_waiting_when_the_connection_is_lost_before_its_turn(
    link: Link,
) -> None:
    went_on = False

    async def wait() -> None:
        nonlocal went_on
        await link.wait_until_up()
        went_on = True

    async with anyio.create_task_group() as tasks:
        tasks.start_soon(wait)
        await anyio.wait_all_tasks_blocked()
        await link._on_reconnected()
        await link._on_disconnected()
        await anyio.wait_all_tasks_blocked()
        assert not went_on
        await link._on_reconnected()
    assert went_on


async def test_waiter_is_told_of_the_failure_when_the_client_closes_after_it(link: Link) -> None:
    link.fail_nowait("it is over")
    await link._on_disconnected()
    with anyio.fail_after(1), pytest.raises(BusUnavailable, match="it is over"):
        await link.wait_until_up()


async def test_names_that_are_not_known_are_told_when_no_server_is_reached() -> None:
    url = "nats://user:secret@no-such-host.invalid,nats://nor-this.invalid:4222"
    async with open_background() as tasks:
        link = Link(BusSettings(connect_timeout_s=2.0), url, tasks)
        with pytest.raises(BusUnavailable) as raised:
            await link.connect()
    assert raised.value.reason.startswith(
        "host name no-such-host.invalid or nor-this.invalid is not known ("
    )
    assert "secret" not in str(raised.value)
