"""The tables of the guides, from the catalogue, the schemas, the limits and the spans.

Reads and writes only the guides in `docs/`, and in them only what stands between two marks:
`<!-- generated: NAME -->` and `<!-- end -->`.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Final

from weightbus.bus.monitor import CaughtUp, EngineGone, Missed, Reconnected
from weightbus.bus.streams import bus_streams
from weightbus.schemas import (
    BUCKETS,
    CATALOGUE,
    DEFAULT_LIMITS,
    DTYPE_BYTES,
    CheckpointReady,
    CheckpointRetired,
    CheckpointSkipped,
    DeadLetter,
    EngineState,
    Entry,
    Message,
    RoundComplete,
    UpdateComplete,
    UpdateFailed,
    entry_of,
    stream_name,
)
from weightbus.schemas.asyncapi import HEADERS
from weightbus.schemas.catalogue import MONITORED
from weightbus.schemas.jsonschema import json_schema
from weightbus.schemas.limits import MAX_ELEMENTS
from weightbus.schemas.placement import MAX_SEGMENT_WAYS
from weightbus.tracing.attributes import ATTRIBUTES, SPANS
from weightbus.tracing.metric_names import METRICS, prometheus_name

__all__ = ("GUIDES", "HEARD", "SAID", "TABLES", "regenerated")

DOCS: Final = Path(__file__).parents[2] / "docs"
GUIDES: Final = (
    DOCS / "messages.md",
    DOCS / "monitors.md",
    DOCS / "publish-from-any-language.md",
    DOCS / "telemetry.md",
)

SAID: Final[tuple[type[Message], ...]] = (CheckpointReady, CheckpointRetired, CheckpointSkipped)
"""What a trainer of any language says; only the first is needed."""
HEARD: Final[tuple[type[Message], ...]] = (
    RoundComplete,
    UpdateComplete,
    UpdateFailed,
    DeadLetter,
)
"""What it waits for."""

MARKS: Final = (EngineState, EngineGone, CaughtUp, Reconnected, Missed)
"""What monitors are told beside messages."""

PREFIX: Final = "weightbus"
SCHEMAS: Final[dict[str, Any]] = json_schema()["$defs"]
NS_PER_S: Final = 10**9
INSTRUMENTS: Final = {
    "histogram": "histogram",
    "counter": "counter",
    "updown": "up-down counter",
    "gauge": "gauge",
}
OURS: Final = ("type", "schema_version")
"""Fields of every message: told once."""

_MARKED = re.compile(r"(<!-- generated: (\w+) -->\n).*?(<!-- end -->)", re.DOTALL)


def regenerated(guide: str) -> str:
    """The text of a guide with every table as it must be."""
    return _MARKED.sub(lambda mark: f"{mark[1]}\n{TABLES[mark[2]]()}\n{mark[3]}", guide)


def _table(titles: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    lines = [list(titles), *(list(row) for row in rows)]
    lines.insert(1, ["---"] * len(lines[0]))
    return "".join("|" + "|".join(_cell(cell) for cell in line) + "|\n" for line in lines)


def _cell(text: str) -> str:
    return text if text == "---" else f" {text} ".replace("|", "\\|")


def _subjects() -> str:
    rows = (
        (
            f"`{entry.message.__name__}`",
            f"`{entry.subject}`",
            entry.stream,
            entry.sender,
            ", ".join(entry.receivers),
            _encoding(entry),
        )
        for entry in CATALOGUE
    )
    return _table(("message", "subject", "stream", "from", "to", "we write"), rows)


def _monitored() -> str:
    entries = map(entry_of, MONITORED)
    rows = (
        (f"`Received[{entry.message.__name__}]`", entry.stream, entry.sender, entry.description)
        for entry in entries
    )
    return _table(("event", "stream", "from", "what it says"), rows)


def _marks() -> str:
    rows = ((f"`{kind.__name__}`", _first_paragraph(kind)) for kind in MARKS)
    return _table(("event", "what it says"), rows)


def _first_paragraph(kind: type) -> str:
    return " ".join((kind.__doc__ or "").partition("\n\n")[0].split())


def _keys() -> str:
    rows = (
        (
            f"`{entry.message.__name__}`",
            f"`{entry.key}`",
            entry.bucket,
            entry.sender,
            ", ".join(entry.receivers),
        )
        for entry in BUCKETS
    )
    return _table(("message", "key", "bucket", "from", "to"), rows)


def _said() -> str:
    rows = ((*_place(kind), entry_of(kind).description) for kind in SAID)
    return _table(("message", "subject", "stream", "what it says"), rows)


def _heard() -> str:
    entries = ((kind, entry_of(kind)) for kind in HEARD)
    rows = (
        (*_place(kind), _encoding(entry), entry.sender, entry.description)
        for kind, entry in entries
    )
    return _table(("message", "subject", "stream", "in", "from", "what it says"), rows)


def _place(kind: type[Message]) -> tuple[str, str, str]:
    entry = entry_of(kind)
    subject = entry.subject.replace("{p}", PREFIX)
    return f"`{kind.__name__}`", f"`{subject}`", f"`{stream_name(entry.stream, PREFIX)}`"


def _encoding(entry: Entry) -> str:
    return "JSON" if entry.encoding == "json" else "MessagePack"


def _headers() -> str:
    rows = []
    for name, header in HEADERS["properties"].items():
        value = " or ".join(f"`{one}`" for one in header.get("enum", ()))
        if "default" in header:
            value += f"; left out: `{header['default']}`"
        if name == "Nats-Msg-Id":
            ids = ((kind, entry_of(kind).message_id) for kind in SAID)
            value = "; ".join(f"`{kind.__name__}`: `{told}`" for kind, told in ids if told)
        rows.append((f"`{name}`", value or "text", header["description"]))
    return _table(("header", "value", "what for"), rows)


def _fields() -> str:
    parts = []
    for kind in (*SAID, *HEARD):
        schema = SCHEMAS[kind.__name__]
        required = schema["required"]
        rows = [
            (f"`{name}`", _type(field), _default(name, field, required), _meaning(field))
            for name, field in schema["properties"].items()
            if name not in OURS
        ]
        table = _table(("field", "type", "if left out", "meaning"), rows)
        parts.append(f"#### {kind.__name__}\n\n{_meaning(schema)}\n\n{table}")
    return "\n".join(parts)


def _meaning(schema: dict[str, Any]) -> str:
    """Of a struct the first paragraph of its description."""
    text = " ".join(schema["description"].partition("\n\n")[0].split())
    return re.sub(r"\bNone\b", "null", text)


def _default(name: str, field: dict[str, Any], required: list[str]) -> str:
    if name in required:
        return "**required**"
    return f"`{json.dumps(field['default'])}`"


def _type(field: dict[str, Any]) -> str:
    """A JSON Schema in words, with its limits."""
    if "anyOf" in field:
        return " or ".join(map(_type, field["anyOf"]))
    if "$ref" in field:
        return f"`{field['$ref'].rpartition('/')[2]}`"
    if "enum" in field:
        return " or ".join(f"`{value}`" for value in field["enum"])
    match field["type"]:
        case "string" if "contentEncoding" in field:
            return f"base64 text, ≤ {field['maxLength']:,} characters"
        case "string" if "pattern" in field:
            return f"text `{field['pattern'].removeprefix('^').removesuffix('$')}`"
        case "string":
            least = f"{field['minLength']} to " if "minLength" in field else "≤ "
            return f"text, {least}{field['maxLength']:,} characters"
        case "integer" | "number":
            kind = "integer" if field["type"] == "integer" else "number"
            return f"{kind}{_range(field)}"
        case "array":
            items = _type(field["items"])
            return f"array of at most {field['maxItems']:,}: {items}"
        case "object":
            value = _type(field["additionalProperties"])
            return f"object of at most {field['maxProperties']:,}: {value}"
        case kind:
            return str(kind)


def _range(field: dict[str, Any]) -> str:
    low = _number(field["minimum"])
    if "exclusiveMaximum" in field:
        return f" {low} to {_number(field['exclusiveMaximum'] - 1)}"
    return f" {low} to {_number(field['maximum'])}" if "maximum" in field else f" ≥ {low}"


def _number(value: float) -> str:
    """`2^63 - 1` for what nobody would recognise."""
    whole = int(value)
    for less in (0, 1):
        power = (whole + less).bit_length() - 1
        if power > 16 and whole + less == 2**power:
            return f"2^{power}" + (f" - {less}" if less else "")
    return f"{whole:,}"


def _limits() -> str:
    limits = DEFAULT_LIMITS
    ready = SCHEMAS["CheckpointReady"]["properties"]
    files, metadata = ready["files"], ready["metadata"]
    name, _, shape = SCHEMAS["TensorSpec"]["prefixItems"]
    most = _number(MAX_ELEMENTS)
    streams = {stream.name: stream for stream in bus_streams(PREFIX)}
    checkpoints = streams[stream_name("CHECKPOINTS", PREFIX)]
    progress = streams[stream_name("PROGRESS", PREFIX)]
    pairs = f"{metadata['propertyNames']['maxLength']:,} characters of key"
    values = f"{metadata['additionalProperties']['maxLength']:,} of value"
    rows = (
        ("a message", f"{_number(limits.max_payload_bytes)} bytes"),
        ("an id: model, engine, producer, round", "one subject token, `[A-Za-z0-9_-]{1,64}`"),
        ("a version", f"{_type(ready['version'])}, growing"),
        ("files of a version", f"{files['maxItems']:,}, each once"),
        ("a file's path", f"absolute, {files['items']['maxLength']:,} characters"),
        ("header of a safetensors file", f"{limits.max_safetensors_header_bytes:,} bytes"),
        ("tensors of a version", f"{limits.max_tensors:,}"),
        ("a tensor's name", f"1 to {name['maxLength']} characters, in one file only"),
        ("a tensor's dtype", ", ".join(f"`{dtype}`" for dtype in DTYPE_BYTES)),
        ("a tensor's shape", f"{shape['maxItems']} dimensions; {most} elements and bytes"),
        ("ways to one segment of a `placement`", f"{MAX_SEGMENT_WAYS}"),
        ("`metadata`", f"{metadata['maxProperties']} pairs, {pairs}, {values}"),
        (
            "a repeated `Nats-Msg-Id`",
            f"dropped for {checkpoints.duplicate_window // NS_PER_S} s after the first",
        ),
        (
            f"kept in `{checkpoints.name}`",
            f"the last {checkpoints.max_msgs_per_subject} messages of every subject",
        ),
        (
            f"kept in `{progress.name}`",
            f"{progress.max_age // NS_PER_S // 86_400} days, {_number(progress.max_bytes)} bytes",
        ),
    )
    return _table(("what", "limit"), rows)


def _spans() -> str:
    rows = (
        (f"`{span.name}`", span.parent or "the trainer's own root", span.kind, span.meaning)
        for span in SPANS
    )
    return _table(("span", "child of", "kind", "what it covers"), rows)


def _attributes() -> str:
    rows = ((f"`{item.name}`", item.type, _on(item.spans), item.meaning) for item in ATTRIBUTES)
    return _table(("attribute", "type", "on", "meaning"), rows)


def _on(words: tuple[str, ...]) -> str:
    every = tuple(span.word for span in SPANS)
    if words == every:
        return "all spans"
    left_out = [word for word in every if word not in words]
    return ", ".join(words) if len(left_out) > 1 else f"all but {left_out[0]}"


def _metrics() -> str:
    rows = (
        (
            f"`{spec.name}`",
            INSTRUMENTS[spec.kind],
            f"`{spec.unit}`",
            ", ".join(f"`{name.removeprefix('weightbus.')}`" for name in spec.attributes),
            f"`{prometheus_name(spec)}`",
            spec.told,
        )
        for spec in METRICS
    )
    return _table(("metric", "kind", "unit", "attributes", "for Prometheus", "what"), rows)


TABLES: Final = {
    "subjects": _subjects,
    "monitored": _monitored,
    "marks": _marks,
    "keys": _keys,
    "said": _said,
    "heard": _heard,
    "headers": _headers,
    "fields": _fields,
    "limits": _limits,
    "spans": _spans,
    "attributes": _attributes,
    "metrics": _metrics,
}
"""Name in a guide's mark -> what stands there."""
