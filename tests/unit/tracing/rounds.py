"""Messages of one round, as they would come from the bus: shared by the tests of tracing."""

from __future__ import annotations

from collections.abc import Sequence

from weightbus.schemas.base import BucketTiming, Message, RouteName, Stage
from weightbus.schemas.checkpoint import CheckpointReady, CheckpointSkipped, SkipCause
from weightbus.schemas.progress import (
    EngineState,
    EngineStatus,
    FirstToken,
    StageComplete,
    UpdateComplete,
    UpdateFailed,
)
from weightbus.schemas.rounds import (
    CommitPolicy,
    EngineRoute,
    Join,
    Links,
    RankOffer,
    RankRoute,
    RoundComplete,
    RoundPlan,
)
from weightbus.tracing.history import Heard

__all__ = (
    "MODEL", "MS", "T0_NS", "TRACE_ID", "complete", "done", "failed", "first_token", "heard",
    "join", "plan", "ready", "refused", "skipped", "stage", "state", "whole_round",
)  # fmt: skip

MODEL = "minilm"
TRACE_ID = "4bf92f3577b34da6a3ce929d0e0e4736"
T0_NS = 1_700_000_000_000_000_000
"""When the version was announced."""
MS = 1_000_000
"""Nanoseconds."""


def heard(*messages: Message) -> list[Heard]:
    """As they come without headers, and without a word of when the bus stored them."""
    return [Heard(message) for message in messages]


def ready(
    version: int = 7, *, at_ms: int = 0, model: str = MODEL, residual_ns: int | None = None
) -> CheckpointReady:
    return CheckpointReady(
        model=model, version=version, producer="trainer", files=("/w/a.safetensors",),
        created_ns=T0_NS + at_ms * MS, clock_residual_ns=residual_ns,
    )  # fmt: skip


def skipped(
    version: int = 8, cause: SkipCause = "busy", *ranks: int, waited_s: float = 0.0
) -> CheckpointSkipped:
    return CheckpointSkipped(
        model=MODEL, version=version, producer="trainer", cause=cause, reason="a reads slot 1",
        ranks=ranks, waited_s=waited_s, created_ns=T0_NS + 5 * MS,
    )  # fmt: skip


def join(
    engine: str, version: int = 7, *, at_ms: int = 3, model: str = MODEL, host: str = "host",
    links: Links | None = None, device: str = "cpu", ranks: int = 1,
) -> Join:  # fmt: skip
    offers = tuple(
        RankOffer(rank=rank, device=device, needs_digest="0" * 64, need_bytes=1, routes=("local",))
        for rank in range(ranks)
    )
    return Join(
        model=model, version=version, round=f"v{version}", engine=engine, consumer=f"{engine}-1",
        host_id=host, ranks=offers, links=links or Links(), joined_ns=T0_NS + at_ms * MS,
    )  # fmt: skip


def plan(
    *engines: EngineRoute, version: int = 7, epoch: int = 1, at_ms: int = 8, leader: str = "a",
    commit: CommitPolicy = "each", device: bool = False,
) -> RoundPlan:  # fmt: skip
    return RoundPlan(
        model=MODEL, version=version, round=f"v{version}", epoch=epoch, leader=leader,
        engines=engines or (route("a"), route("b")), created_ns=T0_NS + at_ms * MS, commit=commit,
        device=device,
    )  # fmt: skip


def route(engine: str, ranks: int = 1, reason: str = "", taken: RouteName = "local") -> EngineRoute:
    return EngineRoute(
        engine=engine,
        ranks=tuple(RankRoute(rank=rank, route=taken, reason=reason) for rank in range(ranks)),
    )


def stage(
    engine: str,
    name: Stage,
    start_ms: float,
    end_ms: float,
    *,
    rank: int | None = None,
    taken: RouteName | None = None,
    moved_bytes: int = 0,
    error: str = "",
    version: int = 7,
    buckets_ms: Sequence[tuple[float, float]] = (),
) -> StageComplete:
    """Of `buckets_ms`, starts and ends, each has the same part of the bytes."""
    return StageComplete(
        model=MODEL, version=version, round=f"v{version}", engine=engine, stage=name, rank=rank,
        route=taken, bytes=moved_bytes, start_ns=T0_NS + round(start_ms * MS),
        end_ns=T0_NS + round(end_ms * MS), ok=not error, error=error, trace_id=TRACE_ID,
        buckets=tuple(
            BucketTiming(
                T0_NS + round(start * MS), T0_NS + round(end * MS), moved_bytes // len(buckets_ms)
            )
            for start, end in buckets_ms
        ),
    )  # fmt: skip


def first_token(engine: str, start_ms: int, end_ms: int, version: int = 7) -> FirstToken:
    return FirstToken(
        model=MODEL, version=version, round=f"v{version}", engine=engine,
        start_ns=T0_NS + start_ms * MS, end_ns=T0_NS + end_ms * MS, trace_id=TRACE_ID,
        span_id="c" * 16,
    )  # fmt: skip


def complete(
    engine: str,
    version: int = 7,
    *,
    start_ms: int = 2,
    end_ms: int = 131,
    size_bytes: int = 90_900_000,
    paused_s: float = 0.085,
    taken: RouteName = "local",
    residual_ns: int | None = None,
) -> UpdateComplete:
    return UpdateComplete(
        model=MODEL, version=version, round=f"v{version}", engine=engine, verified="verified",
        weights_digest="0" * 16, routes=(taken,), bytes=size_bytes,
        start_ns=T0_NS + start_ms * MS, end_ns=T0_NS + end_ms * MS, paused_s=paused_s,
        trace_id=TRACE_ID, clock_residual_ns=residual_ns,
    )  # fmt: skip


def failed(
    engine: str, version: int = 7, *, reason: str = "segment s has generation 9: it must be 8",
    end_ms: int = 365, served_version: int = -1, quarantined: bool = True,
) -> UpdateFailed:  # fmt: skip
    return UpdateFailed(
        model=MODEL, version=version, round=f"v{version}", engine=engine, cause="TornRead",
        reason=reason, served_version=served_version, quarantined=quarantined,
        start_ns=T0_NS + 3 * MS, end_ns=T0_NS + end_ms * MS, trace_id=TRACE_ID,
    )  # fmt: skip


def refused(engine: str, *, at_ms: int = 300_000) -> list[Message]:
    """An engine that starts minutes later: version 7 is gone by then. It says so in its round."""
    reason = "version 7 is retired: its publisher died"
    update = UpdateFailed(
        model=MODEL, version=7, round="v7", engine=engine, cause="VersionRetired", reason=reason,
        stage="negotiate", start_ns=T0_NS + at_ms * MS, end_ns=T0_NS + (at_ms + 5) * MS,
        trace_id=TRACE_ID,
    )  # fmt: skip
    error = f"VersionRetired: {reason}"
    return [stage(engine, "negotiate", at_ms + 0.1, at_ms + 5.2, error=error), update]


def done(
    *completed: str, version: int = 7, failed: dict[str, str] | None = None, epoch: int = 1,
    leader: str = "a",
) -> RoundComplete:  # fmt: skip
    return RoundComplete(
        model=MODEL, version=version, round=f"v{version}", epoch=epoch, leader=leader,
        completed=completed, failed=failed or {}, started_ns=T0_NS + 2 * MS,
        ended_ns=T0_NS + 370 * MS,
    )  # fmt: skip


def state(
    engine: str, status: EngineStatus = "serving", version: int = 7, target: int = -1,
    *, at_ms: int = 0, model: str = MODEL,
) -> EngineState:  # fmt: skip
    return EngineState(
        model=model, engine=engine, consumer=f"{engine}-1", host_id="host", status=status,
        version=version, target_version=target, ranks=2, engine_kind="torch",
        updated_ns=T0_NS + at_ms * MS,
    )  # fmt: skip


def whole_round() -> list[Message]:
    """Version 7: engine a serves it, rank 1 of engine b read a segment that was written again."""
    torn = "segment s has generation 9: it must be 8"
    return [
        ready(),
        join("a"),
        join("b"),
        plan(route("a", reason="shared memory of this host"), route("b", ranks=2)),
        stage("a", "negotiate", 2, 10),
        stage("b", "negotiate", 3, 11),
        stage("a", "fetch", 10, 40, rank=0, taken="local", moved_bytes=90_900_000),
        stage("b", "fetch", 12, 80, rank=0, taken="local", moved_bytes=45_450_000),
        stage("a", "reload", 40, 120, rank=0, taken="local", moved_bytes=90_900_000),
        stage("a", "commit", 120, 130),
        complete("a"),
        stage("b", "reload", 80, 350, rank=0, taken="local", moved_bytes=45_450_000),
        stage("b", "reload", 81, 360, rank=1, taken="local", error=f"TornRead: {torn}"),
        failed("b", reason=torn),
        done("a", failed={"b": f"TornRead: {torn}"}),
    ]
