"""Virtual time, one source of chance, and a log: what everything in a simulation is made of."""

from __future__ import annotations

import heapq
import random
from collections.abc import Callable
from typing import Any

__all__ = ("NS_PER_S", "Broken", "World")

NS_PER_S = 1_000_000_000
EPOCH_NS = 1_700_000_000 * NS_PER_S
"""When every simulation begins."""


class Broken(AssertionError):
    """An invariant does not hold."""


class World:
    """Runs callbacks in the order of virtual time. Nothing else in a simulation moves time or rolls
    dice, so that a seed replays exactly."""

    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)
        self.now_ns = EPOCH_NS
        self.steps = 0
        self._queue: list[tuple[int, int, Callable[..., None], tuple[Any, ...]]] = []
        self._numbers = 0
        self._log: list[tuple[int, str, str, object]] = []

    @property
    def now_s(self) -> float:
        """Seconds since the simulation began."""
        return (self.now_ns - EPOCH_NS) / NS_PER_S

    def at(self, at_ns: int, call: Callable[..., None], *args: Any) -> None:
        """Call back at a point in time; at once, but not within this call, if it is past."""
        self._numbers += 1
        heapq.heappush(self._queue, (max(at_ns, self.now_ns), self._numbers, call, args))

    def after(self, delay_s: float, call: Callable[..., None], *args: Any) -> None:
        """Call back in `delay_s`."""
        self._numbers += 1
        at_ns = self.now_ns + int(delay_s * NS_PER_S)
        heapq.heappush(self._queue, (at_ns, self._numbers, call, args))

    def chance(self, probability: float) -> bool:
        return probability > 0 and self.random.random() < probability

    def between(self, low: float, high: float) -> float:
        return low + (high - low) * self.random.random()

    def note(self, who: str, what: str, detail: object = "") -> None:
        """Keep a line of the log; it is rendered only if someone wants to read it."""
        self._log.append((self.now_ns, who, what, detail))

    def run(self, until_s: float) -> None:
        """Run everything that happens until `until_s`."""
        until_ns = EPOCH_NS + int(until_s * NS_PER_S)
        queue = self._queue
        while queue and queue[0][0] <= until_ns:
            self.now_ns, _, call, args = heapq.heappop(queue)
            self.steps += 1
            call(*args)
        self.now_ns = until_ns

    def log(self, last: int | None = None) -> str:
        """The log as text: all of it, or its last lines."""
        lines = self._log if last is None else self._log[-last:]
        return "\n".join(
            f"{(at_ns - EPOCH_NS) / NS_PER_S:10.4f}  {who:14} {what:14} {detail}"
            for at_ns, who, what, detail in lines
        )
