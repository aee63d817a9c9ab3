"""The tracer of OpenTelemetry's SDK that spans are exported with.

Imported only when they are: the SDK takes longer to import than the rest of `tracing`. When the
tracer is made, the SDK reads its own standard variables (`OTEL_TRACES_SAMPLER`,
`OTEL_RESOURCE_ATTRIBUTES`, `OTEL_SDK_DISABLED`).
"""

from __future__ import annotations

from collections.abc import Mapping

from opentelemetry.sdk.resources import SERVICE_NAME, SERVICE_VERSION, Resource
from opentelemetry.sdk.trace import SpanProcessor, TracerProvider
from opentelemetry.sdk.trace.id_generator import IdGenerator
from opentelemetry.trace import NoOpTracer, Tracer

from weightbus import __version__
from weightbus.tracing.ids import new_span_id, new_trace_id

__all__ = ("make_tracer",)


class EntropyIds(IdGenerator):
    """Ids that a seeded `random` cannot repeat."""

    def generate_trace_id(self) -> int:
        return new_trace_id()

    def generate_span_id(self) -> int:
        return new_span_id()


def make_tracer(
    service: str, processor: SpanProcessor, resource: Mapping[str, str]
) -> Tracer | None:
    """A tracer of a provider of its own; None if `OTEL_SDK_DISABLED` switches the SDK off."""
    attributes = {SERVICE_NAME: service, SERVICE_VERSION: __version__, **resource}
    provider = TracerProvider(
        resource=Resource.create(attributes), id_generator=EntropyIds(), shutdown_on_exit=False
    )
    provider.add_span_processor(processor)
    tracer = provider.get_tracer("weightbus", __version__)
    return None if isinstance(tracer, NoOpTracer) else tracer
