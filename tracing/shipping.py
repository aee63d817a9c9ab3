"""Hands ended spans to an exporter, from a thread of its own, and counts what does not arrive.

Owns one daemon thread and two bounded queues. Invariants: `on_end` never waits for the exporter and
never raises, so a collector that is absent, slow or refuses costs an update nothing; the exporter
is touched by the thread alone; `close` returns within its deadline, whatever the exporter does;
every span is either delivered or counted in `losses`. Spans that are many and can be made after
the fact are made by the thread, too (`make_later`), as there is room for them; how many may wait
for that is bounded, and what makes them may raise.

OpenTelemetry's own `BatchSpanProcessor` promises none of the last three: its drops are not counted,
and its shutdown hands the exporter no deadline (open-telemetry/opentelemetry-python issue 4555).
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable
from typing import TYPE_CHECKING, Final

from opentelemetry.sdk.trace import SpanProcessor
from opentelemetry.sdk.trace.export import SpanExporter, SpanExportResult

from weightbus.tracing.errors import CollectorRefused
from weightbus.tracing.otlp import ExportLosses

if TYPE_CHECKING:
    from opentelemetry.sdk.trace import ReadableSpan

__all__ = ("SpanShipper",)

QUEUE_SPANS: Final = 4096
"""Spans that may wait; what comes on top of a full queue is dropped."""

LATE_SPANS: Final = 32_768
"""Spans that may wait to be made; what comes on top is dropped."""

BATCH_SPANS: Final = 512
"""Most spans of one export."""

BATCH_DELAY_S: Final = 1.0
"""How long a batch that is not full waits for more."""


class SpanShipper(SpanProcessor):
    """A span processor with bounded memory, bounded shutdown and a count of its losses."""

    def __init__(
        self,
        exporter: SpanExporter,
        *,
        queue_spans: int = QUEUE_SPANS,
        late_spans: int = LATE_SPANS,
        batch_spans: int = BATCH_SPANS,
        batch_delay_s: float = BATCH_DELAY_S,
    ) -> None:
        self._exporter = exporter
        self._queue_spans, self._late_spans = queue_spans, late_spans
        self._batch_spans = batch_spans
        self._batch_delay_s = batch_delay_s
        self._changed = threading.Condition()
        self._waiting: deque[ReadableSpan] = deque()
        self._late: deque[tuple[int, Callable[[], None]]] = deque()
        self._late_waiting = 0
        """Spans of all of `_late`."""
        self._exporting = self._making = 0
        """On their way; still to be made by what is called now."""
        self._closing = self._given_up = False
        self._queue_full = self._refused = self._unsent = 0
        self.last_error: Exception | None = None
        """What the exporter, or a `make`, raised last, if it ever raised."""
        self._thread = threading.Thread(target=self._run, name="weightbus-spans", daemon=True)
        self._thread.start()

    @property
    def losses(self) -> ExportLosses:
        """What was lost so far."""
        with self._changed:
            return ExportLosses(
                queue_full=self._queue_full, refused=self._refused, unsent=self._unsent
            )

    def on_end(self, span: ReadableSpan) -> None:
        """Queue a span that has ended; drop and count it when there is no room."""
        if span.context is None or not span.context.trace_flags.sampled:
            return
        with self._changed:
            is_late = threading.current_thread() is self._thread
            if is_late:
                self._making = max(0, self._making - 1)
                if self._given_up:
                    return  # it is counted
            if (self._closing and not is_late) or len(self._waiting) >= self._queue_spans:
                self._queue_full += 1
            else:
                self._waiting.append(span)
                self._changed.notify()

    def make_later(self, spans: int, make: Callable[[], None]) -> None:
        """Have `make` called, which begins and ends so many spans, at most `BATCH_SPANS`; drop and
        count them when there is no room."""
        with self._changed:
            if self._closing or self._late_waiting + spans > self._late_spans:
                self._queue_full += spans
            else:
                self._late.append((spans, make))
                self._late_waiting += spans
                self._changed.notify()

    def close(self, deadline_s: float) -> ExportLosses:
        """Send what waits, for at most `deadline_s`, then give up the rest. Idempotent."""
        with self._changed:
            self._closing = True
            self._changed.notify()
        self._thread.join(deadline_s)
        with self._changed:
            self._given_up = True
            late = self._late_waiting + self._making
            self._unsent += len(self._waiting) + self._exporting + late
            self._waiting.clear()
            self._late.clear()
            self._exporting = self._late_waiting = self._making = 0
        return self.losses

    def _run(self) -> None:
        while batch := self._next_batch():
            lost = self._export(batch)
            with self._changed:
                self._refused += min(lost, self._exporting)  # 0 once `close` has given it up
                self._exporting = 0
        self._exporter.shutdown()

    def _next_batch(self) -> tuple[ReadableSpan, ...]:
        """Wait for spans; empty once closed and nothing is left."""
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._waiting or self._late or self._closing)
                self._changed.wait_for(self._batch_is_due, self._batch_delay_s)
            self._make_late()
            with self._changed:
                size = min(len(self._waiting), self._batch_spans)
                if size or (self._closing and not self._late):
                    self._exporting = size
                    return tuple(self._waiting.popleft() for _ in range(size))

    def _make_late(self) -> None:
        """As many as make a batch full, and no queue."""
        while True:
            with self._changed:
                room = self._batch_spans - len(self._waiting)
                if not self._late or (self._waiting and self._late[0][0] > room):
                    return
                self._making, make = self._late.popleft()
                self._late_waiting -= self._making
            try:
                make()
            except Exception as error:  # noqa: BLE001 - counted, and told at the end
                self.last_error = error
                with self._changed:
                    self._refused += self._making  # 0 once `close` has given them up
            with self._changed:
                self._making = 0

    def _batch_is_due(self) -> bool:
        return self._closing or len(self._waiting) + self._late_waiting >= self._batch_spans

    def _export(self, batch: tuple[ReadableSpan, ...]) -> int:
        """How many are lost."""
        try:
            if self._exporter.export(batch) is not SpanExportResult.SUCCESS:
                return len(batch)
        except Exception as error:  # noqa: BLE001 - foreign code; counted, and told at the end
            self.last_error = error
            return len(batch)
        rejected = getattr(self._exporter, "rejected", 0)
        if rejected:
            self.last_error = CollectorRefused(getattr(self._exporter, "why", ""))
        return int(rejected)
