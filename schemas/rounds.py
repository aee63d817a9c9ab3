"""What consumers say to each other while they negotiate one round. Does no I/O.

A round brings one version to the engines that are present. Its leader holds the round's lease; the
lease's `epoch` grows with every new leader and every new plan, and fences the old ones.
"""

from __future__ import annotations

from typing import Annotated, Literal

from msgspec import Meta, Struct

from weightbus.schemas.base import (
    INT64_MAX,
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
    "Links",
    "Member",
    "Proven",
    "RankOffer",
    "RankRoute",
    "RoundComplete",
    "RoundPlan",
)

Epoch = Annotated[int, Meta(ge=0, le=2**63 - 1)]
"""Sequence of a write in the stream of the rounds' leases."""
Rate = Annotated[int, Meta(ge=0, le=INT64_MAX)]
CommitPolicy = Literal["each", "together"]
"""`each`: an engine serves once its own proof holds. `together`: once the leader says so."""


class RankOffer(Struct, frozen=True, kw_only=True):
    """What one rank of an engine needs and can do."""

    rank: RankNumber
    device: Annotated[str, Meta(max_length=64)] = "cpu"
    needs_digest: ObjectDigest
    need_bytes: SizeBytes
    free_bytes: SizeBytes = 0
    """Memory that staging of all ranks of its engine may take on this host; 0: any."""
    device_bytes: SizeBytes = 0
    """What is free on its GPU; 0: not known, or it has none."""
    routes: Annotated[tuple[RouteName, ...], Meta(max_length=3)]
    """Routes this rank can take for this version, nearest first."""


Offers = Annotated[tuple[RankOffer, ...], Meta(min_length=1, max_length=4096)]


class Links(Struct, frozen=True, kw_only=True):
    """Rates of one host in bytes per second, as `weightbus doctor` measures them; 0: not known."""

    memory: Rate = 0
    """Mapped memory of the host -> parameters, all ranks together."""
    disk: Rate = 0
    """Files -> memory."""
    network: Rate = 0
    """One network card, one way."""
    broadcast: Rate = 0
    """One broadcast in a process group: what its receivers get."""
    p2p: Rate = 0
    """What the transfer engine of one process reads in all, or serves in all."""
    device: Rate = 0
    """Mapped memory of the host -> one GPU, by its copy engine; every GPU has a link of its own."""
    peer: Rate = 0
    """What one GPU reads of memory of the others of its host."""
    cards: Annotated[int, Meta(ge=1, le=1024)] = 1
    """Network cards that can be used side by side."""


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
    links: Links = Links()
    """What was measured on this host."""
    rendezvous: Annotated[str, Meta(max_length=512)] = ""
    """Where a group that this engine is the first member of meets; empty: it can be in none."""
    groups: Annotated[tuple[Token, ...], Meta(max_length=4096)] = ()
    """Ids of the groups that it is ready in: they need not be formed again."""
    checkpoint_ns: Nanoseconds = 0
    """`created_ns` of the `CheckpointReady`: tells a version published again from the first."""
    layout_digest: ObjectDigest | None = None
    """Of the layout that the version is cut by: only engines of the same one share a broadcast."""
    broken_epoch: Epoch = 0
    """Epoch of the last plan this engine ran, if its group broke; 0: it asks for its first plan."""
    joined_ns: Nanoseconds = 0


class Member(Struct, frozen=True, array_like=True):
    """One rank of one engine."""

    engine: Token
    rank: RankNumber


class Group(Struct, frozen=True, kw_only=True):
    """One lane of a broadcast: one rank of every host, in group-rank order.

    Every member stages the lane's part of each bucket for its host. The root of bucket `k` in group
    `g` is member `(k + g) % len(members)`: it fetches the part and broadcasts it to the others. The
    members of all groups are of the same hosts, in the same order; a host of few ranks has one rank
    in several groups. A group of one member, on a single host, only fetches.
    """

    id: Token
    """Of this membership: equal ids, in whatever plan, mean the same processes in this order."""
    members: Annotated[tuple[Member, ...], Meta(min_length=1, max_length=65_536)]
    rendezvous: Annotated[str, Meta(max_length=512)] = ""
    """Where the members meet, such as `tcp://host:port`, if they have not met before."""


class RankRoute(Struct, frozen=True, kw_only=True):
    """How one rank gets its bytes."""

    rank: RankNumber
    route: RouteName
    reason: Annotated[str, Meta(max_length=512)] = ""
    """Why this route, in a few words, for `weightbus trace`."""


class EngineRoute(Struct, frozen=True, kw_only=True):
    """The part of a plan that one engine runs. All its ranks take one route."""

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
    """The lanes of the plan's one broadcast, if there is one."""
    bucket_bytes: SizeBytes = 64 * 2**20
    """Of one slot of one lane of staging."""
    slots: Annotated[int, Meta(ge=1, le=16)] = 2
    """Slots of a lane; with one, fetch, broadcast and reload take turns."""
    device: bool = False
    """The slots lie in memory of the GPUs of the lanes' members, whose workers fill them."""
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
    """Of the last plan."""
    leader: Token
    """The engine whose consumer led the round."""
    completed: Annotated[tuple[Token, ...], Meta(max_length=4096)] = ()
    """Engines that serve the version."""
    failed: Annotated[dict[Token, Reason], Meta(max_length=4096)] = {}
    """Engine id -> why it does not serve the version."""
    layout_digest: ObjectDigest | None = None
    """Of the layout that the version has."""
    bytes: SizeBytes = 0
    """Bytes moved into parameters, over all engines."""
    engines: Count = 0
    """How many engines took part."""
    started_ns: Nanoseconds = 0
    """When the leader had its plan."""
    ended_ns: Nanoseconds = 0
    """When the leader closed it."""
    trace_id: Annotated[str, Meta(max_length=32)] = ""
    """Of the trace that tells it all; empty: none."""
