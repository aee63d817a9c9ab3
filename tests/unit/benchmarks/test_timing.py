"""From what consumers said to how long each part of an update took."""

from __future__ import annotations

import pytest

from benchmarks.h200.timing import Heard, is_whole, times_of
from weightbus.schemas.base import Stage
from weightbus.schemas.checkpoint import CheckpointReady
from weightbus.schemas.progress import StageComplete, UpdateComplete

MS = 10**6
SENT_NS = 10**18


def stage(name: Stage, start_ms: int, end_ms: int, rank: int | None = None) -> StageComplete:
    return StageComplete(
        model="m",
        version=1,
        round="r",
        engine="e",
        stage=name,
        rank=rank,
        start_ns=SENT_NS + start_ms * MS,
        end_ns=SENT_NS + end_ms * MS,
    )


def heard(*stages: StageComplete, paused_ms: int, end_ms: int) -> Heard:
    complete = UpdateComplete(
        model="m",
        version=1,
        round="r",
        engine="e",
        verified="verified",
        routes=("local",),
        bytes=1,
        start_ns=SENT_NS,
        end_ns=SENT_NS + end_ms * MS,
        paused_s=paused_ms / 1e3,
    )
    return Heard(complete=complete, stages=stages)


READY = CheckpointReady(
    model="m", version=1, producer="t", created_ns=SENT_NS, layout_digest="0" * 64
)
LOCAL = (stage("negotiate", 2, 8), stage("reload", 15, 40, 0), stage("reload", 14, 50, 1))


def test_parts_add_up_to_the_last_rank_that_is_written() -> None:
    times = times_of(READY, [heard(*LOCAL, stage("commit", 54, 60), paused_ms=49, end_ms=61)])
    assert times.seconds == pytest.approx(0.050)
    assert times.announce_s == pytest.approx(0.002)
    assert times.event_to_plan_s == pytest.approx(0.006)
    assert times.prepare_s == pytest.approx(0.003)
    assert times.pause_s == pytest.approx(0.003)
    assert times.transfer_s == pytest.approx(0.036)
    assert times.prove_s == pytest.approx(0.004)
    assert times.resume_s == pytest.approx(0.006)
    assert times.served_s == pytest.approx(0.061)
    parts = ("announce_s", "event_to_plan_s", "prepare_s", "pause_s", "transfer_s")
    assert sum(getattr(times, part) for part in parts) == pytest.approx(times.seconds)


def test_engine_that_is_written_last_counts_when_there_are_several() -> None:
    early = heard(*LOCAL, stage("commit", 54, 60), paused_ms=49, end_ms=61)
    late = heard(
        stage("negotiate", 2, 9),
        stage("reload", 20, 70, 0),
        stage("commit", 71, 72),
        paused_ms=60,
        end_ms=72,
    )
    for order in ([early, late], [late, early]):
        times = times_of(READY, order)
        assert (times.seconds, times.event_to_plan_s) == pytest.approx((0.070, 0.007))


def test_staging_that_is_filled_before_the_pause_is_part_of_the_transfer() -> None:
    staged = (
        stage("negotiate", 2, 8),
        stage("fetch", 9, 40, 0),
        stage("broadcast", 10, 45, 0),
        stage("reload", 20, 50, 0),
        stage("commit", 51, 55),
    )
    times = times_of(READY, [heard(*staged, paused_ms=40, end_ms=56)])
    assert (times.prepare_s, times.pause_s) == pytest.approx((0.001, 0.0))
    assert times.transfer_s == pytest.approx(0.041)


def test_engine_is_waited_for_until_every_rank_and_both_ends_are_reported() -> None:
    commit = stage("commit", 54, 60)
    assert is_whole([*LOCAL, commit], ranks=2)
    assert not is_whole(LOCAL, ranks=2)
    assert not is_whole([*LOCAL, commit], ranks=3)
