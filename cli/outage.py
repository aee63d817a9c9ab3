"""Whether a command's bus is lost, said while it is, and not only once it is back."""

from __future__ import annotations

from collections.abc import Callable

import anyio

from weightbus.bus.connection import Bus
from weightbus.tracing.narration import time_of_day

__all__ = ("Outage", "tell_outages")

LOOK_S = 0.5


class Outage:
    """What is known of one bus; sees of it what its looks see."""

    def __init__(self, bus: Bus) -> None:
        self._bus = bus
        self._since = ""

    def look(self) -> str:
        """A line that says since when the bus is lost; empty: it is there."""
        if self._bus.is_connected:
            self._since = ""
            return ""
        self._since = self._since or time_of_day(self._bus.clock.now_ns())
        return f"bus lost, trying since {self._since}"


async def tell_outages(bus: Bus, tell: Callable[[str], None]) -> None:
    """Tell the line of `Outage.look` once it has changed, until cancelled; at first it is empty."""
    outage, told = Outage(bus), ""
    while True:
        if (line := outage.look()) != told:
            tell(line)
            told = line
        await anyio.sleep(LOOK_S)
