"""Spans that are open, and what the spans of one update share. Does no I/O."""

from __future__ import annotations

from msgspec import Struct
from opentelemetry.trace import Span as OtelSpan
from opentelemetry.trace import Status, StatusCode

from weightbus.tracing import attributes as names
from weightbus.tracing.attributes import AttributeValue
from weightbus.tracing.context import SpanRef

__all__ = ("Span", "StageScope")


class StageScope(Struct, frozen=True):
    """Whose update a stage belongs to."""

    model: str
    version: int
    round: str
    engine: str

    def attributes(self) -> dict[str, AttributeValue]:
        return {
            names.MODEL: self.model,
            names.VERSION: self.version,
            names.ROUND: self.round,
            names.ENGINE: self.engine,
        }


class Span:
    """A span that is open; whoever has begun it ends it, once."""

    def __init__(self, span: OtelSpan) -> None:
        self._span = span
        self.ref = SpanRef.of(span.get_span_context())
        """Parent of what is done within it, and what goes into the headers of messages."""

    @property
    def is_recorded(self) -> bool:
        """Whether what is set goes anywhere."""
        return self._span.is_recording()

    def set(self, key: str, value: AttributeValue) -> None:
        """Set one attribute."""
        self._span.set_attribute(key, value)

    def link(self, *others: SpanRef) -> None:
        """It has to do with spans of other processes, which are not its parent."""
        for other in others:
            self._span.add_link(other.as_context(remote=True))

    def fail(self, error: str) -> None:
        """Mark it as failed: `TornRead: segment ...`, the name of the error class first."""
        self._span.set_attribute(names.ERROR_TYPE, error.partition(":")[0])
        self._span.set_status(Status(StatusCode.ERROR, error))

    def end(self, end_ns: int, error: str = "") -> None:
        """It ended at `end_ns`, and failed if `error` is not empty."""
        if error:
            self.fail(error)
        self._span.end(end_ns)
