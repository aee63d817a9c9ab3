"""A round's messages become rows that agree with them, whatever is missing, doubled or skewed."""

from __future__ import annotations

import random

import msgspec
import pytest

from tests.unit.tracing.rounds import (
    MODEL,
    MS,
    T0_NS,
    TRACE_ID,
    complete,
    done,
    failed,
    first_token,
    heard,
    join,
    plan,
    ready,
    route,
    stage,
    whole_round,
)  # fmt: skip
from weightbus.schemas.base import Message
from weightbus.tracing.history import Heard, build_waterfall, summarise_rounds
from weightbus.tracing.waterfall import EngineWaterfall, Waterfall


def built(*messages: Message) -> Waterfall:
    waterfall = build_waterfall(MODEL, "v7", heard(*messages))
    assert waterfall is not None
    return waterfall


def engine_of(waterfall: Waterfall, name: str) -> EngineWaterfall:
    (engine,) = (engine for engine in waterfall.engines if engine.engine == name)
    return engine


def test_waterfall_tells_the_round_when_all_its_messages_are_there() -> None:
    waterfall = built(*whole_round())
    assert (waterfall.model, waterfall.round, waterfall.version) == (MODEL, "v7", 7)
    assert (waterfall.leader, waterfall.epoch, waterfall.complete) == ("a", 1, True)
    assert waterfall.trace_id == TRACE_ID
    assert (waterfall.origin, waterfall.origin_ns) == ("checkpoint_ready", T0_NS)
    assert waterfall.wall_s == pytest.approx(0.131)
    assert waterfall.span_s == pytest.approx(0.370)
    assert waterfall.bytes == 90_900_000
    assert waterfall.gb_per_s == pytest.approx(0.0909 / 0.131)
    assert [engine.engine for engine in waterfall.engines] == ["a", "b"]


def test_waterfall_rows_agree_with_their_stages() -> None:
    a, b = built(*whole_round()).engines
    assert [(row.stage, row.rank) for row in a.stages] == [
        ("negotiate", None), ("fetch", 0), ("reload", 0), ("commit", None),
    ]  # fmt: skip
    fetch = a.stages[1]
    assert (fetch.start_s, fetch.duration_s) == pytest.approx((0.010, 0.030))
    assert (fetch.bytes, fetch.route) == (90_900_000, "local")
    assert fetch.gb_per_s == pytest.approx(3.03)
    assert (a.outcome, a.verified, a.routes, a.paused_s) == (
        "complete",
        "verified",
        ("local",),
        0.085,
    )
    assert (a.start_s, a.end_s) == pytest.approx((0.002, 0.131))
    assert a.plan_reasons == ("shared memory of this host",)
    assert (b.outcome, b.cause, b.quarantined, b.bytes) == ("failed", "TornRead", True, 0)
    assert [row.ok for row in b.stages] == [True, True, True, False]


@pytest.mark.parametrize("seed", range(20))
def test_waterfall_is_the_same_when_messages_come_twice_and_in_another_order(seed: int) -> None:
    messages = whole_round()
    shuffled = messages * 2
    random.Random(seed).shuffle(shuffled)
    assert built(*shuffled) == built(*messages), f"seed {seed}"


def test_waterfall_passes_over_other_rounds_models_and_versions() -> None:
    others = [
        ready(8), join("c", 8), stage("c", "fetch", 1, 2, version=8), complete("c", 8),
        msgspec.structs.replace(join("d"), model="other"), ready(model="other", at_ms=-50),
    ]  # fmt: skip
    assert built(*others, *whole_round()) == built(*whole_round())


def test_waterfall_is_none_when_no_message_is_of_the_round() -> None:
    assert build_waterfall(MODEL, "v9", heard(*whole_round())) is None
    assert build_waterfall("other", "v7", heard(*whole_round())) is None


def test_waterfall_counts_from_the_earliest_time_when_checkpoint_ready_is_gone() -> None:
    waterfall = built(*whole_round()[1:])
    assert (waterfall.origin, waterfall.origin_ns) == ("earliest", T0_NS + 2 * MS)
    assert waterfall.wall_s == pytest.approx(0.129)


def test_waterfall_has_no_negative_time_when_the_clock_of_the_trainer_is_ahead() -> None:
    waterfall = built(ready(at_ms=50), *whole_round()[1:])
    assert waterfall.origin == "earliest"
    times = [row.start_s for engine in waterfall.engines for row in engine.stages]
    assert min(times) == 0


def test_waterfall_lasts_no_negative_time_when_a_stage_ends_before_it_starts() -> None:
    (row,) = engine_of(built(ready(), stage("a", "fetch", 10, 4, moved_bytes=5)), "a").stages
    assert (row.duration_s, row.gb_per_s) == (0, None)


def test_engine_is_unfinished_when_it_has_only_joined() -> None:
    waterfall = built(ready(), join("a"), plan(route("a")))
    a = engine_of(waterfall, "a")
    assert (a.outcome, a.routes, a.stages, a.end_s) == ("unfinished", ("local",), (), None)
    assert (waterfall.wall_s, waterfall.gb_per_s, waterfall.complete) == (None, None, False)


def test_engine_has_failed_with_the_reason_of_the_leader_when_it_never_reported() -> None:
    waterfall = built(ready(), join("a"), join("b"), complete("a"), done("a", failed={"b": "lost"}))
    b = engine_of(waterfall, "b")
    assert (b.outcome, b.reason, b.end_s) == ("failed", "lost", None)


def test_engine_is_complete_when_it_failed_first_and_then_succeeded() -> None:
    a = engine_of(built(ready(), failed("a"), complete("a")), "a")
    assert (a.outcome, a.cause, a.quarantined) == ("complete", "", False)


def test_waterfall_takes_the_plan_of_the_last_epoch() -> None:
    second = plan(route("a", reason="b is gone"), epoch=2)
    waterfall = built(ready(), plan(route("a"), route("b")), second, plan(route("b"), epoch=1))
    assert waterfall.epoch == 2
    assert engine_of(waterfall, "a").plan_reasons == ("b is gone",)


def test_waterfall_survives_json() -> None:
    waterfall = built(*whole_round())
    assert msgspec.json.decode(msgspec.json.encode(waterfall), type=Waterfall) == waterfall


def test_rounds_are_listed_the_newest_last() -> None:
    history = [
        (join("b", 8), 20), (join("a", 7), 11), (plan(version=7), 12), (join("a", 8), 21),
        (ready(9), 30), (msgspec.structs.replace(join("c"), model="other"), 5),
    ]  # fmt: skip
    listed = [
        (item.model, item.round, item.version, item.first_ns)
        for item in summarise_rounds(Heard(message, {}, at_ns) for message, at_ns in history)
    ]
    assert listed == [("other", "v7", 7, 5), (MODEL, "v7", 7, 11), (MODEL, "v8", 8, 20)]


def late_joiner() -> list[Message]:
    """Engine c comes when the round of a and b is closed, and plans for itself."""
    return [
        *whole_round(),
        join("c", at_ms=900),
        plan(route("c", reason="it came late"), epoch=9, at_ms=903, leader="c"),
        stage("c", "negotiate", 880, 905),
        complete("c", start_ms=880, end_ms=990),
        done("c", epoch=9, leader="c"),
    ]


@pytest.mark.parametrize("seed", range(5))
def test_waterfall_keeps_what_was_planned_first_when_an_engine_joins_late(seed: int) -> None:
    messages = late_joiner()
    random.Random(seed).shuffle(messages)
    waterfall = built(*messages)
    a, b, c = waterfall.engines
    assert (waterfall.leader, waterfall.epoch, waterfall.complete) == ("a", 1, True), seed
    assert a.plan_reasons == ("shared memory of this host",)
    assert [engine.outcome for engine in (a, b, c)] == ["complete", "failed", "complete"]
    assert (a.epoch, b.epoch, c.epoch) == (1, 1, 9)
    assert (a.joined_s, c.joined_s) == pytest.approx((0.003, 0.900))
    assert (a.planned_s, c.planned_s) == pytest.approx((0.010, 0.905))
    assert c.plan_reasons == ("it came late",)
    assert waterfall.wall_s == pytest.approx(0.990)


def test_late_joiner_changes_nothing_of_those_whose_outcome_only_the_leader_told() -> None:
    first = [ready(), join("a"), join("b"), done("a", failed={"b": "lost"})]
    waterfall = built(*first, join("c"), done("c", epoch=9, leader="c"))
    assert [(each.outcome, each.reason) for each in waterfall.engines] == [
        ("complete", ""), ("failed", "lost"), ("complete", ""),
    ]  # fmt: skip


def test_waterfall_tells_the_first_token_and_the_residuals_of_clocks() -> None:
    waterfall = built(
        ready(residual_ns=30_000), complete("a", end_ms=131, residual_ns=20_000),
        first_token("a", 131, 150),
    )  # fmt: skip
    (a,) = waterfall.engines
    assert a.first_token_s == pytest.approx(0.150)
    assert a.first_token_span_id == "c" * 16
    assert a.clock_residual_s == pytest.approx(20e-6)
    assert waterfall.clock_residual_s == pytest.approx(30e-6)
    assert waterfall.span_s == pytest.approx(0.150)


def test_time_zero_is_the_creation_when_others_are_earlier_by_what_the_clocks_may_be_off() -> None:
    told = [ready(residual_ns=MS), complete("a", residual_ns=MS), stage("a", "fetch", -1.5, 4)]
    waterfall = built(*told)
    assert (waterfall.origin, waterfall.origin_ns) == ("checkpoint_ready", T0_NS)
    row = waterfall.engines[0].stages[0]
    assert (row.start_s, row.duration_s) == pytest.approx((0, 0.004))
    before = stage("a", "fetch", -2.5, 4)
    assert built(*told, before).origin == "earliest"


def test_waterfall_takes_the_span_of_the_publication_from_the_headers_of_its_message() -> None:
    headers = {"Traceparent": f"00-{TRACE_ID}-{'b' * 16}-01"}
    history = [Heard(ready(), headers, T0_NS + MS), Heard(join("a"), {}, 0)]
    waterfall = build_waterfall(MODEL, "v7", history)
    assert waterfall is not None
    assert (waterfall.trace_id, waterfall.publish_span_id) == (TRACE_ID, "b" * 16)
    assert waterfall.producer == "trainer"
    assert waterfall.stored_s == pytest.approx(0.001)


@pytest.mark.parametrize("told_before", [0, T0_NS])
@pytest.mark.parametrize("seed", range(3))
def test_round_of_a_version_that_was_published_again_is_that_of_the_last_time(
    told_before: int, seed: int
) -> None:
    """A trainer crashed after v7, and makes v7 again an hour later; b is gone since."""
    hour = 3_600_000

    def run(at_ms: int, checkpoint_ns: int) -> list[Message]:
        of = {"checkpoint_ns": checkpoint_ns}
        return [
            ready(at_ms=at_ms),
            msgspec.structs.replace(join("a", at_ms=at_ms + 3), **of),
            msgspec.structs.replace(plan(route("a"), at_ms=at_ms + 8), **of),
            stage("a", "negotiate", at_ms + 2, at_ms + 10),
            complete("a", start_ms=at_ms + 2, end_ms=at_ms + 60),
        ]

    again = run(hour, T0_NS + hour * MS)
    first = [*run(0, told_before), join("b"), complete("b"), first_token("a", 60, 70), done("a")]
    messages = [*first, *again]
    random.Random(seed).shuffle(messages)
    waterfall = built(*messages)
    assert waterfall == built(*again), seed
    assert waterfall.wall_s == pytest.approx(0.060)
    assert not waterfall.complete, "the first run was closed, this one is not"


def test_waterfall_takes_of_two_publications_that_which_was_joined_for() -> None:
    joined = msgspec.structs.replace(join("a", at_ms=40), checkpoint_ns=T0_NS + 20 * MS)
    waterfall = built(ready(at_ms=20), ready(), joined)
    assert waterfall.origin_ns == T0_NS + 20 * MS


def test_time_of_storing_is_not_believed_when_an_engine_heard_of_it_before() -> None:
    history = [Heard(ready(), {}, T0_NS + 10 * MS), Heard(complete("a", start_ms=2), {}, 0)]
    waterfall = build_waterfall(MODEL, "v7", history)
    assert waterfall is not None
    assert waterfall.stored_s is None
