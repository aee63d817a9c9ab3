"""Exports of hand-made rounds, read back as strictly as the programs that they are for."""

from __future__ import annotations

import base64
import json
import math
from typing import Any

import pytest
from google.protobuf import json_format
from msgspec import structs
from opentelemetry.proto.trace.v1.trace_pb2 import Span, TracesData

from tests.unit.tracing.rounds import (
    MODEL,
    MS,
    T0_NS,
    TRACE_ID,
    complete,
    failed,
    first_token,
    join,
    plan,
    ready,
    route,
    stage,
    whole_round,
)
from tests.unit.tracing.test_critical_path import broadcast_round
from weightbus.schemas.base import Message
from weightbus.schemas.rounds import Links
from weightbus.tracing.exports.otlp_json import otlp_json
from weightbus.tracing.exports.perfetto import perfetto
from weightbus.tracing.history import Heard, build_waterfall
from weightbus.tracing.waterfall import Waterfall

PUBLISH_ID = "b" * 16


def traced(messages: list[Message]) -> Waterfall:
    """Stages and updates with ids, as consumers send them; published in a span of 1 ms."""
    history = []
    for number, message in enumerate(messages):
        headers = {"traceparent": f"00-{TRACE_ID}-{PUBLISH_ID}-01"}
        engine = getattr(message, "engine", "")
        ids = {}
        if hasattr(message, "parent_span_id"):
            ids = {"span_id": f"{number + 1:016x}", "parent_span_id": f"{ord(engine):016x}"}
        told = structs.replace(message, **ids)
        history.append(Heard(told, headers, T0_NS + MS))
    waterfall = build_waterfall(MODEL, "v7", history)
    assert waterfall is not None
    return waterfall


def streaming_round() -> list[Message]:
    """Two lanes of one rank at once, buckets that overlap, a failed attempt and a first token."""
    lane = [(12.0, 20.0), (18.0, 30.0), (30.0, 40.0)]
    return [
        ready(residual_ns=30_000),
        join("a", at_ms=4, links=Links(p2p=10**9)),
        plan(route("a", taken="p2p"), at_ms=8),
        stage("a", "negotiate", 3, 10),
        stage("a", "fetch", 12, 40, rank=0, taken="p2p", moved_bytes=9_000_000, buckets_ms=lane),
        stage("a", "fetch", 14, 44, rank=0, taken="p2p", moved_bytes=9_000_000),
        stage("a", "reload", 20, 60, rank=0, taken="p2p", moved_bytes=18_000_000),
        stage("a", "commit", 61, 62),
        complete("a", start_ms=3, end_ms=63, taken="p2p", residual_ns=20_000),
        first_token("a", 63, 70),
    ]


ROUNDS = {
    "whole": whole_round(),
    "broadcast": broadcast_round(slow_ms=100),
    "streaming": streaming_round(),
    "failed at once": [ready(), failed("a")],
    "only joined": [ready(), join("a")],
}


# ------------------------------------------------------------------------------ Perfetto


def assert_importable(trace: dict[str, Any]) -> list[dict[str, Any]]:
    """What Perfetto's importer asks of Trace Event Format, and drops or misplaces otherwise."""
    events: list[dict[str, Any]] = trace["traceEvents"]
    names: dict[str, set[tuple[int, int]]] = {"process_name": set(), "thread_name": set()}
    slices: dict[tuple[int, int], list[tuple[int, int, str]]] = {}
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
            start_ns = round(event["ts"] * 1000)
            thread = (event["pid"], event["tid"])
            slices.setdefault(thread, []).append(
                (start_ns, start_ns + round(event["dur"] * 1000), event["name"])
            )
        elif event["ph"] == "C":
            assert all(isinstance(value, float) for value in event["args"].values()), event
        else:
            assert event["ph"] in ("s", "f"), event
    assert set(slices) <= names["thread_name"]
    assert {pid for pid, _ in slices} == {pid for pid, _ in names["process_name"]}
    for thread, found in slices.items():
        assert_nested(found, thread)
    assert_arrows(events)
    return events


def assert_nested(found: list[tuple[int, int, str]], thread: tuple[int, int]) -> None:
    """In the order of the file among equal starts, as the importer sorts them."""
    ends: list[int] = []
    for start_ns, end_ns, name in sorted(found, key=lambda each: each[0]):
        while ends and ends[-1] <= start_ns:
            ends.pop()
        assert not ends or end_ns <= ends[-1], f"{name} overlaps on thread {thread}: {found}"
        ends.append(end_ns)


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


@pytest.mark.parametrize("name", ROUNDS)
def test_perfetto_export_is_what_its_importer_takes(name: str) -> None:
    assert_importable(json.loads(perfetto(traced(ROUNDS[name]))))


def test_perfetto_export_shows_every_stage_bucket_and_step() -> None:
    waterfall = traced(streaming_round())
    trace = json.loads(perfetto(waterfall))
    events = assert_importable(trace)
    processes = [e["args"]["name"] for e in events if e["name"] == "process_name"]
    assert processes == ["critical path", "trainer trainer", "engine a (complete)"]
    threads = [e["args"]["name"] for e in events if e["name"] == "thread_name" and e["pid"] == 3]
    assert threads == [
        "update", "rank 0 fetch", "rank 0 fetch (2)", "rank 0 fetch buckets", "rank 0 reload",
    ]  # fmt: skip
    shown = [e["name"] for e in events if e["ph"] == "X" and e["pid"] == 3]
    assert sorted(shown) == sorted(
        ["update", "negotiate", "join", "plan", "fetch", "fetch", "fetch 0", "fetch 1", "fetch 2",
         "reload", "commit", "first token"]
    )  # fmt: skip
    steps = [e["name"] for e in events if e["ph"] == "X" and e["pid"] == 1]
    assert len(steps) == len(waterfall.critical_path)
    (second,) = [e for e in events if e["name"] == "fetch 1"]
    assert (second["ts"], second["dur"]) == (18_000.0, 12_000.0)
    (reload,) = [e for e in events if e["name"] == "reload"]
    assert reload["args"]["weightbus.bytes"] == 18_000_000
    assert reload["args"]["GB/s"] == pytest.approx(0.45)
    fetches = [e["args"]["weightbus.link.share"] for e in events if e["name"] == "fetch"]
    assert max(fetches) == pytest.approx(waterfall.engines[0].stages[1].link_share)
    rates = [e["args"] for e in events if e["ph"] == "C"]
    assert max(each["fetch"] for each in rates) == pytest.approx(9 / 28 + 9 / 30)
    assert rates[-1] == {"fetch": 0.0, "reload": 0.0}
    assert [e["ph"] for e in events if e["name"] == "CheckpointReady"] == ["s", "f"]
    assert trace["otherData"]["critical_path"] == waterfall.critical_told


# ------------------------------------------------------------------------------ OTLP


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
    assert len({span.trace_id for span in spans}) == 1
    assert sum(not span.parent_span_id for span in spans) == roots
    for span in spans:
        assert span.end_time_unix_nano >= span.start_time_unix_nano, span
        if not span.parent_span_id:
            continue
        parent = by_id[span.parent_span_id]
        assert parent.start_time_unix_nano <= span.start_time_unix_nano, span
        if span.kind == Span.SPAN_KIND_INTERNAL:
            assert span.end_time_unix_nano <= parent.end_time_unix_nano, (span, parent)


@pytest.mark.parametrize("name", ROUNDS)
def test_otlp_export_is_one_tree(name: str) -> None:
    assert_tree(parsed(otlp_json(traced(ROUNDS[name])))[1])


def test_otlp_export_has_the_ids_times_and_attributes_of_the_trace() -> None:
    waterfall = traced(streaming_round())
    traces, spans = parsed(otlp_json(waterfall))
    services = [
        {item.key: item.value.string_value for item in group.resource.attributes}
        for group in traces.resource_spans
    ]
    assert services == [
        {"service.name": "trainer"},
        {"service.name": "weightbus-consumer", "weightbus.engine": "a"},
    ]
    named = {span.name: span for span in spans}
    publish = named["publish weightbus.{model}.checkpoint.ready"]
    update = named["update weightbus.{model}.checkpoint.ready"]
    assert publish.trace_id.hex() == TRACE_ID
    assert (publish.span_id.hex(), publish.kind) == (PUBLISH_ID, Span.SPAN_KIND_PRODUCER)
    assert publish.start_time_unix_nano == T0_NS
    assert publish.end_time_unix_nano == T0_NS + MS
    assert (update.parent_span_id, update.kind) == (publish.span_id, Span.SPAN_KIND_CONSUMER)
    assert update.span_id.hex() == f"{ord('a'):016x}"
    assert (update.flags & 0x300, named["reload"].flags & 0x300) == (0x300, 0x100)
    assert update.start_time_unix_nano == T0_NS + 3 * MS
    assert update.end_time_unix_nano == named["first token"].end_time_unix_nano == T0_NS + 70 * MS
    reload = {item.key: item.value for item in named["reload"].attributes}
    assert reload["weightbus.bytes"].int_value == 18_000_000
    assert (reload["weightbus.rank"].int_value, reload["weightbus.route"].string_value) == (
        0,
        "p2p",
    )
    residual = {item.key: item.value.int_value for item in update.attributes}
    assert residual["weightbus.clock.residual_ns"] == 20_000
    assert sum(span.name == "bucket" for span in spans) == 3
    assert named["plan"].start_time_unix_nano == named["join"].end_time_unix_nano == T0_NS + 4 * MS


def test_otlp_export_tells_what_failed() -> None:
    _, spans = parsed(otlp_json(traced(whole_round())))
    errors = {(span.name.split()[0], span.status.message) for span in spans if span.status.code}
    torn = "TornRead: segment s has generation 9: it must be 8"
    assert errors == {("update", torn), ("reload", torn)}


def test_otlp_export_has_a_tree_for_every_update_when_the_publication_was_not_traced() -> None:
    history = [Heard(message) for message in whole_round()]
    waterfall = build_waterfall(MODEL, "v7", history)
    assert waterfall is not None
    assert_tree(parsed(otlp_json(waterfall))[1], roots=2)


def test_otlp_export_has_an_update_for_every_attempt() -> None:
    first = [stage("a", "negotiate", 2, 10), stage("a", "broadcast", 10, 40, error="PeerLost: b")]
    second = [stage("a", "negotiate", 40, 52), complete("a", end_ms=80)]
    waterfall = traced([ready(), *first, *second])
    engine = waterfall.engines[0]
    *rows, last = engine.stages
    retried = structs.replace(last, parent_span_id="e" * 16)
    engine = structs.replace(engine, stages=(*rows, retried), span_id="e" * 16)
    waterfall = structs.replace(waterfall, engines=(engine,))
    _, spans = parsed(otlp_json(waterfall))
    assert_tree(spans)
    updates = [span for span in spans if span.kind == Span.SPAN_KIND_CONSUMER]
    told = [
        (span.start_time_unix_nano - T0_NS, span.end_time_unix_nano - T0_NS) for span in updates
    ]
    assert told == [(2 * MS, 40 * MS), (40 * MS, 80 * MS)]
