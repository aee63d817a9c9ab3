"""A browser, a bus and the page about it; the tests must be marked `anyio`."""

from __future__ import annotations

from collections.abc import AsyncIterator

import pytest
from playwright.async_api import Browser

from tests.integration.ui.pages import Visit, open_browser, open_teller, open_ui, visit
from tests.nats_server import NatsServer
from weightbus.bus.connection import Bus


@pytest.fixture
async def browser() -> AsyncIterator[Browser]:
    async with open_browser() as browser:
        yield browser


@pytest.fixture
async def teller(nats_server: NatsServer) -> AsyncIterator[Bus]:
    """Says on the bus what a fleet would."""
    async with open_teller(nats_server.settings) as bus:
        yield bus


@pytest.fixture
async def ui_url(nats_server: NatsServer) -> AsyncIterator[str]:
    async with open_ui(nats_server.url) as url:
        yield url


@pytest.fixture
async def shown(browser: Browser, ui_url: str) -> AsyncIterator[Visit]:
    """The page, live."""
    async with visit(browser, ui_url) as visited:
        await visited.sees("#link", "live")
        yield visited
