"""Which engines could share one broadcast, and why the others could not. Pure.

Who can read every segment in place depends on nobody, and shares none; but for replicas
(`replicas.py`).
"""

from __future__ import annotations

import ipaddress
from collections.abc import Collection, Mapping
from typing import NamedTuple
from urllib.parse import urlsplit

from weightbus.schemas.base import RouteName
from weightbus.schemas.rounds import Join
from weightbus.schemas.shared_memory import MAX_READERS

__all__ = ("Sharing", "agreeing", "find_sharers", "is_on_gpus", "offers")


class Sharing(NamedTuple):
    """Who could take a broadcast together."""

    engines: tuple[str, ...]
    """Two at least, or none."""
    apart: dict[str, str]
    """Every other engine -> why not."""


def offers(join: Join, route: RouteName) -> bool:
    """Whether all ranks of an engine offer a route."""
    return all(route in offer.routes for offer in join.ranks)


def is_on_gpus(join: Join) -> bool:
    """Whether all ranks of an engine are on GPUs."""
    return _kind(join) == "cuda"


def find_sharers(joins: Mapping[str, Join], barred: Mapping[str, str]) -> Sharing:
    """
    Args:
        joins: engine id -> its join.
        barred: engines that must not take part, and why.
    """
    left = {engine: join for engine, join in joins.items() if engine not in barred}
    apart = {**barred, **_without_offer(left)}
    left = {engine: join for engine, join in left.items() if engine not in apart}
    sharing = agreeing(left)
    return Sharing(sharing.engines, apart | sharing.apart)


def agreeing(joins: Mapping[str, Join]) -> Sharing:
    """Of engines that may all take a broadcast, those that could take it together."""
    apart: dict[str, str] = {}
    left = dict(joins)
    for find in (
        _of_another_layout,
        _of_another_kind,
        _of_too_many_readers,
        _without_meeting,
    ):
        unfit = find(left)
        apart |= unfit
        left = {engine: join for engine, join in left.items() if engine not in unfit}
    if len(left) < 2:
        apart |= dict.fromkeys(left, "no other engine could share a broadcast")
        left = {}
    return Sharing(tuple(left), apart)


Unfit = dict[str, str]


def _without_offer(joins: Mapping[str, Join]) -> Unfit:
    unfit = {}
    for engine, join in joins.items():
        if offers(join, "local"):
            unfit[engine] = "its host can read every segment"
        elif not offers(join, "broadcast"):
            unfit[engine] = "it offers no broadcast"
    return unfit


def _of_another_layout(joins: Mapping[str, Join]) -> Unfit:
    """Members of a group cut the same layout into the same parts: that which most were given."""
    counts: dict[str, int] = {}
    for join in joins.values():
        digest = join.layout_digest or ""
        counts[digest] = counts.get(digest, 0) + 1
    most = max(counts, key=lambda digest: (counts[digest], digest), default="")
    return {
        engine: "it was given another layout of this version than those who share a broadcast"
        for engine, join in joins.items()
        if (join.layout_digest or "") != most
    }


def _of_another_kind(joins: Mapping[str, Join]) -> Unfit:
    """Groups are of one kind of device: of that which most engines have."""
    kinds = {engine: _kind(join) for engine, join in joins.items()}
    counts: dict[str, int] = {}
    for kind in kinds.values():
        counts[kind] = counts.get(kind, 0) + 1
    most = max(counts, key=lambda kind: (counts[kind], kind), default="")
    return {
        engine: f"its device is {kind}, and that of those who share a broadcast {most}"
        for engine, kind in kinds.items()
        if kind != most
    }


def _of_too_many_readers(joins: Mapping[str, Join]) -> Unfit:
    ranks: dict[str, int] = {}
    for join in joins.values():
        ranks[join.host_id] = ranks.get(join.host_id, 0) + len(join.ranks)
    return {
        engine: f"its host has {ranks[join.host_id]} ranks, and a lane {MAX_READERS} readers"
        for engine, join in joins.items()
        if ranks[join.host_id] > MAX_READERS
    }


def _without_meeting(joins: Mapping[str, Join]) -> Unfit:
    """Engines of one host need not meet; virtual hosts of one machine meet by loopback."""
    if _hosts(joins.values()) < 2:
        return {}
    unfit = {
        engine: "no group can meet at it" for engine, join in joins.items() if not join.rendezvous
    }
    near = {engine for engine, join in joins.items() if _is_loopback(join.rendezvous)}
    if len(near) + len(unfit) < len(joins):
        unfit |= dict.fromkeys(near, "its address is loopback, and others are of other machines")
    return unfit


def _hosts(joins: Collection[Join]) -> int:
    return len({join.host_id for join in joins})


def _kind(join: Join) -> str:
    return "+".join(sorted({offer.device.partition(":")[0] for offer in join.ranks}))


def _is_loopback(rendezvous: str) -> bool:
    try:
        host = urlsplit(rendezvous).hostname or ""
    except ValueError:
        return False
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
