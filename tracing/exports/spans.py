"""The tree of one round's trace, built again from its waterfall: what the exports are made of.

Does no I/O. Publication, updates, stages and first tokens have the ids that they were traced by, so
that what a collector has and what is exported here is one trace. Of the publication only that is
known which came after the creation of `CheckpointReady`, until the bus had it: the trainer's own
span begins before, with the copy of the weights. What has no twin on the bus
(`join`, `plan`, buckets) has ids derived from its parent's: a collector knows it by others. So has
all of a round that nobody traced. Invariants: one tree if the publication was traced, and one more
for every update that is of another trace; no orphan, no negative duration; children lie inside
their parents, only an update lies outside of the publication that it follows.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from typing import Final, Literal

from msgspec import Struct

from weightbus.tracing import attributes as names
from weightbus.tracing.attributes import AttributeValue
from weightbus.tracing.text import NS_PER_S
from weightbus.tracing.waterfall import EngineWaterfall, StageRow, Waterfall

__all__ = ("TreeSpan", "span_tree", "trace_id_of")

PREFIX: Final = "weightbus"
"""Of subjects: a waterfall does not say which its bus has."""

LINK: Final = "weightbus.link"
LINK_SHARE: Final = "weightbus.link.share"
CRITICAL: Final = "weightbus.critical"
"""What the waterfall adds to the attributes of stages."""

Kind = Literal["PRODUCER", "CONSUMER", "INTERNAL"]


class TreeSpan(Struct, frozen=True, kw_only=True):
    """One span."""

    name: str
    kind: Kind
    engine: str
    """Empty: the trainer's."""
    trace_id: str
    span_id: str
    parent_id: str
    """Empty: a root."""
    start_ns: int
    """Since the Unix epoch, by the bus's clock."""
    end_ns: int
    attributes: dict[str, AttributeValue]
    error: str = ""
    """`TornRead: segment ...`; empty: it did not fail."""


def span_tree(waterfall: Waterfall, *, with_late: bool = True) -> tuple[TreeSpan, ...]:
    """All spans of a round, parents before their children; `with_late`: and those of the attempts
    that began when it was over."""
    return tuple(_Tree(waterfall).spans(with_late=with_late))


class _Tree:
    def __init__(self, waterfall: Waterfall) -> None:
        self._waterfall = waterfall
        self._round: dict[str, AttributeValue] = {
            names.MODEL: waterfall.model,
            names.VERSION: waterfall.version,
        }
        self._destination = names.Destination.of_ready(PREFIX, waterfall.model, client="", url="")

    def spans(self, *, with_late: bool) -> Iterator[TreeSpan]:
        if self._waterfall.publish_span_id:
            yield self._publication()
        for engine in self._waterfall.engines:
            yield from self._engine(engine)
        for late in self._waterfall.late if with_late else ():
            yield from self._engine(late, "late", late.attempts)

    def _publication(self) -> TreeSpan:
        waterfall = self._waterfall
        attributes: dict[str, AttributeValue] = {
            **self._round,
            **names.messaging_attributes("send", "publish", self._destination),
        }
        if waterfall.producer:
            attributes[names.PRODUCER] = waterfall.producer
        if waterfall.clock_residual_s is not None:
            attributes[names.CLOCK_RESIDUAL] = round(waterfall.clock_residual_s * NS_PER_S)
        return TreeSpan(
            name=names.messaging_span_name("publish", self._destination.template),
            kind="PRODUCER",
            engine="",
            trace_id=trace_id_of(waterfall),
            span_id=waterfall.publish_span_id,
            parent_id="",
            start_ns=self._at(-waterfall.late_s),
            end_ns=self._at((waterfall.stored_s or 0.0) - waterfall.late_s),
            attributes=attributes,
        )

    def _engine(
        self, engine: EngineWaterfall, when: str = "", number: int = 1
    ) -> Iterator[TreeSpan]:
        """An update span for every attempt, the stages of each below it; the first is attempt
        `number` of those that were made `when`."""
        own = {row.span_id for row in engine.stages}
        attempts: dict[str, list[StageRow]] = {}
        for row in engine.stages:
            parent = row.parent_span_id if row.parent_span_id not in own else ""
            attempts.setdefault(parent or engine.span_id, []).append(row)
        last_id = next(reversed(attempts)) if attempts else engine.span_id
        first_id = next(iter(attempts), last_id)
        numbered = enumerate((attempts or {last_id: []}).items(), start=number)
        for number, (span_id, rows) in numbered:
            who = f"{engine.engine} {when}".strip()
            update_id = span_id or self._derived(self._waterfall.round, who, number)
            starts = [row.start_s for row in rows]
            ends = [_end_s(row) for row in rows]
            if span_id == first_id:
                starts += _known(engine.start_s, engine.joined_s)
            if span_id == last_id:
                ends += _known(engine.end_s, engine.first_token_s, engine.planned_s)
            start_s = min(starts, default=0.0)
            failed = engine.outcome == "failed" and span_id == last_id
            yield self._update(
                engine, update_id, number, start_s, max([start_s, *starts, *ends]), failed=failed
            )
            for index, row in enumerate(rows):
                yield from self._stage(engine, update_id, index, row)
            if span_id == last_id and engine.first_token_s is not None:
                yield self._first_token(engine, update_id, engine.first_token_s)

    def _update(
        self,
        engine: EngineWaterfall,
        span_id: str,
        number: int,
        start_s: float,
        end_s: float,
        *,
        failed: bool,
    ) -> TreeSpan:
        attributes: dict[str, AttributeValue] = {
            **self._of(engine),
            **names.messaging_attributes("process", "update", self._destination),
            names.ATTEMPT: number,
        }
        if engine.clock_residual_s is not None:
            attributes[names.CLOCK_RESIDUAL] = round(engine.clock_residual_s * NS_PER_S)
        return self._span(
            names.messaging_span_name("update", self._destination.template), engine, span_id,
            self._publish_id(engine), start_s, end_s, attributes, kind="CONSUMER",
            error=f"{engine.cause}: {engine.reason}".strip(": ") if failed else "",
        )  # fmt: skip

    def _stage(
        self, engine: EngineWaterfall, parent_id: str, index: int, row: StageRow
    ) -> Iterator[TreeSpan]:
        span_id = row.span_id or self._derived(parent_id, row.stage, index)
        attributes: dict[str, AttributeValue] = {
            **self._of(engine), names.STAGE: row.stage, names.BYTES: row.bytes,
        }  # fmt: skip
        if row.rank is not None:
            attributes[names.RANK] = row.rank
        if row.route is not None:
            attributes[names.ROUTE] = row.route
        if row.link:
            attributes[LINK] = row.link
        if row.link_share is not None:
            attributes[LINK_SHARE] = row.link_share
        if row.critical:
            attributes[CRITICAL] = True
        start_s, end_s = row.start_s, _end_s(row)
        yield self._span(
            row.stage, engine, span_id, parent_id, start_s, end_s, attributes, error=row.error
        )
        if row.stage == "negotiate":
            yield from self._negotiation(engine, span_id, start_s, end_s)
        for number, bucket in enumerate(row.buckets):
            begin_s = min(max(bucket.start_s, start_s), end_s)
            finish_s = min(max(bucket.start_s + bucket.duration_s, begin_s), end_s)
            told: dict[str, AttributeValue] = {
                **self._of(engine), names.BUCKET: number, names.BYTES: bucket.bytes,
            }  # fmt: skip
            if row.rank is not None:
                told[names.RANK] = row.rank
            bucket_id = self._derived(span_id, "bucket", number)
            yield self._span("bucket", engine, bucket_id, span_id, begin_s, finish_s, told)

    def _negotiation(
        self, engine: EngineWaterfall, parent_id: str, start_s: float, end_s: float
    ) -> Iterator[TreeSpan]:
        """What came before the first `Join`, and after it."""
        joined_s = engine.joined_s
        if joined_s is None or not start_s <= joined_s <= end_s:
            return
        leads = engine.engine == engine.leader
        told: dict[str, AttributeValue] = {names.LEADER: leads, names.EPOCH: engine.epoch}
        yield self._span(
            "join", engine, self._derived(parent_id, "join"), parent_id, start_s, joined_s,
            self._of(engine),
        )  # fmt: skip
        yield self._span(
            "plan", engine, self._derived(parent_id, "plan"), parent_id, joined_s, end_s,
            {**self._of(engine), **told},
        )  # fmt: skip

    def _first_token(self, engine: EngineWaterfall, parent_id: str, token_s: float) -> TreeSpan:
        span_id = engine.first_token_span_id or self._derived(parent_id, "first token", 0)
        begin_s = engine.first_token_start_s
        start_s = token_s if begin_s is None else min(begin_s, token_s)
        return self._span(
            "first token", engine, span_id, parent_id, start_s, token_s, self._of(engine)
        )

    def _of(self, engine: EngineWaterfall) -> dict[str, AttributeValue]:
        return {**self._round, names.ROUND: self._waterfall.round, names.ENGINE: engine.engine}

    def _span(
        self,
        name: str,
        engine: EngineWaterfall,
        span_id: str,
        parent_id: str,
        start_s: float,
        end_s: float,
        attributes: dict[str, AttributeValue],
        *,
        kind: Kind = "INTERNAL",
        error: str = "",
    ) -> TreeSpan:
        return TreeSpan(
            name=name,
            kind=kind,
            engine=engine.engine,
            trace_id=self._trace_id(engine),
            span_id=span_id,
            parent_id=parent_id,
            start_ns=self._at(start_s),
            end_ns=max(self._at(start_s), self._at(end_s)),
            attributes=attributes,
            error=error,
        )

    def _trace_id(self, engine: EngineWaterfall) -> str:
        return engine.trace_id or trace_id_of(self._waterfall)

    def _publish_id(self, engine: EngineWaterfall) -> str:
        """The parent of an update; none in another trace than its own."""
        same = self._trace_id(engine) == trace_id_of(self._waterfall)
        return self._waterfall.publish_span_id if same else ""

    def _at(self, time_s: float) -> int:
        return self._waterfall.origin_ns + round(time_s * NS_PER_S)

    def _derived(self, *of: str | int) -> str:
        return _derived(self._waterfall.trace_id, *of)


def trace_id_of(waterfall: Waterfall) -> str:
    """That of the round's trace; one derived from what it is, if nobody traced it."""
    if waterfall.trace_id:
        return waterfall.trace_id
    return _digest(waterfall.model, waterfall.round, waterfall.origin_ns)[:32]


def _derived(*of: str | int) -> str:
    return _digest(*of)[:16]


def _digest(*of: str | int) -> str:
    return hashlib.sha256("/".join(["weightbus", *map(str, of)]).encode()).hexdigest()


def _known(*times_s: float | None) -> list[float]:
    return [time_s for time_s in times_s if time_s is not None]


def _end_s(row: StageRow) -> float:
    return row.start_s + row.duration_s
