"""Engines that could read in place and could share a broadcast instead, and with whom. Pure.

*Replicas* are engines of one host, all their ranks on GPUs, that read the same memory of it: each
all that it needs by its own links, or together, by all their links, every byte once.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Final

from weightbus.consumers.planning.sharing import agreeing, is_on_gpus, offers
from weightbus.schemas.rounds import Join

__all__ = ("find_replicas", "replica_sets")

MAX_HOSTS: Final = 12
"""Hosts whose replicas alone are looked at: those whose ranks need most."""


def find_replicas(joins: Mapping[str, Join], barred: Collection[str]) -> dict[str, tuple[str, ...]]:
    """The engines of every host that read its memory in place, and could share that instead.

    Whose group broke reads in place: the round is not put at risk twice.

    Returns:
        Host -> two engines at least. Whether sharing is worth it is another question.
    """
    hosts: dict[str, dict[str, Join]] = {}
    for engine, join in joins.items():
        able = offers(join, "local") and offers(join, "broadcast") and is_on_gpus(join)
        if able and engine not in barred and not join.broken_epoch:
            hosts.setdefault(join.host_id, {})[engine] = join
    shared = {host: agreeing(able).engines for host, able in hosts.items()}
    return {host: replicas for host, replicas in shared.items() if replicas}


def replica_sets(
    joins: Mapping[str, Join], replicas: Mapping[str, Collection[str]], barred: Collection[str]
) -> list[tuple[str, ...]]:
    """Who could broadcast together with replicas: those of one host, of all hosts, and all.

    A plan has one broadcast: that of one host's replicas leaves none to the others.

    Args:
        joins: engine id -> its join.
        replicas: as `find_replicas`.
        barred: engines that must not take part.
    """
    if not replicas:
        return []
    near = {engine for engines in replicas.values() for engine in engines}
    needs: dict[str, int] = {}
    for join in map(joins.__getitem__, near):
        need = max(offer.need_bytes for offer in join.ranks)
        needs[join.host_id] = max(needs.get(join.host_id, 0), need)
    first = sorted(needs, key=lambda host: (-needs[host], host))[:MAX_HOSTS]
    far = {
        engine
        for engine, join in joins.items()
        if engine not in barred and offers(join, "broadcast") and not offers(join, "local")
    }
    wanted = [set(replicas[host]) for host in first] + [near, near | far]
    sets = [agreeing({e: join for e, join in joins.items() if e in engines}) for engines in wanted]
    return [engines for engines in dict.fromkeys(sharing.engines for sharing in sets) if engines]
