"""The history of rounds: what its lines tell, and that it is bounded."""

from __future__ import annotations

import pytest
from msgspec import structs

from tests.unit.tracing.rounds import (
    MODEL,
    MS,
    T0_NS,
    complete,
    done,
    failed,
    join,
    plan,
    ready,
    refused,
    stage,
    whole_round,
)
from weightbus.cli.ui.rounds import HistoryRow, RoundLog
from weightbus.schemas.base import Message
from weightbus.schemas.placement import FileSegment
from weightbus.schemas.progress import FirstToken
from weightbus.tracing.history import Heard, build_waterfall


def log_of(*messages: Message, is_heard: bool = True, log: RoundLog | None = None) -> RoundLog:
    log = log or RoundLog()
    for message in messages:
        log.feed(message, T0_NS, {}, is_heard=is_heard)
    return log


def row_of(*messages: Message, in_flight: bool = False) -> HistoryRow:
    (row,) = log_of(*messages).rows([(MODEL, "v7")] if in_flight else [])
    return row


def test_line_tells_of_a_round_in_short() -> None:
    row = row_of(*whole_round())
    assert (row.model, row.round, row.version, row.state) == (MODEL, "v7", 7, "failed")
    assert (row.engines, row.completed, row.failed) == (2, 1, 1)
    assert (row.bytes, row.wall_s, row.routes) == (90_900_000, 0.131, ("local",))
    assert row.gb_per_s == pytest.approx(0.0909 / 0.131)
    assert row.first_token_s is None
    assert row.names == ("a", "b")
    assert row.told == len(whole_round()) - 1, "CheckpointReady names no round"


def test_time_is_that_of_the_waterfall() -> None:
    waterfall = build_waterfall(MODEL, "v7", [Heard(message) for message in whole_round()])
    assert waterfall is not None
    row = row_of(*whole_round())
    assert (row.wall_s, row.bytes, row.gb_per_s) == (
        waterfall.wall_s,
        waterfall.bytes,
        waterfall.gb_per_s,
    )


@pytest.mark.parametrize(
    ("told", "in_flight", "state"),
    [
        ([join("a"), plan()], True, "running"),
        ([join("a"), plan(), complete("a")], False, "left"),
        ([join("a"), complete("a")], False, "complete"),
        ([join("a"), failed("a")], False, "failed"),
        ([join("a"), join("b"), failed("b")], True, "running"),
        ([join("a"), complete("a"), done("a")], True, "complete"),
        ([join("a"), done(failed={"a": "lost"})], False, "failed"),
        ([stage("a", "fetch", 1, 2)], False, "left"),
    ],
)
def test_state_of_a_round(told: list[Message], in_flight: bool, state: str) -> None:
    assert row_of(*told, in_flight=in_flight).state == state


def test_time_of_an_engine_that_came_late_is_that_of_its_waterfall() -> None:
    late = [ready(), join("a", at_ms=60_003), complete("a", start_ms=60_002, end_ms=60_102)]
    waterfall = build_waterfall(MODEL, "v7", [Heard(message, {}, T0_NS) for message in late])
    row = row_of(*late)
    assert waterfall is not None
    assert (row.wall_s, row.gb_per_s) == (waterfall.wall_s, waterfall.gb_per_s)
    assert row.wall_s == pytest.approx(0.1)


@pytest.mark.parametrize("closing", [[done("a", "b")], []], ids=["closed", "not closed"])
@pytest.mark.parametrize(
    "late", [refused("c"), refused("a"), [join("c", at_ms=300_001), *refused("c")]]
)
def test_good_round_stays_good_when_an_engine_is_refused_later(
    closing: list[Message], late: list[Message]
) -> None:
    good = [ready(), join("a"), join("b"), plan(), complete("a"), complete("b"), *closing]
    row = row_of(*good, *late)
    assert row.state == "complete"
    assert row.late == (late[-1].engine,)  # type: ignore[attr-defined]
    assert structs.replace(row, late=(), told=0) == structs.replace(row_of(*good), told=0)


def test_first_token_counts_from_the_same_start() -> None:
    token = FirstToken(
        model=MODEL, version=7, round="v7", engine="a",
        start_ns=T0_NS + 131 * MS, end_ns=T0_NS + 200 * MS,
    )  # fmt: skip
    assert row_of(*whole_round(), token).first_token_s == 0.2


def test_messages_are_kept_once_and_come_back_as_they_were() -> None:
    log = log_of(*whole_round(), *whole_round())
    known = log.find(MODEL, "v7")
    assert known is not None
    assert known.is_whole
    assert [heard.message for heard in known.messages] == whole_round()


def test_round_that_was_looked_back_is_not_whole() -> None:
    log = log_of(*whole_round(), is_heard=False)
    known = log.find(MODEL, "v7")
    assert known is not None
    assert not known.is_whole
    assert [heard.message for heard in known.messages] == [ready()]
    assert log.rows([])[0].completed == 1


def test_round_that_began_before_we_listened_is_not_whole() -> None:
    log = log_of(ready(), is_heard=False)
    log_of(*whole_round()[1:], log=log)
    assert not is_whole(log)
    assert not is_whole(log_of(*whole_round()[1:])), "its version was announced before"
    again = log_of(ready(at_ms=500), join("c"), log=log_of(ready(), is_heard=False))
    assert not is_whole(again), "its version was published before"


def test_round_that_was_forgotten_is_not_whole_when_more_of_it_comes() -> None:
    log = RoundLog(rounds_kept=1)
    log_of(ready(), join("a"), ready(8), join("a", 8), join("b"), log=log)
    assert not is_whole(log)


def test_round_that_began_when_something_was_missed_is_not_whole() -> None:
    log = log_of(ready())
    log.forget_messages()
    log_of(stage("a", "fetch", 1, 2), log=log)
    assert not is_whole(log)


def is_whole(log: RoundLog) -> bool:
    known = log.find(MODEL, "v7")
    assert known is not None
    return known.is_whole


def test_rounds_are_not_whole_after_something_was_missed() -> None:
    log = log_of(*whole_round())
    log.forget_messages()
    log_of(complete("b"), log=log)
    known = log.find(MODEL, "v7")
    assert known is not None
    assert not known.is_whole
    assert log.size_bytes == 0


def test_round_that_nobody_told_of_is_not_found() -> None:
    assert log_of(ready()).find(MODEL, "v7") is None


def test_placement_of_a_version_is_cut_to_what_tells_the_link() -> None:
    placement = tuple((FileSegment(path=f"/w/{part}"),) for part in range(1000))
    announced = structs.replace(ready(), files=(), placement=placement, metadata={"step": "1"})
    known = log_of(announced, join("a")).find(MODEL, "v7")
    assert known is not None
    assert known.messages[0].message == structs.replace(
        announced, placement=placement[:1], metadata={}
    )


def test_oldest_rounds_are_forgotten_beyond_the_limit() -> None:
    log = RoundLog(rounds_kept=3)
    for version in range(1, 6):
        log.feed(join("a", version), T0_NS + version, {}, is_heard=True)
    assert [row.version for row in log.rows([])] == [5, 4, 3]
    assert log.find(MODEL, "v1") is None


def test_messages_of_the_oldest_rounds_are_let_go_first_beyond_the_limit() -> None:
    one_round = log_of(ready(), *(stage("a", "fetch", at, at + 1) for at in range(50))).size_bytes
    log = RoundLog(messages_kept_bytes=2 * one_round)
    for version in (1, 2, 3):
        log_of(ready(version), log=log)
        for at in range(50):
            log.feed(stage("a", "fetch", at, at + 1, version=version), T0_NS, {}, is_heard=True)
        assert log.size_bytes <= 2 * one_round
    found = [log.find(MODEL, f"v{version}") for version in (1, 2, 3)]
    assert [known is not None and known.is_whole for known in found] == [False, True, True]


def test_round_greater_than_the_limit_is_let_go_and_stays_in_the_history() -> None:
    log = RoundLog(messages_kept_bytes=1000)
    log_of(ready(), *(stage("a", "fetch", at, at + 1) for at in range(50)), log=log)
    known = log.find(MODEL, "v7")
    assert known is not None
    assert not known.is_whole
    assert log.size_bytes == 0
    assert len(log.rows([])) == 1
