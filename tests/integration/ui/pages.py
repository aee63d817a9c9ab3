"""A page that is looked at: the command `weightbus ui` beside a bus, and a real Chromium."""

from __future__ import annotations

import shutil
import signal
import subprocess
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import anyio
import anyio.to_thread
import pytest
from msgspec import structs
from playwright.async_api import Browser, Page, Response, async_playwright

from tests.integration.tracing.monitors import COMMAND, DEADLINE_S, PRESENCE_TTL_S, environment
from weightbus.bus.connection import Bus, open_bus
from weightbus.bus.settings import BusSettings
from weightbus.schemas.base import Message
from weightbus.schemas.progress import EngineState

__all__ = ("DEADLINE_MS", "Visit", "open_browser", "open_teller", "open_ui", "put", "visit")

DEADLINE_MS = 60_000
"""The machine may be busy with other tests."""
POLL_S = 0.02


@asynccontextmanager
async def open_ui(nats_url: str, *arguments: str, **variables: str) -> AsyncIterator[str]:
    """The command, until it is interrupted; yields the page's URL."""
    process = _start(nats_url, arguments, variables)
    try:
        assert process.stdout is not None
        line = await anyio.to_thread.run_sync(process.stdout.readline)
        assert "http://" in line, process.communicate(timeout=DEADLINE_S)
        yield line.split()[3]
        process.send_signal(signal.SIGINT)
        _, errors = await anyio.to_thread.run_sync(lambda: process.communicate(timeout=DEADLINE_S))
        assert (process.returncode, errors) == (0, ""), errors
    finally:
        process.kill()
        process.wait(DEADLINE_S)


def _start(
    nats_url: str, arguments: Sequence[str], variables: Mapping[str, str]
) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [*COMMAND, "ui", "--nats", nats_url, "--port", "0", *arguments],
        env=environment(PYTHONUNBUFFERED="1", **variables),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


@asynccontextmanager
async def open_browser() -> AsyncIterator[Browser]:
    """Debian's Chromium; the test is skipped where it is not installed."""
    chromium = shutil.which("chromium")
    if chromium is None:
        pytest.skip("there is no chromium: apt-get install chromium")
    async with async_playwright() as playwright:
        browser = await playwright.chromium.launch(
            executable_path=chromium, args=["--no-sandbox", "--disable-dev-shm-usage"]
        )
        try:
            yield browser
        finally:
            await browser.close()


class Visit:
    """A page, and all that went wrong on it."""

    def __init__(self, page: Page) -> None:
        self.page = page
        self.wrong: list[str] = []
        self.requested: list[str] = []
        page.on(
            "console", lambda said: self.wrong.append(said.text) if _is_bad(said.type) else None
        )
        page.on("pageerror", lambda error: self.wrong.append(str(error)))
        page.on("request", lambda request: self.requested.append(request.url))
        page.on("response", self._answered)
        page.set_default_timeout(DEADLINE_MS)

    def _answered(self, response: Response) -> None:
        if response.status >= 400:
            self.wrong.append(f"{response.status} {response.url}")

    async def sees(self, selector: str, text: str) -> None:
        """Returns once something that is shown there has this text."""
        found = self.page.locator(selector, has_text=text).filter(visible=True).first
        await found.wait_for(timeout=DEADLINE_MS)

    async def holds(self, expression: str) -> None:
        """Returns once the expression is true there. Not by playwright's own waiting: that
        evaluates text within the page, which the page's policy forbids."""
        with anyio.fail_after(DEADLINE_MS / 1000):
            while not await self.page.evaluate(expression):  # noqa: ASYNC110 - of a browser
                await anyio.sleep(POLL_S)

    async def text(self, selector: str) -> str:
        return await self.page.locator(selector).first.inner_text()

    async def shot(self, directory: Path, name: str) -> None:
        await self.page.screenshot(path=str(directory / f"{name}.png"))


def _is_bad(kind: str) -> bool:
    return kind in ("error", "warning")


@asynccontextmanager
async def visit(browser: Browser, url: str, **options: Any) -> AsyncIterator[Visit]:
    """A page of its own, left without anything having gone wrong on it."""
    options = {"viewport": {"width": 1440, "height": 900}} | options
    context = await browser.new_context(**options)
    try:
        visited = Visit(await context.new_page())
        await visited.page.goto(url)
        yield visited
        assert visited.wrong == []
    finally:
        await context.close()


@asynccontextmanager
async def open_teller(settings: BusSettings) -> AsyncIterator[Bus]:
    """A bus whose heartbeats outlive a slow test."""
    async with open_bus(structs.replace(settings, presence_ttl_s=PRESENCE_TTL_S)) as bus:
        yield bus


async def put(bus: Bus, *messages: Message) -> None:
    """Publish messages, and heartbeats as presence, in this order."""
    for message in messages:
        if isinstance(message, EngineState):
            await bus.presence.put(message)
        else:
            await bus.publish(message)
