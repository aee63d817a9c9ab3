"""Which span a message belongs to, and how that travels: W3C trace context in message headers.

Does no I/O and keeps no current span: a parent is always passed on, never found around it.
"""

from __future__ import annotations

from collections.abc import Mapping

from msgspec import Struct
from opentelemetry.context import Context
from opentelemetry.trace import (
    NonRecordingSpan,
    SpanContext,
    TraceFlags,
    TraceState,
    format_span_id,
    format_trace_id,
    get_current_span,
    set_span_in_context,
)
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

__all__ = ("SpanRef",)

_PROPAGATOR = TraceContextTextMapPropagator()


class SpanRef(Struct, frozen=True):
    """One span of one trace, as it is named in message headers and in `StageComplete`."""

    trace_id: str
    """32 hexadecimal digits."""
    span_id: str
    """16 hexadecimal digits."""
    sampled: bool = True
    """False: whoever began the trace does not want it exported."""
    tracestate: str = ""
    """What tracing vendors passed along; handed on as it is."""

    def headers(self) -> dict[str, str]:
        """The message headers that name this span: `traceparent`, and `tracestate` if any."""
        carrier: dict[str, str] = {}
        _PROPAGATOR.inject(carrier, self.as_parent())
        return carrier

    @classmethod
    def from_headers(cls, headers: Mapping[str, str]) -> SpanRef | None:
        """The span that a message was sent in; None if its headers name none, or not a valid one.

        Header names match in any case: other clients write `Traceparent`.
        """
        carrier = {name.lower(): value for name, value in headers.items()}
        found = get_current_span(_PROPAGATOR.extract(carrier, Context())).get_span_context()
        return cls.of(found) if found.is_valid else None

    @classmethod
    def of(cls, context: SpanContext) -> SpanRef:
        """The reference to a span of OpenTelemetry."""
        return cls(
            trace_id=format_trace_id(context.trace_id),
            span_id=format_span_id(context.span_id),
            sampled=bool(context.trace_flags & TraceFlags.SAMPLED),
            tracestate=context.trace_state.to_header(),
        )

    def as_context(self, *, remote: bool = False) -> SpanContext:
        """This span for OpenTelemetry; `remote`: it was begun in another process."""
        return SpanContext(
            trace_id=int(self.trace_id, 16),
            span_id=int(self.span_id, 16),
            is_remote=remote,
            trace_flags=TraceFlags(TraceFlags.SAMPLED if self.sampled else TraceFlags.DEFAULT),
            trace_state=TraceState.from_header([self.tracestate]) if self.tracestate else None,
        )

    def as_parent(self, *, remote: bool = False) -> Context:
        """A context of OpenTelemetry in which a span begun is a child of this one."""
        return set_span_in_context(NonRecordingSpan(self.as_context(remote=remote)), Context())
