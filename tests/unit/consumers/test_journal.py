"""The spans of updates, on a host whose clock is an hour ahead: whole, nested, and ended."""

from __future__ import annotations

import hashlib
from typing import Any

import pytest
from msgspec import structs
from opentelemetry.sdk.trace import ReadableSpan
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from tests.unit.consumers.fakes import ready_of
from weightbus.bus.clock import ClockReading, HostClock
from weightbus.consumers.journal import Journal, Work
from weightbus.consumers.streamed import BUCKETS_SAID, BUCKETS_TRACED
from weightbus.consumers.update import Outcome
from weightbus.schemas.base import BucketTiming
from weightbus.schemas.checkpoint import CheckpointReady
from weightbus.schemas.progress import StageComplete, UpdateComplete, UpdateFailed
from weightbus.schemas.rounds import Join, RoundPlan
from weightbus.schemas.worker import Applied, StageTiming
from weightbus.tracing.attributes import ATTRIBUTES, SPANS, Destination
from weightbus.tracing.context import SpanRef
from weightbus.tracing.sdk import make_tracer
from weightbus.tracing.telemetry import Telemetry

BUS_NS = 1_700_000_000_000_000_000
AHEAD_NS = 3600 * 10**9
RESIDUAL_NS = 5_000
PUBLISH = SpanRef("a" * 32, "b" * 16)
DESTINATION = Destination.of_ready("weightbus", "m", client="c", url="nats://h:4223")


class World:
    """A journal, its clock, and what came of it."""

    def __init__(self, journal_of: Any) -> None:
        self.passed_ns = 0
        self.twins: list[StageComplete] = []
        host = HostClock(
            wall_ns=lambda: BUS_NS + AHEAD_NS + self.passed_ns, steady_ns=lambda: self.passed_ns
        )
        reading = ClockReading(BUS_NS, RESIDUAL_NS, 0, host)
        self.journal: Journal = journal_of(self.twins.append, lambda: reading)

    def wait(self, ns: int) -> int:
        """Returns the bus time then."""
        self.passed_ns += ns
        return BUS_NS + self.passed_ns

    def wall_ns(self) -> int:
        return BUS_NS + AHEAD_NS + self.passed_ns

    def hear(self, ready: CheckpointReady, publish: SpanRef | None = PUBLISH) -> str:
        return self.journal.hear(ready, {} if publish is None else publish.headers())

    def plan(self, ready: CheckpointReady, epoch: int = 1, leader: str = "a") -> Work:
        """The way to a plan: 10 ns until the join, 20 ns until the plan."""
        work = self.journal.open(ready, f"v{ready.version}")
        self.wait(10)
        self.journal.sign(join_of(ready))
        self.wait(20)
        self.journal.begin_round(work, plan_of(ready, epoch, leader))
        return work

    def apply(self, work: Work, *buckets: tuple[int, int]) -> None:
        """A reload of 100 ns, in `buckets` that begin and end so long after its start."""
        start_ns, paused_ns = self.wall_ns(), self.passed_ns
        self.wait(100)
        timed = tuple(BucketTiming(start_ns + b, start_ns + e, 4) for b, e in buckets)
        timing = StageTiming("reload", start_ns, self.wall_ns(), 8, timed)
        applied = Applied(
            request=0,
            rank=1,
            version=work.scope.version,
            bytes=8,
            stages=(timing,),
            cell_digests=b"",
        )
        self.journal.record_outcome(
            work,
            Outcome(
                applied=(applied,),
                route="local",
                verified="verified",
                weights_digest=None,
                pause_start_ns=paused_ns,
            ),
        )

    def serve(self, work: Work) -> UpdateComplete:
        start_ns, end_ns = work.clock.now_ns(), self.wait(5)
        self.journal.tell_outcomes(work)
        self.journal.record(work, "commit", start_ns, end_ns)
        said, _ = self.journal.sign(complete_of(work))
        assert isinstance(said, UpdateComplete)
        return said


@pytest.fixture
def exporter() -> InMemorySpanExporter:
    return InMemorySpanExporter()


@pytest.fixture
def world(exporter: InMemorySpanExporter) -> World:
    return world_of("a", exporter)


def world_of(engine: str, exporter: InMemorySpanExporter) -> World:
    telemetry = Telemetry(make_tracer("consumer", SimpleSpanProcessor(exporter), {}))
    return World(lambda emit, reading: Journal(telemetry, emit, engine, DESTINATION, reading))


def join_of(ready: CheckpointReady) -> Join:
    return Join(
        model="m", version=ready.version, round=f"v{ready.version}", engine="a", consumer="i",
        host_id="h", ranks=(),
    )  # fmt: skip


def plan_of(ready: CheckpointReady, epoch: int, leader: str) -> RoundPlan:
    return RoundPlan(
        model="m", version=ready.version, round=f"v{ready.version}-solo", epoch=epoch,
        leader=leader, engines=(),
    )  # fmt: skip


def complete_of(work: Work) -> UpdateComplete:
    now_ns = work.clock.now_ns()
    return UpdateComplete(
        model="m", version=work.scope.version, round=work.scope.round, engine="a",
        verified="verified", routes=("local",), bytes=8, start_ns=work.start_ns, end_ns=now_ns,
    )  # fmt: skip


def failed_of(version: int, cause: str) -> UpdateFailed:
    return UpdateFailed(
        model="m", version=version, round="r", engine="a", cause=cause, reason="it broke"
    )


def spans_of(exporter: InMemorySpanExporter) -> dict[str, list[ReadableSpan]]:
    """By first words of their names; all is nested, documented and over."""
    found = exporter.get_finished_spans()
    by_id = {span.context.span_id: span for span in found if span.context}
    documented = {info.name: info.word for info in SPANS}
    allowed = {
        info.word: {item.name: item for item in ATTRIBUTES if info.word in item.spans}
        for info in SPANS
    }
    types = {"string": str, "int": int, "double": float, "boolean": bool}
    named: dict[str, list[ReadableSpan]] = {}
    for span in found:
        word = documented[span.name]
        named.setdefault(word, []).append(span)
        for key, value in dict(span.attributes or {}).items():
            assert type(value) is types[allowed[word][key].type], (word, key, value)
        assert span.start_time is not None
        assert span.end_time is not None
        assert span.start_time <= span.end_time, word
        assert span.parent is not None
        parent = by_id.get(span.parent.span_id)
        if word == "update":
            assert parent is None
            continue
        assert parent is not None, word
        assert parent.start_time is not None
        assert parent.end_time is not None
        assert parent.start_time <= span.start_time, (word, parent.name)
        assert span.end_time <= parent.end_time, (word, parent.name)
    return named


def times_of(span: ReadableSpan) -> tuple[int, int]:
    """After the beginning of the test."""
    assert span.start_time is not None
    assert span.end_time is not None
    return span.start_time - BUS_NS, span.end_time - BUS_NS


def test_tree_is_whole_and_on_the_bus_clock_when_an_update_ends_well(
    world: World, exporter: InMemorySpanExporter
) -> None:
    ready = ready_of(7)
    assert world.hear(ready) == PUBLISH.trace_id
    world.wait(1000)
    work = world.plan(ready)
    world.apply(work, (0, 60), (40, 100))
    assert work.pause_start_ns == BUS_NS + 1030
    said = world.serve(work)
    assert said.clock_residual_ns == RESIDUAL_NS
    world.wait(3)
    world.journal.close(7)
    spans = spans_of(exporter)
    assert {name: [times_of(span) for span in found] for name, found in spans.items()} == {
        "join": [(0, 1010)],
        "plan": [(1010, 1030)],
        "negotiate": [(0, 1030)],
        "bucket": [(1030, 1090), (1070, 1130)],
        "reload": [(1030, 1130)],
        "commit": [(1130, 1135)],
        "update": [(0, 1138)],
    }
    (update,), (plan,) = spans["update"], spans["plan"]
    assert update.parent is not None
    assert f"{update.parent.span_id:016x}" == PUBLISH.span_id
    told = dict(update.attributes or {})
    assert told["weightbus.clock.offset_ns"] == -AHEAD_NS
    assert told["weightbus.clock.residual_ns"] == RESIDUAL_NS
    assert told["weightbus.round"] == "v7-solo"
    assert told["weightbus.attempt"] == 1
    assert told["messaging.message.id"] == "m/7/t"
    assert update.status.is_ok
    planned = dict(plan.attributes or {})
    assert (planned["weightbus.leader"], planned["weightbus.epoch"]) == (True, 1)
    assert [dict(b.attributes or {})["weightbus.bucket"] for b in spans["bucket"]] == [0, 1]
    reload = next(twin for twin in world.twins if twin.stage == "reload")
    assert [b.start_ns - BUS_NS for b in reload.buckets] == [1030, 1070]
    assert [twin.stage for twin in world.twins] == ["negotiate", "reload", "commit"]


def test_first_token_lies_within_the_update_when_it_comes_after_the_end(
    world: World, exporter: InMemorySpanExporter
) -> None:
    ready = ready_of(7)
    world.hear(ready)
    work = world.plan(ready)
    world.serve(work)
    world.journal.await_first_token(work)
    served_ns = world.wall_ns()
    world.journal.close(7)
    ended = {span.name for span in exporter.get_finished_spans()}
    assert DESTINATION.template not in " ".join(ended), "it is open for the token"
    world.wait(500)
    told = world.journal.record_first_token(
        work, start_ns=served_ns, end_ns=served_ns + 400, resolution_ns=9
    )
    assert told is not None
    assert (told.start_ns - BUS_NS, told.end_ns - BUS_NS, told.resolution_ns) == (35, 435, 9)
    spans = spans_of(exporter)
    (token,), (update,) = spans["first token"], spans["update"]
    assert times_of(token) == (35, 435)
    assert times_of(update) == (0, 435)
    assert token.context is not None
    assert update.context is not None
    assert told.span_id == f"{token.context.span_id:016x}"
    assert told.parent_span_id == f"{update.context.span_id:016x}"
    assert told.trace_id == PUBLISH.trace_id
    again = world.journal.record_first_token(work, start_ns=0, end_ns=1, resolution_ns=0)
    assert again is None, "there is one first token"


def _bytes_of(span: ReadableSpan) -> int:
    told = (span.attributes or {})["weightbus.bytes"]
    assert isinstance(told, int)
    return told


def test_stages_are_told_when_the_engine_serves_again_and_many_buckets_as_few(
    world: World, exporter: InMemorySpanExporter
) -> None:
    world.hear(ready_of(7))
    work = world.plan(ready_of(7))
    count = 3 * BUCKETS_SAID + 5
    world.apply(work, *((number * 100 // count, 100) for number in range(count)))
    assert [twin.stage for twin in world.twins] == ["negotiate"], "requests wait"
    world.serve(work)
    assert [twin.stage for twin in world.twins] == ["negotiate", "reload", "commit"]
    said = world.twins[1].buckets
    assert len(said) == -(-count // 4) <= BUCKETS_SAID
    assert sum(bucket.bytes for bucket in said) == 4 * count
    assert (said[0].start_ns - BUS_NS, said[-1].end_ns - BUS_NS) == (30, 130)
    assert [b.start_ns for b in said] == sorted(b.start_ns for b in said)
    world.journal.close(7)
    traced = spans_of(exporter)["bucket"]
    assert len(traced) == -(-count // 25) <= BUCKETS_TRACED
    assert sum(_bytes_of(span) for span in traced) == 4 * count


def test_stages_keep_their_round_when_their_plan_came_to_nothing_after_them(
    world: World, exporter: InMemorySpanExporter
) -> None:
    world.hear(ready_of(7))
    work = world.plan(ready_of(7))
    world.apply(work)
    work.scope = structs.replace(work.scope, round="another")
    world.wait(50)
    world.journal.close(7)
    (reload,) = spans_of(exporter)["reload"]
    assert times_of(reload) == (30, 130)
    assert dict(reload.attributes or {})["weightbus.round"] == "v7-solo"


@pytest.mark.parametrize("way", ["given up", "next version", "stop"])
def test_update_ends_when_it_was_served_if_its_first_token_does_not_come(
    world: World, exporter: InMemorySpanExporter, way: str
) -> None:
    world.hear(ready_of(7))
    work = world.plan(ready_of(7))
    world.serve(work)
    world.journal.await_first_token(work)
    world.journal.close(7)
    world.wait(10_000)
    match way:
        case "given up":
            world.journal.give_up_first_token(work)
        case "next version":
            world.hear(ready_of(8))
            world.serve(world.plan(ready_of(8)))
            world.journal.close(8)
        case "stop":
            world.journal.close_all()
    assert times_of(spans_of(exporter)["update"][0]) == (0, 35)
    assert world.journal.record_first_token(work, start_ns=0, end_ns=1, resolution_ns=0) is None


def test_attempts_are_linked_when_a_version_is_tried_again(
    world: World, exporter: InMemorySpanExporter
) -> None:
    ready = ready_of(7)
    world.hear(ready)
    work = world.plan(ready)
    world.journal.record(
        work, "reload", work.clock.now_ns(), world.wait(4), error="TornRead: it broke"
    )
    world.journal.sign(failed_of(7, "TornRead"))
    world.journal.close(7)
    world.wait(1000)
    world.serve(world.plan(ready))
    world.journal.close(7)
    first, second = spans_of(exporter)["update"]
    assert times_of(first) == (0, 34)
    assert times_of(second) == (1034, 1069)
    assert dict(first.attributes or {})["error.type"] == "TornRead"
    assert first.status.description == "TornRead: it broke"
    assert second.status.is_ok
    assert [dict(span.attributes or {})["weightbus.attempt"] for span in (first, second)] == [1, 2]
    assert first.context is not None
    links = [f"{link.context.span_id:016x}" for link in second.links]
    assert links == [PUBLISH.span_id, f"{first.context.span_id:016x}"]
    assert first.parent == second.parent


def test_negotiation_is_told_twice_when_the_first_plan_came_to_nothing(
    world: World, exporter: InMemorySpanExporter
) -> None:
    ready = ready_of(7)
    world.hear(ready)
    work = world.plan(ready)
    world.wait(50)
    world.journal.negotiate_again(work)
    assert world.plan(ready, epoch=2, leader="b") is work
    world.serve(work)
    world.journal.close(7)
    spans = spans_of(exporter)
    assert [times_of(span) for span in spans["negotiate"]] == [(0, 30), (80, 110)]
    assert [times_of(span) for span in spans["join"]] == [(0, 10), (80, 90)]
    epochs = [dict(span.attributes or {}) for span in spans["plan"]]
    assert [each["weightbus.epoch"] for each in epochs] == [1, 2]
    assert [each["weightbus.leader"] for each in epochs] == [True, False]
    assert len(spans["update"]) == 1


def test_negotiation_has_failed_with_the_update_when_there_was_no_plan(
    world: World, exporter: InMemorySpanExporter
) -> None:
    world.hear(ready_of(7))
    world.journal.open(ready_of(7), "v7")
    world.wait(40)
    world.journal.sign(failed_of(7, "DeadlineExceeded"))
    world.journal.close(7)
    spans = spans_of(exporter)
    assert spans.keys() == {"update", "negotiate", "join"}, "it got no further than its join"
    for (span,) in spans.values():
        assert times_of(span) == (0, 40)
        assert dict(span.attributes or {})["error.type"] == "DeadlineExceeded"


@pytest.mark.parametrize("by", ["another version", "the end"])
def test_update_has_an_error_when_it_is_put_down(
    world: World, exporter: InMemorySpanExporter, by: str
) -> None:
    world.hear(ready_of(7))
    world.journal.open(ready_of(7), "v7")
    world.wait(10)
    world.journal.sign(join_of(ready_of(7)))
    world.wait(30)
    if by == "the end":
        world.journal.close_all()
    else:
        world.journal.close(7)
    spans = spans_of(exporter)
    assert {word: times_of(span) for word, (span,) in spans.items()} == {
        "join": (0, 10),
        "plan": (10, 40),
        "negotiate": (0, 40),
        "update": (0, 40),
    }
    failed = {word for word, (span,) in spans.items() if not span.status.is_ok}
    assert failed == {"plan", "negotiate", "update"}, "it had joined in time"
    assert dict(spans["update"][0].attributes or {})["error.type"] == "Superseded"


def test_engines_share_one_trace_when_the_trainer_began_none() -> None:
    found = []
    for engine in ("a", "b"):
        exporter = InMemorySpanExporter()
        world = world_of(engine, exporter)
        trace_id = world.hear(ready_of(7), None)
        world.journal.open(ready_of(7), "v7")
        world.journal.close(7)
        other = world.hear(ready_of(8), None)
        spans = exporter.get_finished_spans()
        assert {f"{span.context.trace_id:032x}" for span in spans if span.context} == {trace_id}
        assert [span.name.split()[0] for span in spans if span.parent is None] == ["update"]
        found.append((trace_id, other))
    assert found[0] == found[1]
    assert found[0][0] != found[0][1]
    assert found[0][0] == hashlib.sha256(b"weightbus/m/7/t/8").hexdigest()[:32]


def test_publish_span_is_the_later_one_when_a_version_is_published_again(world: World) -> None:
    ready = ready_of(7)
    later = SpanRef("c" * 32, "d" * 16)
    assert world.hear(ready) == PUBLISH.trace_id
    assert world.hear(ready, later) == PUBLISH.trace_id, "a repeat tells nothing new"
    again = structs.replace(ready, created_ns=ready.created_ns + 1)
    assert world.hear(again, later) == later.trace_id


def test_times_are_kept_within_the_update_when_a_worker_tells_others(
    world: World, exporter: InMemorySpanExporter
) -> None:
    world.hear(ready_of(7))
    work = world.plan(ready_of(7))
    world.wait(10)
    world.journal.record(work, "h2d", BUS_NS - 500, BUS_NS + 10**12)
    world.journal.record(work, "fetch", BUS_NS + 20, BUS_NS + 10)
    world.journal.close(7)
    spans = spans_of(exporter)
    assert times_of(spans["h2d"][0]) == (0, 40)
    assert times_of(spans["fetch"][0]) == (20, 20)
