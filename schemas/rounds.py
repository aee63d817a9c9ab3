"""What consumers say to each other while they negotiate one round. Does no I/O.

A round brings one version to the engines that are present. Its leader holds the round's lease; the
lease's `epoch` grows with every new leader and every new plan, and fences the old ones.
"""

from __future__ import annotations

from typing import Annotated, Literal

from msgspec import Meta, Struct

from weightbus.schemas.base import (
    Count,
    Message,
    Nanoseconds,
    ObjectDigest,
    RankNumber,
    Reason,
    RouteName,
    Seconds,
    SizeBytes,
    Token,
    Version,
)
from weightbus.schemas.placement import HostId

__all__ = (
    "Abort",
    "Budgets",
    "Commit",
    "CommitPolicy",
    "EngineRoute",
    "Epoch",
    "Group",
    "Join",
    "Member",
    "Proven",
    "RankOffer",
    "RankRoute",
    "RoundComplete",
    "RoundPlan",
)

Epoch = Annotated[int, Meta(ge=0, le=2**63 - 1)]
"""Sequence of a write in the stream of the rounds' leases."""
CommitPolicy = Literal["each", "together"]
"""`each`: an engine serves once its own proof holds. `together`: once the leader says so."""


class RankOffer(Struct, frozen=True, kw_only=True):
    """What one rank of an engine needs and can do."""

    rank: RankNumber
    device: Annotated[str, Meta(max_length=64)] = "cpu"
    needs_digest: ObjectDigest
    need_bytes: SizeBytes
    free_bytes: SizeBytes = 0
    """Memory that staging may take on the rank's device."""
    routes: Annotated[tuple[RouteName, ...], Meta(max_length=3)]
    """Routes this rank can take for this version, nearest first."""


Offers = Annotated[tuple[RankOffer, ...], Meta(min_length=1, max_length=4096)]


class Join(Message, frozen=True, kw_only=True):
    """An engine wants to take part in a round. Repeated until a plan comes; the last one counts."""

    model: Token
    version: Version
    round: Token
    engine: Token
    consumer: Token
    """Instance id of the consumer process: a restarted consumer is another one."""
    host_id: HostId
    ranks: Offers
    served_version: Annotated[int, Meta(ge=-1)] = -1
    """What the engine serves now; -1: nothing yet."""
    checkpoint_ns: Nanoseconds = 0
    """`created_ns` of the `CheckpointReady`: tells a version published again from the first."""
    broken_epoch: Epoch = 0
    """Epoch of the last plan this engine ran, if its group broke; 0: it asks for its first plan."""
    joined_ns: Nanoseconds = 0


class Member(Struct, frozen=True, array_like=True):
    """One rank of one engine."""

    engine: Token
    rank: RankNumber


class Group(Struct, frozen=True, kw_only=True):
    """Ranks that exchange bytes with each other, in group-rank order."""

    members: Annotated[tuple[Member, ...], Meta(min_length=2, max_length=65_536)]
    rendezvous: Annotated[str, Meta(max_length=512)] = ""
    """Where the members meet, such as `tcp://host:port`."""


class RankRoute(Struct, frozen=True, kw_only=True):
    """How one rank gets its bytes."""

    rank: RankNumber
    route: RouteName
    group: Annotated[int, Meta(ge=0)] | None = None
    """Index into `RoundPlan.groups` for `broadcast`."""
    reason: Annotated[str, Meta(max_length=512)] = ""
    """Why this route, in a few words, for `weightbus trace`."""


class EngineRoute(Struct, frozen=True, kw_only=True):
    """The part of a plan that one engine runs."""

    engine: Token
    ranks: Annotated[tuple[RankRoute, ...], Meta(min_length=1, max_length=4096)]


class Budgets(Struct, frozen=True, kw_only=True):
    """Deadline of each stage, in seconds from its start. Nothing waits without one."""

    prepare_s: Seconds = 30.0
    """Layout fetched, needs described, sources opened."""
    transfer_s: Seconds = 120.0
    """From the first byte moved to the last rank's proof: pause, fetch, h2d, broadcast, reload."""
    commit_s: Seconds = 10.0
    """From an engine's own proof to serving: waiting for `Commit` (`together`), and resuming."""
    round_s: Seconds = 180.0
    """From the plan to `RoundComplete`; who has not reported by then is lost."""


class RoundPlan(Message, frozen=True, kw_only=True):
    """The leader's decision; every consumer runs the part that names its engine."""

    model: Token
    version: Version
    round: Token
    epoch: Epoch
    leader: Token
    """Engine id of the leader."""
    engines: Annotated[tuple[EngineRoute, ...], Meta(min_length=1, max_length=4096)]
    groups: Annotated[tuple[Group, ...], Meta(max_length=4096)] = ()
    bucket_bytes: SizeBytes = 256 * 2**20
    budgets: Budgets = Budgets()
    commit: CommitPolicy = "each"
    checkpoint_ns: Nanoseconds = 0
    """`created_ns` of the `CheckpointReady` that this plan brings."""
    created_ns: Nanoseconds = 0


class Proven(Message, frozen=True, kw_only=True):
    """Under `together`: this engine holds the version, whole and proven, and waits for `Commit`.

    Repeated until `Commit` comes or the wait's budget runs out; then it serves the version alone.
    """

    model: Token
    version: Version
    round: Token
    epoch: Epoch
    engine: Token


class Commit(Message, frozen=True, kw_only=True):
    """Under `together`: every engine still in the round has its proof; serve the version now."""

    model: Token
    version: Version
    round: Token
    epoch: Epoch


class Abort(Message, frozen=True, kw_only=True):
    """This epoch's groups are broken; who has not finished waits for the plan of a later epoch."""

    model: Token
    version: Version
    round: Token
    epoch: Epoch
    lost: Annotated[tuple[Token, ...], Meta(max_length=4096)] = ()
    """Engines that are gone."""
    reason: Reason = ""


class RoundComplete(Message, frozen=True, kw_only=True):
    """The leader's closing word on a round."""

    model: Token
    version: Version
    round: Token
    epoch: Epoch
    leader: Token
    completed: Annotated[tuple[Token, ...], Meta(max_length=4096)] = ()
    failed: Annotated[dict[Token, Reason], Meta(max_length=4096)] = {}
    """Engine id -> why it does not serve the version."""
    layout_digest: ObjectDigest | None = None
    bytes: SizeBytes = 0
    """Bytes moved into parameters, over all engines."""
    engines: Count = 0
    started_ns: Nanoseconds = 0
    ended_ns: Nanoseconds = 0
    trace_id: Annotated[str, Meta(max_length=32)] = ""
