"""From what the bus remembers to rounds and waterfalls: shared by trace, page and demo.

Does no I/O and knows no clock.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TypeVar

from msgspec import Struct, structs

from weightbus.schemas.base import Message
from weightbus.schemas.checkpoint import CheckpointReady
from weightbus.schemas.progress import StageComplete, UpdateComplete, UpdateFailed
from weightbus.schemas.rounds import RankRoute
from weightbus.tracing.critical_path import CriticalPath, find_path
from weightbus.tracing.critical_told import tell_late, tell_path
from weightbus.tracing.facts import RoundFacts, Told
from weightbus.tracing.link_share import LinkUser, share_links
from weightbus.tracing.text import NS_PER_S, gigabytes_per_second
from weightbus.tracing.waterfall import (
    ROUND_MESSAGES,
    BucketRow,
    EngineWaterfall,
    LateEngine,
    Origin,
    RoundSummary,
    StageRow,
    Waterfall,
)

__all__ = ("HISTORY_MESSAGES", "Heard", "Told", "build_waterfall", "summarise_rounds")

T = TypeVar("T")

HISTORY_MESSAGES = (CheckpointReady, *ROUND_MESSAGES)
"""All that a waterfall is made of."""


class Heard(Struct, frozen=True):
    """A message that did not come from the history of a bus: see `Told`."""

    message: Message
    headers: Mapping[str, str] = {}
    received_ns: int = 0


def summarise_rounds(history: Iterable[Told]) -> tuple[RoundSummary, ...]:
    """The rounds that a history tells of, the newest last."""
    found: dict[tuple[str, str], RoundSummary] = {}
    for told in history:
        message = told.message
        if not isinstance(message, ROUND_MESSAGES):
            continue
        key = (message.model, message.round)
        known = found.get(key)
        if known is None or told.received_ns < known.first_ns:
            found[key] = RoundSummary(
                model=message.model,
                round=message.round,
                version=message.version,
                first_ns=told.received_ns,
            )
    return tuple(sorted(found.values(), key=lambda summary: (summary.first_ns, summary.version)))


def build_waterfall(model: str, round_id: str, history: Iterable[Told]) -> Waterfall | None:
    """The waterfall of one round; None if no message is of this round.

    `history` is in the order of the bus, `CheckpointReady` wherever it comes; what is of other
    rounds is passed over, and what came twice counts once.
    """
    facts = RoundFacts(model, round_id, history)
    if facts.version is None:
        return None
    origin, origin_ns = facts.origin()
    builder = _Builder(facts, origin_ns)
    rows = builder.rows()
    engines = tuple(builder.engine(name, rows[name]) for name in facts.engines)
    stored_s = builder.after(facts.stored_ns) if origin != "heard" else None
    path = find_path(engines, facts, builder.after, stored_s)
    engines = tuple(_marked(engine, path) for engine in engines)
    served = [e.end_s for e in engines if e.outcome == "complete" and e.end_s is not None]
    wall_s = max(served, default=None)
    moved_bytes = sum(engine.bytes for engine in engines if engine.outcome == "complete")
    plan, ready, publish = facts.plan, facts.ready, facts.publish
    return Waterfall(
        model=model,
        version=facts.version,
        round=round_id,
        epoch=0 if plan is None else plan.epoch,
        leader="" if plan is None else plan.leader,
        producer="" if ready is None else ready.producer,
        trace_id=facts.trace_id,
        publish_span_id="" if publish is None else publish.span_id,
        complete=bool(facts.closed),
        origin=origin,
        origin_ns=origin_ns,
        late_s=facts.late_ns() / NS_PER_S,
        clock_residual_s=None if ready is None else _residual(ready.clock_residual_ns),
        stored_s=stored_s,
        wall_s=wall_s,
        span_s=builder.after(facts.last_ns()) or 0.0,
        bytes=moved_bytes,
        gb_per_s=None if wall_s is None else gigabytes_per_second(moved_bytes, wall_s),
        engines=engines,
        critical_path=path.steps,
        critical_told=tell_path(path, engines, origin, facts.late_ns() / NS_PER_S),
        late=tuple(
            _late_engine(name, count, _Builder(attempt, origin_ns), origin)
            for name, (count, attempt) in sorted(facts.late.items())
        ),
    )


def _late_engine(name: str, attempts: int, builder: _Builder, origin: Origin) -> LateEngine:
    known = structs.asdict(builder.engine(name, builder.rows()[name]))
    engine = LateEngine(**known, attempts=attempts, told="")
    return structs.replace(engine, told=tell_late(engine, origin))


class _Builder:
    """Makes rows of the facts of one round."""

    def __init__(self, facts: RoundFacts, origin_ns: int) -> None:
        self._facts = facts
        self._origin_ns = origin_ns

    def after(self, time_ns: int) -> float | None:
        """Seconds after the origin, at least 0; None for 0, which stands for no time."""
        return max(0, time_ns - self._origin_ns) / NS_PER_S if time_ns else None

    def rows(self) -> dict[str, tuple[StageRow, ...]]:
        """Engine id -> its rows in the order of their starts."""
        facts = self._facts
        users = {
            name: LinkUser(
                join=facts.joins.get(name),
                plan=facts.plans.get(name),
                ready=facts.ready,
                rows=sorted(map(self._row, facts.stages_of(name)), key=_place),
            )
            for name in facts.engines
        }
        return share_links(users)

    def engine(self, name: str, rows: tuple[StageRow, ...]) -> EngineWaterfall:
        """One engine's part."""
        facts = self._facts
        update, join, token = facts.updates.get(name), facts.joins.get(name), facts.tokens.get(name)
        done = update if isinstance(update, UpdateComplete) else None
        failed = update if isinstance(update, UpdateFailed) else None
        stages = facts.stages_of(name)
        plan = facts.plans.get(name)
        planned: list[RankRoute] = []
        if plan is not None:
            planned += [r for route in plan.engines if route.engine == name for r in route.ranks]
        routes = _unique(row.route for row in rows if row.route)
        word = facts.closing_word(name)
        return EngineWaterfall(
            engine=name,
            host_id="" if join is None else join.host_id,
            outcome=facts.outcome(name),
            verified=None if done is None else done.verified,
            routes=(done.routes if done else ()) or routes or _unique(r.route for r in planned),
            plan_reasons=_unique(rank.reason for rank in planned if rank.reason),
            epoch=0 if plan is None else plan.epoch,
            leader="" if plan is None else plan.leader,
            bytes=0 if done is None else done.bytes,
            start_s=None if update is None else self.after(update.start_ns),
            joined_s=self.after(min(facts.join_times_ns.get(name, {0}))),
            planned_s=self._planned_s(name, stages),
            end_s=None if update is None else self.after(update.end_ns),
            first_token_start_s=None if token is None else self.after(token.start_ns),
            first_token_s=None if token is None else self.after(token.end_ns),
            paused_s=0.0 if done is None else done.paused_s,
            cause="" if failed is None else failed.cause,
            reason=update.reason if update else word.failed.get(name, "") if word else "",
            quarantined=failed is not None and failed.quarantined,
            clock_residual_s=None if update is None else _residual(update.clock_residual_ns),
            trace_id=facts.trace_id_of(name),
            span_id=_update_id(rows),
            first_token_span_id="" if token is None else token.span_id,
            stages=rows,
        )

    def _planned_s(self, name: str, stages: Iterable[StageComplete]) -> float | None:
        """The end of the last `negotiate`; else when the plan was made."""
        ends_ns = [stage.end_ns for stage in stages if stage.stage == "negotiate" and stage.ok]
        plan = self._facts.plans.get(name)
        return self.after(max(ends_ns, default=0 if plan is None else plan.created_ns))

    def _span(self, start_ns: int, end_ns: int) -> tuple[float, float]:
        """Start after the origin, and duration; what began before the origin is cut."""
        start_ns = max(start_ns, self._origin_ns)
        return (start_ns - self._origin_ns) / NS_PER_S, max(0, end_ns - start_ns) / NS_PER_S

    def _row(self, stage: StageComplete) -> StageRow:
        start_s, duration_s = self._span(stage.start_ns, stage.end_ns)
        return StageRow(
            stage=stage.stage,
            rank=stage.rank,
            route=stage.route,
            start_s=start_s,
            duration_s=duration_s,
            bytes=stage.bytes,
            gb_per_s=gigabytes_per_second(stage.bytes, duration_s),
            link="",
            link_share=None,
            buckets=tuple(
                BucketRow(start_s=start_s, duration_s=duration_s, bytes=bucket.bytes)
                for bucket in stage.buckets
                for start_s, duration_s in (self._span(bucket.start_ns, bucket.end_ns),)
            ),
            critical=False,
            ok=stage.ok,
            error=stage.error,
            span_id=stage.span_id,
            parent_span_id=stage.parent_span_id,
        )


def _place(row: StageRow) -> tuple[float, int]:
    return row.start_s, -1 if row.rank is None else row.rank


def _marked(engine: EngineWaterfall, path: CriticalPath) -> EngineWaterfall:
    """With the rows of the critical path marked."""
    marked = [
        structs.replace(row, critical=(engine.engine, index) in path.rows)
        for index, row in enumerate(engine.stages)
    ]
    return structs.replace(engine, stages=tuple(marked))


def _update_id(rows: Sequence[StageRow]) -> str:
    """The last parent that is not a stage itself."""
    stages = {"", *(row.span_id for row in rows)}
    parents = (row.parent_span_id for row in reversed(rows))
    return next((parent for parent in parents if parent not in stages), "")


def _residual(residual_ns: int | None) -> float | None:
    return None if residual_ns is None else residual_ns / NS_PER_S


def _unique(values: Iterable[T]) -> tuple[T, ...]:
    return tuple(dict.fromkeys(values))
