"""What happened in one round, stage by stage: the rows that trace, page, report and exports show.

Does no I/O; `tracing.history` makes them of messages. Times are seconds after the *origin*: the
creation of `CheckpointReady` if that is known and somebody heard of it promptly, else the earliest
time that any message tells. All are by the bus's clock, each off by its clock's residual at most;
no time is negative.
`Waterfall` is what `weightbus trace --json` prints.
"""

from __future__ import annotations

from typing import Final, Literal

from msgspec import Struct

from weightbus.schemas.base import RouteName, Stage
from weightbus.schemas.progress import FirstToken, StageComplete, UpdateComplete, UpdateFailed
from weightbus.schemas.rounds import Join, RoundComplete, RoundPlan

__all__ = (
    "ROUND_MESSAGES",
    "BucketRow",
    "EngineWaterfall",
    "LateEngine",
    "LinkName",
    "Origin",
    "Outcome",
    "PathStep",
    "RoundMessage",
    "RoundSummary",
    "StageRow",
    "StepKind",
    "Waterfall",
)

RoundMessage = (
    Join | RoundPlan | StageComplete | UpdateComplete | UpdateFailed | FirstToken | RoundComplete
)

ROUND_MESSAGES: Final = (
    Join,
    RoundPlan,
    StageComplete,
    UpdateComplete,
    UpdateFailed,
    FirstToken,
    RoundComplete,
)
"""The messages that name their round. `CheckpointReady` names only a version."""

Origin = Literal["checkpoint_ready", "stored", "heard", "earliest"]
"""What time 0 is: the creation of `CheckpointReady`; when the bus stored it, if a trainer's clock
says that it was made later than that; when the first engine told that it had heard of it, if all
came late: a round of an engine that was started again lasts as long as its update, not since the
publication; or the earliest time that a message tells, if nothing better is known."""

Outcome = Literal["complete", "failed", "unfinished"]
"""`unfinished`: the engine has reported neither `UpdateComplete` nor `UpdateFailed`."""

LinkName = Literal["memory", "device", "peer", "network", "broadcast", "p2p", "disk", ""]
"""A rate of `Links`; empty: not known, or nothing moved."""

StepKind = Literal[
    "publish", "deliver", "negotiate", "fetch", "h2d", "broadcast", "reload", "wait", "commit",
    "first_token",
]  # fmt: skip
"""`publish`: until the bus had `CheckpointReady`. `deliver`: until the engine's consumer heard it.
`wait`: for peers, for pausing, for the leader."""


class BucketRow(Struct, frozen=True, kw_only=True):
    """One bucket of a stage that streamed."""

    start_s: float
    """After the origin."""
    duration_s: float
    bytes: int


class StageRow(Struct, frozen=True, kw_only=True):
    """One stage: one bar."""

    stage: Stage
    rank: int | None
    """None: a stage of the whole engine."""
    route: RouteName | None
    start_s: float
    """After the origin."""
    duration_s: float
    bytes: int
    gb_per_s: float | None
    """10^9 bytes per second; None when nothing moved."""
    link: LinkName
    """Which the bytes took."""
    link_share: float | None
    """What moved over this link meanwhile, by all ranks that share it, as a share of the rate that
    was measured for it; None: not known."""
    buckets: tuple[BucketRow, ...]
    """In the order of their starts; empty: it did not stream, or in one bucket only."""
    critical: bool
    """The critical path goes through it, or waits for it."""
    ok: bool
    error: str
    span_id: str
    """Of its span; empty if nobody traced."""
    parent_span_id: str
    """Of the update that it is a part of; an engine that tries again has another."""


class EngineWaterfall(Struct, frozen=True, kw_only=True):
    """One engine's part of a round."""

    engine: str
    host_id: str
    """Of its host; empty: it did not join."""
    outcome: Outcome
    verified: str | None
    """`verified`, or `not_offered` when the publisher gave no digest; None: not complete."""
    routes: tuple[RouteName, ...]
    """Taken, as far as reported; else planned."""
    plan_reasons: tuple[str, ...]
    """Why the plan chose these routes."""
    epoch: int
    """Of the last plan that names it; 0 if there is none."""
    leader: str
    """Engine id of who made that plan: itself, if it came late; empty if there is none."""
    bytes: int
    start_s: float | None
    """When its consumer received `CheckpointReady`, after the origin; None: not reported."""
    joined_s: float | None
    """When it first joined, after the origin; None: it did not."""
    planned_s: float | None
    """When its last plan was made, after the origin; None: there is none."""
    end_s: float | None
    """When it served again or gave up, after the origin; None: not reported."""
    first_token_start_s: float | None
    """From when on its first token was waited for, after the origin; None: not reported."""
    first_token_s: float | None
    """When its first token of the version was there, after the origin; None: not reported."""
    paused_s: float
    cause: str
    """Name of the error class, if it failed."""
    reason: str
    """Why it failed, or why the engine's own loader was taken."""
    quarantined: bool
    clock_residual_s: float | None
    """By how much its times may be off the bus's clock; None: they are by its host's."""
    trace_id: str
    """Of the trace of its update, the last one if it tried again: that of the publication, if that
    was traced; empty if nobody traced."""
    span_id: str
    """Of the span of its update, the last one if it tried again; empty if nobody traced."""
    first_token_span_id: str
    stages: tuple[StageRow, ...]
    """In the order of their starts."""


class LateEngine(EngineWaterfall, frozen=True, kw_only=True):
    """The last attempt of an engine that came when the round was over, and came to no plan: it had
    no part in it. Who had one may have come again, as when it was started anew."""

    attempts: int
    """How many it made by then."""
    told: str
    """All that in one sentence."""


class PathStep(Struct, frozen=True, kw_only=True):
    """One step of the critical path."""

    what: StepKind
    engine: str
    """Empty for `publish` and `deliver`."""
    rank: int | None
    """None: the whole engine."""
    start_s: float
    """After the origin: the end of the step before."""
    duration_s: float
    waited_for: str
    """What a `wait` was for, in a few words; else empty."""


class Waterfall(Struct, frozen=True, kw_only=True):
    """One round."""

    model: str
    version: int
    round: str
    epoch: int
    """Of the plan that most engines ran; 0 if there is none."""
    leader: str
    """Engine id of the leader who made it; empty if there is no plan."""
    producer: str
    """Who published the version; empty if `CheckpointReady` is gone."""
    trace_id: str
    """Of the trace that begins with the publication; empty if nobody traced."""
    publish_span_id: str
    """Of the span of the publication; empty if it is not known."""
    complete: bool
    """The leader has closed the round."""
    origin: Origin
    origin_ns: int
    """Time 0, in nanoseconds since the Unix epoch."""
    late_s: float
    """How long before time 0 the version was there, if `origin` is `heard`; else 0."""
    clock_residual_s: float | None
    """By how much the trainer's time may be off the bus's clock; None: it is by the trainer's."""
    stored_s: float | None
    """When the bus had stored `CheckpointReady`, after the origin; None: not known, or before."""
    wall_s: float | None
    """From the origin to the last engine serving; None: none serves the version."""
    span_s: float
    """From the origin to the last thing reported: the width of the chart."""
    bytes: int
    """Moved into parameters, over all engines that completed."""
    gb_per_s: float | None
    """`bytes` over `wall_s`, in 10^9 bytes per second."""
    engines: tuple[EngineWaterfall, ...]
    """In the order of their names."""
    critical_path: tuple[PathStep, ...]
    """What the last engine to serve spent its time on, each step beginning where the one before
    ends: from 0 to `wall_s`, then its first token if it is known; to where it failed, or as far as
    it is told, if none serves."""
    critical_told: str
    """The critical path in one sentence; empty if there is nothing to tell."""
    late: tuple[LateEngine, ...] = ()
    """Who came when the round was over, and gave up, in the order of their names. Nothing else
    that is told of the round counts them."""


class RoundSummary(Struct, frozen=True, kw_only=True):
    """A round that the bus remembers."""

    model: str
    round: str
    version: int
    first_ns: int
    """When the bus received the first message that told of it."""
