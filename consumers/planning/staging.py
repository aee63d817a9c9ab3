"""How large the slots of staging are, and who has no room for them. Pure.

A lane holds `slots * bucket_bytes`. Staging of an engine lies in memory of its consumer, which says
how much of it may be taken for all its lanes together: the least figure of its ranks; 0 is any.
Engines of one host share its memory: together they take no more than the largest figure that one
of them names.

Lanes may lie in memory of GPUs instead, of each in that of the ranks that fill it. Of what is free
there they take a quarter at most, and never more than `DEVICE_BYTES`. Memory of the host they take
only where a consumer must fetch what their workers cannot read.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from typing import Final

from msgspec import Struct

from weightbus.schemas.rounds import Join, Member

__all__ = (
    "DEVICE_BYTES",
    "DEVICE_PART",
    "DEVICE_SLOTS",
    "MIB",
    "Memory",
    "StagingLimits",
    "StagingSize",
    "device_room",
    "fit_staging",
    "full_staging",
    "memory_of",
    "rooms",
    "short_of_memory",
)

MIB: Final = 2**20

DEVICE_PART: Final = 4
"""Of what is free on a GPU, lanes take one part in so many: groups need buffers, too, and an engine
what its next requests take."""
DEVICE_BYTES: Final = 384 * MIB
"""What lanes take of a GPU at most: two of full size, and half of the 768 MiB that a broadcast may
take there with the buffers of its groups."""
DEVICE_SLOTS: Final = 2
"""With fewer nothing overlaps: lanes then lie in memory of the host."""


class StagingLimits(Struct, frozen=True, kw_only=True):
    """How large slots may be."""

    bucket_bytes: int = 64 * MIB
    """At most, where there is room: a power of two."""
    min_bucket_bytes: int = MIB
    """A slot is never smaller: transfers would wait more than they move. A power of two."""
    buckets: int = 8
    """A version is cut into so many, if they are not smaller than that: few do not overlap."""
    slots: int = 3
    """Of a lane, where there is room: fetch, broadcast and reload have one each."""


class StagingSize(Struct, frozen=True, kw_only=True):
    """Of a lane."""

    bucket_bytes: int
    slots: int


class Memory(Struct, frozen=True):
    """Bytes that staging may take; who is not in it has any room."""

    engines: dict[str, int]
    hosts: dict[str, int]


def memory_of(joins: Collection[Join]) -> Memory:
    """What engines and their hosts have."""
    engines: dict[str, int] = {}
    hosts: dict[str, int] = {}
    for join in joins:
        named = min((offer.free_bytes for offer in join.ranks if offer.free_bytes), default=0)
        if named:
            engines[join.engine] = named
            hosts[join.host_id] = max(hosts.get(join.host_id, 0), named)
    boundless = {join.host_id for join in joins if join.engine not in engines}
    return Memory(engines, {host: free for host, free in hosts.items() if host not in boundless})


def rooms(
    memory: Memory, joins: Mapping[str, Join], lanes: Mapping[str, int]
) -> dict[str, int | None]:
    """Engine id -> bytes for each of its lanes, None: any; of all engines of `lanes`."""
    staged = _staged(joins, lanes)
    found: dict[str, int | None] = {}
    for engine, count in lanes.items():
        host = joins[engine].host_id
        shares = []
        if engine in memory.engines:
            shares.append(memory.engines[engine] // count)
        if host in memory.hosts:
            shares.append(memory.hosts[host] // staged[host])
        found[engine] = min(shares, default=None)
    return found


def device_room(joins: Collection[Join], lanes: Iterable[Iterable[Member]]) -> int:
    """Bytes for each lane of a broadcast on the GPUs of its members, of the tightest of them.

    Args:
        joins: of its members; who does not know what is free on its GPU has enough.
        lanes: as `plan_lanes`.
    """
    free = {
        Member(join.engine, offer.rank): offer.device_bytes
        for join in joins
        for offer in join.ranks
    }
    filled: dict[Member, int] = {}
    for lane in lanes:
        for member in lane:
            filled[member] = filled.get(member, 0) + 1
    rooms = [DEVICE_BYTES // max(filled.values(), default=1)]
    rooms += [free[m] // DEVICE_PART // count for m, count in filled.items() if free[m]]
    return min(rooms)


def full_staging(layout_bytes: int, lanes: int, limits: StagingLimits) -> StagingSize:
    """The slots of so many lanes if memory does not matter."""
    wanted = layout_bytes // max(1, lanes * limits.buckets)
    fitting = max(limits.min_bucket_bytes, min(limits.bucket_bytes, wanted))
    return StagingSize(bucket_bytes=_power_of_two(fitting), slots=limits.slots)


def fit_staging(room: int | None, full: StagingSize, min_bucket_bytes: int) -> StagingSize:
    """The slots of a lane that has so many bytes, `min_bucket_bytes` at least.

    All slots, if they may be of a quarter of the full size at least; else two; one, and no overlap,
    only if two of the least size do not fit.
    """
    most = full.bucket_bytes
    if room is None or room // full.slots >= most:
        return full
    for slots, least in (
        (full.slots, max(most // 4, min_bucket_bytes)),
        (min(2, full.slots), min_bucket_bytes),
    ):
        if room // slots >= least:
            size = min(most, _power_of_two(room // slots))
            return StagingSize(bucket_bytes=size, slots=slots)
    return StagingSize(bucket_bytes=min(most, _power_of_two(room)), slots=1)


def short_of_memory(
    memory: Memory, joins: Mapping[str, Join], lanes: Mapping[str, int], limits: StagingLimits
) -> dict[str, str]:
    """Engines without room for one slot of the least size in each of their lanes, and why.

    Of a host that has too little for all, the first engines in order of their ids have room.
    """
    least, short = limits.min_bucket_bytes, {}
    taken: dict[str, int] = {}
    for engine in sorted(lanes):
        count, host = lanes[engine], joins[engine].host_id
        own, shared = memory.engines.get(engine), memory.hosts.get(host)
        if own is not None and own < count * least:
            short[engine] = _shortage(own, f"{count} lane{'s' * (count > 1)}", least)
            continue
        wanted = taken.get(host, 0) + count
        if shared is not None and shared < wanted * least:
            of = f"the {wanted} lanes of host {host} up to its own"
            short[engine] = _shortage(shared, of, least)
            continue
        taken[host] = wanted
    return short


def _shortage(free: int, of: str, least: int) -> str:
    return f"staging may take {free} bytes for {of}, which need {least} each"


def _staged(joins: Mapping[str, Join], lanes: Mapping[str, int]) -> dict[str, int]:
    """Host -> lanes on it."""
    staged: dict[str, int] = {}
    for engine, count in lanes.items():
        host = joins[engine].host_id
        staged[host] = staged.get(host, 0) + count
    return staged


def _power_of_two(most: int) -> int:
    """The largest one that is not above `most`."""
    return 1 << (most.bit_length() - 1)
