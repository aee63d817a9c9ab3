"""A waterfall as OTLP/JSON, for any collector or trace viewer that reads it.

Does no I/O. The JSON mapping of `opentelemetry.proto.trace.v1.TracesData` as OTLP has it: ids in
hexadecimal, 64-bit numbers as strings, enumerations as numbers; see
https://opentelemetry.io/docs/specs/otlp/#json-protobuf-encoding. Posted to a collector's
`/v1/traces` it is an export request. The tree is that of `exports.spans`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

import msgspec

from weightbus import __version__
from weightbus.tracing.attributes import ENGINE, AttributeValue
from weightbus.tracing.exports.spans import TreeSpan, span_tree
from weightbus.tracing.waterfall import Waterfall

__all__ = ("otlp_json",)

KINDS: Final = {"INTERNAL": 1, "PRODUCER": 4, "CONSUMER": 5}
STATUS_ERROR: Final = 2

SAMPLED: Final = 0x01
HAS_IS_REMOTE: Final = 0x100
IS_REMOTE: Final = 0x200
"""Bits of a span's `flags`: W3C's, and whether it is known that the parent is in another process,
and whether it is."""

CONSUMER_SERVICE: Final = "weightbus-consumer"
TRAINER_SERVICE: Final = "weightbus-publish"


def otlp_json(waterfall: Waterfall) -> str:
    """One JSON object on one line: a resource for the trainer, and one for every engine."""
    of_engine: dict[str, list[TreeSpan]] = {}
    for span in span_tree(waterfall):
        of_engine.setdefault(span.engine, []).append(span)
    data = {
        "resourceSpans": [
            {
                "resource": {"attributes": _resource(engine, waterfall)},
                "scopeSpans": [
                    {
                        "scope": {"name": "weightbus", "version": __version__},
                        "spans": [_span(span) for span in spans],
                    }
                ],
            }
            for engine, spans in of_engine.items()
        ]
    }
    return msgspec.json.encode(data).decode()


def _resource(engine: str, waterfall: Waterfall) -> list[dict[str, Any]]:
    if engine:
        return _attributes({"service.name": CONSUMER_SERVICE, ENGINE: engine})
    return _attributes({"service.name": waterfall.producer or TRAINER_SERVICE})


def _span(span: TreeSpan) -> dict[str, Any]:
    remote = span.kind == "CONSUMER" and bool(span.parent_id)
    told: dict[str, Any] = {
        "traceId": span.trace_id,
        "spanId": span.span_id,
        "flags": SAMPLED | HAS_IS_REMOTE | (IS_REMOTE if remote else 0),
        "name": span.name,
        "kind": KINDS[span.kind],
        "startTimeUnixNano": str(span.start_ns),
        "endTimeUnixNano": str(span.end_ns),
        "attributes": _attributes(span.attributes),
    }
    if span.parent_id:
        told["parentSpanId"] = span.parent_id
    if span.error:
        error_type = {"error.type": span.error.partition(":")[0]}
        told["attributes"] += _attributes(error_type)
        told["status"] = {"code": STATUS_ERROR, "message": span.error}
    return told


def _attributes(attributes: Mapping[str, AttributeValue]) -> list[dict[str, Any]]:
    return [{"key": key, "value": _value(value)} for key, value in attributes.items()]


def _value(value: AttributeValue) -> dict[str, Any]:
    match value:
        case bool():
            return {"boolValue": value}
        case int():
            return {"intValue": str(value)}
        case float():
            return {"doubleValue": value}
        case _:
            return {"stringValue": value}
