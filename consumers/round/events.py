"""What happens to a consumer: the only input of its round machine. Does no I/O.

The driver makes one event of everything it hears on the bus, of every answer to an instruction and
of every timer, and feeds them in the order in which they happened.

- Every `Prepare`, `Transfer` and `Resume` is answered exactly once, by its deadline, with the event
  that carries its `token`; a cancelled `Prepare` may stay unanswered.
- What is heard on the bus may come late, twice, in any order, or never, and own messages may come
  back. After a reconnect the driver reads the last `CheckpointReady` and the last `RoundPlan` of
  the round in hand from the streams and feeds them as if they had just come.
"""

from __future__ import annotations

from msgspec import Struct

from weightbus.consumers.round.config import Origin
from weightbus.schemas.base import RouteName, Stage
from weightbus.schemas.checkpoint import CheckpointReady
from weightbus.schemas.progress import EngineState, UpdateComplete, UpdateFailed, Verified
from weightbus.schemas.rounds import (
    Abort,
    Commit,
    Join,
    Proven,
    RankOffer,
    RoundComplete,
    RoundPlan,
)

__all__ = (
    "Started",
    "CheckpointSeen",
    "CheckpointGone",
    "Prepared",
    "PrepareFailed",
    "LeaseWon",
    "LeaseHeld",
    "LeaseLost",
    "JoinSeen",
    "PlanSeen",
    "WentAlone",
    "ProvenSeen",
    "CommitSeen",
    "AbortSeen",
    "RoundCompleteSeen",
    "UpdateSeen",
    "EngineSeen",
    "EngineGone",
    "EngineLost",
    "EngineServes",
    "TransferDone",
    "TransferFailed",
    "Resumed",
    "ResumeFailed",
    "TimerFired",
    "Stop",
    "Event",
)


class Started(Struct, frozen=True):
    """The first event: what the engine, which may have outlived an earlier consumer, holds."""

    served_version: int
    """The version it serves, or served last; -1: none."""
    touched: bool
    """True: its parameters may be a mix, or are whole but not proven: it is paused, and stays so
    until an update ends whole. An engine that is paused but was not written to is resumed by the
    driver before it feeds this."""


class CheckpointSeen(Struct, frozen=True):
    """A version can be read."""

    ready: CheckpointReady
    trace_id: str = ""
    """Of the publish span: goes into the reports of this version."""


class CheckpointGone(Struct, frozen=True):
    """A version can no longer be read (`CheckpointRetired`)."""

    version: int
    reason: str = ""
    producer: str = ""
    """Whose version it is: another producer's of the same number stays. Empty: whoever's."""


class Prepared(Struct, frozen=True):
    """`Prepare` is done: layout and needs are known, routes checked, the reader lease is held."""

    token: int
    offers: tuple[RankOffer, ...]
    """Of every rank, in rank order."""
    planned: RoundPlan | None = None
    """The last plan of the version's main round that the stream holds."""
    layout_digest: str | None = None
    rendezvous: str = ""
    """Where a group meets that this engine is the first member of; empty: it can be in none."""
    groups: tuple[str, ...] = ()
    """Ids of the groups that this consumer is ready in."""
    origin: Origin = Origin()
    """Where the version comes from."""


class PrepareFailed(Struct, frozen=True):
    """`Prepare` could not be done; the engine is as it was."""

    token: int
    cause: str
    """Name of the error class."""
    reason: str
    """The error's message."""


class LeaseWon(Struct, frozen=True):
    """`Campaign`: this consumer process holds the round's lease, until `LeaseLost`."""

    round: str
    epoch: int
    """The lease's revision in the store: greater than in every earlier `LeaseWon` of this round, on
    any consumer and on this one. It is what makes two leaders of one epoch impossible."""


class LeaseHeld(Struct, frozen=True):
    """`Campaign`: someone else holds it (also an earlier process of this same consumer)."""

    round: str
    leader: str
    """Engine id of the holder."""


class LeaseLost(Struct, frozen=True):
    """A lease that was won could not be renewed: it has expired or is someone else's."""

    round: str


class JoinSeen(Struct, frozen=True):
    join: Join


class PlanSeen(Struct, frozen=True):
    plan: RoundPlan


class WentAlone(Struct, frozen=True):
    """An engine brings itself a version in a round of its own: what the plan of such a round means
    to the version's main round. Made by the machine itself; the driver never feeds it."""

    engine: str
    version: int


class ProvenSeen(Struct, frozen=True):
    proven: Proven


class CommitSeen(Struct, frozen=True):
    commit: Commit


class AbortSeen(Struct, frozen=True):
    abort: Abort


class RoundCompleteSeen(Struct, frozen=True):
    complete: RoundComplete


class UpdateSeen(Struct, frozen=True):
    update: UpdateComplete | UpdateFailed


class EngineSeen(Struct, frozen=True):
    """Presence: an engine's state, on every change of status, version, target or consumer."""

    state: EngineState


class EngineGone(Struct, frozen=True):
    """Presence: an engine's key has expired or was dropped."""

    engine: str


class EngineLost(Struct, frozen=True):
    """The engine beside this consumer has lost what it served: its workers were started anew, or it
    is gone. Not fed for what a transfer or a resume under way will tell itself."""

    reason: str = ""


class EngineServes(Struct, frozen=True):
    """The engine was asked, and serves `version`: it is neither paused nor touched. Undoes an
    `EngineLost` that was wrong, and a `Resume` that only seemed to fail: its `UpdateComplete` is
    said then. It was asked after the last answer to a `Transfer` or `Resume`, and answered before
    the next."""

    version: int


class TransferDone(Struct, frozen=True):
    """`Transfer`: every rank holds the version, whole and proven; the engine is still paused."""

    token: int
    verified: Verified
    routes: tuple[RouteName, ...]
    """The routes taken, each once."""
    bytes: int = 0
    """Bytes written into parameters, over all ranks."""
    weights_digest: str | None = None
    direct_parameters: int = 0
    processed_parameters: int = 0
    reason: str = ""
    """Why the engine's own loader was taken, if it was."""


class TransferFailed(Struct, frozen=True):
    """`Transfer` failed or was cancelled, and nothing writes to the parameters any more."""

    token: int
    cause: str
    """Name of the error class; `TransferCancelled` after `CancelTransfer`."""
    reason: str
    touched: bool
    """True: a live parameter may have been written; the engine is paused. False: none was, and the
    engine does what it did before the transfer: the driver has undone its pause."""
    stage: Stage | None = None
    """Where it failed."""


class Resumed(Struct, frozen=True):
    """`Resume`: the engine serves the version."""

    token: int
    paused_s: float = 0.0
    """How long requests waited, from pause to resume."""


class ResumeFailed(Struct, frozen=True):
    """`Resume` failed: the engine may serve the version, or not."""

    token: int
    cause: str
    reason: str
    paused_s: float = 0.0
    """How long requests have waited, from pause until now."""


class TimerFired(Struct, frozen=True):
    """A timer of `SetTimer`; one that was replaced or cancelled is ignored by its token."""

    name: str
    token: int


class Stop(Struct, frozen=True):
    """The service ends. The driver feeds on until `RoundMachine.stopped`."""


Event = (
    Started
    | CheckpointSeen
    | CheckpointGone
    | Prepared
    | PrepareFailed
    | LeaseWon
    | LeaseHeld
    | LeaseLost
    | JoinSeen
    | PlanSeen
    | WentAlone
    | ProvenSeen
    | CommitSeen
    | AbortSeen
    | RoundCompleteSeen
    | UpdateSeen
    | EngineSeen
    | EngineGone
    | EngineLost
    | EngineServes
    | TransferDone
    | TransferFailed
    | Resumed
    | ResumeFailed
    | TimerFired
    | Stop
)
