"""What `weightbus watch` shows: a fleet at one moment. Does no I/O.

`FleetView` is what `weightbus watch --once --json` prints.
"""

from __future__ import annotations

from typing import Final, Literal

from msgspec import Struct

from weightbus.schemas.checkpoint import SkipCause
from weightbus.schemas.progress import EngineStatus

__all__ = (
    "LOST",
    "DeadLetterView",
    "EngineView",
    "FailureView",
    "FleetView",
    "RoundView",
    "SkippedView",
    "WatchedStatus",
)

WatchedStatus = EngineStatus | Literal["gone"]
"""`gone`: it has taken leave, or its heartbeat has stopped."""

LOST: Final = "lost"
"""Cause of a failure that the engine itself never told of: its leader gave it up."""


class EngineView(Struct, frozen=True, kw_only=True):
    """One engine, now."""

    model: str
    engine: str
    status: WatchedStatus
    version: int
    """The version it serves; -1: none."""
    target_version: int
    """The version it is moving to; -1: none."""
    lag: int | None
    """Newest version announced minus the version served; None: it serves none, or none is known."""
    ranks: int
    engine_kind: str
    update_s: float | None
    """Its last update, from receiving `CheckpointReady` to serving; None: none seen."""
    bytes: int
    """Moved by that update."""
    gb_per_s: float | None
    """`bytes` over `update_s`, in 10^9 bytes per second."""
    routes: tuple[str, ...]
    """Taken by that update."""
    verified: str | None
    """`verified` or `not_offered`; None: no update seen."""
    first_token_s: float | None = None
    """From serving that update's version to the first token made with it; None: none was told of,
    as when nobody has asked the engine for tokens."""


class RoundView(Struct, frozen=True, kw_only=True):
    """A round that its leader has not closed."""

    model: str
    round: str
    version: int
    epoch: int
    """Of the last plan; -1: none yet."""
    leader: str
    waiting: tuple[str, ...]
    """Engines that have not reported an end."""
    completed: tuple[str, ...]
    failed: tuple[str, ...]
    last_stage: str
    """The stage reported last, such as `b/1 reload`."""
    age_s: float
    """Since its first message, or its last plan."""
    overdue: bool
    """It is older than its plan allows."""


class FailureView(Struct, frozen=True, kw_only=True):
    """An update that failed."""

    model: str
    engine: str
    version: int
    round: str
    cause: str
    """Name of the error class; `lost`: the leader gave the engine up."""
    reason: str
    quarantined: bool
    failed_ns: int
    """When, in nanoseconds since the Unix epoch."""
    late: bool = False
    """It began when its round was over: the engine came too late to have a part in it."""


class SkippedView(Struct, frozen=True, kw_only=True):
    """A version that its trainer went on without."""

    model: str
    producer: str
    version: int
    cause: SkipCause
    reason: str
    ranks: tuple[int, ...]
    """Of the trainer, not heard of; often none."""
    skipped_ns: int


class DeadLetterView(Struct, frozen=True, kw_only=True):
    """What could not be read."""

    model: str
    subject: str
    reason: str
    reported_by: str
    reported_ns: int


class FleetView(Struct, frozen=True, kw_only=True):
    """A fleet at one moment."""

    newest: dict[str, int]
    """Model -> newest version announced."""
    engines: tuple[EngineView, ...]
    rounds: tuple[RoundView, ...]
    failures: tuple[FailureView, ...]
    """The last ones, the latest first."""
    dead_letters: tuple[DeadLetterView, ...]
    """The last ones, the latest first."""
    skipped: tuple[SkippedView, ...] = ()
    """The last ones, the latest first."""
