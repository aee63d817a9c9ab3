"""No exporter, however broken, makes a span's end wait or the shutdown exceed its deadline."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from functools import partial

from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import SpanExporter, SpanExportResult

from weightbus.tracing.otlp import ExportLosses
from weightbus.tracing.shipping import SpanShipper

GENEROUS_S = 30.0


class FakeExporter(SpanExporter):
    """Takes batches as a test wants them taken."""

    def __init__(self, *, result: SpanExportResult | Exception = SpanExportResult.SUCCESS) -> None:
        self.result = result
        self.batches: list[list[str]] = []
        self.entered = threading.Event()
        self.gate = threading.Event()
        self.gate.set()
        self.closed = threading.Event()

    def export(self, spans: Sequence[ReadableSpan]) -> SpanExportResult:
        self.entered.set()
        self.gate.wait(GENEROUS_S)
        if isinstance(self.result, Exception):
            raise self.result
        self.batches.append([span.name for span in spans])
        return self.result

    def shutdown(self) -> None:
        self.closed.set()


def end_spans(shipper: SpanShipper, *names: str) -> None:
    """Begin and end one span of each name."""
    provider = TracerProvider(shutdown_on_exit=False)
    provider.add_span_processor(shipper)
    for name in names:
        provider.get_tracer("test").start_span(name).end()


def test_shipper_delivers_everything_in_batches_when_it_is_closed() -> None:
    exporter = FakeExporter()
    shipper = SpanShipper(exporter, batch_spans=2, batch_delay_s=GENEROUS_S)
    end_spans(shipper, "a", "b", "c")
    assert shipper.close(GENEROUS_S) == ExportLosses()
    assert exporter.batches == [["a", "b"], ["c"]]
    assert exporter.closed.is_set()


def test_shipper_sends_without_being_closed_when_the_delay_is_over() -> None:
    exporter = FakeExporter()
    shipper = SpanShipper(exporter, batch_delay_s=0.001)
    end_spans(shipper, "a")
    assert exporter.entered.wait(GENEROUS_S)
    shipper.close(GENEROUS_S)


def test_shipper_drops_and_counts_when_the_queue_is_full() -> None:
    exporter = FakeExporter()
    exporter.gate.clear()
    shipper = SpanShipper(exporter, queue_spans=2, batch_spans=1, batch_delay_s=0.001)
    end_spans(shipper, "on its way")
    assert exporter.entered.wait(GENEROUS_S)
    end_spans(shipper, "a", "b", "c", "d", "e")
    assert shipper.losses == ExportLosses(queue_full=3)
    exporter.gate.set()
    assert shipper.close(GENEROUS_S) == ExportLosses(queue_full=3)
    assert exporter.batches == [["on its way"], ["a"], ["b"]]


def test_shipper_counts_what_the_exporter_refuses() -> None:
    shipper = SpanShipper(FakeExporter(result=SpanExportResult.FAILURE))
    end_spans(shipper, "a", "b")
    assert shipper.close(GENEROUS_S) == ExportLosses(refused=2)


def test_shipper_goes_on_and_keeps_the_error_when_the_exporter_raises() -> None:
    error = ConnectionError("no route")
    shipper = SpanShipper(FakeExporter(result=error), batch_spans=1)
    end_spans(shipper, "a", "b")
    assert shipper.close(GENEROUS_S) == ExportLosses(refused=2)
    assert shipper.last_error is error


def test_shipper_closes_within_its_deadline_when_the_exporter_hangs() -> None:
    exporter = FakeExporter()
    exporter.gate.clear()
    shipper = SpanShipper(exporter, batch_spans=2, batch_delay_s=GENEROUS_S)
    end_spans(shipper, "a", "b", "c")
    assert exporter.entered.wait(GENEROUS_S)
    before = time.monotonic()
    assert shipper.close(0.05) == ExportLosses(unsent=3)
    assert time.monotonic() - before < GENEROUS_S / 2
    exporter.gate.set()
    assert exporter.closed.wait(GENEROUS_S), "the thread ends once the exporter lets go"
    assert shipper.losses == ExportLosses(unsent=3)


def test_shipper_counts_spans_that_end_after_it_was_closed() -> None:
    shipper = SpanShipper(FakeExporter())
    assert shipper.close(GENEROUS_S) == ExportLosses()
    end_spans(shipper, "late")
    assert shipper.losses == ExportLosses(queue_full=1)


def test_spans_that_are_made_late_are_delivered_and_overflow_nothing() -> None:
    exporter = FakeExporter()
    shipper = SpanShipper(exporter, queue_spans=4, batch_spans=4, batch_delay_s=0.001)
    end_spans(shipper, "a")
    for number in range(5):
        names = f"{number}x", f"{number}y", f"{number}z"
        shipper.make_later(3, partial(end_spans, shipper, *names))
    assert shipper.close(GENEROUS_S) == ExportLosses()
    sent = [name for batch in exporter.batches for name in batch]
    assert sorted(sent) == sorted(["a", *(f"{n}{c}" for n in range(5) for c in "xyz")])


def test_thread_goes_on_when_what_was_to_be_made_late_is_not_sampled() -> None:
    exporter = FakeExporter()
    shipper = SpanShipper(exporter, batch_delay_s=0.001)
    was_called = threading.Event()
    shipper.make_later(1, was_called.set)
    assert was_called.wait(GENEROUS_S)
    end_spans(shipper, "a")
    assert exporter.entered.wait(GENEROUS_S)
    assert shipper.close(GENEROUS_S) == ExportLosses()


def test_spans_that_are_not_made_by_the_deadline_are_counted_once() -> None:
    exporter, makes, gate = FakeExporter(), threading.Event(), threading.Event()
    shipper = SpanShipper(exporter, batch_delay_s=0.001)

    def make() -> None:
        makes.set()
        gate.wait(GENEROUS_S)
        end_spans(shipper, "a", "b")

    shipper.make_later(2, make)
    assert makes.wait(GENEROUS_S)
    shipper.make_later(3, partial(end_spans, shipper, "c", "d", "e"))
    assert shipper.close(0.05) == ExportLosses(unsent=5)
    gate.set()
    assert exporter.closed.wait(GENEROUS_S)
    assert (shipper.losses, exporter.batches) == (ExportLosses(unsent=5), [])


def test_spans_that_are_to_be_made_after_the_end_are_counted() -> None:
    shipper = SpanShipper(FakeExporter())
    shipper.close(GENEROUS_S)
    shipper.make_later(3, partial(end_spans, shipper, "a", "b", "c"))
    assert shipper.losses == ExportLosses(queue_full=3)


def test_full_batches_of_spans_that_are_made_late_wait_for_no_delay() -> None:
    exporter = FakeExporter()
    all_sent = threading.Event()
    shipper = SpanShipper(exporter, batch_spans=4, batch_delay_s=GENEROUS_S)
    for number in range(6):
        last = [all_sent.set] if number == 5 else []
        shipper.make_later(2, partial(_make, shipper, last))
    assert all_sent.wait(GENEROUS_S / 2), f"{exporter.batches} were sent without being closed"
    assert shipper.close(GENEROUS_S) == ExportLosses()
    assert [len(batch) for batch in exporter.batches] == [4, 4, 4]


def _make(shipper: SpanShipper, then: Sequence[Callable[[], None]] = ()) -> None:
    end_spans(shipper, "x", "y")
    for call in then:
        call()


def test_what_waits_to_be_made_is_bounded_and_the_rest_counted_when_the_exporter_hangs() -> None:
    exporter = FakeExporter()
    exporter.gate.clear()
    shipper = SpanShipper(exporter, late_spans=6, batch_spans=2, batch_delay_s=0.001)
    end_spans(shipper, "a", "b")
    assert exporter.entered.wait(GENEROUS_S)
    for _ in range(5):
        shipper.make_later(2, partial(end_spans, shipper, "x", "y"))
    assert shipper.losses == ExportLosses(queue_full=4)
    exporter.gate.set()
    assert shipper.close(GENEROUS_S) == ExportLosses(queue_full=4)
    assert [len(batch) for batch in exporter.batches] == [2, 2, 2, 2]


def test_thread_goes_on_and_counts_the_spans_when_making_them_raises() -> None:
    exporter = FakeExporter()
    shipper = SpanShipper(exporter, batch_delay_s=0.001)
    error = ValueError("no such attribute")

    def make() -> None:
        end_spans(shipper, "made")
        raise error

    shipper.make_later(3, make)
    shipper.make_later(1, partial(end_spans, shipper, "after"))
    assert shipper.close(GENEROUS_S) == ExportLosses(refused=2)
    assert shipper.last_error is error
    assert sorted(name for batch in exporter.batches for name in batch) == ["after", "made"]


def test_spans_that_were_made_by_the_deadline_are_not_counted_twice() -> None:
    exporter, made, gate = FakeExporter(), threading.Event(), threading.Event()
    shipper = SpanShipper(exporter, batch_delay_s=0.001)

    def make() -> None:
        end_spans(shipper, "a")
        made.set()
        gate.wait(GENEROUS_S)
        end_spans(shipper, "b")

    shipper.make_later(2, make)
    assert made.wait(GENEROUS_S)
    assert shipper.close(0.05) == ExportLosses(unsent=2)
    gate.set()
    assert exporter.closed.wait(GENEROUS_S)
    assert shipper.losses == ExportLosses(unsent=2)
