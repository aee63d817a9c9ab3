"""Engines that come when a round is over and give up: told apart from it, wherever it is shown."""

from __future__ import annotations

import io
import json
import random

import pytest
from msgspec import structs
from opentelemetry.proto.trace.v1.trace_pb2 import Span
from rich.console import Console

from tests.unit.tracing.exported import assert_importable, assert_tree, parsed
from tests.unit.tracing.rounds import (
    MODEL,
    MS,
    T0_NS,
    complete,
    done,
    failed,
    first_token,
    heard,
    join,
    plan,
    ready,
    refused,
    route,
    stage,
    whole_round,
)
from weightbus.schemas.base import Message
from weightbus.tracing.exports.html import html_report
from weightbus.tracing.exports.otlp_json import otlp_json
from weightbus.tracing.exports.perfetto import perfetto
from weightbus.tracing.fleet_view import FleetTables
from weightbus.tracing.history import build_waterfall
from weightbus.tracing.watcher import Fleet
from weightbus.tracing.waterfall import Waterfall
from weightbus.tracing.waterfall_view import WaterfallView

GAVE_UP = (
    "came when the round was over, 300 s after CheckpointReady, and gave up after 5.00 ms: "
    "VersionRetired: version 7 is retired: its publisher died"
)


def good_round() -> list[Message]:
    return [
        ready(), join("a"), join("b"), plan(), stage("a", "negotiate", 2, 10),
        stage("b", "negotiate", 2, 10), complete("a"), complete("b", end_ms=140),
        first_token("a", 131, 150), done("a", "b"),
    ]  # fmt: skip


def built(*messages: Message) -> Waterfall:
    waterfall = build_waterfall(MODEL, "v7", heard(*messages))
    assert waterfall is not None
    return waterfall


def text_of(shown: WaterfallView | FleetTables) -> str:
    console = Console(file=io.StringIO(), width=200)
    console.print(shown)
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


@pytest.mark.parametrize("engine", ["c", "a"], ids=["another", "one that was started anew"])
@pytest.mark.parametrize("seed", range(3))
def test_good_round_stays_as_it_was_when_an_engine_is_refused_later(engine: str, seed: int) -> None:
    messages = [*good_round(), *refused(engine)]
    random.Random(seed).shuffle(messages)
    waterfall = built(*messages)
    assert structs.replace(waterfall, late=()) == built(*good_round()), seed
    assert (waterfall.span_s, waterfall.wall_s) == pytest.approx((0.370, 0.140))
    (late,) = waterfall.late
    assert (late.engine, late.outcome, late.attempts) == (engine, "failed", 1)
    assert (late.start_s, late.end_s) == pytest.approx((300, 300.005))
    assert [row.stage for row in late.stages] == ["negotiate"]
    assert late.told == GAVE_UP


def test_failed_round_is_told_by_who_was_in_it_when_one_is_refused_later() -> None:
    waterfall = built(*whole_round(), *refused("b"))
    assert structs.replace(waterfall, late=()) == built(*whole_round())
    assert [late.cause for late in waterfall.late] == ["VersionRetired"]


def test_last_attempt_is_told_when_an_engine_comes_again_and_again() -> None:
    attempts = [refused("c", at_ms=at_ms) for at_ms in (300_000, 360_000, 420_000)]
    waterfall = built(*good_round(), *(message for each in attempts for message in each))
    (late,) = waterfall.late
    assert (late.attempts, len(late.stages)) == (3, 1)
    assert late.start_s == pytest.approx(420)
    assert late.told.endswith("its publisher died (3 attempts)")


def test_join_of_a_late_engine_is_told_with_it() -> None:
    waterfall = built(*good_round(), join("c", at_ms=300_001), *refused("c"))
    assert [engine.engine for engine in waterfall.engines] == ["a", "b"]
    assert waterfall.late[0].joined_s == pytest.approx(300.001)


def test_round_is_over_without_a_closing_word_when_all_who_were_planned_serve() -> None:
    unclosed = good_round()[:-1]
    waterfall = built(*unclosed, *refused("c"))
    assert structs.replace(waterfall, late=()) == built(*unclosed)
    assert built(*unclosed[:-3], *refused("c")).late == (), "b has not told that it serves"


def test_engine_that_was_at_work_when_the_round_was_closed_has_failed_in_it() -> None:
    """The leader gave b up; b tells later what became of it."""
    waterfall = built(
        ready(), join("a"), join("b"), plan(), complete("a"),
        done("a", failed={"b": "no word"}), stage("b", "reload", 400, 900, rank=0, error="Torn"),
        failed("b", end_ms=905), *refused("b"),
    )  # fmt: skip
    b = waterfall.engines[1]
    assert (b.outcome, b.cause, b.end_s) == ("failed", "TornRead", 0.905)
    assert [row.stage for row in b.stages] == ["reload"]
    assert [late.engine for late in waterfall.late] == ["b"]


def test_engine_that_comes_late_to_a_plan_of_its_own_has_a_part_in_the_round() -> None:
    late = [join("c", at_ms=900), plan(route("c"), epoch=9, at_ms=903, leader="c")]
    gave_up = structs.replace(
        failed("c", end_ms=990), start_ns=T0_NS + 880 * MS, cause="RouteUnavailable"
    )
    waterfall = built(*good_round(), *late, gave_up, done(failed={"c": "no way"}, epoch=9))
    assert [engine.outcome for engine in waterfall.engines] == ["complete", "complete", "failed"]
    assert waterfall.late == ()


def test_engine_is_not_late_to_a_version_that_was_published_again() -> None:
    """An hour later: of the first time only its leader's closing word says when it was over."""
    hour = 3_600_000
    again = structs.replace(join("a", at_ms=hour + 3), checkpoint_ns=T0_NS + hour * MS)
    first = [structs.replace(message, checkpoint_ns=T0_NS) if hasattr(message, "checkpoint_ns")
             else message for message in good_round()]  # fmt: skip
    messages = [*first, ready(at_ms=hour), again, *refused("c", at_ms=hour + 2)]
    waterfall = built(*messages)
    assert [(each.engine, each.outcome) for each in waterfall.engines] == [
        ("a", "unfinished"), ("c", "failed"),
    ]  # fmt: skip
    assert waterfall.late == ()
    assert [each.late for each in fed(*messages).view(T0_NS).failures] == [False]


def test_text_tells_a_late_engine_in_a_line_of_its_own() -> None:
    good = text_of(WaterfallView(built(*good_round()))).splitlines()
    lines = text_of(WaterfallView(built(*good_round(), *refused("c")))).splitlines()
    assert [line for line in lines if line not in good] == [f"c  late {GAVE_UP}"]
    assert [line for line in good if line not in lines] == []


def test_html_report_has_the_late_engine_in_its_data() -> None:
    assert GAVE_UP in html_report(built(*good_round(), *refused("c")))


@pytest.mark.parametrize("engine", ["c", "a"])
def test_perfetto_export_is_not_stretched_by_a_late_engine(engine: str) -> None:
    exported = json.loads(perfetto(built(*good_round(), *refused(engine))))
    alone = json.loads(perfetto(built(*good_round())))
    assert assert_importable(exported) == alone["traceEvents"]
    assert exported["otherData"]["late"] == {engine: GAVE_UP}


@pytest.mark.parametrize("engine", ["c", "a"])
def test_otlp_export_has_the_late_attempt_in_the_tree_as_collectors_have_it(engine: str) -> None:
    history = heard(*good_round(), *refused(engine))
    headers = {"traceparent": f"00-{history[-1].message.trace_id}-{'b' * 16}-01"}  # type: ignore[attr-defined]
    history[0] = structs.replace(history[0], headers=headers, received_ns=T0_NS + MS)
    waterfall = build_waterfall(MODEL, "v7", history)
    assert waterfall is not None
    _, spans = parsed(otlp_json(waterfall))
    assert_tree(spans)
    late = [span for span in spans if span.start_time_unix_nano >= T0_NS + 300_000 * MS]
    assert [span.name.split()[0] for span in late] == ["update", "negotiate"]
    assert late[0].status.code == 2
    updates = [span for span in spans if span.kind == Span.SPAN_KIND_CONSUMER]
    assert len(updates) == 3


# ------------------------------------------------------------------------------ the fleet


def fed(*messages: Message) -> Fleet:
    fleet = Fleet()
    for message in messages:
        fleet.feed(message, T0_NS)
    return fleet


def test_fleet_tells_a_late_engine_apart_from_failures() -> None:
    view = fed(*good_round(), *refused("c")).view(T0_NS)
    assert [(each.engine, each.late) for each in view.failures] == [("c", True)]
    text = text_of(FleetTables(view))
    assert " came late minilm c version 7: VersionRetired: version 7 is retired" in text
    assert " failed " not in text


def test_fleet_keeps_that_an_engine_failed_in_the_round_when_it_tries_again_later() -> None:
    view = fed(*whole_round(), *refused("b")).view(T0_NS)
    assert [(each.engine, each.cause, each.late) for each in view.failures] == [
        ("b", "VersionRetired", False)
    ]
