"""Requests that generate all the time, and what updates cost them.

Owns its requests while `open_load` is open. Each is greedy, ends after a known number of tokens and
is followed by another one; what a user sees of an update is the tokens that come later, or never.
"""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from statistics import median
from typing import Final, NamedTuple

import anyio

from benchmarks.h200.processes import BenchFailed
from benchmarks.vllm_h200.server import Server
from weightbus.bus.background import open_background

__all__ = ("SETTLE_S", "Arrival", "Load", "Window", "counts_of", "open_load", "rate_of")

STREAMS: Final = 8
BASELINE_S: Final = 2.0
"""How long it is looked how fast tokens come when nothing else is done."""
SETTLE_S: Final = 0.5
"""After an update: until then requests may have to compute anew what caches held."""
FIRST_S: Final = 120.0
REQUEST_S: Final = 600.0
END_S: Final = 120.0
POLL_S: Final = 0.02


class Arrival(NamedTuple):
    """Tokens of one request that came at once."""

    at_ns: int
    tokens: int


class Window(NamedTuple):
    """From when requests wait until they go on."""

    begin_ns: int
    end_ns: int


class Load:
    """Made by `open_load`."""

    def __init__(self, server: Server, tokens: int) -> None:
        self._server, self._tokens = server, tokens
        self.arrivals: list[Arrival] = []
        self.rate = 0.0
        """Tokens per second of all requests, when nothing else is done."""
        self.finished = 0
        """Requests that got all their tokens."""
        self.failures: list[str] = []
        self.lost = 0
        """Tokens of requests that were answered with fewer than they asked for, or failed."""
        self._running = 0
        self._ending = False
        self._ended = anyio.Event()

    async def follow(self, number: int) -> None:
        """One request after the other, until the end is near or one fails."""
        self._running += 1
        try:
            turn = 0
            while not self._ending:
                turn += 1
                await self._request([7 + number, 11 + turn % 97, 5, 200 + number])
        finally:
            self._running -= 1
            if not self._running:
                self._ended.set()

    async def _request(self, prompt: Sequence[int]) -> None:
        got = 0
        try:
            with anyio.fail_after(REQUEST_S):
                async with self._server.stream(prompt, self._tokens) as pieces:
                    async for piece in pieces:
                        got += len(piece)
                        self.arrivals.append(Arrival(time.time_ns(), len(piece)))
        except (BenchFailed, TimeoutError) as error:
            self.failures.append(f"{error}" or f"no end within {REQUEST_S:g} s")
            self._ending = True  # one more would fail likewise
        if got == self._tokens:
            self.finished += 1
        else:
            self.lost += self._tokens - got

    async def warm_up(self, streams: int) -> None:
        """Returns once it is known how fast tokens come.

        Raises:
            BenchFailed: requests fail, or do not come on.
        """
        with anyio.move_on_after(FIRST_S):
            while sum(arrival.tokens for arrival in self.arrivals) < 2 * streams:
                self._check()
                await anyio.sleep(POLL_S)
            begin_ns = time.time_ns()
            await anyio.sleep(BASELINE_S)
            self._check()
            self.rate = rate_of(self.arrivals, begin_ns, time.time_ns())
            return
        raise BenchFailed(f"requests do not come on: no {2 * streams} tokens within {FIRST_S:g} s")

    async def end(self) -> None:
        """Returns when the requests that run have ended, for no more than `END_S`."""
        self._ending = True
        with anyio.move_on_after(END_S) as limit:
            await self._ended.wait()
        if limit.cancelled_caught:
            self.failures.append(f"{self._running} requests did not end within {END_S:g} s")

    def _check(self) -> None:
        if self.failures:
            raise BenchFailed(self.failures[0])


def rate_of(arrivals: Sequence[Arrival], begin_ns: int, end_ns: int) -> float:
    """Tokens per second."""
    return _tokens_within(arrivals, begin_ns, end_ns) / max(1e-9, (end_ns - begin_ns) / 1e9)


def counts_of(load: Load, windows: Sequence[Window]) -> dict[str, float]:
    """As a row shows them; `tokens_delayed` is the median, over all updates, of the tokens that
    would have come from the pause until `SETTLE_S` after it, and came later."""
    delayed = []
    for window in windows:
        end_ns = window.end_ns + round(SETTLE_S * 1e9)
        expected = load.rate * (end_ns - window.begin_ns) / 1e9
        came = _tokens_within(load.arrivals, window.begin_ns, end_ns)
        delayed.append(max(0.0, expected - came))
    return {
        "requests": float(load.finished),
        "requests_failed": float(len(load.failures)),
        "tokens_lost": float(load.lost),
        "tokens_per_second": round(load.rate, 1),
        **({"tokens_delayed": round(median(delayed), 1)} if delayed else {}),
    }


def _tokens_within(arrivals: Sequence[Arrival], begin_ns: int, end_ns: int) -> int:
    return sum(one.tokens for one in arrivals if begin_ns <= one.at_ns < end_ns)


@asynccontextmanager
async def open_load(server: Server, tokens: int, streams: int = STREAMS) -> AsyncIterator[Load]:
    """Entered once it is known how fast tokens come; left when the requests have ended.

    Raises:
        BenchFailed: requests fail from the beginning.
    """
    load = Load(server, tokens)
    async with open_background() as tasks:
        for number in range(streams):
            tasks.start_soon(load.follow, number)
        await load.warm_up(streams)
        yield load
        await load.end()
