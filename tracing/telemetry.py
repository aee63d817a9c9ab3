"""Spans, and the twin on the bus of every stage's span; and the meters of metrics.

Owns, if they are exported, a tracer provider and a `SpanShipper`, and a meter provider, of its own.
Touches no global of OpenTelemetry, but for the global meters where no metrics are exported: a
trainer that has set up metrics of its own gets ours with them. Invariants: a span always has ids,
exported or not; a `StageComplete` has the ids, the parent and the times of its span; no span ends
before it starts, whatever the wall clock does; nothing here waits while an update runs.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from typing import TYPE_CHECKING, Final

from msgspec import structs
from opentelemetry.context import Context
from opentelemetry.metrics import Meter, get_meter
from opentelemetry.trace import (
    Link,
    NonRecordingSpan,
    SpanContext,
    SpanKind,
    TraceFlags,
    Tracer,
)
from opentelemetry.trace import Span as OtelSpan

from weightbus.schemas.base import BucketTimings, RouteName, Stage
from weightbus.schemas.progress import StageComplete
from weightbus.tracing import attributes as names
from weightbus.tracing.attributes import AttributeValue, Destination
from weightbus.tracing.context import SpanRef
from weightbus.tracing.ids import in_trace, new_span_id, new_trace_id
from weightbus.tracing.lost import cause_told, lost_told
from weightbus.tracing.otlp import (
    ExportLosses,
    OtlpSettings,
    open_exporter,
)
from weightbus.tracing.span import Span, StageScope

if TYPE_CHECKING:
    from opentelemetry.sdk.metrics.export import MetricReader
    from opentelemetry.sdk.trace.export import SpanExporter

    from weightbus.tracing.sdk import OwnMeters
    from weightbus.tracing.shipping import SpanShipper

__all__ = ("Emit", "Span", "StageScope", "Telemetry", "open_telemetry")

Emit = Callable[[StageComplete], None]
"""Where a twin goes: queues it for the bus and returns at once. It must not raise."""

SHUTDOWN_S: Final = 2.0
"""How long a program that ends waits for its last spans to be sent."""

SPANS_SHARE: Final = 0.6
"""Of that, where the last metrics are sent after them; what the spans do not need is theirs."""

BUCKETS_AT_ONCE: Final = 128
"""Spans of buckets that are made between two looks at the queue."""

REASON_CHARACTERS: Final = 4096
"""Limit of `schemas.base.Reason`."""

_logger = logging.getLogger(__name__)


class Telemetry:
    """Makes spans. Without a tracer they have ids and go nowhere.

    Points in time are nanoseconds of the bus's clock. A function that gives the time now may be
    passed; without one it is this host's.
    """

    def __init__(
        self,
        tracer: Tracer | None = None,
        shipper: SpanShipper | None = None,
        meters: OwnMeters | None = None,
    ) -> None:
        self._tracer, self._shipper, self._meters = tracer, shipper, meters

    def meter(self, name: str) -> Meter:
        """The meter of one part of this program: where metrics are exported that of this service,
        else that of OpenTelemetry's global provider, which keeps nothing unless one was set."""
        return get_meter(name) if self._meters is None else self._meters.get(name)

    @property
    def metrics_url(self) -> str:
        """Where Prometheus reads the metrics of this process; empty: nowhere."""
        return "" if self._meters is None else self._meters.url

    @property
    def losses(self) -> ExportLosses:
        """Spans, and exports of metrics, that did not arrive, so far."""
        losses = ExportLosses() if self._shipper is None else self._shipper.losses
        refused = 0 if self._meters is None else self._meters.refused
        return structs.replace(losses, metrics_refused=refused)

    @contextmanager
    def span(
        self,
        name: str,
        *,
        kind: SpanKind = SpanKind.INTERNAL,
        parent: SpanRef | None = None,
        attributes: Mapping[str, AttributeValue] = {},
        links: Sequence[SpanRef] = (),
        now_ns: Callable[[], int] = time.time_ns,
    ) -> Iterator[Span]:
        """A span around a block; what the block raises marks it as failed and goes on.

        Without a parent it begins a trace of its own.
        """
        clock = _Stopwatch(now_ns())
        span = Span(self._begin(name, kind, parent, attributes, clock.start_ns, links))
        reason = ""
        try:
            yield span
        except BaseException as error:
            reason = _reason_of(error)
            raise
        finally:
            span.end(clock.now_ns(), reason)

    def publish_span(
        self,
        destination: Destination,
        *,
        model: str,
        version: int,
        producer: str,
        offset_ns: int = 0,
        residual_ns: int | None = None,
        now_ns: Callable[[], int] = time.time_ns,
    ) -> AbstractContextManager[Span]:
        """The producer's span of one version; its ref goes into the headers of the event.

        `offset_ns` and `residual_ns` as in `clock_attributes`.
        """
        return self.span(
            names.messaging_span_name("publish", destination.template),
            kind=SpanKind.PRODUCER,
            attributes={
                **names.messaging_attributes("send", "publish", destination),
                names.MODEL: model,
                names.VERSION: version,
                names.PRODUCER: producer,
                **names.clock_attributes(offset_ns, residual_ns),
            },
            now_ns=now_ns,
        )

    def begin_update(
        self,
        destination: Destination,
        scope: StageScope,
        *,
        start_ns: int,
        parent: SpanRef | None,
        trace_id: str = "",
        links: Sequence[SpanRef] = (),
        attributes: Mapping[str, AttributeValue] = {},
        message_id: str = "",
    ) -> Span:
        """A consumer's span of one update: child of the publish span, parent of its stages.

        Args:
            parent: the ref in the headers of `CheckpointReady`. The convention wants a link to it,
                too; it gets one.
            trace_id: of the trace that it begins if there is no parent; empty: any.
            links: to earlier attempts.
        """
        return Span(
            self._begin(
                names.messaging_span_name("update", destination.template),
                SpanKind.CONSUMER,
                parent,
                {
                    **names.messaging_attributes("process", "update", destination, message_id),
                    **scope.attributes(),
                    **attributes,
                },
                start_ns,
                links if parent is None else (parent, *links),
                trace_id,
            )
        )

    def record_span(
        self,
        name: str,
        *,
        start_ns: int,
        end_ns: int,
        parent: SpanRef,
        attributes: Mapping[str, AttributeValue] = {},
        error: str = "",
    ) -> SpanRef:
        """A span without a twin that has ended already."""
        span = Span(self._begin(name, SpanKind.INTERNAL, parent, attributes, start_ns))
        span.end(max(start_ns, end_ns), _shortened(error))
        return span.ref

    def record_stage(
        self,
        emit: Emit,
        scope: StageScope,
        stage: Stage,
        *,
        start_ns: int,
        end_ns: int,
        bytes: int = 0,
        buckets: BucketTimings = (),
        rank: int | None = None,
        route: RouteName | None = None,
        parent: SpanRef | None = None,
        error: str = "",
    ) -> SpanRef:
        """A stage that has ended already, timed inside a worker: its span, and its twin to `emit`.

        `buckets`, within it, are told by the twin; their spans are `record_buckets`'s. `error`, if
        it failed, begins with the name of the error class: `TornRead: segment ...`. An end before
        the start (a wall clock that was set back) counts as the start.
        """
        attributes = scope.attributes() | {names.STAGE: stage, names.BYTES: bytes}
        if rank is not None:
            attributes[names.RANK] = rank
        if route is not None:
            attributes[names.ROUTE] = route
        end_ns, error = max(start_ns, end_ns), _shortened(error)
        span = Span(self._begin(stage, SpanKind.INTERNAL, parent, attributes, start_ns))
        span.end(end_ns, error)
        emit(
            StageComplete(
                model=scope.model,
                version=scope.version,
                round=scope.round,
                engine=scope.engine,
                stage=stage,
                rank=rank,
                route=route,
                bytes=bytes,
                buckets=buckets,
                start_ns=start_ns,
                end_ns=end_ns,
                ok=not error,
                error=error,
                trace_id=span.ref.trace_id,
                span_id=span.ref.span_id,
                parent_span_id="" if parent is None else parent.span_id,
            )
        )
        return span.ref

    def record_buckets(
        self, stage: SpanRef, scope: StageScope, rank: int | None, buckets: BucketTimings
    ) -> None:
        """The spans of a stage's buckets, if spans are exported. Each takes some 50 us, and there
        may be thousands: the thread that exports them makes them."""
        if self._tracer is None:
            return
        attributes = scope.attributes()
        if rank is not None:
            attributes[names.RANK] = rank
        for first in range(0, len(buckets), BUCKETS_AT_ONCE):
            some = buckets[first : first + BUCKETS_AT_ONCE]
            make = partial(self._make_buckets, stage, attributes, first, some)
            if self._shipper is None:
                make()
            else:
                self._shipper.make_later(len(some), make)

    def _make_buckets(
        self,
        stage: SpanRef,
        attributes: Mapping[str, AttributeValue],
        first: int,
        buckets: BucketTimings,
    ) -> None:
        for number, bucket in enumerate(buckets, start=first):
            self.record_span(
                "bucket",
                start_ns=bucket.start_ns,
                end_ns=bucket.end_ns,
                parent=stage,
                attributes={**attributes, names.BUCKET: number, names.BYTES: bucket.bytes},
            )

    def _begin(
        self,
        name: str,
        kind: SpanKind,
        parent: SpanRef | None,
        attributes: Mapping[str, AttributeValue],
        start_ns: int,
        links: Sequence[SpanRef] = (),
        trace_id: str = "",
    ) -> OtelSpan:
        if trace_id and parent is None:
            with in_trace(int(trace_id, 16)):
                return self._begin(name, kind, None, attributes, start_ns, links)
        if self._tracer is None:
            return _unexported_span(parent)
        # A message's span has its parent in the process that sent the message.
        remote = kind is SpanKind.CONSUMER
        return self._tracer.start_span(
            name,
            context=Context() if parent is None else parent.as_parent(remote=remote),
            kind=kind,
            attributes=attributes,
            links=[Link(link.as_context(remote=remote)) for link in links],
            start_time=start_ns,
        )


@contextmanager
def open_telemetry(
    service: str,
    *,
    otlp: OtlpSettings | None = None,
    exporter: SpanExporter | None = None,
    reader: MetricReader | None = None,
    resource: Mapping[str, str] = {},
    shutdown_s: float = SHUTDOWN_S,
) -> Iterator[Telemetry]:
    """Telemetry of one process or service; its end waits at most `shutdown_s` for what is unsent.

    Spans go to the collector of `otlp`, or to `exporter`, or nowhere; metrics to that collector's
    `metrics_endpoint`, or to `reader`, and to whoever asks at its `prometheus`; where there is none
    of these to OpenTelemetry's global provider. `resource` adds attributes that all spans and
    metrics of this service have. Where Prometheus cannot ask at its address that is warned of.

    Raises:
        ExporterMissing: `otlp` is given, but the extra `otlp` is not installed.
        PrometheusMissing: the extra `prometheus` is not installed, and `otlp` asks for it.
    """
    if otlp is not None and otlp.endpoint:
        exporter = open_exporter(otlp)
    meters: OwnMeters | None = None
    shipper: SpanShipper | None = None
    tracer: Tracer | None = None
    if reader is not None or (otlp is not None and (otlp.metrics_endpoint or otlp.prometheus)):
        from weightbus.tracing.sdk import open_meters

        meters = open_meters(service, otlp, reader, resource)
    if exporter is not None:
        from weightbus.tracing.sdk import make_tracer
        from weightbus.tracing.shipping import SpanShipper

        shipper = SpanShipper(exporter)
        tracer = make_tracer(service, shipper, resource)
    telemetry = Telemetry(tracer, shipper, meters)
    if meters is not None:
        meters.tell_losses(lambda: telemetry.losses)
    try:
        yield telemetry
    finally:
        end_s = time.monotonic() + shutdown_s
        if shipper is not None:  # first: the last metrics tell what was lost of it
            spans_s = shutdown_s * (1 if meters is None else SPANS_SHARE)
            _close_shipper(shipper, service, "" if otlp is None else otlp.endpoint, spans_s)
        if meters is not None:
            meters.close(max(0.0, end_s - time.monotonic()))


def _close_shipper(shipper: SpanShipper, service: str, endpoint: str, shutdown_s: float) -> None:
    losses = shipper.close(shutdown_s)
    if losses.total:
        _logger.warning(
            "%s: %d not taken by a collector, %d unsent at the end, %d without room; %s",
            lost_told(losses.total, "span", "spans", service),
            losses.refused,
            losses.unsent,
            losses.queue_full,
            cause_told(endpoint, str(shipper.last_error or "")),
        )


class _Stopwatch:
    """Time that cannot run backwards: from its start on it goes by the steady clock."""

    def __init__(self, start_ns: int) -> None:
        self.start_ns = start_ns
        self._started_ns = time.perf_counter_ns()

    def now_ns(self) -> int:
        return self.start_ns + time.perf_counter_ns() - self._started_ns


def _unexported_span(parent: SpanRef | None) -> OtelSpan:
    """A span that has ids, those of its trace if there is one, and is recorded nowhere."""
    inherited = None if parent is None else parent.as_context()
    return NonRecordingSpan(
        SpanContext(
            trace_id=new_trace_id() if inherited is None else inherited.trace_id,
            span_id=new_span_id(),
            is_remote=False,
            trace_flags=TraceFlags(TraceFlags.SAMPLED)
            if inherited is None
            else inherited.trace_flags,
            trace_state=None if inherited is None else inherited.trace_state,
        )
    )


def _reason_of(error: BaseException) -> str:
    """`TornRead: segment ...`, or the class name alone when the error says nothing."""
    return _shortened(f"{type(error).__name__}: {error}".removesuffix(": "))


def _shortened(reason: str) -> str:
    """Within the limit of a message's reason."""
    return reason if len(reason) <= REASON_CHARACTERS else reason[: REASON_CHARACTERS - 3] + "..."
