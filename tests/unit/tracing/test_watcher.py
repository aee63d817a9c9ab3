"""The fleet's state after every kind of message, in order and out of it."""

from __future__ import annotations

import random
import tracemalloc

import msgspec
import pytest

from tests.unit.tracing.rounds import (
    MODEL,
    MS,
    T0_NS,
    complete,
    done,
    failed,
    first_token,
    join,
    plan,
    ready,
    route,
    skipped,
    stage,
    state,
    whole_round,
)  # fmt: skip
from weightbus.schemas.base import Message
from weightbus.schemas.progress import DeadLetter
from weightbus.tracing.fleet import EngineView, FleetView
from weightbus.tracing.watcher import SKIPPED_KEPT, Fleet

SECOND_NS = 1_000_000_000


def fed(*messages: Message) -> Fleet:
    """A fleet that was told these messages, one every millisecond from T0."""
    fleet = Fleet()
    for number, message in enumerate(messages):
        fleet.feed(message, T0_NS + number * MS)
    return fleet


def view_of(*messages: Message) -> FleetView:
    return fed(*messages).view(T0_NS + SECOND_NS)


def engine_of(view: FleetView, name: str) -> EngineView:
    (engine,) = (engine for engine in view.engines if engine.engine == name)
    return engine


def test_engine_shows_its_heartbeat() -> None:
    engine = engine_of(view_of(state("a", "updating", 6, target=7)), "a")
    assert (engine.status, engine.version, engine.target_version) == ("updating", 6, 7)
    assert (engine.ranks, engine.engine_kind, engine.update_s) == (2, "torch", None)


def test_heartbeat_is_news_only_when_it_says_something_new() -> None:
    fleet = Fleet()
    assert fleet.feed(state("a", at_ms=0), T0_NS)
    assert not fleet.feed(state("a", at_ms=1000), T0_NS)
    assert fleet.feed(state("a", "updating", 7, target=8, at_ms=2000), T0_NS)
    assert not fleet.feed(state("a", at_ms=1500), T0_NS), "said before what is known"


@pytest.mark.parametrize(("newest", "served", "lag"), [
    (None, 7, None), (7, -1, None), (7, 7, 0), (9, 7, 2), (6, 7, 0),
])  # fmt: skip
def test_engine_lags_by_the_difference_of_the_versions(
    newest: int | None, served: int, lag: int | None
) -> None:
    announced = [] if newest is None else [ready(newest)]
    assert engine_of(view_of(*announced, state("a", version=served)), "a").lag == lag


def test_newest_version_never_goes_back() -> None:
    fleet = fed(ready(8))
    assert not fleet.feed(ready(7), T0_NS)
    assert fleet.view(T0_NS).newest == {MODEL: 8}


def test_engine_shows_its_last_update() -> None:
    engine = engine_of(view_of(state("a", "updating", 6, 7), complete("a")), "a")
    assert (engine.status, engine.version, engine.target_version) == ("serving", 7, -1)
    assert engine.update_s == pytest.approx(0.129)
    assert engine.gb_per_s == pytest.approx(0.0909 / 0.129)
    assert (engine.routes, engine.verified, engine.bytes) == (("local",), "verified", 90_900_000)


def test_engine_shows_how_soon_its_first_token_came_after_the_update() -> None:
    engine = engine_of(view_of(complete("a"), first_token("a", 131, 143)), "a")
    assert engine.first_token_s == pytest.approx(0.012)


@pytest.mark.parametrize("messages", [
    [complete("a")],
    [first_token("a", 5, 9, version=6), complete("a")],
    [complete("a"), first_token("b", 131, 143)],
    [complete("a", 6, end_ms=5), first_token("a", 5, 9, version=6), complete("a")],
])  # fmt: skip
def test_engine_shows_no_first_token_of_another_version_or_engine(messages: list[Message]) -> None:
    assert engine_of(view_of(*messages), "a").first_token_s is None


def test_engine_keeps_its_version_when_a_heartbeat_from_before_the_update_comes_late() -> None:
    engine = engine_of(
        view_of(
            state("a", "updating", 6, 7, at_ms=50),
            complete("a"),
            state("a", "updating", 6, 7, at_ms=100),
        ),
        "a",
    )
    assert (engine.status, engine.version) == ("serving", 7)


def test_engine_goes_back_to_nothing_when_it_was_restarted() -> None:
    engine = engine_of(view_of(complete("a"), state("a", "starting", -1, at_ms=500)), "a")
    assert (engine.status, engine.version) == ("starting", -1)


@pytest.mark.parametrize(("quarantined", "served", "status"), [
    (True, -1, "quarantined"), (False, 6, "updating"),
])  # fmt: skip
def test_engine_shows_what_a_failed_update_left(
    quarantined: bool, served: int, status: str
) -> None:
    update = failed("a", quarantined=quarantined, served_version=served)
    engine = engine_of(view_of(state("a", "updating", 6, 7), update), "a")
    assert (engine.status, engine.version, engine.target_version) == (status, served, -1)


def test_engine_is_gone_when_its_heartbeat_has_ended_and_is_back_with_the_next() -> None:
    fleet = fed(state("a"))
    assert fleet.feed_gone(MODEL, "a")
    assert not fleet.feed_gone(MODEL, "a")
    assert not fleet.feed_gone(MODEL, "nobody")
    assert engine_of(fleet.view(T0_NS), "a").status == "gone"
    assert fleet.feed(state("a"), T0_NS)
    assert engine_of(fleet.view(T0_NS), "a").status == "serving"


def test_engine_stays_gone_when_its_last_words_come_late() -> None:
    fleet = fed(state("a", "updating", 6, 7))
    fleet.feed_gone(MODEL, "a")
    fleet.feed(complete("a"), T0_NS)
    engine = engine_of(fleet.view(T0_NS), "a")
    assert (engine.status, engine.version) == ("gone", 7)


def test_fleet_forgets_the_first_of_many_engines_that_are_gone() -> None:
    fleet = fed(state("alive"))
    for number in range(100):
        fleet.feed(state(f"e{number}"), T0_NS)
        fleet.feed_gone(MODEL, f"e{number}")
    names = {engine.engine for engine in fleet.view(T0_NS).engines}
    assert names == {"alive", *(f"e{number}" for number in range(84, 100))}


def test_round_is_in_flight_from_its_first_join_until_its_leader_closes_it() -> None:
    fleet = fed(join("a"), join("b"))
    (joining,) = fleet.view(T0_NS + SECOND_NS).rounds
    assert (joining.round, joining.version, joining.epoch) == ("v7", 7, -1)
    assert joining.waiting == ("a", "b")
    assert joining.age_s == pytest.approx(1.0)
    fleet.feed(plan(), T0_NS + SECOND_NS)
    fleet.feed(stage("b", "reload", 80, 350, rank=1), T0_NS)
    fleet.feed(complete("a"), T0_NS)
    fleet.feed(failed("b"), T0_NS)
    (running,) = fleet.view(T0_NS + 2 * SECOND_NS).rounds
    assert (running.epoch, running.leader) == (1, "a")
    assert running.age_s == pytest.approx(1.0), "counted from the plan"
    assert (running.waiting, running.completed, running.failed) == ((), ("a",), ("b",))
    assert (running.last_stage, running.overdue) == ("b/1 reload", False)
    fleet.feed(done("a"), T0_NS)
    assert fleet.view(T0_NS).rounds == ()


def test_round_is_overdue_when_its_budget_is_spent_and_left_out_when_that_is_long_ago() -> None:
    fleet = fed(plan())
    assert not fleet.view(T0_NS + 179 * SECOND_NS).rounds[0].overdue
    assert fleet.view(T0_NS + 181 * SECOND_NS).rounds[0].overdue
    assert fleet.view(T0_NS + 361 * SECOND_NS).rounds == ()


def test_round_of_an_older_version_ends_when_a_newer_one_is_closed() -> None:
    messages = [join("a", 6), join("a", 8), join("a", 7), done("a", version=7)]
    assert [each.version for each in view_of(*messages).rounds] == [8]


def test_round_stays_closed_until_a_plan_of_a_later_epoch() -> None:
    fleet = fed(*whole_round())
    assert not fleet.feed(join("c"), T0_NS)
    assert not fleet.feed(plan(route("c"), epoch=1), T0_NS)
    assert fleet.view(T0_NS).rounds == ()
    assert fleet.feed(plan(route("c"), epoch=2), T0_NS)
    assert [each.waiting for each in fleet.view(T0_NS).rounds] == [("c",)]


@pytest.mark.parametrize("late", [
    join("c", 6), stage("c", "fetch", 1, 2, rank=0, version=6), failed("c", 6), complete("c", 6),
    join("c"), stage("c", "fetch", 1, 2, rank=0), failed("c"), complete("c"),
    plan(route("c"), version=6, epoch=1),
])  # fmt: skip
def test_late_words_open_no_round_that_is_over_or_of_an_older_version(late: Message) -> None:
    fleet = fed(join("a", 6), *whole_round())
    fleet.feed(late, T0_NS)
    assert fleet.view(T0_NS).rounds == ()


def test_round_of_a_late_joiner_is_open_from_its_plan_until_it_is_closed() -> None:
    fleet = fed(*whole_round(), join("c"), plan(route("c"), epoch=2))
    fleet.feed(done("a"), T0_NS)  # of the first epoch, again
    assert [each.waiting for each in fleet.view(T0_NS).rounds] == [("c",)]
    fleet.feed(msgspec.structs.replace(done("c"), epoch=2), T0_NS)
    assert fleet.view(T0_NS).rounds == ()
    fleet.feed(plan(route("c"), epoch=1), T0_NS)
    assert fleet.view(T0_NS).rounds == ()


def test_trainer_that_begins_again_has_its_rounds_shown_from_their_plans() -> None:
    fleet = fed(*whole_round(), join("a", 1), plan(version=1, epoch=5))
    assert [each.version for each in fleet.view(T0_NS).rounds] == [1]


def test_round_without_a_plan_is_over_when_all_who_joined_have_failed() -> None:
    fleet = fed(join("a"), join("b"), failed("a"))
    (open_still,) = fleet.view(T0_NS).rounds
    assert (open_still.waiting, open_still.failed) == (("b",), ("a",))
    fleet.feed(failed("b"), T0_NS)
    assert fleet.view(T0_NS).rounds == ()
    assert [failure.engine for failure in fleet.view(T0_NS).failures] == ["b", "a"]


def test_round_without_a_plan_is_over_when_the_last_who_joined_is_gone() -> None:
    fleet = fed(state("a"), join("a"))
    assert fleet.view(T0_NS).rounds != ()
    fleet.feed_gone(MODEL, "a")
    assert fleet.view(T0_NS).rounds == ()


def test_round_with_a_plan_waits_for_its_leader_when_all_have_failed_or_are_gone() -> None:
    fleet = fed(state("a"), join("a"), join("b"), plan(), failed("b"))
    fleet.feed_gone(MODEL, "a")
    assert [(each.waiting, each.failed) for each in fleet.view(T0_NS).rounds] == [(("a",), ("b",))]


def test_refusal_of_a_version_that_is_not_new_opens_no_round() -> None:
    assert view_of(failed("a")).rounds == ()


def test_failures_tell_their_reason_the_latest_first_and_are_bounded() -> None:
    view = view_of(*(failed(f"e{number}", end_ms=number + 1) for number in range(20)))
    assert [failure.engine for failure in view.failures] == [f"e{n}" for n in range(19, 11, -1)]
    assert (view.failures[0].cause, view.failures[0].failed_ns) == ("TornRead", T0_NS + 20 * MS)


def test_failure_is_told_by_the_leader_when_the_engine_never_reported() -> None:
    fleet = fed(join("b"), done("a", failed={"b": "no word within 180 s"}))
    (failure,) = fleet.view(T0_NS).failures
    assert (failure.engine, failure.cause, failure.reason) == ("b", "lost", "no word within 180 s")
    fleet.feed(failed("b"), T0_NS)
    (failure,) = fleet.view(T0_NS).failures
    assert failure.cause == "TornRead", "the engine's own word counts, even when it comes later"


def test_failure_counts_once_when_engine_and_leader_tell_of_it() -> None:
    view = view_of(failed("b"), done("a", failed={"b": "TornRead"}))
    assert [failure.cause for failure in view.failures] == ["TornRead"]


def test_dead_letters_are_kept_with_their_reasons() -> None:
    letter = DeadLetter(
        model=MODEL, subject="weightbus.minilm.checkpoint.ready", reason="version is -1",
        reported_by="a-1", reported_ns=T0_NS,
    )  # fmt: skip
    view = view_of(letter, letter)
    assert [(each.subject, each.reason) for each in view.dead_letters] == [
        (letter.subject, letter.reason)
    ]


def test_skipped_version_is_told_once_and_is_not_the_newest() -> None:
    view = view_of(ready(7), skipped(8, "ranks", 2, 3), skipped(8, "ranks", 2, 3))
    (told,) = view.skipped
    assert (told.model, told.producer, told.version) == (MODEL, "trainer", 8)
    assert (told.cause, told.ranks, told.skipped_ns) == ("ranks", (2, 3), T0_NS + 5 * MS)
    assert view.newest == {MODEL: 7}


def test_skipped_version_is_dropped_when_its_trainer_publishes_it_after_all() -> None:
    fleet = fed(ready(7), skipped(8), skipped(9))
    assert fleet.feed(ready(8), T0_NS)
    assert [told.version for told in fleet.view(T0_NS).skipped] == [9]
    assert not fleet.feed(skipped(8), T0_NS)
    late = fed(ready(8), skipped(8))
    assert late.view(T0_NS).skipped == ()


def test_older_version_that_comes_after_all_is_news_and_not_the_newest() -> None:
    fleet = fed(skipped(8), ready(9))
    assert fleet.feed(ready(8), T0_NS)
    assert (fleet.view(T0_NS).skipped, fleet.view(T0_NS).newest) == ((), {MODEL: 9})


def test_version_of_one_trainer_leaves_what_another_skipped() -> None:
    other = msgspec.structs.replace(ready(8), producer="other")
    (told,) = view_of(skipped(8), other).skipped
    assert (told.producer, told.version) == ("trainer", 8)


def test_the_last_skipped_versions_are_kept_the_latest_first() -> None:
    view = view_of(*(skipped(version) for version in range(SKIPPED_KEPT + 4)))
    assert [told.version for told in view.skipped] == list(range(SKIPPED_KEPT + 3, 3, -1))


@pytest.mark.parametrize("seed", range(20))
def test_fleet_ends_in_the_same_state_when_history_comes_twice(seed: int) -> None:
    messages = [state("a", "updating", 6, 7), state("b", "updating", 6, 7), *whole_round()]
    overlap = random.Random(seed).randrange(len(messages))
    fleet = fed(*messages)
    news = [
        fleet.feed(message, T0_NS) for message in messages[overlap:] if message not in messages[:2]
    ]
    assert not any(news), f"seed {seed}"
    assert fleet.view(T0_NS) == fed(*messages).view(T0_NS), f"seed {seed}"


def test_fleet_keeps_no_message_when_it_has_told_of_many_large_ones() -> None:
    fleet = Fleet()
    tracemalloc.start()
    try:
        for version in range(64):
            metadata = {"note": "x" * 2**18}
            large = msgspec.structs.replace(ready(version), metadata=metadata)
            assert fleet.feed(large, T0_NS)
            assert not fleet.feed(large, T0_NS)
        del large, metadata
        kept_bytes, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert kept_bytes < 2**18, "16 MiB were said"


def test_models_are_those_that_any_message_named() -> None:
    other = msgspec.structs.replace(join("c"), model="other")
    assert fed(ready(), other, state("x", model="third")).models == {MODEL, "other", "third"}


def test_fleet_view_survives_json() -> None:
    view = view_of(state("a"), *whole_round(), join("a", 8))
    assert msgspec.json.decode(msgspec.json.encode(view), type=FleetView) == view
