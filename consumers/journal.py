"""What a consumer remembers of the versions it works on: when they were heard of, spans, timings.

Owns the update spans that are open. Every stage that is recorded becomes a span and, through
`emit`, its twin on the bus. Times in it are bus time; those of engines and their workers, which go
by this host's wall clock, are put on it here, and nowhere else. Invariants: one update has one
clock, without a step; a span lies within its parent; every update span ends, as failed unless its
version is served.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import msgspec

from weightbus.bus.clock import ClockReading
from weightbus.consumers.streamed import BUCKETS_SAID, BUCKETS_TRACED, Streamed
from weightbus.consumers.update import Outcome, Prepared
from weightbus.schemas.base import BucketTimings, Message, RouteName, Stage
from weightbus.schemas.catalogue import message_id_of
from weightbus.schemas.checkpoint import CheckpointReady
from weightbus.schemas.progress import FirstToken, UpdateComplete, UpdateFailed
from weightbus.schemas.rounds import Join, RoundPlan
from weightbus.tracing import attributes as names
from weightbus.tracing.attributes import AttributeValue, Destination
from weightbus.tracing.context import SpanRef
from weightbus.tracing.ids import derived_trace_id
from weightbus.tracing.telemetry import Emit, Span, StageScope, Telemetry

__all__ = ("Journal", "Work")

VERSIONS_REMEMBERED = 8
"""Checkpoints whose publish span is remembered; a publisher has two alive at most."""

PUT_DOWN = "Superseded: put down before it was served, and before it failed"
"""The error of an update that was neither: for another version, or because the consumer stops."""


@dataclass
class _Heard:
    """How a checkpoint was heard of."""

    created_ns: int
    """By the trainer: a version may be published again."""
    publish: SpanRef | None
    trace_id: str
    seen_ns: int
    attempts: list[SpanRef] = field(default_factory=list)
    """The last update span, if there was one."""
    tried: int = 0


@dataclass(kw_only=True, eq=False)
class Work:
    """What belongs to one version while it is worked on."""

    scope: StageScope
    start_ns: int
    """When the update span began."""
    seen_ns: int
    """When the negotiation began: its `CheckpointReady` was heard, or the last attempt failed."""
    clock: ClockReading
    """Of the whole update."""
    span: Span
    prepared: Prepared | None = None
    joined_ns: int = 0
    """When the first `Join` of this negotiation was said; 0: it was not yet."""
    pause_start_ns: int = 0
    """When requests began to wait; 0: they do not."""
    last_ns: int = 0
    """The end of what ended last within the update."""
    served: bool = False
    """It was said that it is complete."""
    failed: bool = False
    """It was said that it failed."""
    negotiating: bool = True
    """No plan is in hand."""
    awaits_token: bool = False
    """Somebody looks out for its first token."""
    closed_ns: int = 0
    """When work on it was over; 0: it is not."""
    outcomes: list[tuple[StageScope, int, int, Outcome]] = field(default_factory=list)
    """Transfers whose stages are told when requests are served again; within which round, how the
    clock and the wall clock were apart when they ended, and when that was."""
    untold: list[tuple[SpanRef, StageScope, int, Streamed]] = field(default_factory=list)
    """Buckets of stages, whose spans are made when the update is over."""

    def within(self, time_ns: int) -> int:
        """A time within this update, until now, whatever some clock said."""
        return min(max(time_ns, self.start_ns), self.clock.now_ns())


class Journal:
    """One entry for every version in hand."""

    def __init__(
        self,
        telemetry: Telemetry,
        emit: Emit,
        engine: str,
        destination: Destination,
        reading: Callable[[], ClockReading],
    ) -> None:
        """`destination`: where `CheckpointReady` is heard. `reading`: of the clock that is to be
        kept, for as long as there are entries."""
        self._telemetry = telemetry
        self._emit = emit
        self._engine = engine
        self._destination = destination
        self._reading = reading
        self._heard: dict[int, _Heard] = {}
        self._works: dict[int, Work] = {}
        self._awaited: Work | None = None
        """Closed, but for the first token."""

    @property
    def is_empty(self) -> bool:
        """No version is in hand."""
        return not self._works

    def hear(self, ready: CheckpointReady, headers: Mapping[str, str]) -> str:
        """Remember when, and within which publish span; returns the id of its trace: of a trainer
        that began none, one that is made of what it said."""
        publish = SpanRef.from_headers(headers)
        known = self._heard.get(ready.version)
        if known is None or known.created_ns < ready.created_ns:
            known = self._heard[ready.version] = self._heard_now(ready, publish)
        for version in sorted(self._heard)[:-VERSIONS_REMEMBERED]:
            del self._heard[version]
        return known.trace_id

    def _heard_now(self, ready: CheckpointReady, publish: SpanRef | None) -> _Heard:
        trace_id = derived_trace_id(ready) if publish is None else publish.trace_id
        return _Heard(ready.created_ns, publish, trace_id, self._reading().now_ns())

    def open(self, ready: CheckpointReady, round: str) -> Work:
        """The entry of a version, and its span; kept until it is closed."""
        if (work := self._works.get(ready.version)) is not None:
            return work
        heard = self._heard.get(ready.version)
        if heard is None:
            heard = self._heard[ready.version] = self._heard_now(ready, None)
        clock = self._reading()
        now_ns = clock.now_ns()
        start_ns = now_ns if heard.tried else min(heard.seen_ns, now_ns)
        heard.tried += 1
        scope = StageScope(ready.model, ready.version, round, self._engine)
        span = self._telemetry.begin_update(
            self._destination,
            scope,
            start_ns=start_ns,
            parent=heard.publish,
            trace_id=heard.trace_id,
            links=heard.attempts,
            attributes={
                names.PRODUCER: ready.producer,
                names.ATTEMPT: heard.tried,
                **names.clock_attributes(clock.offset_ns, clock.residual_ns),
            },
            message_id=message_id_of(ready) or "",
        )
        heard.attempts = [span.ref]
        work = Work(scope=scope, start_ns=start_ns, seen_ns=start_ns, clock=clock, span=span)
        self._works[ready.version] = work
        return work

    def find(self, version: int) -> Work | None:
        """The entry of a version that is in hand."""
        return self._works.get(version)

    def close(self, version: int) -> None:
        """Work on a version is over: end its span, unless its first token is awaited."""
        work = self._works.pop(version, None)
        if work is None:
            return
        work.closed_ns = work.clock.now_ns()
        self.tell_outcomes(work)
        if not (work.served or work.failed):
            self._fail(work, PUT_DOWN)
        if work.served:
            self._give_up_awaited()
        if work.served and work.awaits_token:
            self._awaited = work
        else:
            work.awaits_token = False
            self._end(work)

    def close_all(self) -> None:
        """The consumer stops: no span stays open."""
        for version in tuple(self._works):
            self.close(version)
        self._give_up_awaited()

    def await_first_token(self, work: Work) -> None:
        """Somebody looks out for it: the update's span stays open for it after `close`, until
        `record_first_token` or `give_up_first_token`, or until the engine serves anew, be it the
        same version. Nothing is awaited of work that is closed."""
        work.awaits_token = not work.closed_ns

    def record_first_token(
        self, work: Work, *, start_ns: int, end_ns: int, resolution_ns: int
    ) -> FirstToken | None:
        """The engine has made its first token with what `work` brought; returns what is to be said.

        None: it is not awaited (any more).

        Args:
            start_ns, end_ns: when it served again, and when the token was there, by this host's
                wall clock.
            resolution_ns: it was there at most so long before `end_ns`.
        """
        if not work.awaits_token:
            return None
        work.awaits_token = False
        start_ns = work.within(work.clock.bus_ns(start_ns))
        end_ns = max(start_ns, work.within(work.clock.bus_ns(end_ns)))
        span = self._record_span(
            work, "first token", start_ns, end_ns, work.span.ref, {names.RESOLUTION: resolution_ns}
        )
        if work is self._awaited:
            self._awaited = None
            self._end(work)
        return FirstToken(
            model=work.scope.model,
            version=work.scope.version,
            round=work.scope.round,
            engine=self._engine,
            start_ns=start_ns,
            end_ns=end_ns,
            resolution_ns=min(max(0, resolution_ns), end_ns - start_ns),
            trace_id=span.trace_id,
            span_id=span.span_id,
            parent_span_id=work.span.ref.span_id,
        )

    def give_up_first_token(self, work: Work) -> None:
        """Nobody looks out for it any more: the update has ended when its version was served."""
        work.awaits_token = False
        if work is self._awaited:
            self._awaited = None
            self._end(work)

    def _give_up_awaited(self) -> None:
        if self._awaited is not None:
            self.give_up_first_token(self._awaited)

    def begin_round(self, work: Work, plan: RoundPlan) -> None:
        """A plan is in hand: `negotiate` has ended, and what follows belongs to its round."""
        work.scope = msgspec.structs.replace(work.scope, round=plan.round)
        work.span.set(names.ROUND, plan.round)
        self._end_negotiation(
            work,
            {names.LEADER: plan.leader == self._engine, names.EPOCH: plan.epoch},
        )

    def negotiate_again(self, work: Work) -> None:
        """The plan came to nothing: another one may come."""
        work.seen_ns, work.joined_ns, work.negotiating = work.clock.now_ns(), 0, True

    def record(
        self,
        work: Work,
        stage: Stage,
        start_ns: int,
        end_ns: int,
        *,
        bytes: int = 0,
        buckets: BucketTimings = (),
        rank: int | None = None,
        route: RouteName | None = None,
        error: str = "",
        scope: StageScope | None = None,
    ) -> SpanRef:
        """A stage has ended; `error` begins with the name of the error class."""
        start_ns = work.within(start_ns)
        end_ns = max(start_ns, work.within(end_ns))
        work.last_ns = max(work.last_ns, end_ns)
        return self._telemetry.record_stage(
            self._emit,
            scope or work.scope,
            stage,
            start_ns=start_ns,
            end_ns=end_ns,
            bytes=bytes,
            buckets=buckets,
            rank=rank,
            route=route,
            parent=work.span.ref,
            error=error,
        )

    def record_outcome(self, work: Work, outcome: Outcome) -> None:
        """A transfer has ended well. The engine is paused, so that its stages, of which there may
        be thousands of parts, are told by `tell_outcomes`, or when the work is closed."""
        if outcome.pause_start_ns:
            work.pause_start_ns = work.within(work.clock.at_steady_ns(outcome.pause_start_ns))
        work.outcomes.append((work.scope, work.clock.offset_ns, work.clock.now_ns(), outcome))

    def tell_outcomes(self, work: Work) -> None:
        """The stages that were timed for each rank: by the route, then by its worker."""
        outcomes, work.outcomes = work.outcomes, []
        for scope, offset_ns, until_ns, outcome in outcomes:
            for applied in outcome.applied:
                for timing in applied.stages:
                    start_ns = min(work.within(timing.start_ns + offset_ns), until_ns)
                    end_ns = max(start_ns, min(timing.end_ns + offset_ns, until_ns))
                    streamed = Streamed(timing.buckets, offset_ns, start_ns, end_ns)
                    stage = self.record(
                        work,
                        timing.stage,
                        start_ns,
                        end_ns,
                        bytes=timing.bytes,
                        buckets=streamed.merged(BUCKETS_SAID),
                        rank=applied.rank,
                        route=outcome.route,
                        scope=scope,
                    )
                    if timing.buckets:
                        work.untold.append((stage, scope, applied.rank, streamed))

    def sign(self, message: Message) -> tuple[Message, Mapping[str, str]]:
        """A message as it is to be said, and headers that put it into the trace of its version."""
        work = self._works.get(getattr(message, "version", -1))
        match message:
            case Join() if work is not None and not work.joined_ns:
                work.joined_ns = work.clock.now_ns()
            case UpdateFailed() if work is not None:
                self._fail(work, f"{message.cause}: {message.reason}")
                work.failed = True
            case UpdateComplete() if work is not None:
                work.served = True
        if isinstance(message, UpdateComplete | UpdateFailed):
            clock = self._reading() if work is None else work.clock
            message = msgspec.structs.replace(message, clock_residual_ns=clock.residual_ns)
        return message, {} if work is None else work.span.ref.headers()

    def _fail(self, work: Work, error: str) -> None:
        """The update has failed; if there was no plan, so has the negotiation."""
        work.span.fail(error)
        if work.negotiating:
            self._end_negotiation(work, {}, error)

    def _end_negotiation(
        self, work: Work, planned: Mapping[str, AttributeValue], error: str = ""
    ) -> None:
        work.negotiating = False
        end_ns = work.clock.now_ns()
        parent = self.record(work, "negotiate", work.seen_ns, end_ns, error=error)
        joined_ns = work.joined_ns or end_ns
        unjoined = error if not work.joined_ns else ""
        self._record_span(work, "join", work.seen_ns, joined_ns, parent, {}, unjoined)
        if work.joined_ns:
            self._record_span(work, "plan", joined_ns, end_ns, parent, planned, error)

    def _record_span(
        self,
        work: Work,
        name: str,
        start_ns: int,
        end_ns: int,
        parent: SpanRef,
        attributes: Mapping[str, AttributeValue],
        error: str = "",
    ) -> SpanRef:
        work.last_ns = max(work.last_ns, end_ns)
        return self._telemetry.record_span(
            name,
            start_ns=start_ns,
            end_ns=end_ns,
            parent=parent,
            attributes={**work.scope.attributes(), **attributes},
            error=error,
        )

    def _end(self, work: Work) -> None:
        for stage, scope, rank, streamed in work.untold:
            self._telemetry.record_buckets(stage, scope, rank, streamed.merged(BUCKETS_TRACED))
        work.span.end(max(work.closed_ns, work.last_ns))
