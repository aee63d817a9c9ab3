"""Exports of hand-made rounds, read back as strictly as the programs that they are for."""

from __future__ import annotations

import json
import random
from itertools import pairwise

import pytest
from msgspec import structs
from opentelemetry.proto.trace.v1.trace_pb2 import Span

from tests.unit.tracing.exported import assert_importable, assert_tree, parsed
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
from weightbus.tracing.attributes import EPOCH, LEADER
from weightbus.tracing.exports.otlp_json import otlp_json
from weightbus.tracing.exports.perfetto import perfetto
from weightbus.tracing.exports.spans import span_tree
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


@pytest.mark.parametrize("name", ROUNDS)
def test_perfetto_export_is_what_its_importer_takes(name: str) -> None:
    assert_importable(json.loads(perfetto(traced(ROUNDS[name]))))


@pytest.mark.parametrize("seed", range(20))
def test_perfetto_export_nests_to_the_last_digit_when_times_are_odd(seed: int) -> None:
    """Stages that touch, to the nanosecond, and buckets that fill them."""
    rng = random.Random(seed)
    cuts = sorted(rng.uniform(0.1, 900) for _ in range(12))
    waterfall = traced([
        ready(),
        join("a", at_ms=0),
        stage("a", "negotiate", 0, cuts[0]),
        stage("a", "fetch", cuts[0], cuts[-2], rank=0, taken="p2p", moved_bytes=11,
              buckets_ms=list(pairwise(cuts[:-1]))),
        stage("a", "commit", cuts[-2], cuts[-1]),
        complete("a", start_ms=0, end_ms=1000, taken="p2p"),
    ])  # fmt: skip
    assert_importable(json.loads(perfetto(waterfall)))


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


@pytest.mark.parametrize("published", [False, True])
def test_exports_have_the_trace_that_every_update_is_of(published: bool) -> None:
    """Engine b tells of another trace than a; if the publication was traced, a's is that of it."""
    ids = {"a": TRACE_ID, "b": "b" * 32}
    headers = {"traceparent": f"00-{TRACE_ID}-{PUBLISH_ID}-01"} if published else {}
    negotiated = [
        structs.replace(
            stage(engine, "negotiate", 2, 10), trace_id=ids[engine],
            span_id=f"{ord(engine):016d}", parent_span_id=f"{ord(engine):016x}",
        )
        for engine in ids
    ]  # fmt: skip
    waterfall = build_waterfall(
        MODEL, "v7", [Heard(ready(), headers, T0_NS + MS), *map(Heard, negotiated)]
    )
    assert waterfall is not None
    _, spans = parsed(otlp_json(waterfall))
    assert_tree(spans, roots=2)
    found = {(span.name.partition(" ")[0], span.trace_id.hex()) for span in spans}
    publication = {("publish", TRACE_ID)} if published else set()
    expected = {(name, trace) for name in ("update", "negotiate") for trace in ids.values()}
    assert found == expected | publication
    events = assert_importable(json.loads(perfetto(waterfall)))
    assert {
        event["args"]["trace_id"] for event in events if "trace_id" in event.get("args", {})
    } == set(ids.values())


def test_plan_of_an_engine_that_led_its_own_round_is_said_to_be_its_own() -> None:
    """The plan of z, which came late, is of another leader than that of a and b."""
    messages = [
        ready(), join("a"), join("b"), plan(), stage("a", "negotiate", 2, 10),
        stage("b", "negotiate", 2, 10), join("z", at_ms=900),
        plan(route("z"), epoch=2, at_ms=905, leader="z"), stage("z", "negotiate", 890, 906),
    ]  # fmt: skip
    leads = {
        span.engine: (span.attributes[LEADER], span.attributes[EPOCH])
        for span in span_tree(traced(messages))
        if span.name == "plan"
    }
    assert leads == {"a": (True, 1), "b": (False, 1), "z": (True, 2)}


def test_otlp_export_is_one_tree_when_a_stage_is_below_another() -> None:
    fetch = structs.replace(
        stage("a", "fetch", 2, 10, rank=0), span_id="1" * 16, parent_span_id="e" * 16
    )
    reload = structs.replace(
        stage("a", "reload", 4, 9, rank=0), span_id="2" * 16, parent_span_id="1" * 16
    )
    headers = {"traceparent": f"00-{TRACE_ID}-{PUBLISH_ID}-01"}
    history = [Heard(ready(), headers, T0_NS + MS), Heard(fetch), Heard(reload)]
    waterfall = build_waterfall(MODEL, "v7", history)
    assert waterfall is not None
    assert waterfall.engines[0].span_id == "e" * 16
    _, spans = parsed(otlp_json(waterfall))
    assert_tree(spans)
    assert_importable(json.loads(perfetto(waterfall)))


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


def test_exports_have_the_publication_in_its_place_when_the_engine_came_long_after_it() -> None:
    late = [
        ready(),
        join("a", at_ms=60_003),
        stage("a", "negotiate", 60_002, 60_010),
        complete("a", start_ms=60_002, end_ms=60_100),
    ]
    waterfall = traced(late)
    _, spans = parsed(otlp_json(waterfall))
    assert_tree(spans)
    (publication,) = (span for span in spans if span.name.startswith("publish"))
    assert publication.start_time_unix_nano == T0_NS + MS
    events = assert_importable(json.loads(perfetto(waterfall)))
    assert min(event["ts"] for event in events if event["ph"] == "X") == 0
    assert [event for event in events if event["ph"] == "s"] == []
