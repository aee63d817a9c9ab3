"""Tasks that stand and fall together, and blocking calls that may outlive who waits for them.

Owns threads that were left: `Calls` knows when the last one has ended.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Awaitable, Callable, Iterable
from contextlib import AbstractContextManager, AsyncExitStack
from typing import Any, TypeVar

import anyio
import anyio.to_thread

from weightbus.consumers.errors import DeadlineExceeded
from weightbus.schemas.errors import WeightBusError

__all__ = ("Calls", "enter_in_thread", "run_together")

_logger = logging.getLogger(__name__)

T = TypeVar("T")


async def run_together(functions: Iterable[Callable[[], Awaitable[None]]]) -> None:
    """Run all; the first that fails cancels the others, and its error is raised.

    Raises:
        WeightBusError: of whichever failed first.
    """
    failures: list[WeightBusError] = []

    async def run(function: Callable[[], Awaitable[None]]) -> None:
        try:
            await function()
        except WeightBusError as error:
            failures.append(error)
            tasks.cancel_scope.cancel()

    async with anyio.create_task_group() as tasks:
        for function in functions:
            tasks.start_soon(run, function)
    if failures:
        raise failures[0]


async def enter_in_thread(
    stack: AsyncExitStack, context: AbstractContextManager[T], deadline_s: float
) -> T:
    """Enter a context whose entering blocks. Nobody waits for it after the deadline, or if it is
    cancelled: once it is entered, the thread leaves it at once.

    Args:
        stack: leaves it otherwise.

    Raises:
        DeadlineExceeded: it takes too long.
    """
    lock, left = threading.Lock(), False
    entered: list[T] = []

    def enter() -> None:
        value = context.__enter__()
        with lock:
            if not left:
                entered.append(value)
                return
        context.__exit__(None, None, None)

    try:
        with anyio.move_on_after(deadline_s):
            await anyio.to_thread.run_sync(enter, abandon_on_cancel=True)
    finally:
        with lock:
            left = True
        if entered:
            stack.push(context.__exit__)
    if not entered:
        raise DeadlineExceeded("loading of libraries", deadline_s)
    return entered[0]


class Calls:
    """Blocking calls in threads that are left to themselves when they are cancelled."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._running = 0
        self._then: list[Callable[[], None]] = []

    @property
    def running(self) -> int:
        """Calls that have not ended, whoever waits for them."""
        return self._running

    def when_ended(self, function: Callable[[], None]) -> None:
        """Call it once no call is running: now, or in the thread of the last one.

        What it raises in that thread is logged: nobody is there to hear it. Functions of several
        calls are called one after another, but one of them may not rely on that.
        """
        with self._lock:
            if self._running:
                self._then.append(function)
                return
        function()

    async def run(self, function: Callable[..., T], *args: Any) -> T:
        """`function(*args)` in a thread; on cancellation it goes on alone, if it has begun."""
        call = _Call()
        with self._lock:
            self._running += 1

        def work() -> T:
            with self._lock:
                if call.left:
                    raise _Left
                call.begun = True
            try:
                return function(*args)
            finally:
                self._end()

        try:
            return await anyio.to_thread.run_sync(work, abandon_on_cancel=True)
        finally:
            with self._lock:
                call.left = True
            if not call.begun:
                self._end()

    def _end(self) -> None:
        with self._lock:
            self._running -= 1
            then = [] if self._running else self._then
            if not self._running:
                self._then = []
        for function in then:
            try:
                function()
            except Exception:  # a defect, in a thread that has a result of its own to return
                _logger.exception("what was to follow a call that was left has failed")


class _Call:
    begun = False
    left = False


class _Left(Exception):
    """Nobody waits for the call that was about to begin."""
