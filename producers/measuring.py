"""Measures what publishing costs a trainer, and counts what came of it. Does no I/O.

The same numbers go to the version's span and to the meter `weightbus.producer`.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial

from weightbus.producers.announcing import Announcer
from weightbus.producers.devices import Handover
from weightbus.producers.skipping import cause_of
from weightbus.producers.slots import Slots
from weightbus.schemas.progress import DeadLetter
from weightbus.tracing.attributes import BLOCKED_S, SLOT_BYTES, WAITED_S
from weightbus.tracing.metric_names import BUS_METER, PRODUCER_METER
from weightbus.tracing.metrics import BusMetrics, PublisherMetrics
from weightbus.tracing.telemetry import Span, Telemetry

__all__ = ("BlockedClock", "Measures")


class BlockedClock:
    """How long a trainer cannot go on: from when it hands a part over until its tensors are copied,
    or until all is done if it waits for that."""

    def __init__(self, handover: Handover) -> None:
        self._begun_s, self._end_s = handover.begun_s, math.inf
        self.handover = handover
        """To be used in place of the one that was given."""
        if handover.goes_on:
            self.handover = replace(handover, copied=partial(self._go_on, handover.copied))

    def blocked_s(self) -> float:
        """Until now, or until it went on."""
        return min(self._end_s, time.perf_counter()) - self._begun_s

    def _go_on(self, copied: Callable[[], None]) -> None:
        self._end_s = time.perf_counter()
        copied()


class Measures:
    """Of one rank's publisher."""

    def __init__(self, announcer: Announcer, slots: Slots, telemetry: Telemetry, rank: int) -> None:
        self._announcer, self._slots = announcer, slots
        self._kinds: set[str] = set()
        self._metrics = PublisherMetrics(
            telemetry.meter(PRODUCER_METER),
            model=announcer.model,
            producer=announcer.producer,
            rank=rank,
        )
        slots.waiting = self._metrics.waiting
        self._bus_metrics = BusMetrics(
            telemetry.meter(BUS_METER),
            model=announcer.model,
            reporter=announcer.bus.settings.name,
        )

    @contextmanager
    def count(self, version: int) -> Iterator[None]:
        """Around everything that publishing a version takes."""
        try:
            yield
        except BaseException as error:
            if not self._announcer.is_offered(version):
                self._metrics.skipped(cause_of(error))
            raise
        self._metrics.published()

    @contextmanager
    def measure(self, clock: BlockedClock, span: Span) -> Iterator[None]:
        """The same, of a version that is written into slots."""
        self._slots.waited_s = 0.0
        try:
            yield
        finally:
            blocked_s, sizes = clock.blocked_s(), self._slots.size_bytes
            self._metrics.blocked(blocked_s, self._slots.waited_s)
            self._metrics.slots(sizes)
            self._kinds |= sizes.keys()
            span.set(BLOCKED_S, blocked_s)
            span.set(WAITED_S, self._slots.waited_s)
            span.set(SLOT_BYTES, sum(sizes.values()))

    def dead_letter(self, letter: DeadLetter) -> None:
        """The connection could not read something."""
        self._bus_metrics.dead_letter(letter)

    def freed(self) -> None:
        """The slots are gone."""
        self._metrics.slots(dict.fromkeys(self._kinds, 0))
