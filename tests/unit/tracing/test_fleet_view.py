"""The fleet's text, and its width at every width."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from tests.unit.tracing.rounds import (
    T0_NS,
    first_token,
    join,
    ready,
    skipped,
    stage,
    state,
    whole_round,
)
from weightbus.schemas.progress import DeadLetter
from weightbus.tracing.fleet import FleetView
from weightbus.tracing.fleet_view import FleetTables
from weightbus.tracing.watcher import Fleet

EXPECTED = """\
newest versions  minilm 8

model  engine status      version target lag update   token GB/s route proof
minilm a      serving           7          1 129 ms 12.0 ms 0.70 local verified
minilm b      quarantined

round v8 of minilm: 1.00 s, no plan yet, waiting for a, last a/0 fetch
22:13:20.365Z failed minilm b version 7: TornRead: segment s has generation 9:
it must be 8 (quarantined)
22:13:20.005Z skipped minilm version 9 by trainer: busy: a reads slot 1
22:13:20.000Z dead letter weightbus.minilm.checkpoint.ready: version is \\x1b[2J
"""


def fleet_view() -> FleetView:
    fleet = Fleet()
    letter = DeadLetter(
        model="minilm", subject="weightbus.minilm.checkpoint.ready", reason="version is \x1b[2J",
        reported_ns=T0_NS,
    )  # fmt: skip
    for message in (
        state("a"), state("b"), *whole_round(), first_token("a", 131, 143), letter, skipped(9),
        ready(8), join("a", 8), stage("a", "fetch", 1, 2, rank=0, version=8),
    ):  # fmt: skip
        fleet.feed(message, T0_NS)
    return fleet.view(T0_NS + 1_000_000_000)


def rendered(view: FleetView, width: int, *, colour: bool = False) -> str:
    stream = io.StringIO()
    console = Console(
        file=stream, width=width, force_terminal=colour,
        color_system="standard" if colour else None, legacy_windows=False,
    )  # fmt: skip
    console.print(FleetTables(view))
    return stream.getvalue()


def test_fleet_text_is_the_expected_one() -> None:
    lines = rendered(fleet_view(), 80).splitlines()
    assert [line.rstrip() for line in lines] == EXPECTED.splitlines()


@pytest.mark.parametrize("width", [1, 10, 20, 40, 80, 120, 300])
def test_fleet_keeps_to_the_width(width: int) -> None:
    assert max(len(line) for line in rendered(fleet_view(), width).splitlines()) <= width


def test_fleet_has_escape_sequences_only_when_the_terminal_has_colours() -> None:
    assert "\x1b[" in rendered(fleet_view(), 80, colour=True)
    assert "\x1b" not in rendered(fleet_view(), 80)


def test_fleet_says_so_when_there_is_nothing() -> None:
    text = rendered(Fleet().view(T0_NS), 80)
    assert "none announced" in text
    assert "no engines" in text
