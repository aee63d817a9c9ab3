"""What a consumer remembers of the versions it works on: when they were heard of, spans, timings.

Owns the update spans that are open. Every stage that is recorded becomes a span and, through
`emit`, its twin on the bus.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass

import msgspec

from weightbus.consumers.update import Outcome, Prepared
from weightbus.schemas.base import Message, RouteName, Stage
from weightbus.schemas.catalogue import subject_of
from weightbus.schemas.checkpoint import CheckpointReady
from weightbus.tracing.context import SpanRef
from weightbus.tracing.telemetry import Emit, Span, StageScope, Telemetry

__all__ = ("Journal", "Work")

VERSIONS_REMEMBERED = 8
"""Checkpoints whose publish span is remembered; a publisher has two alive at most."""


@dataclass(frozen=True)
class _Heard:
    """How a checkpoint was heard of."""

    publish: SpanRef | None
    seen_ns: int
    """0: it was tried before, and what follows begins when it is tried again."""


@dataclass(kw_only=True)
class Work:
    """What belongs to one version while it is worked on."""

    scope: StageScope
    seen_ns: int
    """When the negotiation began: its `CheckpointReady` was heard, or the last attempt failed."""
    span: Span
    stack: ExitStack
    prepared: Prepared | None = None
    pause_start_ns: int = 0
    """When requests began to wait; 0: they do not."""


class Journal:
    """One entry for every version in hand."""

    def __init__(
        self,
        telemetry: Telemetry,
        emit: Emit,
        engine: str,
        prefix: str,
        now_ns: Callable[[], int],
    ) -> None:
        self._telemetry = telemetry
        self._emit = emit
        self._engine = engine
        self._prefix = prefix
        self._now_ns = now_ns
        self._heard: dict[int, _Heard] = {}
        self._works: dict[int, Work] = {}

    def hear(self, ready: CheckpointReady, headers: Mapping[str, str]) -> str:
        """Remember when, and within which publish span; returns its trace id, or ""."""
        publish = SpanRef.from_headers(headers)
        self._heard.setdefault(ready.version, _Heard(publish, self._now_ns()))
        for version in sorted(self._heard)[:-VERSIONS_REMEMBERED]:
            del self._heard[version]
        return publish.trace_id if publish else ""

    def open(self, ready: CheckpointReady, round: str) -> Work:
        """The entry of a version, and its span; kept if the version is tried again."""
        if (work := self._works.get(ready.version)) is not None:
            return work
        heard = self._heard.get(ready.version) or _Heard(None, self._now_ns())
        self._heard[ready.version] = _Heard(heard.publish, 0)
        scope = StageScope(ready.model, ready.version, round, self._engine)
        stack = ExitStack()
        span = stack.enter_context(
            self._telemetry.update_span(
                subject_of(ready, self._prefix), scope, parent=heard.publish
            )
        )
        work = Work(scope=scope, seen_ns=heard.seen_ns or self._now_ns(), span=span, stack=stack)
        self._works[ready.version] = work
        return work

    def find(self, version: int) -> Work | None:
        """The entry of a version that is in hand."""
        return self._works.get(version)

    def close(self, version: int) -> None:
        """Work on a version is over: end its span."""
        if (work := self._works.pop(version, None)) is not None:
            work.stack.close()

    def begin_round(self, work: Work, round: str) -> None:
        """A plan is in hand: `negotiate` has ended, and what follows belongs to its round."""
        work.scope = msgspec.structs.replace(work.scope, round=round)
        self.record(work, "negotiate", work.seen_ns, self._now_ns())

    def record(
        self,
        work: Work,
        stage: Stage,
        start_ns: int,
        end_ns: int,
        *,
        bytes: int = 0,
        rank: int | None = None,
        route: RouteName | None = None,
        error: str = "",
    ) -> None:
        """A stage has ended; `error` begins with the name of the error class."""
        self._telemetry.record_stage(
            self._emit,
            work.scope,
            stage,
            start_ns=start_ns,
            end_ns=end_ns,
            bytes=bytes,
            rank=rank,
            route=route,
            parent=work.span.ref,
            error=error,
        )

    def record_outcome(self, work: Work, outcome: Outcome) -> None:
        """The stages that were timed for each rank: by the route, then by its worker."""
        work.pause_start_ns = outcome.pause_start_ns
        for applied in outcome.applied:
            for timing in applied.stages:
                self.record(
                    work,
                    timing.stage,
                    timing.start_ns,
                    timing.end_ns,
                    bytes=timing.bytes,
                    rank=applied.rank,
                    route=outcome.route,
                )

    def headers_for(self, message: Message) -> Mapping[str, str]:
        """Headers that put a message into the trace of its version."""
        work = self._works.get(getattr(message, "version", -1))
        return work.span.ref.headers() if work is not None else {}
