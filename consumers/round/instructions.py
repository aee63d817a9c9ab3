"""What a round machine wants done: its only output. Does no I/O.

The driver executes the instructions of one `handle` call in their order, without waiting for the
long ones (`Prepare`, `Transfer`, `Resume`, `Campaign`): those run as tasks whose results come back
as events. At most one of `Prepare`, `Transfer` and `Resume` is under way at any time; a `Prepare`
that is being cancelled has let go of the engine before the next one begins.

Points in time are nanoseconds of the clock whose readings the driver passes to `handle`.
"""

from __future__ import annotations

from msgspec import Struct

from weightbus.schemas.base import Message
from weightbus.schemas.checkpoint import CheckpointReady
from weightbus.schemas.progress import EngineStatus
from weightbus.schemas.rounds import RoundPlan

__all__ = (
    "Prepare",
    "CancelPrepare",
    "Campaign",
    "Renew",
    "ReleaseRound",
    "Send",
    "Transfer",
    "CancelTransfer",
    "Resume",
    "SetState",
    "ReleaseReader",
    "SetTimer",
    "CancelTimer",
    "Instruction",
)


class Prepare(Struct, frozen=True):
    """Get everything that can be got before a plan: reader lease (first), layout, needs, reachable
    routes, and the last plan of the round `round` from the stream. Serving goes on.

    Answered by `Prepared` or `PrepareFailed`. The reader lease is renewed until `ReleaseReader`.
    """

    token: int
    ready: CheckpointReady
    round: str
    """The version's main round."""
    deadline_ns: int


class CancelPrepare(Struct, frozen=True):
    """Nobody needs the answer. Work that another version of the same layout shares may go on."""

    token: int


class Campaign(Struct, frozen=True):
    """Create the round's lease, or write it anew if this process holds it; its TTL starts again.

    Answered by `LeaseWon` or `LeaseHeld`; not at all if the bus cannot be reached.
    """

    round: str


class Renew(Struct, frozen=True):
    """Keep a lease that was won. Answered by `LeaseLost` if it is not ours any more."""

    round: str


class ReleaseRound(Struct, frozen=True):
    """Give the lease up, if this process holds it."""

    round: str


class Send(Struct, frozen=True):
    """Publish a message; its subject comes from the catalogue."""

    message: Message


class Transfer(Struct, frozen=True):
    """Run this engine's part of the plan: pause as late as can be, move, prove by the digest.

    Answered by `TransferDone` or `TransferFailed`.
    """

    token: int
    plan: RoundPlan
    ready: CheckpointReady
    late: bool
    """True: a round of this engine alone."""
    deadline_ns: int


class CancelTransfer(Struct, frozen=True):
    """End the transfer. Answered like `Transfer`: by `TransferDone` if it came too late."""

    token: int


class Resume(Struct, frozen=True):
    """Let the engine serve the version it now holds. Answered by `Resumed` or `ResumeFailed`."""

    token: int
    version: int
    deadline_ns: int


class SetState(Struct, frozen=True):
    """Put the engine's state now, and with every heartbeat from now on."""

    status: EngineStatus
    version: int
    target_version: int


class ReleaseReader(Struct, frozen=True):
    """Work on this version is over: drop its reader lease, close its sources, end its spans."""

    version: int


class SetTimer(Struct, frozen=True):
    """Feed `TimerFired(name, token)` at `at_ns`; replaces the timer of the same name."""

    name: str
    token: int
    at_ns: int


class CancelTimer(Struct, frozen=True):
    """Forget a timer."""

    name: str


Instruction = (
    Prepare
    | CancelPrepare
    | Campaign
    | Renew
    | ReleaseRound
    | Send
    | Transfer
    | CancelTransfer
    | Resume
    | SetState
    | ReleaseReader
    | SetTimer
    | CancelTimer
)
