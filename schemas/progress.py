"""What a consumer reports while it works: stages, updates, state, and what could not be read.

Does no I/O. These are the messages that monitors live on; no update depends on anyone reading them.
"""

from __future__ import annotations

from typing import Annotated, Literal

from msgspec import Meta

from weightbus.schemas.base import (
    BucketTimings,
    ClockResidual,
    Count,
    Digest64,
    Message,
    Nanoseconds,
    RankNumber,
    Reason,
    RouteName,
    Seconds,
    SizeBytes,
    Stage,
    Token,
    Version,
)
from weightbus.schemas.placement import HostId

__all__ = (
    "PERMANENT_CAUSES",
    "DeadLetter",
    "EngineState",
    "EngineStatus",
    "FirstToken",
    "StageComplete",
    "UpdateComplete",
    "UpdateFailed",
    "Verified",
)

EngineStatus = Literal["starting", "serving", "updating", "quarantined", "stopping"]
"""`quarantined`: paused, its parameters may be a mix; it serves again after a whole update."""

Verified = Literal["verified", "not_offered"]
"""`verified`: the digests of all ranks add up to the publisher's. `not_offered`: it gave none."""

PERMANENT_CAUSES = frozenset({"CheckpointRefused", "MessageInvalid", "VersionRetired"})
"""Of `UpdateFailed`, errors of the version itself: an engine that met one does not try it again."""

TraceId = Annotated[str, Meta(pattern=r"^([0-9a-f]{32})?\Z")]
SpanId = Annotated[str, Meta(pattern=r"^([0-9a-f]{16})?\Z")]
ErrorName = Annotated[str, Meta(max_length=128)]
ServedVersion = Annotated[int, Meta(ge=-1)]


class StageComplete(Message, frozen=True, kw_only=True):
    """One timed stage of one update has ended: the twin of a span."""

    model: Token
    version: Version
    round: Token
    engine: Token
    stage: Stage
    rank: RankNumber | None = None
    """None: a stage of the whole engine (`negotiate`, `commit`)."""
    route: RouteName | None = None
    bytes: SizeBytes = 0
    buckets: BucketTimings = ()
    """Its parts, if it streamed: they overlap those of the other stages. Of many, neighbours are
    told as one: 256 at most by this project's consumers; spans tell all."""
    start_ns: Nanoseconds
    end_ns: Nanoseconds
    ok: bool = True
    error: Reason = ""
    trace_id: TraceId = ""
    span_id: SpanId = ""
    parent_span_id: SpanId = ""


class UpdateComplete(Message, frozen=True, kw_only=True):
    """An engine serves a version, whole and (if the publisher offered a digest) proven."""

    model: Token
    version: Version
    round: Token
    engine: Token
    verified: Verified
    """`verified`: all ranks' digests add up to the publisher's. `not_offered`: it gave none."""
    weights_digest: Digest64 | None = None
    """The digest that all ranks' parts added up to."""
    routes: Annotated[tuple[RouteName, ...], Meta(max_length=3)]
    """How the bytes came."""
    bytes: SizeBytes
    """Bytes moved into parameters, over all ranks."""
    start_ns: Nanoseconds
    """When the consumer received `CheckpointReady`."""
    end_ns: Nanoseconds
    """When the engine served again."""
    paused_s: Seconds = 0.0
    """How long the engine served nothing."""
    direct_parameters: Count = 0
    """Parameters written in place by the plan, over all ranks."""
    processed_parameters: Count = 0
    """Parameters that went through the engine's own loader, over all ranks."""
    reason: Reason = ""
    """Why the engine's own loader was taken, if it was."""
    trace_id: TraceId = ""
    """Of the trace that tells it all; empty: none."""
    clock_residual_ns: ClockResidual = None
    """By how much its times, put on the bus's clock, may be off; None: they are by the sender's."""


class UpdateFailed(Message, frozen=True, kw_only=True):
    """An engine did not reach a version, and why."""

    model: Token
    version: Version
    round: Token
    engine: Token
    cause: ErrorName
    """Name of the error class, such as `TornRead`."""
    reason: Reason
    """The error's message: thing, value and limit."""
    stage: Stage | None = None
    """The stage that failed; None: before any."""
    served_version: ServedVersion = -1
    """What the engine serves now; -1: nothing (it is paused or empty)."""
    quarantined: bool = False
    """Its parameters may be a mix: it stays paused until an update ends whole."""
    start_ns: Nanoseconds = 0
    """When the consumer received `CheckpointReady`."""
    end_ns: Nanoseconds = 0
    """When the update was given up."""
    trace_id: TraceId = ""
    """Of the trace that tells it all; empty: none."""
    clock_residual_ns: ClockResidual = None
    """By how much its times, put on the bus's clock, may be off; None: they are by the sender's."""


class FirstToken(Message, frozen=True, kw_only=True):
    """An engine has made its first token with a version: the end of what a trainer waits for.

    Said only if somebody asked the engine for tokens soon after it served, and again if it came to
    serve the same version again (it was started anew, or the version published again).
    """

    model: Token
    version: Version
    round: Token
    engine: Token
    start_ns: Nanoseconds
    """When the engine served again: not later than `end_ns` of `UpdateComplete`."""
    end_ns: Nanoseconds
    """When the token was there."""
    resolution_ns: Nanoseconds = 0
    """It was there at most so long before `end_ns`: engines that are asked again and again."""
    trace_id: TraceId = ""
    """Of the trace that tells it all; empty: none."""
    span_id: SpanId = ""
    """Of this token's span."""
    parent_span_id: SpanId = ""
    """Of the update's."""


class EngineState(Message, frozen=True, kw_only=True):
    """Heartbeat of an engine: the value of its presence key."""

    model: Token
    engine: Token
    consumer: Token
    host_id: HostId
    status: EngineStatus
    version: ServedVersion = -1
    """The version it serves; -1: none."""
    target_version: ServedVersion = -1
    """The version it is moving to; -1: none."""
    ranks: Annotated[int, Meta(ge=1, le=65_536)] = 1
    engine_kind: Annotated[str, Meta(max_length=64)] = ""
    updated_ns: Nanoseconds = 0


class DeadLetter(Message, frozen=True, kw_only=True):
    """What could not be read, and why. Nothing else happened because of it."""

    model: Token
    subject: Annotated[str, Meta(max_length=512)]
    """Where it was found."""
    reason: Reason
    """All of it in one sentence."""
    field: Annotated[str, Meta(max_length=512)] = "$"
    """Path of the field at fault, such as `placement[0][1].path`; `$`: the whole."""
    value: Annotated[str, Meta(max_length=256)] = ""
    """What stood there, shortened."""
    limit: Annotated[str, Meta(max_length=512)] = ""
    """The rule or limit that it broke."""
    content_type: Annotated[str, Meta(max_length=128)] = ""
    """The header, as it came."""
    payload: Annotated[bytes, Meta(max_length=1024)] = b""
    """Its first kilobyte."""
    payload_bytes: SizeBytes = 0
    """How long it was in full."""
    reported_by: Annotated[str, Meta(max_length=64)] = ""
    """Who could not read it."""
    reported_ns: Nanoseconds = 0
    """When."""
