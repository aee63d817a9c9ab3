"""The critical path of hand-made rounds: every step, what was waited for, and the sentence."""

from __future__ import annotations

import pytest

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
    route,
    stage,
    whole_round,
)
from weightbus.schemas.base import Message
from weightbus.schemas.rounds import Links
from weightbus.tracing.history import Heard, build_waterfall
from weightbus.tracing.waterfall import Waterfall

Told = tuple[str, str, int | None, float, str]
"""What, engine, rank, until when in ms, waited for."""


def built(*messages: Message, stored_ms: float | None = None) -> Waterfall:
    history = heard(*messages)
    if stored_ms is not None:
        history = [Heard(each.message, {}, T0_NS + round(stored_ms * MS)) for each in history]
    waterfall = build_waterfall(MODEL, "v7", history)
    assert waterfall is not None
    return waterfall


def path_of(waterfall: Waterfall) -> list[Told]:
    """Checked to be without gaps and overlaps, from 0 on."""
    told: list[Told] = []
    now_s = 0.0
    for step in waterfall.critical_path:
        assert step.start_s == pytest.approx(now_s, abs=1e-12), waterfall.critical_path
        assert step.duration_s > 0, waterfall.critical_path
        now_s = step.start_s + step.duration_s
        told.append((step.what, step.engine, step.rank, round(now_s * 1e3, 3), step.waited_for))
    return told


def marked(waterfall: Waterfall) -> set[tuple[str, str, int | None]]:
    return {
        (engine.engine, row.stage, row.rank)
        for engine in waterfall.engines
        for row in engine.stages
        if row.critical
    }


def test_path_of_one_local_engine_goes_from_publish_to_its_first_token() -> None:
    waterfall = built(
        ready(),
        join("a", at_ms=4),
        plan(route("a"), at_ms=8),
        stage("a", "negotiate", 3, 10),
        stage("a", "reload", 32, 92, rank=0, taken="local", moved_bytes=120_000_000),
        stage("a", "commit", 97, 99),
        complete("a", start_ms=3, end_ms=100, paused_s=0.072),
        first_token("a", 100, 112),
        done("a"),
        stored_ms=1,
    )
    assert path_of(waterfall) == [
        ("publish", "", None, 1, ""),
        ("deliver", "", None, 3, ""),
        ("negotiate", "a", None, 10, ""),
        ("wait", "a", 0, 28, "its source to be opened"),
        ("wait", "a", 0, 32, "its engine to pause"),
        ("reload", "a", 0, 92, ""),
        ("wait", "a", None, 97, "the proof"),
        ("commit", "a", None, 100, ""),
        ("first_token", "a", None, 112, ""),
    ]
    assert waterfall.wall_s == pytest.approx(0.100)
    assert marked(waterfall) == {
        ("a", "negotiate", None),
        ("a", "reload", 0),
        ("a", "commit", None),
    }
    assert waterfall.critical_told == (
        "engine a served after 100 ms: reload of rank 0 took 60.0 ms (60 %) at 2.00 GB/s; "
        "rank 0 waited 18.0 ms (18 %) for its source to be opened; "
        "negotiate took 7.00 ms (7 %); its first token came 12.0 ms later"
    )


def test_path_is_that_of_the_slowest_rank_of_the_last_engine() -> None:
    waterfall = built(
        ready(),
        stage("a", "negotiate", 0, 10),
        stage("a", "reload", 10, 50, rank=0, taken="local", moved_bytes=1),
        stage("a", "reload", 10, 80, rank=1, taken="local", moved_bytes=1),
        complete("a", start_ms=0, end_ms=80, paused_s=0.0),
        stage("b", "negotiate", 0, 10),
        stage("b", "reload", 10, 40, rank=0, taken="local", moved_bytes=1),
        complete("b", start_ms=0, end_ms=41, paused_s=0.0),
    )
    assert path_of(waterfall) == [
        ("negotiate", "a", None, 10, ""), ("reload", "a", 1, 80, ""),
    ]  # fmt: skip
    assert marked(waterfall) == {("a", "negotiate", None), ("a", "reload", 1)}
    assert waterfall.critical_told.startswith("engine a, the last of 2, served after 80.0 ms: ")


def test_path_waits_for_who_joined_last_and_for_the_plan_of_the_leader() -> None:
    waterfall = built(
        ready(),
        join("a", at_ms=5),
        join("b", at_ms=6),
        join("c", at_ms=150),
        plan(route("a"), route("b"), route("c"), at_ms=155),
        stage("b", "negotiate", 2, 157),
        stage("b", "reload", 157, 190, rank=0, taken="local", moved_bytes=1),
        complete("b", start_ms=2, end_ms=190, paused_s=0.0),
    )
    assert path_of(waterfall) == [
        ("deliver", "", None, 2, ""),
        ("negotiate", "b", None, 6, ""),
        ("wait", "b", None, 150, "c to join"),
        ("wait", "b", None, 155, "the plan of a"),
        ("negotiate", "b", None, 157, ""),
        ("reload", "b", 0, 190, ""),
    ]
    assert "it waited 144 ms (76 %) for c to join" in waterfall.critical_told


@pytest.mark.parametrize(
    ("measured", "told"),
    [
        (100_000_000, "3030 % of the memory link (above 100 %: faster than measured by weightbus"),
        (3_030_000_000, "100 % of the memory link"),
        (6_060_000_000, "50 % of the memory link"),
    ],
)
def test_share_above_that_of_the_whole_link_is_said_to_be_faster_than_measured(
    measured: int, told: str
) -> None:
    waterfall = built(
        ready(),
        join("a", links=Links(memory=measured)),
        plan(route("a")),
        stage("a", "reload", 10, 40, rank=0, taken="local", moved_bytes=90_900_000),
        complete("a", end_ms=40, paused_s=0.0),
    )
    assert f", {told}" in waterfall.critical_told
    assert ("above 100 %" in waterfall.critical_told) == ("above" in told)


def test_the_leader_itself_negotiates_until_it_has_planned() -> None:
    waterfall = built(
        ready(),
        join("a", at_ms=5),
        plan(route("a"), at_ms=205),
        stage("a", "negotiate", 2, 206),
        complete("a", start_ms=2, end_ms=206, paused_s=0.0),
    )
    assert path_of(waterfall) == [("deliver", "", None, 2, ""), ("negotiate", "a", None, 206, "")]


def broadcast_round(*, slow_ms: float) -> list[Message]:
    """Engines a and b, of one rank each, fetch 4 buckets in turn: b in 40 ms, a in `slow_ms`."""
    fast = [(10.0, 30.0), (30.0, 50.0)]
    slow = [(10.0, 10 + slow_ms / 2), (10 + slow_ms / 2, 10 + slow_ms)]
    end = 10 + slow_ms + 20
    rates = Links(broadcast=2_000_000_000)
    return [
        ready(),
        join("a", links=rates),
        join("b", links=rates),
        plan(route("a", taken="broadcast"), route("b", taken="broadcast")),
        *[
            message
            for engine, fetched in (("a", slow), ("b", fast))
            for message in (
                stage(engine, "negotiate", 2, 10),
                stage(engine, "fetch", 10, fetched[-1][1], rank=3, taken="broadcast",
                      moved_bytes=20_000_000, buckets_ms=fetched),
                stage(engine, "broadcast", 30, end - 10, rank=3, taken="broadcast",
                      moved_bytes=40_000_000,
                      buckets_ms=[(30, 40), (40, end - 30), (end - 30, end - 20),
                                  (end - 20, end - 10)]),
                stage(engine, "reload", 12, end, rank=3, taken="broadcast",
                      moved_bytes=40_000_000,
                      buckets_ms=[(40, 45), (end - 30, end - 25), (end - 20, end - 15),
                                  (end - 10, end)]),
                stage(engine, "commit", end, end + 1 + (engine == "b")),
            )
        ],
        complete("a", start_ms=2, end_ms=round(end) + 1, paused_s=0.0, taken="broadcast"),
        complete("b", start_ms=2, end_ms=round(end) + 2, paused_s=0.0, taken="broadcast"),
    ]  # fmt: skip


def test_path_waits_for_its_peers_when_one_of_a_broadcast_fetches_slowly() -> None:
    waterfall = built(*broadcast_round(slow_ms=100))
    assert path_of(waterfall) == [
        ("deliver", "", None, 2, ""),
        ("negotiate", "b", None, 3, ""),
        ("wait", "b", None, 8, "the plan of a"),
        ("negotiate", "b", None, 10, ""),
        ("fetch", "b", 3, 50, ""),
        ("wait", "b", 3, 110, "its peers: a rank 3"),
        ("broadcast", "b", 3, 120, ""),
        ("reload", "b", 3, 130, ""),
        ("commit", "b", None, 132, ""),
    ]
    assert marked(waterfall) == {
        ("a", "fetch", 3), ("b", "negotiate", None), ("b", "fetch", 3), ("b", "broadcast", 3),
        ("b", "reload", 3), ("b", "commit", None),
    }  # fmt: skip
    assert waterfall.critical_told == (
        "engine b, the last of 2, served after 132 ms: "
        "rank 3 waited 60.0 ms (45 %) for its peers: a rank 3; "
        "fetch of rank 3 took 40.0 ms (30 %) at 0.50 GB/s; "
        "broadcast of rank 3 took 10.0 ms (8 %) at 0.44 GB/s, 22 % of the broadcast link"
    )


def test_path_waits_for_no_peer_when_all_fetch_equally_fast() -> None:
    waterfall = built(*broadcast_round(slow_ms=40))
    assert [step for step in path_of(waterfall) if "peers" in step[4]] == []
    assert ("a", "fetch", 3) not in marked(waterfall)


def test_path_goes_through_what_was_busy_longest_when_stages_stream() -> None:
    """Fetching has to wait for room: reload sets the pace, though both end at about one time."""
    buckets = [(20.0 * n, 20.0 * n + 2) for n in range(5)]
    waterfall = built(
        ready(),
        stage("a", "fetch", 0, 82, rank=0, taken="p2p", moved_bytes=50, buckets_ms=buckets),
        stage("a", "reload", 0, 102, rank=0, taken="p2p", moved_bytes=50,
              buckets_ms=[(start + 2, start + 22) for start, _ in buckets]),
        complete("a", start_ms=0, end_ms=102, paused_s=0.0, taken="p2p"),
    )  # fmt: skip
    assert path_of(waterfall) == [("fetch", "a", 0, 2, ""), ("reload", "a", 0, 102, "")]


def test_path_gives_a_stage_without_buckets_only_what_came_after_the_one_before() -> None:
    waterfall = built(
        ready(),
        stage("a", "fetch", 0, 82, rank=0, taken="p2p", moved_bytes=50),
        stage("a", "reload", 0, 102, rank=0, taken="p2p", moved_bytes=50),
        complete("a", start_ms=0, end_ms=102, paused_s=0.0, taken="p2p"),
    )
    assert path_of(waterfall) == [("fetch", "a", 0, 82, ""), ("reload", "a", 0, 102, "")]


def test_path_waits_for_the_pause_between_what_was_fetched_and_its_reload() -> None:
    waterfall = built(
        ready(),
        stage("a", "fetch", 0, 30, rank=0, taken="p2p", moved_bytes=50),
        stage("a", "reload", 70, 100, rank=0, taken="p2p", moved_bytes=50),
        complete("a", start_ms=0, end_ms=100, paused_s=0.070, taken="p2p"),
    )
    assert path_of(waterfall) == [
        ("fetch", "a", 0, 30, ""),
        ("wait", "a", 0, 70, "its engine to pause"),
        ("reload", "a", 0, 100, ""),
    ]


def test_path_is_that_of_a_late_joiner_when_it_serves_last() -> None:
    early = [
        ready(),
        join("a", at_ms=3),
        plan(route("a", reason="shared memory of this host"), at_ms=5),
        stage("a", "negotiate", 2, 6),
        stage("a", "reload", 6, 30, rank=0, taken="local", moved_bytes=1),
        complete("a", start_ms=2, end_ms=31, paused_s=0.0),
        done("a"),
    ]
    late = [
        join("c", at_ms=900),
        plan(route("c", reason="it came late", taken="p2p"), epoch=9, at_ms=903, leader="c"),
        stage("c", "negotiate", 880, 904),
        stage("c", "fetch", 904, 960, rank=0, taken="p2p", moved_bytes=1),
        stage("c", "reload", 960, 990, rank=0, taken="p2p", moved_bytes=1),
        complete("c", start_ms=880, end_ms=991, paused_s=0.0, taken="p2p"),
        done("c", epoch=9, leader="c"),
    ]
    waterfall = built(*early, *late)
    assert path_of(waterfall) == [
        ("deliver", "", None, 880, ""),
        ("negotiate", "c", None, 904, ""),
        ("fetch", "c", 0, 960, ""),
        ("reload", "c", 0, 990, ""),
        ("wait", "c", None, 991, "the proof"),
    ]
    assert (waterfall.leader, waterfall.epoch, waterfall.complete) == ("c", 9, True)


@pytest.mark.parametrize("stored_ms", [None, 1])
def test_round_of_an_engine_that_came_late_counts_from_when_it_heard(
    stored_ms: float | None,
) -> None:
    """Started again an hour after the version, it updates within 88 ms."""
    hour = 3_600_000
    waterfall = built(
        ready(),
        join("z", at_ms=hour + 3),
        plan(route("z", taken="p2p"), at_ms=hour + 5, leader="z"),
        stage("z", "negotiate", hour + 2, hour + 6),
        stage("z", "fetch", hour + 6, hour + 90, rank=0, taken="p2p", moved_bytes=84_000_000),
        complete("z", start_ms=hour + 2, end_ms=hour + 90, paused_s=0.0, taken="p2p"),
        stored_ms=stored_ms,
    )
    assert (waterfall.origin, waterfall.origin_ns) == ("heard", T0_NS + (hour + 2) * MS)
    assert waterfall.wall_s == waterfall.span_s == pytest.approx(0.088)
    assert waterfall.stored_s is None
    assert waterfall.late_s == pytest.approx(3600.002 - (stored_ms or 0) / 1e3)
    assert path_of(waterfall) == [("negotiate", "z", None, 4, ""), ("fetch", "z", 0, 88, "")]
    assert waterfall.critical_told.startswith(
        "engine z served after 88.0 ms since it was heard of: fetch of rank 0 took 84.0 ms (95 %)"
    )
    assert waterfall.critical_told.endswith("it came 3,600 s after the version")


def test_late_engine_is_not_told_to_have_waited_for_delivery_when_others_came_promptly() -> None:
    waterfall = built(
        ready(),
        complete("a", end_ms=100),
        complete("z", start_ms=9_000, end_ms=10_000, paused_s=0.0),
    )
    assert (waterfall.origin, waterfall.late_s) == ("checkpoint_ready", 0.0)
    assert "it came 9.00 s (90 %) after the version" in waterfall.critical_told


def test_path_ends_where_it_failed_when_no_engine_serves() -> None:
    torn = "TornRead: segment s has generation 9: it must be 8"
    waterfall = built(
        ready(),
        join("a"),
        plan(route("a")),
        stage("a", "negotiate", 2, 10),
        stage("a", "reload", 12, 60, rank=1, taken="local", error=torn),
        failed("a", end_ms=65),
        done(failed={"a": torn}),
    )
    assert path_of(waterfall) == [
        ("deliver", "", None, 2, ""),
        ("negotiate", "a", None, 10, ""),
        ("wait", "a", 1, 12, "its source to be opened"),
        ("reload", "a", 1, 60, ""),
        ("wait", "a", None, 65, "what it had begun to end"),
    ]
    assert waterfall.wall_s is None
    assert waterfall.critical_told.startswith(
        "engine a failed after 65.0 ms: reload of rank 1 took"
    )


def test_path_counts_every_attempt_when_an_engine_tries_again() -> None:
    waterfall = built(
        ready(),
        join("a", at_ms=4),
        stage("a", "negotiate", 2, 10),
        stage("a", "broadcast", 10, 40, error="PeerLost: b"),
        join("a", at_ms=45),
        plan(route("a"), epoch=2, at_ms=50),
        stage("a", "negotiate", 40, 52),
        stage("a", "reload", 52, 80, rank=0, taken="local", moved_bytes=1),
        complete("a", start_ms=2, end_ms=80, paused_s=0.0),
    )
    assert path_of(waterfall) == [
        ("deliver", "", None, 2, ""),
        ("negotiate", "a", None, 10, ""),
        ("broadcast", "a", None, 40, ""),
        ("negotiate", "a", None, 52, ""),
        ("reload", "a", 0, 80, ""),
    ]


def attempts_of_two(*, slow_first_ms: float = 20) -> Waterfall:
    """Engines a and b lose a peer at 60 ms; b joins again last, at 140 ms. a is the last to serve;
    b fetches last in the second attempt, and took `slow_first_ms` for it in the first."""
    again = [
        message
        for engine, first_end_ms, fetched_ms in (("a", 20, 150), ("b", 10 + slow_first_ms, 160))
        for message in (
            stage(engine, "negotiate", 2, 10),
            stage(engine, "fetch", 10, first_end_ms, rank=0, taken="broadcast", moved_bytes=9),
            stage(engine, "broadcast", 30, 60, rank=0, taken="broadcast", error="PeerLost: c"),
            stage(engine, "negotiate", 100, 142),
            stage(engine, "fetch", 142, fetched_ms, rank=0, taken="broadcast", moved_bytes=9),
            stage(engine, "broadcast", 142, 170, rank=0, taken="broadcast", moved_bytes=9,
                  buckets_ms=[(160, 170)]),
            stage(engine, "reload", 142, 180, rank=0, taken="broadcast", moved_bytes=9,
                  buckets_ms=[(162, 180)]),
        )
    ]  # fmt: skip
    routes = route("a", taken="broadcast"), route("b", taken="broadcast")
    return built(
        ready(),
        join("a", at_ms=3), join("b", at_ms=3), plan(*routes, at_ms=8),
        join("a", at_ms=101), join("b", at_ms=140), plan(*routes, epoch=2, at_ms=141),
        *again,
        complete("a", end_ms=182, paused_s=0.0, taken="broadcast"),
        complete("b", end_ms=180, paused_s=0.0, taken="broadcast"),
    )  # fmt: skip


def test_path_waits_for_who_joined_last_for_the_attempt_and_not_for_the_one_before() -> None:
    path = path_of(attempts_of_two())
    assert ("wait", "a", None, 100, "another attempt") in path
    assert ("wait", "a", None, 140, "b to join") in path


def test_peers_of_an_attempt_are_told_by_what_they_fetched_in_it() -> None:
    """In the first attempt b fetched as fast as a, or slowly; in the second it was done later."""
    told = {
        slow_ms: [
            step
            for step in path_of(attempts_of_two(slow_first_ms=slow_ms))
            if step[4].startswith("its peers: ")
        ]
        for slow_ms in (20, 80)
    }
    assert told == {20: [], 80: [("wait", "a", 0, 60, "its peers: b rank 0")]}


def test_path_is_that_of_an_engine_that_told_when_it_served_before_one_that_did_not() -> None:
    """b serves only by its leader's word: when, nobody knows."""
    waterfall = built(
        ready(),
        complete("a", end_ms=50),
        stage("b", "negotiate", 2, 10),
        stage("b", "reload", 10, 90, rank=0, taken="local", moved_bytes=1),
        done("a", "b"),
    )
    assert waterfall.wall_s == pytest.approx(0.050)
    assert path_of(waterfall)[-1][1:4] == ("a", None, 50)


def test_path_ends_with_what_is_told_when_the_round_is_unfinished() -> None:
    waterfall = built(
        ready(), join("a", at_ms=4), plan(route("a"), at_ms=8), stage("a", "negotiate", 2, 10)
    )
    assert path_of(waterfall) == [("deliver", "", None, 2, ""), ("negotiate", "a", None, 10, "")]
    assert waterfall.critical_told == (
        "engine a has not finished; told are 10.0 ms: negotiate took 8.00 ms (80 %); "
        "delivery took 2.00 ms (20 %)"
    )


def test_path_ends_with_the_join_when_nothing_else_is_told() -> None:
    waterfall = built(ready(), join("a", at_ms=4))
    assert path_of(waterfall) == [("deliver", "", None, 4, "")]


def test_path_is_empty_when_only_a_failure_of_no_duration_is_told() -> None:
    waterfall = built(done(failed={}))
    assert (waterfall.critical_path, waterfall.critical_told) == ((), "")


def test_path_begins_with_the_first_message_when_the_clock_of_the_trainer_is_ahead() -> None:
    waterfall = built(ready(at_ms=500), *whole_round()[1:])
    assert waterfall.origin == "earliest"
    assert path_of(waterfall)[0] == ("negotiate", "a", None, 8, "")
    assert " since the first message: " in waterfall.critical_told


def test_path_begins_when_the_bus_had_the_version_if_the_trainer_says_later() -> None:
    waterfall = built(ready(at_ms=500), *whole_round()[1:], stored_ms=1)
    assert (waterfall.origin, waterfall.origin_ns) == ("stored", T0_NS + MS)
    assert path_of(waterfall)[0] == ("deliver", "", None, 1, "")
    assert waterfall.wall_s == pytest.approx(0.130)


def test_path_waits_for_the_proof_of_all_when_they_commit_together() -> None:
    waterfall = built(
        ready(),
        plan(route("a"), commit="together", at_ms=3),
        stage("a", "negotiate", 0, 5),
        stage("a", "reload", 5, 30, rank=0, taken="local", moved_bytes=1),
        stage("a", "commit", 70, 71),
        complete("a", start_ms=0, end_ms=71, paused_s=0.0),
    )
    assert ("wait", "a", None, 70, "the proof of all engines") in path_of(waterfall)
