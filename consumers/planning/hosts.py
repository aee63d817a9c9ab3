"""One host's share of a broadcast: its lanes, who owns them, and who reads them. Pure.

Everything follows from the plan, so that all consumers of a host find the same names and numbers
without a word to each other.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

from weightbus.bus.blocks import STAGE_PREFIX
from weightbus.consumers.errors import PlanError
from weightbus.schemas.rounds import Group, Member, RoundPlan
from weightbus.schemas.shared_memory import MAX_READERS, TURN_BITS

__all__ = ("HostShare", "OwnedLane", "host_share", "turn_of")


@dataclass(frozen=True)
class OwnedLane:
    """A lane that one engine's consumer fills for its host."""

    number: int
    """Among all lanes of the plan."""
    rank: int
    """Of the engine: the host's member of the lane's group."""
    group: Group


@dataclass(frozen=True)
class HostShare:
    """What concerns one engine."""

    place: int
    """Of its host in every group."""
    names: tuple[str, ...]
    """Of the staging block of every lane of the host."""
    readers: tuple[Member, ...]
    """All ranks of the host that read them; their place here is their number."""
    owned: tuple[OwnedLane, ...]
    """By this engine's consumer; at least one."""


def host_share(plan: RoundPlan, engine: str) -> HostShare:
    """What a plan's broadcast means for the host of an engine.

    Raises:
        PlanError: the engine is in no group, or its host has too many ranks.
    """
    column = next((h for h, host in enumerate(_hosts(plan.groups)) if engine in _names(host)), None)
    if column is None:
        raise PlanError(f"broadcast of round {plan.round}", "without us", "must name our engine")
    host = {group.members[column] for group in plan.groups}
    readers = tuple(sorted(host, key=lambda member: (member.engine, member.rank)))
    if len(readers) > MAX_READERS:
        raise PlanError("readers of a host", len(readers), f"must be at most {MAX_READERS}")
    shape = f"{plan.bucket_bytes}x{plan.slots}"
    return HostShare(
        place=column,
        names=tuple(
            f"{STAGE_PREFIX}{plan.model}.{group.id}.{column}.{shape}" for group in plan.groups
        ),
        readers=readers,
        owned=tuple(
            OwnedLane(number, group.members[column].rank, group)
            for number, group in enumerate(plan.groups)
            if group.members[column].engine == engine
        ),
    )


def turn_of(plan: RoundPlan) -> int:
    """What tells the transfers of one group apart in the words of a staging block; never 0.

    Made of when the plan was made, too: epochs begin again where the bus has lost its streams. Two
    plans have the same turn once in 2**32 times.
    """
    said = f"{plan.round} {plan.epoch} {plan.created_ns}"
    digest = hashlib.sha256(said.encode()).digest()
    return int.from_bytes(digest[: TURN_BITS // 8], "little") or 1


def _hosts(groups: Sequence[Group]) -> list[list[Member]]:
    """Of every host, its members in all groups."""
    return [list(members) for members in zip(*(group.members for group in groups), strict=True)]


def _names(host: Sequence[Member]) -> set[str]:
    return {member.engine for member in host}
