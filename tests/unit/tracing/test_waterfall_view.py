"""The waterfall's text, letter by letter; and its width at every width."""

from __future__ import annotations

import io
from pathlib import Path

import pytest
from rich.console import Console

from tests.unit.tracing.rounds import (
    MODEL,
    complete,
    first_token,
    heard,
    join,
    ready,
    stage,
    whole_round,
)
from weightbus.schemas.base import Message
from weightbus.schemas.rounds import Links
from weightbus.tracing.history import build_waterfall
from weightbus.tracing.waterfall_view import WaterfallView

GOLDEN = Path(__file__).parent / "golden"


def rendered(
    messages: list[Message], width: int, *, encoding: str = "utf-8", colour: bool = False
) -> str:
    waterfall = build_waterfall(MODEL, "v7", heard(*messages))
    assert waterfall is not None
    stream = io.TextIOWrapper(io.BytesIO(), encoding=encoding, newline="\n")
    console = Console(
        file=stream, width=width, force_terminal=colour,
        color_system="standard" if colour else None, legacy_windows=False,
    )  # fmt: skip
    console.print(WaterfallView(waterfall))
    stream.seek(0)
    return stream.read()


@pytest.mark.parametrize(("name", "width", "encoding"), [
    ("waterfall_80.txt", 80, "utf-8"),
    ("waterfall_120.txt", 120, "utf-8"),
    ("waterfall_80_ascii.txt", 80, "ascii"),
])  # fmt: skip
def test_waterfall_text_is_the_golden_one(name: str, width: int, encoding: str) -> None:
    lines = rendered(whole_round(), width, encoding=encoding).splitlines()
    assert [line.rstrip() for line in lines] == (GOLDEN / name).read_text().splitlines()


@pytest.mark.parametrize("width", [1, 10, 14, 15, 24, 33, 40, 60, 79, 80, 81, 100, 200, 400])
def test_waterfall_keeps_to_the_width(width: int) -> None:
    lines = rendered(whole_round(), width).splitlines()
    assert max(len(line) for line in lines) <= width


def test_waterfall_has_escape_sequences_only_when_the_terminal_has_colours() -> None:
    assert "\x1b[" in rendered(whole_round(), 80, colour=True)
    assert "\x1b" not in rendered(whole_round(), 80)


def test_waterfall_disarms_what_a_peer_wrote_when_it_holds_control_characters() -> None:
    hostile = stage("a", "fetch", 1, 2, error="x\x1b[2Jy\nz")
    text = rendered([ready(), hostile], 80)
    assert "x\\x1b[2Jy\\nz" in text


def test_waterfall_is_drawn_when_nothing_took_any_time() -> None:
    text = rendered([ready(), stage("a", "fetch", 0, 0)], 80)
    assert "█" in text


def test_waterfall_says_what_is_missing_when_the_round_has_only_begun() -> None:
    text = rendered([join("a")], 80)
    assert "no plan, not closed yet" in text
    assert "a  unfinished" in text
    assert "the earliest message" in " ".join(text.split())


def test_waterfall_bar_is_at_least_one_cell_and_ends_at_the_edge() -> None:
    messages = [
        ready(),
        stage("a", "fetch", 999, 1000),
        stage("a", "h2d", 0, 1),
        complete("a", end_ms=1000),
    ]
    bars = [line for line in rendered(messages, 80).splitlines() if "█" in line and "all" in line]
    assert [line.count("█") for line in bars[:2]] == [1, 1], bars
    assert len(bars[1]) == 80


def test_waterfall_marks_the_critical_path_without_colour_and_tells_it() -> None:
    lines = rendered(whole_round(), 120).splitlines()
    assert [line.split()[1:3] for line in lines if line.startswith("*")] == [
        ["all", "negotiate"], ["0", "fetch"], ["0", "reload"], ["all", "commit"],
    ]  # fmt: skip
    assert any(line.startswith("critical path: engine a served after 131 ms: ") for line in lines)


def test_waterfall_shows_shares_of_links_first_tokens_and_what_clocks_may_be_off() -> None:
    text = rendered(
        [
            ready(residual_ns=30_000),
            join("a", links=Links(disk=2_000_000_000)),
            stage("a", "fetch", 10, 60, rank=0, taken="local", moved_bytes=61_000_000),
            complete("a", residual_ns=410_000),
            first_token("a", 131, 150),
        ],
        160,
    )
    assert " 61 % disk " in text
    assert "first token after 150 ms" in text
    assert "clocks are off by 0.41 ms at most" in text


@pytest.mark.parametrize(("measured", "is_faster"), [(2_000_000_000, False), (200_000_000, True)])
def test_waterfall_explains_a_share_that_is_above_the_whole_link(
    measured: int, is_faster: bool
) -> None:
    text = rendered(
        [
            ready(),
            join("a", links=Links(disk=measured)),
            stage("a", "fetch", 10, 60, rank=0, taken="local", moved_bytes=61_000_000),
        ],
        400,
    )
    legend = text.rstrip().splitlines()[-1]
    assert ("(above 100 %: faster than measured by weightbus doctor)" in legend) == is_faster


def test_waterfall_says_from_when_a_round_of_engines_that_came_late_counts() -> None:
    text = rendered([ready(), complete("a", start_ms=60_002, end_ms=60_102)], 400)
    assert "in 100 ms from hearing of it to the last engine serving" in text
    assert "counted from when its first engine heard of it (it came after the version)" in text
    assert "it came 60.0 s after the version" in text


@pytest.mark.parametrize(("engines", "told"), [("a", "1 engine: "), ("ab", "2 engines: ")])
def test_waterfall_counts_its_engines_in_the_right_number(engines: str, told: str) -> None:
    text = rendered([ready(), *(complete(engine) for engine in engines)], 200)
    assert f"total {told}" in text
