"""Messages of one round, as they would come from the bus: shared by the tests of tracing."""

from __future__ import annotations

from weightbus.schemas.base import Message, RouteName, Stage
from weightbus.schemas.checkpoint import CheckpointReady, CheckpointSkipped, SkipCause
from weightbus.schemas.progress import (
    EngineState,
    EngineStatus,
    StageComplete,
    UpdateComplete,
    UpdateFailed,
)
from weightbus.schemas.rounds import (
    EngineRoute,
    Join,
    RankOffer,
    RankRoute,
    RoundComplete,
    RoundPlan,
)
from weightbus.tracing.history import Heard

__all__ = (
    "MODEL", "MS", "T0_NS", "TRACE_ID", "complete", "done", "failed", "heard", "join", "plan",
    "ready", "skipped", "stage", "state", "whole_round",
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


def ready(version: int = 7, *, at_ms: int = 0, model: str = MODEL) -> CheckpointReady:
    return CheckpointReady(
        model=model, version=version, producer="trainer", files=("/w/a.safetensors",),
        created_ns=T0_NS + at_ms * MS,
    )  # fmt: skip


def skipped(
    version: int = 8, cause: SkipCause = "busy", *ranks: int, waited_s: float = 0.0
) -> CheckpointSkipped:
    return CheckpointSkipped(
        model=MODEL, version=version, producer="trainer", cause=cause, reason="a reads slot 1",
        ranks=ranks, waited_s=waited_s, created_ns=T0_NS + 5 * MS,
    )  # fmt: skip


def join(engine: str, version: int = 7, *, at_ms: int = 3, model: str = MODEL) -> Join:
    offer = RankOffer(rank=0, needs_digest="0" * 64, need_bytes=1, routes=("local",))
    return Join(
        model=model, version=version, round=f"v{version}", engine=engine, consumer=f"{engine}-1",
        host_id="host", ranks=(offer,), joined_ns=T0_NS + at_ms * MS,
    )  # fmt: skip


def plan(*engines: EngineRoute, version: int = 7, epoch: int = 1, at_ms: int = 8) -> RoundPlan:
    return RoundPlan(
        model=MODEL, version=version, round=f"v{version}", epoch=epoch, leader="a",
        engines=engines or (route("a"), route("b")), created_ns=T0_NS + at_ms * MS,
    )  # fmt: skip


def route(engine: str, ranks: int = 1, reason: str = "") -> EngineRoute:
    return EngineRoute(
        engine=engine,
        ranks=tuple(RankRoute(rank=rank, route="local", reason=reason) for rank in range(ranks)),
    )


def stage(
    engine: str,
    name: Stage,
    start_ms: int,
    end_ms: int,
    *,
    rank: int | None = None,
    taken: RouteName | None = None,
    moved_bytes: int = 0,
    error: str = "",
    version: int = 7,
) -> StageComplete:
    return StageComplete(
        model=MODEL, version=version, round=f"v{version}", engine=engine, stage=name, rank=rank,
        route=taken, bytes=moved_bytes, start_ns=T0_NS + start_ms * MS,
        end_ns=T0_NS + end_ms * MS, ok=not error, error=error, trace_id=TRACE_ID,
    )  # fmt: skip


def complete(
    engine: str,
    version: int = 7,
    *,
    start_ms: int = 2,
    end_ms: int = 131,
    size_bytes: int = 90_900_000,
) -> UpdateComplete:
    return UpdateComplete(
        model=MODEL, version=version, round=f"v{version}", engine=engine, verified="verified",
        weights_digest="0" * 16, routes=("local",), bytes=size_bytes,
        start_ns=T0_NS + start_ms * MS, end_ns=T0_NS + end_ms * MS, paused_s=0.085,
        trace_id=TRACE_ID,
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


def done(*completed: str, version: int = 7, failed: dict[str, str] | None = None) -> RoundComplete:
    return RoundComplete(
        model=MODEL, version=version, round=f"v{version}", epoch=1, leader="a",
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
