"""Two rounds beside each other: every number, and what is said to have made the difference."""

from __future__ import annotations

import io

import msgspec
import pytest
from rich.console import Console

from tests.unit.tracing.rounds import (
    MODEL,
    complete,
    failed,
    first_token,
    heard,
    join,
    plan,
    ready,
    route,
    stage,
)
from tests.unit.tracing.test_critical_path import broadcast_round
from weightbus.schemas.base import Message
from weightbus.schemas.rounds import Links
from weightbus.tracing.compare import Comparison, EngineComparison, Sides, compare_rounds
from weightbus.tracing.compare_view import CompareView
from weightbus.tracing.history import build_waterfall
from weightbus.tracing.waterfall import Waterfall


def built(messages: list[Message], version: int = 7) -> Waterfall:
    waterfall = build_waterfall(MODEL, f"v{version}", heard(*messages))
    assert waterfall is not None
    return waterfall


def local_round(version: int, *, reload_ms: int, size_bytes: int = 80_000_000) -> Waterfall:
    end_ms = 20 + reload_ms
    return built(
        [
            ready(version),
            join("a", version),
            plan(route("a"), version=version),
            stage("a", "negotiate", 2, 10, version=version),
            stage("a", "reload", 10, 10 + reload_ms, rank=0, taken="local",
                  moved_bytes=size_bytes, version=version),
            complete("a", version, end_ms=end_ms, size_bytes=size_bytes, paused_s=0.03),
            first_token("a", end_ms, end_ms + 5, version),
        ],
        version,
    )  # fmt: skip


def numbers(engine: EngineComparison, stage_name: str) -> tuple[Sides, Sides, Sides]:
    (found,) = (each for each in engine.stages if each.stage == stage_name)
    return found.seconds, found.bytes, found.gb_per_s


def test_comparison_has_every_stage_of_every_engine() -> None:
    compared = compare_rounds(local_round(7, reload_ms=80), local_round(8, reload_ms=120))
    assert (compared.first_round, compared.second_round) == ("v7", "v8")
    assert compared.wall_s.difference == pytest.approx(0.040)
    assert compared.wall_s.ratio == pytest.approx(1.4)
    (a,) = compared.engines
    assert [each.stage for each in a.stages] == [
        "update", "paused", "negotiate", "reload", "first token",
    ]  # fmt: skip
    seconds, moved, rate = numbers(a, "reload")
    assert (seconds.first, seconds.second) == pytest.approx((0.080, 0.120))
    assert seconds.ratio == pytest.approx(1.5)
    assert (moved.first, moved.second, moved.ratio) == (80e6, 80e6, 1)
    assert (rate.first, rate.second) == pytest.approx((1.0, 2 / 3))
    seconds, _, rate = numbers(a, "first token")
    assert (seconds.first, seconds.second) == pytest.approx((0.005, 0.005))
    assert (rate.first, rate.ratio) == (None, None)


def test_comparison_tells_that_it_was_the_reload() -> None:
    fast, slow = local_round(7, reload_ms=80), local_round(8, reload_ms=120)
    assert compare_rounds(fast, slow).told == (
        "round v8 took 40.0 ms longer than v7 (140 ms against 100 ms): reload took 40.0 ms longer "
        "(120 ms against 80.0 ms, at 0.67 GB/s against 1.00)"
    )
    assert compare_rounds(slow, fast).told == (
        "round v7 took 40.0 ms less than v8 (100 ms against 140 ms): reload took 40.0 ms less "
        "(80.0 ms against 120 ms, at 1.00 GB/s against 0.67)"
    )


def test_comparison_tells_that_it_was_a_slow_peer() -> None:
    told = compare_rounds(
        built(broadcast_round(slow_ms=40)), built(broadcast_round(slow_ms=100))
    ).told
    assert "waiting for its peers: a rank 3 took 60.0 ms longer (60.0 ms against 0.00 ms)" in told


def test_comparison_tells_what_went_against_the_difference() -> None:
    """The reload took 60 ms less, and who joined last came 40 ms later."""
    late = [
        ready(8), join("a", 8), join("b", 8, at_ms=45),
        plan(route("a"), route("b"), version=8, at_ms=46),
        stage("a", "negotiate", 2, 50, version=8),
        stage("a", "reload", 50, 70, rank=0, taken="local", moved_bytes=80_000_000, version=8),
        complete("a", 8, end_ms=80, paused_s=0.03),
    ]  # fmt: skip
    told = compare_rounds(local_round(7, reload_ms=80), built(late, 8)).told
    assert told.startswith("round v8 took 20.0 ms less than v7 (80.0 ms against 100 ms): reload ")
    assert "; though waiting for b to join took 42.0 ms longer (42.0 ms against 0.00 ms)" in told


def test_comparison_tells_when_more_was_moved() -> None:
    small = local_round(7, reload_ms=80)
    large = local_round(8, reload_ms=160, size_bytes=160_000_000)
    assert compare_rounds(small, large).told.endswith("; it moved 160 MB against 80.0 MB")


def test_comparison_tells_no_cause_when_both_took_the_same_time() -> None:
    told = compare_rounds(local_round(7, reload_ms=80), local_round(8, reload_ms=81)).told
    assert told == "rounds v7 and v8 took the same time (101 ms against 100 ms)"


def test_comparison_tells_which_round_was_never_served() -> None:
    torn = built([ready(), join("a"), failed("a", end_ms=60)])
    served = local_round(8, reload_ms=80)
    told = compare_rounds(torn, served).told
    assert told.startswith(
        "no engine serves the version of round v7, that of v8 was served after 100 ms: "
        "engine a failed after 60.0 ms: "
    )
    assert compare_rounds(served, torn).told == told
    assert ", nor that of v7: " in compare_rounds(torn, torn).told


def test_comparison_keeps_engines_that_only_one_round_has() -> None:
    compared = compare_rounds(built(broadcast_round(slow_ms=40)), local_round(8, reload_ms=80))
    outcomes = [(each.engine, each.first_outcome, each.second_outcome) for each in compared.engines]
    assert outcomes == [("a", "complete", "complete"), ("b", "complete", "")]
    seconds, _, _ = numbers(compared.engines[1], "fetch")
    assert (seconds.second, seconds.difference, seconds.ratio) == (None, None, None)


@pytest.mark.parametrize("traced", [False, True])
def test_comparison_is_of_the_last_attempt_of_an_engine_that_tried_again(traced: bool) -> None:
    """Its reload took 30 ms twice: not the 80 ms from the first one's start on."""
    first = local_round(7, reload_ms=30, size_bytes=9_000_000)
    rows = [
        stage("a", "negotiate", 2, 10),
        stage("a", "reload", 10, 40, rank=0, taken="local", moved_bytes=9_000_000, error="Torn: b"),
        stage("a", "negotiate", 50, 60),
        stage("a", "reload", 60, 90, rank=0, taken="local", moved_bytes=9_000_000),
    ]
    if traced:
        rows = [
            msgspec.structs.replace(row, span_id=f"{at:016x}", parent_span_id="ab"[at // 2] * 16)
            for at, row in enumerate(rows)
        ]
    again = built([ready(), *rows, complete("a", end_ms=91, size_bytes=9_000_000)])
    compared = compare_rounds(first, again)
    (a,) = compared.engines
    assert (a.first_attempt, a.second_attempt) == (1, 2)
    seconds, moved_bytes, gb_per_s = numbers(a, "reload")
    assert seconds.second == pytest.approx(0.030)
    assert moved_bytes.second == 9_000_000
    assert gb_per_s.difference == pytest.approx(0)
    assert "a  complete, then complete (attempt 2)" in rendered(compared, 100)


def test_comparison_explains_a_share_that_is_above_the_whole_link() -> None:
    def measured(memory: int) -> str:
        rounds = [
            built([
                ready(), join("a", links=Links(memory=memory)), plan(route("a")),
                stage("a", "reload", 10, end_ms, rank=0, taken="local", moved_bytes=60_000_000),
                complete("a", end_ms=end_ms, paused_s=0.0),
            ])
            for end_ms in (40, 70)
        ]  # fmt: skip
        return compare_rounds(*rounds).told

    faster = "above 100 %: faster than measured by weightbus doctor"
    assert f"against 2.00 (200 % of its link, {faster})" in measured(1_000_000_000)
    assert "against 2.00 (50 % of its link)" in measured(4_000_000_000)


def test_comparison_survives_json() -> None:
    compared = compare_rounds(local_round(7, reload_ms=80), local_round(8, reload_ms=120))
    assert msgspec.json.decode(msgspec.json.encode(compared), type=Comparison) == compared


def rendered(comparison: Comparison, width: int) -> list[str]:
    stream = io.StringIO()
    Console(file=stream, width=width).print(CompareView(comparison))
    return [line.rstrip() for line in stream.getvalue().splitlines()]


def test_comparison_is_shown_as_a_table() -> None:
    compared = compare_rounds(local_round(7, reload_ms=80), local_round(8, reload_ms=120))
    assert rendered(compared, 100)[:10] == [
        "first  round v7  model minilm  version 7  served after 100 ms",
        "second round v8  model minilm  version 8  served after 140 ms",
        "",
        "  stage         first  second difference ratio GB/s GB/s   bytes",
        "a  complete",
        "  update      98.0 ms  138 ms   +40.0 ms 1.41x 0.82 0.58 80.0 MB",
        "  paused      30.0 ms 30.0 ms    0.00 ms 1.00x",
        "  negotiate   8.00 ms 8.00 ms    0.00 ms 1.00x",
        "  reload      80.0 ms  120 ms   +40.0 ms 1.50x 1.00 0.67 80.0 MB",
        "  first token 5.00 ms 5.00 ms    0.00 ms 1.00x",
    ]


@pytest.mark.parametrize("width", [30, 40, 60, 80, 200])
def test_comparison_keeps_to_the_width(width: int) -> None:
    first, second = built(broadcast_round(slow_ms=40)), local_round(8, reload_ms=80)
    lines = rendered(compare_rounds(first, second), width)
    assert max(map(len, lines)) <= width
    assert any(line.startswith("b  complete, then not there") for line in lines)
