"""One clock for all: that of the NATS server, measured by requests that say what time it is there.

Owns the readings of one connection and does no I/O but `probe`. Everything that the project says of
times is bus time, put on it where it is taken, so that no reader corrects anything. Invariants: a
reading never changes, and does not step when this host's wall clock is set; a clock that cannot be
measured is this host's own, and says so by a residual of None; nothing here raises because of the
bus.

Of several answers the quickest counts: the server's time stamp was made between request and answer,
so that its offset from the middle of both is off by half the round trip at most, however unlike the
two ways are (Cristian, 1989). Between measurements the residual grows by `DRIFT_PPM`: what clocks
that run freely drift. It does not cover a clock that is being slewed (by 500 ppm at most, seldom):
until the next measurement its times may be off by more than stated, by 5 ms after `EVERY_S`. An
allowance for that would hide how exact they are all the other time.
"""

from __future__ import annotations

import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import Final

import anyio

from weightbus.bus.errors import BusError, BusUnavailable
from weightbus.bus.link import Interrupted, NoResponders

__all__ = ("BusClock", "ClockReading", "HostClock")

DRIFT_PPM: Final = 30
"""By how much two clocks drift apart: each by 15 ppm (RFC 5905, PHI), unless one is slewed."""

PROBES: Final = 3
"""Requests of one measurement."""

FIRST_PROBES: Final = 5
"""Of the first, which finds nothing ready."""

OPEN_WITHIN_S: Final = 0.25
"""What the first measurement may take: a bus that is far away is measured after it was opened."""

MEASURE_WITHIN_S: Final = 5.0
"""What later ones may take."""

EVERY_S: Final = 10.0
"""Pause between measurements: 0.3 ms of drift."""

_MILLION = 10**6


@dataclass(frozen=True, slots=True)
class HostClock:
    """The clocks of this host, in nanoseconds; others only in tests."""

    wall_ns: Callable[[], int] = time.time_ns
    """Since the Unix epoch, as other processes of this host have it; may be set at any time."""
    steady_ns: Callable[[], int] = time.monotonic_ns
    """Since some time; never set."""


@dataclass(frozen=True, slots=True)
class ClockReading:
    """What was known of the bus's clock at one time. Whoever keeps one sees no step."""

    steady_offset_ns: int
    """Bus time minus this host's steady clock."""
    error_ns: int | None = None
    """By how much it was off at most; None: not measured, the time is this host's."""
    taken_ns: int = 0
    """When, by the steady clock."""
    host: HostClock = field(default_factory=HostClock)

    def now_ns(self) -> int:
        """Bus time now, in nanoseconds since the Unix epoch; never runs backwards."""
        return self.host.steady_ns() + self.steady_offset_ns

    def bus_ns(self, wall_ns: int) -> int:
        """The bus time of what a process of this host timed by its wall clock, not long ago."""
        return wall_ns + self.offset_ns

    def at_steady_ns(self, steady_ns: int) -> int:
        """The bus time of what this process timed by its steady clock."""
        return steady_ns + self.steady_offset_ns

    @property
    def offset_ns(self) -> int:
        """Bus time minus this host's wall clock, now."""
        return self.steady_offset_ns - (self.host.wall_ns() - self.host.steady_ns())

    @property
    def residual_ns(self) -> int | None:
        """By how much times are off at most, drift since the measurement allowed for; None: not
        measured."""
        if self.error_ns is None:
            return None
        age_ns = max(0, self.host.steady_ns() - self.taken_ns)
        return self.error_ns + age_ns * DRIFT_PPM // _MILLION


class BusClock:
    """The clock of one bus, for one process."""

    def __init__(self, probe: Callable[[], Awaitable[int]], host: HostClock | None = None) -> None:
        """`probe` asks the server for its time. It may raise `BusError`, and what a link raises."""
        self._probe = probe
        self.host = host or HostClock()
        """The clocks of this process."""
        steady_ns = self.host.steady_ns()
        self._reading = ClockReading(self.host.wall_ns() - steady_ns, None, steady_ns, self.host)
        self._again = anyio.Event()
        self._anew = False

    def reading(self) -> ClockReading:
        """The best that is known now; to be kept for as long as times must not step."""
        return self._reading

    def now_ns(self) -> int:
        """Bus time now; may step by the residual from one call to the next."""
        return self._reading.now_ns()

    def bus_ns(self, wall_ns: int) -> int:
        """As `ClockReading.bus_ns`."""
        return self._reading.bus_ns(wall_ns)

    def reconnected_nowait(self) -> None:
        """The server may be another one: what was measured does not count beside what will be."""
        self._anew = True
        self._again.set()

    def failed_nowait(self, error: BusUnavailable) -> None:
        """There is nobody left to ask."""

    async def measure(self, within_s: float = MEASURE_WITHIN_S, probes: int = PROBES) -> bool:
        """Ask, and take the best answer if it is better than what is known. True: one came."""
        best: ClockReading | None = None
        anew = self._anew
        with anyio.move_on_after(within_s):
            for _ in range(probes):
                try:
                    reading = await self._ask()
                except (BusError, Interrupted, NoResponders):
                    break
                if best is None or _error_of(reading) < _error_of(best):
                    best = reading
        if best is None:
            return False
        if anew or self._is_better(best):
            self._anew = self._anew and not anew
            self._reading = best
        return True

    async def run(self, every_s: float = EVERY_S) -> None:
        """Measure again and again, and at once after a reconnect."""
        while True:
            with anyio.move_on_after(every_s):
                await self._again.wait()
            self._again = anyio.Event()
            await self.measure()

    async def _ask(self) -> ClockReading:
        sent_ns = self.host.steady_ns()
        bus_ns = await self._probe()
        heard_ns = self.host.steady_ns()
        middle_ns = (sent_ns + heard_ns) // 2
        error_ns = (heard_ns - sent_ns + 1) // 2
        return ClockReading(bus_ns - middle_ns, error_ns, heard_ns, self.host)

    def _is_better(self, found: ClockReading) -> bool:
        """More exact than what is known, or not to be reconciled with it: then a clock was set, or
        this host slept."""
        known_ns, found_ns = self._reading.residual_ns, _error_of(found)
        if known_ns is None or found_ns <= known_ns:
            return True
        apart_ns = abs(found.steady_offset_ns - self._reading.steady_offset_ns)
        return apart_ns > known_ns + found_ns


def _error_of(reading: ClockReading) -> int:
    assert reading.error_ns is not None, "it was measured"
    return reading.error_ns
