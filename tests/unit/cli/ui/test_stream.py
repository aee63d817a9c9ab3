"""Server-sent events to a browser that takes nothing: nothing is queued, and it is let go."""

from __future__ import annotations

import anyio
import pytest
from starlette.types import Message, Scope

from tests.unit.tracing.rounds import MODEL, T0_NS, stage, state
from weightbus.cli.ui.board import Board
from weightbus.cli.ui.stream import EventStreams
from weightbus.schemas.progress import EngineStatus

pytestmark = pytest.mark.anyio

SCOPE: Scope = {"type": "http", "method": "GET", "path": "/api/events", "headers": []}


class Browser:
    """Takes each part only once it is let."""

    def __init__(self) -> None:
        self.taken: list[bytes] = []
        self.may_take = anyio.Event()
        self.gone = anyio.Event()
        self.begun = anyio.Event()

    async def receive(self) -> Message:
        await self.gone.wait()
        return {"type": "http.disconnect"}

    async def send(self, message: Message) -> None:
        if message["type"] == "http.response.body":
            self.begun.set()
            await self.may_take.wait()
            self.taken.append(message.get("body", b""))


def tell(board: Board, at_ms: int) -> None:
    status: EngineStatus = "updating" if at_ms % 2 else "serving"
    for message in (state("a", status, at_ms=at_ms), stage("a", "fetch", at_ms, at_ms + 1)):
        board.feed(message, T0_NS, {}, is_heard=True)
    board.refresh(T0_NS)


async def test_slow_browser_is_told_less_often_and_nothing_waits_for_it() -> None:
    board, browser = Board(None), Browser()
    streams = EventStreams(board, lambda: T0_NS)
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(streams, SCOPE, browser.receive, browser.send)
        await browser.begun.wait()
        for at_ms in range(1, 1000):
            tell(board, at_ms)
            await anyio.lowlevel.checkpoint()
        browser.may_take.set()
        await anyio.wait_all_tasks_blocked()
        browser.gone.set()
    snapshot, changes, *end = browser.taken
    assert b'"whole":true' in snapshot
    assert f"{MODEL}/a".encode() in changes
    assert end == [b""], "a thousand changes came as one"
    assert len(changes) < 3000


async def test_browser_that_takes_nothing_is_let_go() -> None:
    browser = Browser()
    streams = EventStreams(Board(None), lambda: T0_NS, send_s=0.05)
    with anyio.fail_after(30):
        await streams(SCOPE, browser.receive, browser.send)
    assert browser.taken == []


async def test_closing_ends_every_stream() -> None:
    browsers = [Browser(), Browser()]
    streams = EventStreams(Board(None), lambda: T0_NS)
    with anyio.fail_after(30):
        async with anyio.create_task_group() as tasks:
            for browser in browsers:
                browser.may_take.set()
                tasks.start_soon(streams, SCOPE, browser.receive, browser.send)
            for browser in browsers:
                await browser.begun.wait()
            streams.close()
    assert all(browser.taken[-1] == b"" for browser in browsers)
