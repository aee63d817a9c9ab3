"""Readers of exports, as strict as the programs that the exports are for."""

from __future__ import annotations

import base64
import json
import math
from collections.abc import Sequence
from typing import Any

from google.protobuf import json_format
from opentelemetry.proto.trace.v1.trace_pb2 import Span, TracesData

__all__ = ("assert_importable", "assert_tree", "parsed")


def assert_importable(trace: dict[str, Any]) -> list[dict[str, Any]]:
    """What Perfetto's importer asks of Trace Event Format, and drops or misplaces otherwise."""
    events: list[dict[str, Any]] = trace["traceEvents"]
    names: dict[str, set[tuple[int, int]]] = {"process_name": set(), "thread_name": set()}
    slices: dict[tuple[int, int], list[tuple[float, float, str]]] = {}
    for event in events:
        assert isinstance(event["pid"], int), event
        assert isinstance(event["name"], str), event
        if event["ph"] != "C":
            assert isinstance(event["tid"], int), event
        if event["ph"] == "M":
            if event["name"] in names:
                assert isinstance(event["args"]["name"], str)
                names[event["name"]].add((event["pid"], event["tid"]))
            continue
        assert isinstance(event["ts"], float), event
        assert math.isfinite(event["ts"]), event
        assert event["ts"] >= 0, event
        if event["ph"] == "X":
            assert isinstance(event["dur"], float), event
            assert math.isfinite(event["dur"]), event
            assert event["dur"] >= 0, event
            found = slices.setdefault((event["pid"], event["tid"]), [])
            found.append((event["ts"], event["dur"], event["name"]))
        elif event["ph"] == "C":
            assert all(isinstance(value, float) for value in event["args"].values()), event
        else:
            assert event["ph"] in ("s", "f"), event
    assert set(slices) <= names["thread_name"]
    assert {pid for pid, _ in slices} == {pid for pid, _ in names["process_name"]}
    for found in slices.values():
        assert_nested([(ts, ts + dur, name) for ts, dur, name in found])
        in_ns = [(int(ts * 1000), int(dur * 1000), name) for ts, dur, name in found]
        assert_nested([(ts, ts + dur, name) for ts, dur, name in in_ns])
    assert_arrows(events)
    return events


def assert_nested(found: Sequence[tuple[float, float, str]]) -> None:
    """Start, end and name; in the order of the file among equal starts, as importers sort them."""
    ends: list[float] = []
    for start, end, name in sorted(found, key=lambda each: each[0]):
        while ends and ends[-1] <= start:
            ends.pop()
        assert not ends or end <= ends[-1], f"{name} overlaps: {found}"
        ends.append(end)


def assert_arrows(events: list[dict[str, Any]]) -> None:
    """Every id begins once and ends once, later, each on a slice that is open then."""
    flows: dict[int, list[dict[str, Any]]] = {}
    for event in events:
        if event["ph"] in ("s", "f"):
            flows.setdefault(event["id"], []).append(event)
            assert any(
                other["ph"] == "X"
                and (other["pid"], other["tid"]) == (event["pid"], event["tid"])
                and other["ts"] <= event["ts"] < other["ts"] + other["dur"]
                for other in events
            ), event
    for pair in flows.values():
        assert [event["ph"] for event in pair] == ["s", "f"], pair
        assert pair[0]["ts"] <= pair[1]["ts"], pair
        assert pair[1]["bp"] == "e"


def parsed(text: str) -> tuple[TracesData, list[Span]]:
    """By protobuf's own reader, which takes bytes in base64: ids are in hexadecimal here."""
    data = json.loads(text)
    for group in data["resourceSpans"]:
        for scope in group["scopeSpans"]:
            for span in scope["spans"]:
                for key, size in (("traceId", 16), ("spanId", 8), ("parentSpanId", 8)):
                    if key in span:
                        raw = bytes.fromhex(span[key])
                        assert len(raw) == size, span
                        span[key] = base64.b64encode(raw).decode()
    traces = TracesData()
    json_format.ParseDict(data, traces)  # type: ignore[no-untyped-call]
    return traces, [
        span
        for group in traces.resource_spans
        for scope in group.scope_spans
        for span in scope.spans
    ]


def assert_tree(spans: list[Span], *, roots: int = 1) -> None:
    by_id = {span.span_id: span for span in spans}
    assert len(by_id) == len(spans), "ids are unique"
    assert len({span.trace_id for span in spans}) <= roots
    assert sum(not span.parent_span_id for span in spans) == roots
    for span in spans:
        assert span.end_time_unix_nano >= span.start_time_unix_nano, span
        if not span.parent_span_id:
            continue
        parent = by_id[span.parent_span_id]
        assert parent.trace_id == span.trace_id
        assert parent.start_time_unix_nano <= span.start_time_unix_nano, span
        if span.kind == Span.SPAN_KIND_INTERNAL:
            assert span.end_time_unix_nano <= parent.end_time_unix_nano, (span, parent)
