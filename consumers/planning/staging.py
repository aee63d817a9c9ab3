"""How large the slots of staging are, and who has no room for them. Pure.

A lane holds `slots * bucket_bytes`; a rank stages one lane or several. Ranks whose device is `cpu`
stage in their host's memory and share it, whatever engine they belong to; any other rank has its
device to itself. Of what is free, staging takes a stated share. A rank that names no figure (0)
has any room.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Final

from msgspec import Struct

from weightbus.schemas.rounds import Join, Member

__all__ = ("MIB", "Staging", "StagingLimits", "plan_staging", "short_of_memory")

MIB: Final = 2**20


class StagingLimits(Struct, frozen=True, kw_only=True):
    """What staging may take."""

    bucket_bytes: int = 64 * MIB
    """Of a slot, if every lane has room for it: a power of two."""
    min_bucket_bytes: int = MIB
    """A slot is never smaller: transfers would wait more than they move. A power of two."""
    share: float = 0.5
    """Of a device's free memory."""


class Staging(Struct, frozen=True, kw_only=True):
    """Of every lane of a plan."""

    bucket_bytes: int
    slots: int


class _Pool(Struct):
    """Memory that some ranks share."""

    engines: set[str]
    lanes: int = 0
    free_bytes: int = 0
    """The least that one of them names; 0: none does."""


def plan_staging(
    joins: Iterable[Join], lanes: Mapping[Member, int], limits: StagingLimits
) -> Staging:
    """The slots that fit into every pool.

    Three slots, so that fetch, broadcast and reload each have one, if they may be of a quarter of
    the full size at least; else two; one, and no overlap, only if two of the least size do not fit.

    Args:
        lanes: rank -> how many lanes it stages; ranks that stage none may be left out. None of
            their engines is `short_of_memory`.
    """
    room = min(
        (_room(pool, limits) for pool in _pools(joins, lanes).values() if pool.free_bytes),
        default=None,
    )
    full = limits.bucket_bytes
    if room is None:
        return Staging(bucket_bytes=full, slots=3)
    for slots, least in (
        (3, max(full // 4, limits.min_bucket_bytes)),
        (2, limits.min_bucket_bytes),
    ):
        if room // slots >= least:
            return Staging(bucket_bytes=min(full, _power_of_two(room // slots)), slots=slots)
    return Staging(bucket_bytes=min(full, _power_of_two(room)), slots=1)


def short_of_memory(
    joins: Iterable[Join], lanes: Mapping[Member, int], limits: StagingLimits
) -> list[tuple[tuple[str, ...], str]]:
    """The pools that do not hold one slot of the least size for each of their lanes: the engines
    that share it, and why."""
    return [
        (
            tuple(sorted(pool.engines)),
            f"staging may take {int(pool.free_bytes * limits.share)} bytes of {name} for "
            f"{pool.lanes} lanes, which need {limits.min_bucket_bytes} each",
        )
        for name, pool in sorted(_pools(joins, lanes).items())
        if pool.free_bytes and _room(pool, limits) < limits.min_bucket_bytes
    ]


def _pools(joins: Iterable[Join], lanes: Mapping[Member, int]) -> dict[str, _Pool]:
    pools: dict[str, _Pool] = {}
    for join in joins:
        for offer in join.ranks:
            staged = lanes.get(Member(join.engine, offer.rank), 0)
            if not staged:
                continue
            shared = offer.device == "cpu"
            name = f"host {join.host_id}" if shared else f"rank {offer.rank} of {join.engine}"
            pool = pools.setdefault(name, _Pool(set()))
            pool.engines.add(join.engine)
            pool.lanes += staged
            if offer.free_bytes:
                pool.free_bytes = min(pool.free_bytes or offer.free_bytes, offer.free_bytes)
    return pools


def _room(pool: _Pool, limits: StagingLimits) -> int:
    """Bytes for each lane."""
    return int(pool.free_bytes * limits.share) // pool.lanes


def _power_of_two(most: int) -> int:
    """The largest one that is not above `most`."""
    return 1 << (most.bit_length() - 1)
