"""Every message has its line, and no line does anything to a terminal."""

from __future__ import annotations

import pytest
from msgspec import structs

from tests.unit.tracing.rounds import (
    T0_NS,
    complete,
    failed,
    first_token,
    skipped,
    state,
    whole_round,
)
from weightbus.schemas.base import Message
from weightbus.schemas.progress import DeadLetter
from weightbus.schemas.rounds import Commit
from weightbus.tracing.narration import narrate, narrate_gone, narrate_missed, time_of_day

TORN = "segment s has generation 9: it must be 8"


def test_round_is_told_line_by_line() -> None:
    assert [narrate(message) for message in whole_round()] == ["minilm: " + line for line in [
        "version 7 is ready, from trainer",
        "a joins round v7 with 1 rank",
        "b joins round v7 with 1 rank",
        "a plans round v7, epoch 1: a by local, b by local",
        "a negotiate took 8.00 ms",
        "b negotiate took 8.00 ms",
        "a/0 fetch took 30.0 ms, 90.9 MB, 3.03 GB/s, local",
        "b/0 fetch took 68.0 ms, 45.5 MB, 0.67 GB/s, local",
        "a/0 reload took 80.0 ms, 90.9 MB, 1.14 GB/s, local",
        "a commit took 10.0 ms",
        "a serves version 7 after 129 ms, 90.9 MB, 0.70 GB/s, local, verified, paused 85.0 ms",
        "b/0 reload took 270 ms, 45.5 MB, 0.17 GB/s, local",
        f"b/1 reload failed after 279 ms, local: TornRead: {TORN}",
        f"b did not reach version 7: TornRead: {TORN}; it is quarantined",
        f"a closes round v7: 1 complete, 1 failed (b: TornRead: {TORN})",
    ]]  # fmt: skip


@pytest.mark.parametrize(("message", "line"), [
    (state("a", "starting", -1), "a is starting (2 ranks of torch)"),
    (
        state("a", "updating", 6, 7),
        "a is updating, on version 6, moving to version 7 (2 ranks of torch)",
    ),
    (
        failed("a", quarantined=False, served_version=6),
        f"a did not reach version 7: TornRead: {TORN}; it serves version 6",
    ),
    (
        failed("a", quarantined=False),
        f"a did not reach version 7: TornRead: {TORN}; it serves nothing",
    ),
    (
        complete("a", size_bytes=0),
        "a serves version 7 after 129 ms, local, verified, paused 85.0 ms",
    ),
    (first_token("a", 131, 143), "a makes its first token with version 7 after 12.0 ms"),
    (
        structs.replace(first_token("a", 131, 143), resolution_ns=5_000_000),
        "a makes its first token with version 7 after 12.0 ms, at most 5.00 ms less",
    ),
    (skipped(), "version 8 is skipped by trainer (busy): a reads slot 1"),
    (
        skipped(8, "failed", waited_s=1.5),
        "version 8 is skipped by trainer (failed after 1.50 s): a reads slot 1",
    ),
    (
        skipped(8, "ranks", 2, waited_s=60.0),
        "version 8 is skipped by trainer (ranks after 60.0 s; not heard of: rank 2): "
        "a reads slot 1",
    ),
    (
        skipped(8, "ranks", *range(10)),
        "version 8 is skipped by trainer (ranks; not heard of: "
        "ranks 0, 1, 2, 3, 4, 5, 6, 7 and 2 more): a reads slot 1",
    ),
    (
        DeadLetter(model="minilm", subject="weightbus.m.dead", reason="\x1b[2J\nx"),
        "dead letter on weightbus.m.dead: \\x1b[2J\\nx",
    ),
])  # fmt: skip
def test_message_is_told_in_one_line(message: Message, line: str) -> None:
    assert narrate(message) == f"minilm: {line}"


def test_end_of_a_heartbeat_is_told() -> None:
    assert narrate_gone("minilm", "a") == "minilm: a is gone"


@pytest.mark.parametrize(
    ("at_most", "told"),
    [
        (
            7,
            "at most 7 messages of PROGRESS were missed, counted over all kinds and models: "
            "the bus no longer keeps them",
        ),
        (
            1,
            "at most 1 message of PROGRESS was missed, counted over all kinds and models: "
            "the bus no longer keeps it",
        ),
        (
            None,
            "an unknown number of messages of PROGRESS were missed: the bus no longer keeps them",
        ),
    ],
)
def test_loss_is_told_with_what_is_known_of_it(at_most: int | None, told: str) -> None:
    """A monitor that asked for some kinds may have missed fewer than were dropped, or none."""
    assert narrate_missed("PROGRESS", at_most) == told


def test_message_is_told_by_its_name_when_monitors_do_not_look_at_it() -> None:
    assert narrate(Commit(model="m", version=1, round="r", epoch=1)) == "Commit"


def test_time_of_day_is_in_utc() -> None:
    assert time_of_day(T0_NS + 1_999_999) == "22:13:20.001Z"
