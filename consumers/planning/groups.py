"""The lanes of a broadcast: which rank of every host stages which part. Pure.

There are as many lanes as the host with most ranks has. Lane `l` of a host is staged by its rank
number `l % ranks`, its ranks in order of engine and rank: every rank stages one lane at least. The
hosts stand in order of their ids in every lane.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from typing import Final, NamedTuple

from weightbus.schemas.rounds import Group, Join, Member

__all__ = ("Groups", "lanes_of", "plan_groups", "plan_lanes")

HASH_CHARS: Final = 12
"""Of a group's id: hexadecimal digits of SHA-256 over its membership."""

Lanes = tuple[tuple[Member, ...], ...]
"""Of every lane, its member on each host."""


class Groups(NamedTuple):
    """The groups of a plan."""

    groups: tuple[Group, ...]
    """One for each lane."""
    ready: bool
    """All of them have met before."""


def plan_lanes(joins: Iterable[Join]) -> Lanes:
    """The lanes of a broadcast to all ranks of `joins`; none for no joins."""
    ranks: dict[str, list[Member]] = {}
    for join in joins:
        members = ranks.setdefault(join.host_id, [])
        members.extend(Member(join.engine, offer.rank) for offer in join.ranks)
    hosts = [sorted(ranks[host], key=_order) for host in sorted(ranks)]
    lanes = max(map(len, hosts), default=0)
    return tuple(tuple(host[lane % len(host)] for host in hosts) for lane in range(lanes))


def lanes_of(lanes: Lanes) -> dict[str, int]:
    """Engine id -> how many lanes its ranks stage."""
    counts: dict[str, int] = {}
    for lane in lanes:
        for member in lane:
            counts[member.engine] = counts.get(member.engine, 0) + 1
    return counts


def plan_groups(lanes: Lanes, joins: Mapping[str, Join], epoch: int) -> Groups:
    """The groups of a plan of `epoch`.

    A group that all its members are ready in is taken again: the latest, if there are several.
    After a group broke, none of its members is ready in any.

    Args:
        joins: engine id -> its join, for every engine of `lanes`.
    """
    groups, ready = [], True
    for number, members in enumerate(lanes):
        membership = _membership(number, members, joins)
        known = _ready_epoch(membership, members, joins)
        ready = ready and known is not None
        suffix = epoch if known is None else known
        rendezvous = joins[members[0].engine].rendezvous if len(members) > 1 else ""
        groups.append(Group(id=f"{membership}-{suffix}", members=members, rendezvous=rendezvous))
    return Groups(tuple(groups), ready)


def _order(member: Member) -> tuple[str, int]:
    return member.engine, member.rank


def _membership(lane: int, members: Sequence[Member], joins: Mapping[str, Join]) -> str:
    """Of the same processes in the same order, in the same lane: no token holds a space."""
    named = (f"{m.engine} {joins[m.engine].consumer} {m.rank}" for m in members)
    text = "\n".join((str(lane), *named))
    return hashlib.sha256(text.encode()).hexdigest()[:HASH_CHARS]


def _ready_epoch(
    membership: str, members: Sequence[Member], joins: Mapping[str, Join]
) -> int | None:
    """The latest epoch of a group of this membership that all members are ready in."""
    common: set[int] | None = None
    for engine in {member.engine for member in members}:
        join = joins[engine]
        ready = set() if join.broken_epoch else _epochs(membership, join.groups)
        common = ready if common is None else common & ready
        if not common:
            return None
    return max(common) if common else None


def _epochs(membership: str, groups: Iterable[str]) -> set[int]:
    found = set()
    for group in groups:
        prefix, _, suffix = group.partition("-")
        if prefix == membership and suffix.isdecimal() and group == f"{prefix}-{int(suffix)}":
            found.add(int(suffix))
    return found
