"""What happened in one round, stage by stage, from the messages that tell of it.

Does no I/O and knows no clock. Times are seconds after the *origin*: the creation of
`CheckpointReady` if that message is there, else the earliest time that any message tells. No time
is negative: when the trainer's clock is ahead of the engines', the origin is the earliest time too.
`Waterfall` is what `weightbus trace --json` prints.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Final, Literal

from msgspec import Struct

from weightbus.schemas.base import Message
from weightbus.schemas.checkpoint import CheckpointReady
from weightbus.schemas.progress import StageComplete, UpdateComplete, UpdateFailed
from weightbus.schemas.rounds import EngineRoute, Join, RankRoute, RoundComplete, RoundPlan
from weightbus.tracing.text import NS_PER_S, gigabytes_per_second

__all__ = (
    "ROUND_MESSAGES",
    "EngineWaterfall",
    "Origin",
    "Outcome",
    "RoundMessage",
    "RoundSummary",
    "StageRow",
    "Waterfall",
    "build_waterfall",
    "summarise_rounds",
)

RoundMessage = Join | RoundPlan | StageComplete | UpdateComplete | UpdateFailed | RoundComplete

ROUND_MESSAGES: Final = (
    Join,
    RoundPlan,
    StageComplete,
    UpdateComplete,
    UpdateFailed,
    RoundComplete,
)
"""The messages that name their round. `CheckpointReady` names only a version."""

Origin = Literal["checkpoint_ready", "earliest"]
"""What time 0 is: the creation of `CheckpointReady`, or the earliest time that a message tells."""

Outcome = Literal["complete", "failed", "unfinished"]
"""`unfinished`: the engine has reported neither `UpdateComplete` nor `UpdateFailed`."""


class StageRow(Struct, frozen=True, kw_only=True):
    """One stage: one bar."""

    stage: str
    rank: int | None
    """None: a stage of the whole engine."""
    route: str | None
    start_s: float
    """After the origin."""
    duration_s: float
    bytes: int
    gb_per_s: float | None
    """10^9 bytes per second; None when nothing moved."""
    ok: bool
    error: str


class EngineWaterfall(Struct, frozen=True, kw_only=True):
    """One engine's part of a round."""

    engine: str
    outcome: Outcome
    verified: str | None
    """`verified`, or `not_offered` when the publisher gave no digest; None: not complete."""
    routes: tuple[str, ...]
    """Taken, as far as reported; else planned."""
    plan_reasons: tuple[str, ...]
    """Why the plan chose these routes."""
    bytes: int
    start_s: float | None
    """When its consumer received `CheckpointReady`, after the origin; None: not reported."""
    end_s: float | None
    """When it served again or gave up, after the origin; None: not reported."""
    paused_s: float
    cause: str
    """Name of the error class, if it failed."""
    reason: str
    """Why it failed, or why the engine's own loader was taken."""
    quarantined: bool
    stages: tuple[StageRow, ...]
    """In the order of their starts."""


class Waterfall(Struct, frozen=True, kw_only=True):
    """One round."""

    model: str
    version: int
    round: str
    epoch: int
    """Of the last plan; 0 if there is none."""
    leader: str
    """Engine id of the last leader; empty if there is no plan."""
    trace_id: str
    """Of the trace that begins with the publication; empty if nobody traced."""
    complete: bool
    """The leader has closed the round."""
    origin: Origin
    origin_ns: int
    """Time 0, in nanoseconds since the Unix epoch."""
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


class RoundSummary(Struct, frozen=True, kw_only=True):
    """A round that the bus remembers."""

    model: str
    round: str
    version: int
    first_ns: int
    """When the bus received the first message that told of it."""


def summarise_rounds(history: Iterable[tuple[Message, int]]) -> tuple[RoundSummary, ...]:
    """The rounds in a history of (message, when the bus received it), the newest last."""
    found: dict[tuple[str, str], RoundSummary] = {}
    for message, received_ns in history:
        if not isinstance(message, ROUND_MESSAGES):
            continue
        key = (message.model, message.round)
        known = found.get(key)
        if known is None or received_ns < known.first_ns:
            found[key] = RoundSummary(
                model=message.model,
                round=message.round,
                version=message.version,
                first_ns=received_ns,
            )
    return tuple(sorted(found.values(), key=lambda summary: (summary.first_ns, summary.version)))


def build_waterfall(model: str, round_id: str, messages: Iterable[Message]) -> Waterfall | None:
    """The waterfall of one round; None if no message is of this round.

    `messages` are in the order of the bus; those of other rounds are passed over, and what came
    twice counts once.
    """
    told = _Round(model, round_id, messages)
    if told.version is None:
        return None
    origin, origin_ns = told.origin()
    engines = tuple(told.engine(name, origin_ns) for name in sorted(told.engine_names()))
    served = [e.end_s for e in engines if e.outcome == "complete" and e.end_s is not None]
    wall_s = max(served, default=None)
    moved_bytes = sum(engine.bytes for engine in engines if engine.outcome == "complete")
    return Waterfall(
        model=model,
        version=told.version,
        round=round_id,
        epoch=0 if told.plan is None else told.plan.epoch,
        leader="" if told.plan is None else told.plan.leader,
        trace_id=told.trace_id(),
        complete=told.complete is not None,
        origin=origin,
        origin_ns=origin_ns,
        wall_s=wall_s,
        span_s=(max(told.times_ns(), default=origin_ns) - origin_ns) / NS_PER_S,
        bytes=moved_bytes,
        gb_per_s=None if wall_s is None else gigabytes_per_second(moved_bytes, wall_s),
        engines=engines,
    )


class _Round:
    """The messages of one round, sorted by what they tell."""

    def __init__(self, model: str, round_id: str, messages: Iterable[Message]) -> None:
        self.joins: dict[str, Join] = {}
        self.plan: RoundPlan | None = None
        self.stages: dict[StageComplete, None] = {}
        self.updates: dict[str, UpdateComplete | UpdateFailed] = {}
        self.complete: RoundComplete | None = None
        self.version: int | None = None
        announced: dict[int, CheckpointReady] = {}
        for message in messages:
            if isinstance(message, CheckpointReady) and message.model == model:
                announced[message.version] = message
            elif isinstance(message, ROUND_MESSAGES) and (
                (message.model, message.round) == (model, round_id)
            ):
                self.version = message.version
                self._take(message)
        self.ready = None if self.version is None else announced.get(self.version)

    def _take(self, message: RoundMessage) -> None:
        match message:
            case Join():
                self.joins[message.engine] = message
            case RoundPlan():
                if self.plan is None or message.epoch >= self.plan.epoch:
                    self.plan = message
            case StageComplete():
                self.stages[message] = None
            case UpdateComplete() | UpdateFailed():
                self.updates[message.engine] = message
            case RoundComplete():
                self.complete = message

    def origin(self) -> tuple[Origin, int]:
        """What time 0 is, and when that was."""
        earliest_ns = min(self.times_ns(), default=0)
        if self.ready is not None and self.ready.created_ns == earliest_ns:
            return "checkpoint_ready", earliest_ns
        return "earliest", earliest_ns

    def times_ns(self) -> list[int]:
        """Every point in time that a message tells; 0 stands for none."""
        times = [self.ready.created_ns] if self.ready is not None else []
        times += [join.joined_ns for join in self.joins.values()]
        if self.plan is not None:
            times.append(self.plan.created_ns)
        for timed in (*self.stages, *self.updates.values()):
            times += [timed.start_ns, timed.end_ns]
        if self.complete is not None:
            times += [self.complete.started_ns, self.complete.ended_ns]
        return [time_ns for time_ns in times if time_ns]

    def trace_id(self) -> str:
        """The first trace id that a message names."""
        traced = (*self.stages, *self.updates.values(), *filter(None, (self.complete,)))
        return next((message.trace_id for message in traced if message.trace_id), "")

    def engine_names(self) -> set[str]:
        """Everyone who takes part or is said to."""
        names = {*self.joins, *self.updates, *(stage.engine for stage in self.stages)}
        if self.plan is not None:
            names.update(route.engine for route in self.plan.engines)
        if self.complete is not None:
            names.update(self.complete.completed, self.complete.failed)
        return names

    def engine(self, name: str, origin_ns: int) -> EngineWaterfall:
        """One engine's part."""
        update = self.updates.get(name)
        done = update if isinstance(update, UpdateComplete) else None
        failed = update if isinstance(update, UpdateFailed) else None
        rows = sorted(
            (_row(stage, origin_ns) for stage in self.stages if stage.engine == name),
            key=lambda row: (row.start_s, -1 if row.rank is None else row.rank),
        )
        planned = self._planned(name)
        routes = _unique(row.route for row in rows if row.route)
        return EngineWaterfall(
            engine=name,
            outcome=self._outcome(name),
            verified=None if done is None else done.verified,
            routes=(done.routes if done else ()) or routes or _unique(r.route for r in planned),
            plan_reasons=_unique(rank.reason for rank in planned if rank.reason),
            bytes=0 if done is None else done.bytes,
            start_s=None if update is None else _seconds(origin_ns, update.start_ns),
            end_s=None if update is None else _seconds(origin_ns, update.end_ns),
            paused_s=0.0 if done is None else done.paused_s,
            cause="" if failed is None else failed.cause,
            reason=self._lost_reason(name) if update is None else update.reason,
            quarantined=failed is not None and failed.quarantined,
            stages=tuple(rows),
        )

    def _outcome(self, name: str) -> Outcome:
        update = self.updates.get(name)
        if isinstance(update, UpdateComplete):
            return "complete"
        if isinstance(update, UpdateFailed):
            return "failed"
        if self.complete is None:
            return "unfinished"
        if name in self.complete.failed:
            return "failed"
        return "complete" if name in self.complete.completed else "unfinished"

    def _planned(self, name: str) -> Sequence[RankRoute]:
        engines: tuple[EngineRoute, ...] = () if self.plan is None else self.plan.engines
        return [rank for route in engines if route.engine == name for rank in route.ranks]

    def _lost_reason(self, name: str) -> str:
        return "" if self.complete is None else self.complete.failed.get(name, "")


def _row(stage: StageComplete, origin_ns: int) -> StageRow:
    duration_s = max(0, stage.end_ns - stage.start_ns) / NS_PER_S
    return StageRow(
        stage=stage.stage,
        rank=stage.rank,
        route=stage.route,
        start_s=(stage.start_ns - origin_ns) / NS_PER_S,
        duration_s=duration_s,
        bytes=stage.bytes,
        gb_per_s=gigabytes_per_second(stage.bytes, duration_s),
        ok=stage.ok,
        error=stage.error,
    )


def _seconds(origin_ns: int, time_ns: int) -> float | None:
    """After the origin; None for 0, which stands for no time."""
    return (time_ns - origin_ns) / NS_PER_S if time_ns else None


def _unique(values: Iterable[str]) -> tuple[str, ...]:
    return tuple(dict.fromkeys(values))
