"""Server-sent events: one whole snapshot, then what changes.

Nothing is queued for a browser. What it is told next is made when it has taken what it was told
before; one that takes nothing for long is let go, and asks again when it wakes up.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

import anyio
from starlette.responses import PlainTextResponse
from starlette.types import Receive, Scope, Send

from weightbus.cli.ui.board import Board

__all__ = ("STREAMS_MAX", "EventStreams")

STREAMS_MAX: Final = 64
"""Pages that are open at one time."""

SEND_S: Final = 30.0

END_S: Final = 1.0

KEEP_ALIVE_S: Final = 10.0
"""A page that hears nothing for longer knows that its server is gone."""

RETRY_MS: Final = 1000

HEADERS: Final = [
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-store"),
    (b"x-accel-buffering", b"no"),
]


class EventStreams:
    """An ASGI application: one endless answer for each page."""

    def __init__(self, board: Board, now_ns: Callable[[], int], *, send_s: float = SEND_S) -> None:
        """`now_ns`: the time of the bus, by which all that the board tells is timed. `send_s`: how
        long a browser may take for what it is told at one time."""
        self._board, self._now_ns, self._send_s = board, now_ns, send_s
        self._open: set[anyio.CancelScope] = set()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if len(self._open) >= STREAMS_MAX:
            refusal = PlainTextResponse(f"{STREAMS_MAX} pages are open already\n", 503)
            await refusal(scope, receive, send)
            return
        await send({"type": "http.response.start", "status": 200, "headers": HEADERS})
        async with anyio.create_task_group() as tasks:
            self._open.add(tasks.cancel_scope)
            try:
                tasks.start_soon(self._tell, send, tasks.cancel_scope)
                while (await receive())["type"] != "http.disconnect":
                    pass
                tasks.cancel_scope.cancel()
            finally:
                self._open.discard(tasks.cancel_scope)
        with anyio.move_on_after(END_S):
            await send({"type": "http.response.body"})

    def close(self) -> None:
        """End them all: the server stops."""
        for scope in tuple(self._open):
            scope.cancel()

    async def _tell(self, send: Send, stream: anyio.CancelScope) -> None:
        board = self._board
        told, text = 0, f"retry: {RETRY_MS}\n".encode()
        while True:
            revision = board.revision
            if revision > told:
                text += b"data: " + board.changes(told, self._now_ns()) + b"\n\n"
                told = revision
            with anyio.move_on_after(self._send_s) as patience:
                await send({"type": "http.response.body", "body": text, "more_body": True})
            if patience.cancelled_caught:
                stream.cancel()
                return
            text = b""
            with anyio.move_on_after(KEEP_ALIVE_S):
                await board.wait(told)
            text = b": still here\n\n" if board.revision == told else b""
