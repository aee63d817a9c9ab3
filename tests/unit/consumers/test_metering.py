"""A consumer's figures, from what it says and hears: values, attributes; and nothing raises."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from typing import Any

import pytest
from msgspec import structs
from opentelemetry.sdk.metrics.export import InMemoryMetricReader

from tests.unit.consumers.fakes import ready_of
from weightbus.consumers.metering import REMEMBERED, Metering
from weightbus.schemas.base import Message, Stage
from weightbus.schemas.placement import CudaSegment, SharedMemorySegment
from weightbus.schemas.progress import (
    DeadLetter,
    EngineState,
    FirstToken,
    StageComplete,
    UpdateComplete,
    UpdateFailed,
)
from weightbus.schemas.rounds import (
    EngineRoute,
    Join,
    Links,
    RankOffer,
    RankRoute,
    RoundComplete,
    RoundPlan,
)
from weightbus.tracing.metric_names import METRICS
from weightbus.tracing.telemetry import Telemetry, open_telemetry

S = 10**9
SPECS = {spec.name: spec for spec in METRICS}
Point = tuple[dict[str, Any], Any]


class Meter:
    """A metering, and what was measured by it."""

    def __init__(self, telemetry: Telemetry, reader: InMemoryMetricReader) -> None:
        self.metering = Metering(telemetry, "m", "a", "consumer-a")
        self._reader = reader

    def say(self, *messages: Message) -> None:
        for message in messages:
            self.metering.say(message)

    def hear(self, *messages: Message) -> None:
        for message in messages:
            self.metering.hear(message)

    def points(self, name: str) -> list[Point]:
        """Attributes, without their prefix and those of every point, and the value; of a histogram
        its count and sum."""
        self.metering._note(self.metering._take_stages)
        data = self._reader.get_metrics_data()
        assert data is not None
        found: list[Any] = []
        for group in data.resource_metrics:
            for scope in group.scope_metrics:
                for metric in scope.metrics:
                    if metric.name == f"weightbus.{name}":
                        spec = SPECS[metric.name]
                        assert (scope.scope.name, metric.unit) == (spec.meter, spec.unit)
                        found += metric.data.data_points
        return [
            (_attributes(point, SPECS[f"weightbus.{name}"].attributes), _value(point))
            for point in found
        ]

    def value(self, name: str) -> Any:
        ((_, value),) = self.points(name)
        return value


def _attributes(point: Any, allowed: tuple[str, ...]) -> dict[str, Any]:
    assert set(point.attributes) <= set(allowed)
    assert point.attributes["weightbus.model"] == "m"
    assert point.attributes.get("weightbus.engine", "a") == "a"
    return {
        key.removeprefix("weightbus."): value
        for key, value in point.attributes.items()
        if key not in ("weightbus.model", "weightbus.engine")
    }


def _value(point: Any) -> Any:
    return (point.count, point.sum) if hasattr(point, "count") else point.value


@pytest.fixture
def meter() -> Iterator[Meter]:
    reader = InMemoryMetricReader()
    with open_telemetry("consumer", reader=reader) as telemetry:
        yield Meter(telemetry, reader)


def join(engine: str = "a", version: int = 7, **changes: Any) -> Join:
    said = Join(
        model="m",
        version=version,
        round=f"v{version}",
        engine=engine,
        consumer="c",
        host_id="h",
        ranks=(RankOffer(rank=0, needs_digest="0" * 64, need_bytes=1, routes=("local",)),),
    )
    return structs.replace(said, **changes)


def plan(version: int = 7, *engines: str, device: bool = False) -> RoundPlan:
    return RoundPlan(
        model="m",
        version=version,
        round=f"v{version}",
        epoch=1,
        leader="b",
        device=device,
        engines=tuple(
            EngineRoute(engine=engine, ranks=(RankRoute(rank=0, route="broadcast"),))
            for engine in engines or ("a", "b")
        ),
    )


def stage(name: Stage, start_s: float, end_s: float, **changes: Any) -> StageComplete:
    said = StageComplete(
        model="m",
        version=7,
        round="v7",
        engine="a",
        stage=name,
        start_ns=int(start_s * S),
        end_ns=int(end_s * S),
    )
    return structs.replace(said, **changes)


def complete(version: int = 7, **changes: Any) -> UpdateComplete:
    said = UpdateComplete(
        model="m",
        version=version,
        round=f"v{version}",
        engine="a",
        verified="verified",
        routes=("local",),
        bytes=1000,
        start_ns=10 * S,
        end_ns=12 * S,
        paused_s=0.25,
    )
    return structs.replace(said, **changes)


def failed(cause: str, **changes: Any) -> UpdateFailed:
    said = UpdateFailed(
        model="m", version=7, round="v7", engine="a", cause=cause, reason=f"{cause}: it broke"
    )
    return structs.replace(said, **changes)


def state(version: int) -> EngineState:
    return EngineState(
        model="m", engine="a", consumer="c", host_id="h", status="serving", version=version
    )


def closed(version: int) -> RoundComplete:
    return RoundComplete(model="m", version=version, round=f"v{version}", epoch=1, leader="b")


def test_update_is_measured_by_outcome_and_route_when_it_ends(meter: Meter) -> None:
    meter.hear(plan())
    meter.say(complete(), complete(routes=("p2p",), bytes=500, paused_s=0.5, end_ns=11 * S))
    meter.say(failed("TornRead", stage="fetch", start_ns=10 * S, end_ns=14 * S))
    assert meter.points("update.duration") == [
        ({"route": "local", "outcome": "complete"}, (1, 2.0)),
        ({"route": "p2p", "outcome": "complete"}, (1, 1.0)),
        ({"route": "broadcast", "outcome": "failed"}, (1, 4.0)),
    ]
    assert meter.points("update.size") == [
        ({"route": "local"}, (1, 1000)),
        ({"route": "p2p"}, (1, 500)),
    ]
    assert meter.points("engine.pause.duration") == [
        ({"route": "local"}, (1, 0.25)),
        ({"route": "p2p"}, (1, 0.5)),
    ]


def test_failures_are_counted_by_cause_and_stage(meter: Meter) -> None:
    meter.say(failed("TornRead", stage="fetch"), failed("TornRead", stage="fetch"))
    meter.say(failed("TornRead", stage="reload"), failed("VersionRetired"))
    assert meter.points("update.failures") == [
        ({"stage": "fetch", "error.type": "TornRead"}, 2),
        ({"stage": "reload", "error.type": "TornRead"}, 1),
        ({"error.type": "VersionRetired"}, 1),
    ]
    assert meter.points("update.duration") == [], "they were never begun"


def test_nothing_counts_twice_when_what_was_said_is_heard(meter: Meter) -> None:
    said = (complete(), failed("TornRead"), stage("commit", 0, 1))
    meter.say(*said)
    meter.hear(*said, complete(engine="b"))
    assert meter.value("update.duration") == (1, 2.0)
    assert meter.value("update.failures") == 1
    assert meter.value("stage.duration") == (1, 1.0)


def test_stages_are_measured_by_stage_and_route_over_all_ranks(meter: Meter) -> None:
    meter.say(
        stage("reload", 1, 2, rank=0, route="local", bytes=100),
        stage("reload", 1.5, 3, rank=1, route="local", bytes=300),
        stage("commit", 3, 3.5),
        stage("fetch", 4, 5, rank=0, route="p2p", bytes=50, ok=False, error="TornRead: x"),
    )
    assert meter.points("stage.duration") == [
        ({"stage": "reload", "route": "local", "outcome": "complete"}, (2, 2.5)),
        ({"stage": "commit", "outcome": "complete"}, (1, 0.5)),
        ({"stage": "fetch", "route": "p2p", "outcome": "failed"}, (1, 1.0)),
    ]
    assert meter.points("stage.io") == [({"stage": "reload", "route": "local"}, 400)]
    assert meter.points("stage.throughput") == [({"stage": "reload", "route": "local"}, 200.0)], (
        "400 bytes in the 2 s from the first rank's start to the last one's end"
    )


SHARED = ((SharedMemorySegment(name="weightbus-x", host_id="h", generation=2),),)
CUDA = ((CudaSegment(handle=b"x", host_id="h", device_uuid="g", generation=2), *SHARED[0]),)


@pytest.mark.parametrize(
    ("placement", "device", "lanes", "route", "link", "share"),
    [
        (SHARED, "cpu", False, "local", "memory", 0.5),
        (SHARED, "cuda:0", False, "local", "device", 0.125),
        (CUDA, "cuda:0", False, "local", "peer", 0.0625),
        (CUDA, "cpu", False, "local", "memory", 0.5),
        (SHARED, "cuda:0", True, "broadcast", "peer", 0.0625),
    ],
)
def test_rate_is_told_as_a_share_of_the_link_when_that_was_measured(
    meter: Meter,
    placement: Any,
    device: str,
    lanes: bool,
    route: Any,
    link: str,
    share: float,
) -> None:
    """Two ranks move 100 bytes in one second each: GPUs have links of their own."""
    offers = tuple(
        RankOffer(rank=n, device=device, needs_digest="0" * 64, need_bytes=1, routes=("local",))
        for n in (0, 1)
    )
    links = Links(memory=400, device=800, peer=1600)
    meter.hear(ready_of(7, placement=placement), plan(device=lanes))
    meter.say(join(ranks=offers, links=links))
    for rank in (0, 1):
        meter.say(stage("reload", 1, 2, rank=rank, route=route, bytes=100))
    of = {"stage": "reload", "route": route, "link": link}
    assert meter.points("stage.throughput") == [(of, 200.0)]
    assert meter.points("link.utilization") == [(of, share)]


def test_share_is_absent_when_the_link_was_not_measured(meter: Meter) -> None:
    meter.hear(ready_of(7, placement=SHARED), join())
    meter.say(stage("reload", 1, 2, rank=0, route="local", bytes=100))
    assert meter.points("stage.throughput") == [
        ({"stage": "reload", "route": "local", "link": "memory"}, 100.0)
    ]
    assert meter.points("link.utilization") == []


def test_stages_are_counted_once_when_their_update_has_ended(meter: Meter) -> None:
    for end in (complete(), failed("TornRead")):
        kept = RecordingMetrics()
        meter.metering._metrics = kept  # type: ignore[assignment]
        meter.say(stage("reload", 1, 2, rank=0, route="local", bytes=100))
        assert kept.said == [], "the engine is paused, and waits for nothing"
        meter.say(end)
        assert [said for said in kept.said if said in ("stage", "rate")] == ["stage", "rate"]
        meter.points("stage.duration")
        assert kept.said.count("stage") == 1


class RecordingMetrics:
    """Which figures were kept."""

    def __init__(self) -> None:
        self.said: list[str] = []

    def __getattr__(self, name: str) -> Any:
        return lambda *arguments, **options: self.said.append(name)


def test_rate_is_that_of_the_last_update(meter: Meter) -> None:
    meter.say(stage("reload", 1, 2, rank=0, route="local", bytes=100))
    meter.say(stage("reload", 90, 91, rank=0, route="local", bytes=300, version=8, round="v8"))
    assert meter.value("stage.throughput") == 300.0


def test_rate_of_a_route_that_the_last_update_did_not_take_is_0(meter: Meter) -> None:
    offer = RankOffer(rank=0, needs_digest="0" * 64, need_bytes=1, routes=("local",))
    meter.hear(ready_of(7, placement=SHARED), plan())
    meter.say(join(ranks=(offer,), links=Links(memory=400)))
    reload = stage("reload", 1, 2, rank=0, route="local", bytes=100)
    meter.say(reload, stage("broadcast", 1, 2, rank=0, route="broadcast", bytes=50), complete())
    later = {"version": 8, "round": "v8"}
    meter.say(stage("reload", 90, 91, rank=0, route="p2p", bytes=300, **later), complete(8))
    of_reload = {"stage": "reload", "route": "local", "link": "memory"}
    rates = [(of.get("route"), value) for of, value in meter.points("stage.throughput")]
    assert rates == [("local", 0), ("broadcast", 0), ("p2p", 300.0)]
    assert meter.points("link.utilization") == [(of_reload, 0)]
    meter.say(structs.replace(reload, version=9, round="v9"), complete(9))
    rates = [(of.get("route"), value) for of, value in meter.points("stage.throughput")]
    assert rates == [("local", 0), ("broadcast", 0), ("p2p", 0), ("local", 100.0)], "link not known"


def test_lag_is_the_newest_version_minus_the_one_served(meter: Meter) -> None:
    seen = []
    for message in (state(-1), ready_of(7), state(7), ready_of(9), ready_of(8), state(9)):
        if isinstance(message, EngineState):
            meter.say(message)
        else:
            meter.hear(message)
        seen.append((meter.value("engine.version"), meter.value("engine.lag")))
    assert seen == [(-1, 0), (-1, 8), (7, 0), (7, 2), (7, 2), (9, 0)]


def test_version_is_not_told_before_it_is_known(meter: Meter) -> None:
    meter.hear(ready_of(7))
    assert meter.points("engine.version") == meter.points("engine.lag") == []


def test_rounds_are_under_way_from_the_first_join_to_the_closing_word(meter: Meter) -> None:
    counts = [meter.value("rounds.active")]
    for message in (
        join("b", 7), join("a", 7), plan(7), join("b", 8), closed(7), plan(8), closed(8),
        join("late", 8), structs.replace(plan(8, "late"), epoch=2), closed(8),
    ):  # fmt: skip
        meter.hear(message)
        counts.append(meter.value("rounds.active"))
    assert counts == [0, 1, 1, 1, 2, 1, 1, 0, 1, 1, 0]


def test_round_stays_over_when_its_plan_is_looked_up_again(meter: Meter) -> None:
    meter.hear(join("a", 7), plan(7), closed(7), plan(7))
    assert meter.value("rounds.active") == 0
    meter.hear(structs.replace(plan(7), epoch=2))
    assert meter.value("rounds.active") == 1, "a late engine's"


def test_round_goes_on_when_another_of_its_version_is_closed(meter: Meter) -> None:
    meter.hear(join("a", 7), join("c", 7), join("c", 6))
    meter.hear(structs.replace(closed(7), round="v7-b-x-1"))
    assert meter.value("rounds.active") == 1, "that of version 6 is out of date"
    meter.hear(closed(7))
    assert meter.value("rounds.active") == 0


def test_round_is_over_when_its_version_came_to_no_plan_or_a_newer_one_is_done(
    meter: Meter,
) -> None:
    meter.hear(join("a", 7), join("a", 6), plan(6))
    meter.say(failed("VersionRetired"))
    assert meter.value("rounds.active") == 1
    meter.say(failed("VersionRetired", version=6, round="v6"))
    assert meter.value("rounds.active") == 1, "others may go on"
    meter.hear(closed(9))
    assert meter.value("rounds.active") == 0


def test_rounds_and_memory_are_bounded_when_nobody_closes_any(meter: Meter) -> None:
    for version in range(10 * REMEMBERED):
        meter.hear(ready_of(version), join("a", version), plan(version))
    assert meter.value("rounds.active") == REMEMBERED
    meter.metering.leave()
    assert meter.value("rounds.active") == 0


def test_first_token_is_measured(meter: Meter) -> None:
    token = FirstToken(
        model="m", version=7, round="v7", engine="a", start_ns=12 * S, end_ns=12 * S + S // 4
    )
    meter.say(token)
    assert meter.points("engine.first_token.duration") == [({}, (1, 0.25))]


def test_dead_letters_are_counted_by_who_reports_them(meter: Meter) -> None:
    assert meter.points("dead_letters") == [({"reporter": "consumer-a"}, 0)], "from the start"
    letter = DeadLetter(model="m", subject="weightbus.m.checkpoint.ready", reason="no version")
    meter.metering.count_dead_letter(letter)
    meter.metering.count_dead_letter(letter)
    assert meter.value("dead_letters") == 2


def test_durations_are_not_negative_when_a_clock_was_set_back(meter: Meter) -> None:
    meter.say(stage("reload", 3, 1, rank=0, route="local", bytes=100), complete(end_ns=1))
    assert meter.value("stage.duration") == (1, 0.0)
    assert meter.value("update.duration") == (1, 0.0)
    assert meter.points("stage.throughput") == []


def test_nothing_is_raised_and_it_is_told_once_when_figures_cannot_be_kept(
    meter: Meter, caplog: pytest.LogCaptureFixture
) -> None:
    class Broken:
        def __getattr__(self, name: str) -> Any:
            raise OSError("the meter is gone")

    meter.metering._metrics = Broken()  # type: ignore[assignment]
    with caplog.at_level(logging.WARNING):
        meter.say(complete(), state(7))
        meter.hear(join())
    assert [record.getMessage() for record in caplog.records] == [
        "figures are missing: OSError: the meter is gone"
    ]
