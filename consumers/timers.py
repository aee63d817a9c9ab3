"""Named timers for a round machine: each fires once, a new one replaces its namesake.

Owns one task per running timer, in the caller's task group.
"""

from __future__ import annotations

from collections.abc import Callable

import anyio
from anyio.abc import TaskGroup

from weightbus.consumers.round.instructions import SetTimer

__all__ = ("Timers",)


class Timers:
    """Sleeps until a point in time, then calls back with the timer's name and token."""

    def __init__(
        self, group: TaskGroup, now_ns: Callable[[], int], fire: Callable[[str, int], None]
    ) -> None:
        self._group = group
        self._now_ns = now_ns
        self._fire = fire
        self._scopes: dict[str, anyio.CancelScope] = {}

    def set_nowait(self, timer: SetTimer) -> None:
        """Start a timer; one of the same name is forgotten."""
        self.cancel_nowait(timer.name)
        scope = anyio.CancelScope()
        self._scopes[timer.name] = scope
        self._group.start_soon(self._run, timer, scope)

    def cancel_nowait(self, name: str) -> None:
        """Forget a timer; nothing happens if there is none."""
        if (scope := self._scopes.pop(name, None)) is not None:
            scope.cancel()

    async def _run(self, timer: SetTimer, scope: anyio.CancelScope) -> None:
        with scope:
            await anyio.sleep(max(0, timer.at_ns - self._now_ns()) / 1e9)
            if self._scopes.get(timer.name) is scope:
                del self._scopes[timer.name]
            self._fire(timer.name, timer.token)
